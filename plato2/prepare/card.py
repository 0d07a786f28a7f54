"""The data card: what a prepared corpus is made of, beside the shards, for people.

`card.md` has the funnel from dialogues to samples, the cleaning rules, lengths beside the paper's, dates,
source and options; `lengths.png` is its histogram. The same numbers stand in `index.json` under `facts`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plato2.data.shards import ShardIndex
from plato2.data.tokenizer import EOS_ID, Tokenizer
from plato2.prepare.clean import option_of
from plato2.prepare.statistics import SplitStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CARD_FILES = ("card.md", "lengths.png", "card.html", "subreddits.csv")
"""Of any card; the last two only Reddit's has (plato2/prepare/reddit/card.py)."""


@dataclass(frozen=True)
class PaperCorpus:
    """Training samples of the paper (appendix A)."""

    name: str
    samples: str
    utterances_per_sample: float
    tokens_per_utterance: float


ENGLISH = PaperCorpus("paper (English, Reddit)", "684M", 2.78, 26.3)
CHINESE = PaperCorpus("paper (Chinese)", "", 2.82, 22.2)


@dataclass(frozen=True)
class CardFacts:
    """What preparing a corpus counted."""

    counts: dict[str, int]
    """The funnel: dialogues, turns, pairs, what is lost where, samples."""
    rules: dict[str, int]
    """Messages hit by each cleaning rule."""
    n_messages_judged: int
    n_messages_failing: int
    broken_examples: list[str]
    skipped: dict[str, int]
    """Records the reader left out on purpose, by reason."""
    dates: dict[str, str]
    split_by: str
    """What "the latest dialogues" means: time, or order in the corpus."""
    unread_share: float
    """Share of the training targets that are unknown to the tokenizer."""
    notes: list[str] = field(default_factory=list)
    """What else the reader said of the files."""
    repeated: dict[str, int] = field(default_factory=dict)
    """By split: samples that are, word for word, in the training split as well."""
    removed: list[dict[str, Any]] = field(default_factory=list)
    """By evaluation set and rule: samples removed from train, and those that are in valid and test."""
    removed_examples: list[str] = field(default_factory=list)


def write_card(
    folder: Path, index: ShardIndex, facts: CardFacts, statistics: Mapping[str, SplitStatistics]
) -> None:
    """Write `card.md` and `lengths.png` into the folder of the shards."""
    draw_lengths(folder / "lengths.png", statistics["train"])
    parts = [
        f"# Data card: {escape(str(index.source['corpus']))}",
        _source(index, facts),
        "## From dialogues to samples",
        table(("", "number"), _funnel(facts.counts, facts.repeated)),
        _broken(facts),
        "## Cleaning rules",
        f"{facts.n_messages_failing:,} of {facts.n_messages_judged:,} messages "
        f"({facts.n_messages_failing / max(1, facts.n_messages_judged):.1%}) fail a rule. A message "
        f"counts for each rule it breaks. Policy: `{index.prepare['policy']}`.",
        table(("rule", "messages"), [(name, f"{n:,}") for name, n in sorted(facts.rules.items())]),
        without_section(index.prepare["without"], facts.removed, facts.removed_examples),
        "## Samples",
        samples_table(folder, index, statistics),
        "![Lengths of contexts and responses](lengths.png)",
        "## Options",
        f"```json\n{json.dumps(index.prepare, indent=2, ensure_ascii=False)}\n```",
    ]
    (folder / "card.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def escape(text: str) -> str:
    """Text that stands in Markdown as itself: no markup, HTML, table cell or new line in it works."""
    flat = " ".join(text.split())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", flat)


def _source(index: ShardIndex, facts: CardFacts) -> str:
    source = index.source
    files = ", ".join(escape(str(file)) for file in source["files"]) or "an installed package"
    days = f"{source['first_day']} to {source['last_day']}" if "first_day" in source else "no dates given"
    return "\n".join(
        [
            f"- source: {files}; {days}",
            f"- validation: the latest dialogues by {facts.split_by}",
            *(["- test: random ones of the other dialogues"] if "test" in index.splits else []),
            f"- prepared: {source['prepared']} with plato2 {source['plato2']}",
            f"- tokenizer: {index.vocab_size - 1:,} pieces, sha256 `{index.tokenizer_sha256}`",
            f"- unigram baseline on the validation responses: perplexity {index.unigram['ppl']:.1f} "
            f"({index.unigram['nll']:.3f} nats a token)",
        ]
    )


def n_samples(counts: Mapping[str, int]) -> int:
    """Samples of all splits."""
    return sum(counts.get(f"{split}_samples", 0) for split in ("train", "valid", "test"))


def lost_pairs(counts: Mapping[str, int]) -> dict[str, int]:
    """Pairs of context and response that became no sample, by reason."""
    samples = n_samples(counts)
    failing = counts.get("pairs_failing_response", 0)
    long_turn = counts.get("pairs_long_context_turn", 0)
    of_sets = counts.get("pairs_of_evaluation_sets", 0)
    return {
        "response fails a rule": failing,
        "no context left by the policy": counts["pairs"] - failing - long_turn - of_sets - samples,
        "last context turn too long": long_turn,
        "has to do with an evaluation set": of_sets,
    }


def losses(counts: Mapping[str, int], rules: Mapping[str, int]) -> str:
    """The same in words, with the rules that messages break and their options; empty if there are none."""
    pairs = [f"{reason} {n:,}" for reason, n in lost_pairs(counts).items() if n]
    commonest = sorted(rules.items(), key=lambda hit: -hit[1])
    hits = [f"{rule} ({option_of(rule)}: {n:,})" for rule, n in commonest if n]
    return "; ".join(
        [", ".join(pairs), *(["messages that break a rule: " + ", ".join(hits)] if hits else [])]
    )


def _funnel(counts: Mapping[str, int], repeated: Mapping[str, int]) -> list[tuple[str, str]]:
    samples = n_samples(counts)
    rows = [
        ("dialogues", counts["dialogues"]),
        ("of two or more turns", counts["dialogues_of_two_or_more_turns"]),
        ("turns", counts["turns"]),
        ("(context, response) pairs", counts["pairs"]),
        *((f"- {reason}", n) for reason, n in lost_pairs(counts).items()),
        ("= samples", samples),
        ("of these: response cut, without end token", counts.get("samples_response_cut", 0)),
        ("for training", counts.get("train_samples", 0)),
        ("for validation", counts.get("valid_samples", 0)),
        ("for test", counts.get("test_samples", 0)),
        *((f"of {split}: word for word in train as well", n) for split, n in repeated.items()),
    ]
    table = [(name, f"{n:,}") for name, n in rows]
    return [*table, ("samples / pairs", f"{samples / counts['pairs']:.1%}")]


def removals(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was removed from training for evaluation sets, in words."""
    return ", ".join(f"{row['train']:,} of {row['file']} ({row['rule']})" for row in rows)


def without_section(files: Sequence[str], rows: Sequence[Mapping[str, Any]], examples: Sequence[str]) -> str:
    """What was removed for evaluation sets, for the card; empty without any."""
    if not files:
        return ""
    splits = ("train", "valid", "test")
    cells = [
        (escape(f"{row['file']}, {row['rule']}"), *(f"{row[split]:,}" for split in splits)) for row in rows
    ]
    parts = [
        "## Evaluation sets",
        "Samples that have to do with their texts: removed from train, only counted in the other splits.",
        table(("", *splits), cells),
        "\n".join(f"- {escape(example)}" for example in examples),
    ]
    return "\n\n".join(part for part in parts if part)


def _broken(facts: CardFacts) -> str:
    lines = [f"{facts.counts['broken']:,} records could not be read and were left out."]
    if facts.broken_examples:
        lines += ["", "The first of them:", "", *(f"- {escape(text)}" for text in facts.broken_examples)]
    for reason, n in facts.skipped.items():
        lines += ["", f"{n:,} records were left out: {escape(reason)}."]
    for note in facts.notes:
        lines += ["", f"{escape(note)}."]
    return "\n".join(lines)


def _is_chinese(folder: Path, counted: SplitStatistics) -> bool:
    """Whether most words of the responses have a Chinese character; special ids and signs are none."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    pieces = {i: tokenizer.decode([i]) for i in range(EOS_ID + 1, tokenizer.mask_id)}
    words = [i for i, piece in pieces.items() if any(map(str.isalpha, piece))]
    chinese = [i for i in words if re.search("[\u3400-\u9fff]", pieces[i])]
    return bool(2 * counted.targets[chinese].sum() > counted.targets[words].sum())


def samples_table(folder: Path, index: ShardIndex, statistics: Mapping[str, SplitStatistics]) -> str:
    """What the splits hold, as a Markdown table; the last row is the paper's corpus of the language."""
    paper = CHINESE if _is_chinese(folder, statistics["train"]) else ENGLISH
    rows: list[tuple[str, ...]] = []
    for split, counted in statistics.items():
        shards = index.splits[split].shards
        rows.append(
            (
                split,
                f"{counted.n_samples:,}",
                f"{len(shards):,}",
                f"{sum(shard.bytes for shard in shards) / 1e6:.1f} MB",
                f"{mean_length(counted.context_lengths):.1f}",
                f"{mean_length(counted.response_lengths):.1f}",
                f"{counted.utterances_per_sample:.2f}",
                f"{counted.tokens_per_utterance:.1f}",
            )
        )
    theirs = (f"{paper.utterances_per_sample:.2f}", f"{paper.tokens_per_utterance:.1f}")
    rows.append((paper.name, paper.samples, "", "", "", "", *theirs))
    lengths = ("ids/context", "ids/response", "utterances/sample", "tokens/utterance")
    return table(("", "samples", "shards", "size", *lengths), rows)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; all columns but the first are numbers, to the right."""
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def mean_length(histogram: np.ndarray) -> float:
    """Of `histogram[n]` samples with n ids."""
    return float((np.arange(len(histogram)) * histogram).sum() / max(1, histogram.sum()))


def draw_lengths(path: Path, counted: SplitStatistics) -> None:
    """Histogram of the ids in a context and in a response, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # drawing is all that needs matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    draw_histogram(figure.add_subplot(1, 2, 1), "context", counted.context_lengths, "C0")
    draw_histogram(figure.add_subplot(1, 2, 2), "response", counted.response_lengths, "C1")
    figure.savefig(path, dpi=100)


def draw_histogram(axes: Axes, name: str, histogram: np.ndarray, color: str) -> None:
    """`histogram[n]` samples have n ids in their context or response."""
    axes.stairs(histogram, np.arange(len(histogram) + 1) - 0.5, fill=True, color=color)
    axes.set_title(f"{name}: mean {mean_length(histogram):.1f}")
    axes.set_xlabel("ids, special ids included")
    axes.set_ylabel("samples")
