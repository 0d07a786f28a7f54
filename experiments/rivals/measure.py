"""Figures of what the rows said, their differences over the same contexts, and where all of it is recorded.

`results.json` has for each budget its seeds, their means, and the differences of DIFFERENCES.
`scores/BUDGET-seed-N.json` has the scores of each context, which these differences are made of, so a seed
can be added at any time. Tables (tables.py) and figure are made from results.json alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from plan import DIFFERENCES, ROWS, RUNS, SMOLLM2
from tables import BY_CONTEXT, LABELS, OF_ALL, OF_CHATS, SETS

from plato2.config import UserError
from plato2.files import lock_file, locked, replace_text
from plato2.metrics import bootstrap

if TYPE_CHECKING:
    from systems import Asked

    from plato2.evaluate.automatic import Compared
    from plato2.evaluate.said import System

Scores = dict[str, list[float | None]]
"""Measure -> its value for each context or self-chat, in the order of the file; None where there is none."""

DIGITS = 4


# ------------------------------------------------------------------------------------------------ one seed


def measure(rows: Sequence[str], folder: Path, asked: Asked) -> dict[str, Any]:
    """The figures of a seed.

    Args:
        rows: the systems.
        folder: of the seed, with what was said.
        asked: what they answered.

    Returns:
        `rows`: row -> set -> measure -> [value, low, high]; `settings`: set -> what is compared at;
        `scores`: set -> row -> measure -> a value for each context.
    """
    from systems import said_file

    from plato2.evaluate.automatic import Compared, evaluate
    from plato2.evaluate.options import AutomaticOptions
    from plato2.evaluate.said import read_systems

    found: dict[str, Any] = {"rows": {row: {} for row in rows}, "settings": {}, "scores": {}}
    for name, contexts in asked.contexts.items():
        files = [f"{row}={said_file(folder, name, row)}" for row in rows]
        options, kept = AutomaticOptions(device="cpu"), folder / f"{name}.json"
        result = evaluate("replies", files, options, kept)
        said, _ = read_systems(files, "replies")
        common = Compared("replies", said, options, kept)  # finds the embeddings that evaluate has kept
        before = [turns_of(line) for line in contexts.read_text("utf-8").splitlines()]
        found["scores"][name] = {row: by_context(said[row], before, common) for row in rows}
        found["settings"][name] = {"near": common.near, "words": common.match_words, "k": common.k}
        for row in rows:
            figures = {m: mean(found["scores"][name][row][m]) for m in BY_CONTEXT}
            for measured in OF_ALL:
                figure = result.systems[row].get(measured)
                figures[measured] = as_list(figure and (figure.value, figure.low, figure.high))
            found["rows"][row][name] = figures
    files = [f"{row}={said_file(folder, 'chats', row)}" for row in rows]
    said, _ = read_systems(files, "dialogues")
    found["scores"]["chats"] = {row: {"repeated_3": repeated(said[row], asked.starts)} for row in rows}
    for row in rows:
        found["rows"][row]["chats"] = {"repeated_3": mean(found["scores"]["chats"][row]["repeated_3"])}
    return found


def turns_of(line: str) -> tuple[str, ...]:
    """The turns of a line of contexts, as they stand in the replies."""
    return tuple(" ".join(turn.split()) for turn in json.loads(line)["turns"])


def by_context(said: System, contexts: Sequence[tuple[str, ...]], common: Compared) -> Scores:
    """The scores of a system's replies to each context.

    Args:
        said: its replies.
        contexts: the turns of each, in the order wanted.
        common: what the systems share, the embeddings among it.
    """
    from sacrebleu.metrics import CHRF

    from plato2.evaluate.metrics import Coverage

    chrf, replies = CHRF(lowercase=True), {one.before: one for one in said}
    scores: Scores = {name: [] for name in BY_CONTEXT}
    for before in contexts:
        one, values = replies.get(before), dict[str, float]()
        if one is not None:
            references = list(one.references)
            values["chrf"] = chrf.sentence_score(one.text, references).score
            values["similarity"] = float(common.similarity([one.text], one.references).max())
            if one.candidates:
                found = [chrf.sentence_score(text, references).score for text in one.candidates]
                values["best_chrf"] = max(found)
            if one.candidates and len(references) > 1:  # else the candidates have no embeddings
                near = common.similarity(one.references, one.candidates)  # (references, K)
                values["best_similarity"] = float(near.max())
                coverage = Coverage(common.near, common.k)
                coverage.update(near)
                values["coverage"] = float(coverage.compute())
        for name, column in scores.items():
            column.append(round(values[name], DIGITS) if name in values else None)
    return scores


def repeated(said: System, dialogues: int) -> list[float | None]:
    """Of each self-chat, the share of trigrams that their speaker has said before in it."""
    from plato2.evaluate.metrics import SelfRepetition

    found: list[float | None] = [None] * dialogues
    for number in range(dialogues):
        metric, speakers = SelfRepetition(3), dict[str, list[tuple[str, ...]]]()
        for one in said:
            if one.dialogue == number:
                speakers.setdefault(one.speaker, []).append(one.words)
        metric.update(*speakers.values())
        value = float(metric.compute())
        found[number] = None if math.isnan(value) else round(value, DIGITS)
    return found


# ------------------------------------------------------------------------------------ several seeds, recorded


def as_list(figure: tuple[float | None, ...] | None) -> list[float | None]:
    """Value, low and high, rounded; all None where there is no value."""
    return [None if x is None or math.isnan(x) else round(x, DIGITS) for x in figure or (None, None, None)]


def mean(values: Sequence[float | None]) -> list[float | None]:
    """The mean over contexts with its 95 % interval; contexts without a value are left out."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return [None, None, None]
    return as_list((float(known.mean()), *bootstrap(lambda draw: float(known[draw].mean()), len(known))))


def over_seeds(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Of each context the mean over those seeds that have a value."""
    return [
        float(np.mean(known)) if (known := [value for value in values if value is not None]) else None
        for values in zip(*columns, strict=True)
    ]


def difference(one: Sequence[Scores], other: Sequence[Scores], name: str) -> dict[str, Any] | None:
    """How much higher a row's measure is than another's over the same contexts; None where one has none.

    What is drawn again for the interval is a context with all of its seeds: it holds for these trainings, and
    `seeds` shows how much they differ.

    Args:
        one: the scores of a row, by seed.
        other: those of the other row.
        name: the measure.
    """
    pairs = [
        [None if a is None or b is None else a - b for a, b in zip(x[name], y[name], strict=True)]
        for x, y in zip(one, other, strict=True)
    ]
    value, low, high = mean(over_seeds(pairs))
    if value is None:
        return None
    return {"value": value, "low": low, "high": high, "seeds": [mean(column)[0] for column in pairs]}


def differences(scores: Sequence[Mapping[str, Mapping[str, Scores]]]) -> dict[str, Any]:
    """The differences of DIFFERENCES in all that is measured by context, over the seeds that have both rows.

    Args:
        scores: of each seed, set -> row -> measure -> values.

    Returns:
        `e - b` -> set -> measure -> value, low, high, seeds.
    """
    found: dict[str, Any] = {}
    for one, other in DIFFERENCES:
        for name in (*SETS, "chats"):
            both = [seed[name] for seed in scores if {one, other} <= seed.get(name, {}).keys()]
            for measured in both[0][one] if both else ():
                of = difference([seed[one] for seed in both], [seed[other] for seed in both], measured)
                if of is not None:
                    found.setdefault(f"{one} - {other}", {}).setdefault(name, {})[measured] = of
    return found


def means(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Row -> set -> measure -> the mean of the seeds' values; and what was charged."""
    found: dict[str, Any] = {}
    for row in (*ROWS, SMOLLM2):
        having = [seed["rows"][row] for seed in seeds.values() if row in seed["rows"]]
        for name in (*SETS, "chats"):
            for measured in LABELS:
                values = [v for r in having if (v := r.get(name, {}).get(measured, [None])[0]) is not None]
                if values:
                    value = round(float(np.mean(values)), DIGITS)
                    found.setdefault(row, {}).setdefault(name, {})[measured] = value
        for spent in ("cpu_minutes", "million_tokens"):
            values = [r["charged"][spent] for r in having if "charged" in r]
            if values:
                found[row].setdefault("charged", {})[spent] = round(float(np.mean(values)), 2)
    return found


def check_asked(results: Path, budget: str, seed: int, asked: Mapping[str, Any]) -> None:
    """Refuses a seed that would not compare with those that are recorded; before it is trained.

    Args:
        results: the folder of results.json.
        budget: its name.
        seed: which.
        asked: what all seeds of a budget must have in common.

    Raises:
        UserError: another seed was asked something else.
    """
    file = results / "results.json"
    found = json.loads(file.read_text("utf-8")) if file.exists() else {"budgets": {}}
    for other, there in found["budgets"].get(budget, {"seeds": {}})["seeds"].items():
        if other != str(seed) and there["asked"] != asked:
            raise UserError(
                f"{file}: seed {other} of {budget} was asked {there['asked']}, this one {asked}; give the "
                "same options, or another folder as --results"
            )


def record(results: Path, budget: str, seed: int, made: dict[str, Any]) -> None:
    """Puts a seed into results.json and scores/, beside what is there; the same seed is replaced.

    Args:
        results: their folder.
        budget: its name.
        seed: which.
        made: from rivals.make.

    Raises:
        UserError: another seed was asked something else.
    """
    file = results / "results.json"
    results.mkdir(parents=True, exist_ok=True)
    scores = made["scores"]
    made = {key: value for key, value in made.items() if key != "scores"}
    with locked(lock_file(file), file):
        found = json.loads(file.read_text("utf-8")) if file.exists() else {"budgets": {}}
        found["rows"] = {
            row: {"label": it.label, "percent": {name: RUNS[name].percent for name in it.charged}}
            for row, it in ROWS.items()
        }
        there = found["budgets"].setdefault(budget, {"seeds": {}})
        check_asked(results, budget, seed, made["asked"])
        (results / "scores").mkdir(exist_ok=True)
        line = json.dumps(scores, separators=(",", ":")) + "\n"
        replace_text(results / "scores" / f"{budget}-seed-{seed}.json", line)
        there["seeds"] = dict(sorted({**there["seeds"], str(seed): made}.items(), key=lambda s: int(s[0])))
        there["means"] = means(there["seeds"])
        kept = [results / "scores" / f"{budget}-seed-{number}.json" for number in there["seeds"]]
        there["differences"] = differences([json.loads(path.read_text("utf-8")) for path in kept])
        replace_text(file, json.dumps(found, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- figure


def draw(results: Path) -> None:
    """Draws the figure of what results.json has."""
    picture(json.loads((results / "results.json").read_text("utf-8")), results / "figure.png")


def picture(found: Mapping[str, Any], path: Path) -> None:
    """Of the largest budget, CPU time first: each row's seeds as dots, their mean as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    budget = max(found["budgets"], key=lambda name: (name.startswith("cpu"), float(name.partition("-")[2])))
    there = found["budgets"][budget]
    rows = list(there["means"])
    shown = [
        (chosen, m)
        for chosen in (*SETS, "chats")
        for m in (*BY_CONTEXT, "matched_2", *OF_CHATS)
        if any(m in figures.get(chosen, {}) for figures in there["means"].values())
    ]
    columns = 4
    figure, axes = plt.subplots(
        math.ceil(len(shown) / columns), columns, figsize=(15, 2.6 * math.ceil(len(shown) / columns)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (chosen, m) in zip(axes.flat, shown, strict=False):
        for place, row in enumerate(rows):
            values = [
                of[0]
                for seed in there["seeds"].values()
                if (of := seed["rows"].get(row, {}).get(chosen, {}).get(m)) and of[0] is not None
            ]
            axis.plot(values, [place] * len(values), "o", color="C0", markersize=4)
            if (value := there["means"][row].get(chosen, {}).get(m)) is not None:
                axis.plot([value, value], [place - 0.3, place + 0.3], color="black", linewidth=1)
        axis.set_title(LABELS[m] + ("" if chosen == "chats" else f", {chosen}"), fontsize=9)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    figure.suptitle(f"{budget}, {len(there['seeds'])} seed(s)", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
