"""The data card of a corpus from Reddit, for people.

    card.md         sources, the funnel from messages to samples, rules, months, lengths, options
    card.html       the same as pictures (card_page.py); opens without a network
    lengths.png     histogram of the contexts and responses for training
    subreddits.csv  all subreddits; card.md shows the biggest

The numbers also stand in `index.json` under `facts`. Nothing is lost without a line here: lines that could
not be read, files that were cut short, messages by the reason why they are no response, cut responses.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from plato2.data.shards import ShardIndex
from plato2.data.tokenizer import EOS_ID
from plato2.prepare.card import draw_lengths, escape, samples_table, table, without_section
from plato2.prepare.reddit.card_page import write_page
from plato2.prepare.reddit.funnel import FunnelFacts
from plato2.prepare.reddit.rules import RedditRules, lists_sha256
from plato2.prepare.statistics import SplitStatistics

__all__ = ["FunnelFacts", "write_card"]

N_SHOWN = 20
"""Subreddits in card.md."""


def write_card(
    folder: Path, index: ShardIndex, facts: FunnelFacts, statistics: Mapping[str, SplitStatistics]
) -> None:
    """Write the four files into the folder of the shards."""
    draw_lengths(folder / "lengths.png", statistics["train"])
    write_page(folder / "card.html", facts, statistics["train"])
    _write_subreddits(folder / "subreddits.csv", facts)
    parts = [
        "# Data card: Reddit",
        "The same as pictures: [card.html](card.html). Every number: `facts` in [index.json](index.json).",
        _about(index, facts),
        "## Sources",
        *_sources(index, facts),
        "## From messages to samples",
        'Each message ends in one line with a minus or in one of those that begin with "of these", and these '
        "add up to the messages read. A sample is a message with at least one above it: the message is the "
        "response.",
        _funnel(facts),
        "## Rules",
        "A message is *removed* by the first rule that it breaks, in this order, and counts for each rule "
        "that it *breaks*; a rule on the number of tokens only sees what passes the rules above it. Rules 7 "
        "and 6 look at other messages too and see what is left by then.",
        _rules(facts),
        _thresholds(index, facts),
        "## Months",
        "*Kept*: by the rules that look at one message.",
        _months(facts),
        "## Subreddits",
        *_subreddits(facts),
        without_section(index.prepare["without"], facts.removed, facts.removed_examples),
        "## Samples",
        samples_table(folder, index, statistics),
        _responses_cut(statistics),
        "![Lengths of contexts and responses](lengths.png)",
        "## Options",
        f"```json\n{json.dumps(index.prepare, indent=2, ensure_ascii=False)}\n```",
    ]
    (folder / "card.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _about(index: ShardIndex, facts: FunnelFacts) -> str:
    source = index.source
    months = list(facts.months)
    hours = ", those kept from {} to {}".format(*facts.hours) if facts.hours else ""
    settings = ", ".join(f"{key} {value}" for key, value in source["engine"].items())
    versions = ", ".join(f"{key} {value}" for key, value in source["versions"].items())
    n_kept = sum(facts.kept.values())
    lines = [
        f"messages from {months[0]} to {months[-1]}{hours} (UTC)" if months else "no messages",
        f"validation: drawn from the responses written from {source['valid_from']} on",
        _test(index, facts),
        f"prepared: {source['prepared']} with plato2 {source['plato2']}",
        f"engine: {escape(settings)}; {escape(versions)}",
        f"tokenizer: {index.vocab_size - 1:,} pieces, sha256 `{index.tokenizer_sha256}`",
        f"tokens of a message kept: {facts.tokens / max(1, n_kept):.1f} on average, {facts.tokens:,} in all",
        f"unigram baseline on the validation responses: perplexity {index.unigram['ppl']:.1f} "
        f"({index.unigram['nll']:.3f} nats a token)",
    ]
    if "digest" in index.extra:
        lines.append(f"digest of all samples in their order: `{index.extra['digest']}`")
    return "\n".join(f"- {line}" for line in lines if line)


def _test(index: ShardIndex, facts: FunnelFacts) -> str:
    """Where the test samples are from; empty without any."""
    if not facts.n_held_out:
        return ""
    until = f"; and all responses from {day} on" if (day := index.prepare.get("test_from")) else ""
    repeated = facts.repeated_in_train
    return (
        f"test: {len(facts.held_out):,} communities that are not trained on (subreddits.csv), before "
        f"validation{until}; {repeated.get('test', 0):,} of its samples and {repeated['valid']:,} of "
        "validation are word for word in training as well"
    )


def _sources(index: ShardIndex, facts: FunnelFacts) -> list[str]:
    """Files, and how their lines became messages."""
    rows = []
    examples = facts.broken_examples
    for file in index.source["files"]:
        name = file["path"].rpartition("/")[2]  # folders are nobody's business
        examples = [text.replace(file["path"], name) for text in examples]
        cut = escape(file["cut"]) if file["cut"] else "no"
        cells = (file["kind"], f"{file['size']:,}", f"{file['n_lines']:,}", cut, f"`{file['sha256']}`")
        rows.append((escape(name), *cells))
    files = index.source["files"]
    n_lines, n_read = sum(file["n_lines"] for file in files), facts.totals()["read"]
    lines = [
        ("lines read", n_lines),
        ("- empty", n_lines - n_read - facts.n_broken),
        ("- could not be read", facts.n_broken),
        ("= messages", n_read),
    ]
    parts = [
        table(("file", "kind", "bytes", "lines", "cut short", "sha256"), rows),
        table(("", "number"), [(name, f"{n:,}") for name, n in lines]),
    ]
    if any(file["cut"] for file in files):
        n_cut = sum(bool(file["cut"]) for file in files)
        parts.append(
            f"**{n_cut:,} of {len(files):,} files were cut short.** How many messages are missing is not "
            "known; the sha256 is that of the bytes that could be read."
        )
    if examples:
        parts.append("The first of the lines that could not be read:")
        parts.append("\n".join(f"- {escape(text)}" for text in examples))
    return parts


def _funnel(facts: FunnelFacts) -> str:
    sign = {"left": "= ", "lost": "- ", "part": "of these "}
    rows = [(f"{sign[step.kind]}{escape(step.name)}", f"{step.n:,}", step.share) for step in facts.steps()]
    return table(("", "messages", "of those read"), rows)


def _rules(facts: FunnelFacts) -> str:
    hits = facts.all_hits()
    rows = []
    for step in facts.steps():
        if step.name in facts.rules:
            broken = f"{hits[step.name]:,}" if step.name in facts.alone else ""
            rows.append((escape(step.name), f"{step.n:,}", step.share, broken))
    return table(("rule", "removed", "of those read", "break it"), rows)


def _thresholds(index: ShardIndex, facts: FunnelFacts) -> str:
    rules = index.prepare["rules"]
    rows = [(escape(name), escape(_setting(value))) for name, value in rules.items()]
    return "\n\n".join(
        [
            table(("setting", "value"), rows),
            f"The lists of rules 8, 9 and 10 have the sha256 `{lists_sha256(RedditRules(**rules))}`. The "
            f"dumps flag {len(facts.quarantined):,} subreddits as quarantined.",
        ]
    )


def _setting(value: object) -> str:
    if value is None or value is False:
        return "off"
    return "on" if value is True else str(value)


def _months(facts: FunnelFacts) -> str:
    rows = [
        _counted(month, counts["read"], facts.kept[month], counts.get("samples", 0))
        for month, counts in facts.months.items()
    ]
    totals = facts.totals()
    rows.append(_counted("all", totals["read"], sum(facts.kept.values()), totals["samples"]))
    return table(("month", "read", "kept", "share", "samples", "share"), rows)


def _counted(name: str, n_read: int, *counts: int) -> tuple[str, ...]:
    """A row: each count with its share of those read."""
    cells = [cell for n in counts for cell in (f"{n:,}", f"{n / max(1, n_read):.1%}")]
    return (name, f"{n_read:,}", *cells)


def _subreddits(facts: FunnelFacts) -> list[str]:
    forums = facts.by_subreddit()
    shown = [_counted(escape(name) or "(none)", n, kept) for name, n, kept in forums[:N_SHOWN]]
    others = forums[N_SHOWN:]
    if others:
        n, kept = sum(row[1] for row in others), sum(row[2] for row in others)
        shown.append(_counted(f"{len(others):,} others", n, kept))
    return [
        f"Messages of {len(forums):,} subreddits; all of them are in [subreddits.csv](subreddits.csv).",
        table(("subreddit", "read", "kept", "share"), shown),
    ]


def _responses_cut(statistics: Mapping[str, SplitStatistics]) -> str:
    n = sum(counted.n_samples - int(counted.targets[EOS_ID]) for counted in statistics.values())
    return (
        f"{n:,} responses are longer than a response may be: they were cut and have no end token. A context "
        "has as many of the newest messages above the response as fit."
    )


def _write_subreddits(path: Path, facts: FunnelFacts) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("subreddit", "read", "kept", "split"))
        held_out = frozenset(facts.held_out)
        writer.writerows((*row, "test" if row[0] in held_out else "") for row in facts.by_subreddit())
