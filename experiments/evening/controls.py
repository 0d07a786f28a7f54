"""What the evening's evaluation models do not know: their figures on texts that were spoilt on purpose.

    python experiments/evening/controls.py --data DIR MODEL [MODEL ...]

MODEL is a run folder, a checkpoint or a model folder of stage 2.2. Each chooses among ten responses of the
validation split (`selection_figures`): as they are; with the responses of other contexts, where only a leak
could still find the "true" one; with the words of every turn in random order; with contexts cut to their last
turn. Prints a table and, with --json, writes the figures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from plato2.data.selection import CANDIDATES, Selection, read_selection
from plato2.data.tokenizer import BOS_ID, EOS_ID
from plato2.talk.selection import CHANCE, overlap_figures, selection_figures
from plato2.weights.folder import load_evaluation


def shuffled_words(text: list[int], rng: np.random.Generator) -> list[int]:
    """The words between special tokens in random order."""
    ids = np.array(text)
    ends = np.flatnonzero((ids == BOS_ID) | (ids == EOS_ID))
    for first, last in zip(ends[:-1] + 1, ends[1:], strict=True):
        ids[first:last] = rng.permutation(ids[first:last])
    return ids.tolist()


def last_turn(context: list[int]) -> list[int]:
    """[CLS] and the last turn."""
    turns = "".join("|" if token == EOS_ID else "." for token in context[1:])
    start = turns.rstrip("|").rfind("|") + 1
    return [context[0], *context[1 + start :]]


def controls(chosen: Selection) -> dict[str, Selection]:
    """The same selection, spoilt in several ways."""
    rng = np.random.default_rng(0)
    others = np.roll(np.arange(len(chosen.responses)), CANDIDATES)  # of other groups

    def shuffle(texts: list[list[int]]) -> list[list[int]]:
        return [shuffled_words(text, rng) for text in texts]

    return {
        "as they are": chosen,
        "responses of other contexts": replace(chosen, responses=[chosen.responses[i] for i in others]),
        "words shuffled": replace(
            chosen, contexts=shuffle(chosen.contexts), responses=shuffle(chosen.responses)
        ),
        "words of the context shuffled": replace(chosen, contexts=shuffle(chosen.contexts)),
        "last turn alone": replace(chosen, contexts=[*map(last_turn, chosen.contexts)]),
    }


def main() -> None:
    """Measures every model on every control."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True, help="the prepared corpus")
    parser.add_argument("--n", type=int, default=600, help="contexts")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    chosen = read_selection(given.data, given.n)
    found: dict[str, dict[str, dict[str, float]]] = {
        "chance": {"": CHANCE},
        "shared words": {"as they are": overlap_figures(chosen)},
    }
    for model in given.models:
        network = load_evaluation(model)
        found[model] = {name: selection_figures(network, spoilt) for name, spoilt in controls(chosen).items()}
    table = Table(title=f"{len(chosen.contexts)} contexts of the validation split")
    for column in ("model", "texts", "pair accuracy", "P@1 of 10", "P@1, lengths matched"):
        table.add_column(column, justify="left" if column in ("model", "texts") else "right")
    for model, rows in found.items():
        for name, row in rows.items():
            table.add_row(
                model,
                name,
                *(f"{row[key]:.3f}" for key in ("pair_acc", "p1")),
                f"{row.get('p1_matched', row['p1']):.3f}",
            )
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps({"n": len(chosen.contexts), "models": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
