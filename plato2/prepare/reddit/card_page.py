"""`card.html`: the pictures of a Reddit data card, on one page that loads nothing and runs nothing.

The choices:

- matplotlib draws SVG, which stands in the page itself. Its text stays text, so it can be read aloud, found
  and copied; names from the dumps are escaped by it, and shortened.
- A picture is drawn as wide as a phone is, so its text is readable there; a desktop shows two side by side.
- Colours are CSS variables: the page is light or dark as the reader's system is.
- Bars have their names above them, since there is no room beside.
- The same counts give the same bytes: no date, no random ids.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from plato2.prepare.card import (
    ENGLISH,
    draw_histogram,
    mean_length,
)
from plato2.prepare.reddit.funnel import FunnelFacts
from plato2.prepare.reddit.shard_parts import month_of
from plato2.prepare.statistics import SplitStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_SUBREDDITS = 20
N_STACKED = 8
"""Rules that get a colour of their own in the stack; the others share one."""
_WIDTH = 4.6
"""Inches; 10 points in a picture are 11 pixels on a phone and 15 on a desktop."""
_MOST_MONTHS = 600
"""Longer ranges come from wrong dates: then only months that have messages are drawn."""

_COLOURS = {  # name: (light, dark); no two light ones are the same
    "ink": ("#1b2430", "#e4e8ee"),
    "line": ("#c9d0d9", "#465160"),
    "read": ("#aebccd", "#52627a"),
    "kept": ("#5b8ec9", "#5b8fd0"),
    "samples": ("#1f5fa8", "#9cc6f7"),
    "lost": ("#d9694a", "#e07c5f"),
}
_STACK = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44bb99", "#999999")
"""Paul Tol's: the colour-blind can tell them apart, on light and on dark."""
_INK, _LINE, _READ, _KEPT, _SAMPLES, _LOST = (light for light, _ in _COLOURS.values())

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; %s }
@media (prefers-color-scheme: dark) { :root { --page: #151a21; %s } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; }
main { columns: 26rem 2; column-gap: 3rem; }
figure { margin: 0 0 2rem; break-inside: avoid; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
svg { display: block; width: 100%%; max-width: 32rem; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
figcaption { font-size: .875rem; opacity: .8; margin-top: .5rem; max-width: 32rem; }
a { color: inherit; }
""".strip()


@dataclass(frozen=True)
class _Picture:
    title: str
    alt: str
    """What it shows, for those who cannot see it."""
    caption: str
    figure: Figure


def write_page(path: Path, facts: FunnelFacts, train: SplitStatistics) -> None:
    """Write the page; the lengths are those of the samples for training."""
    from matplotlib import style  # drawing is all that needs matplotlib

    with style.context(["default", _drawing()]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has it
        pictures = [
            _funnel(facts),
            _rules(facts),
            _over_time(facts),
            _rules_over_time(facts),
            _subreddits(facts),
            _lengths(train),
            _beside_the_paper(train),
        ]
        figures = "\n".join(_html(picture) for picture in pictures)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Data card: Reddit</title>
<style>
{_STYLE % (_variables(0), _variables(1))}
</style>
</head>
<body>
<h1>Data card: Reddit</h1>
<p>{escape(_summary(facts))} All numbers: <a href="card.md">card.md</a>, <a href="index.json">index.json</a>,
<a href="subreddits.csv">subreddits.csv</a>.</p>
<main>
{figures}
</main>
</body>
</html>
"""
    path.write_text(page, encoding="utf-8")


def _summary(facts: FunnelFacts) -> str:
    totals, months = facts.totals(), list(facts.months)
    when = f" from {months[0]} to {months[-1]}" if len(months) > 1 else "".join(f" of {m}" for m in months)
    n_read, n_samples = totals["read"], totals["samples"]
    return (
        f"{n_read:,} messages of {len(facts.subreddits):,} subreddits{when} became {n_samples:,} samples "
        f"({n_samples / max(1, n_read):.1%})."
    )


# -- bars with their names above them ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Bar:
    name: str
    value: str
    pieces: Sequence[tuple[float, float, str]]
    """(start, width, colour)."""
    weight: str = "normal"


def _bars(bars: Sequence[_Bar]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.37 * len(bars)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    most = max([start + width for bar in bars for start, width, _ in bar.pieces] + [0]) or 1
    axes.set_xlim(0, most)
    axes.set_ylim(len(bars), 0)
    for row, bar in enumerate(bars):
        for start, width, colour in bar.pieces:
            axes.barh(row + 0.72, width, 0.24, start, color=colour)
        axes.text(0, row + 0.46, _short(bar.name), weight=bar.weight, size=9.5)
        axes.text(most, row + 0.46, bar.value, weight=bar.weight, size=9.5, ha="right")
    return figure


def _short(name: str) -> str:
    """A name of any text, as one line that fits above a bar."""
    flat = " ".join("".join(char if char.isprintable() else " " for char in name).split())
    return (flat if len(flat) <= 48 else f"{flat[:47]}…") or "(none)"


def _funnel(facts: FunnelFacts) -> _Picture:
    bars = []
    left = 0
    for step in facts.steps():
        value = f"{step.n:,}  ({step.share})"
        if step.kind == "left":
            left = step.n
            colour = {"samples": _SAMPLES, "messages read": _READ}.get(step.name, _KEPT)
            bars.append(_Bar(step.name, value, [(0, left, colour)], "bold"))
        else:
            left -= step.n
            colours = (_READ, _LOST) if step.kind == "lost" else ("none", _SAMPLES)
            sign = "- " if step.kind == "lost" else ""
            bars.append(_Bar(sign + step.name, value, [(0, left, colours[0]), (left, step.n, colours[1])]))
    totals = facts.totals()
    alt = "; ".join(f"{step.name}: {step.n:,}" for step in facts.steps())
    caption = (
        "Each message is lost in one line (-) or is in one below the samples: these add up to the "
        f"{totals['read']:,} messages read, of which the percentages are."
    )
    return _Picture("From messages to samples", alt, caption, _bars(bars))


def _rules(facts: FunnelFacts) -> _Picture:
    totals, hits = facts.totals(), facts.all_hits()
    bars = []
    for name in facts.rules:
        n, broken = totals[name], hits[name] if name in facts.alone else totals[name]
        value = f"{n:,} of {broken:,}" if name in facts.alone else f"{n:,}"
        pieces = [(0, n, _LOST), (n, max(0, broken - n), _READ)]
        bars.append(_Bar(name, value, pieces))
    alt = "; ".join(f"{bar.name}: {bar.value}" for bar in bars)
    caption = (
        "Messages removed, of those that break the rule at all: the first rule broken removes a message. "
        "Rules 6 and 7 see only what the others leave."
    )
    return _Picture("Removed by each rule", alt, caption, _bars(bars or [_Bar("all rules are off", "0", [])]))


def _subreddits(facts: FunnelFacts) -> _Picture:
    forums = facts.by_subreddit()[:N_SUBREDDITS]
    bars = [
        _Bar(name, f"{n:,}  ({kept / max(1, n):.0%} kept)", [(0, kept, _KEPT), (kept, n - kept, _READ)])
        for name, n, kept in forums
    ]
    alt = "; ".join(f"{_short(name)}: {n:,} read, {kept:,} kept" for name, n, kept in forums)
    caption = "Messages read (the whole bar) and kept by the rules for one message (blue)."
    title = f"The biggest of {len(facts.subreddits):,} subreddits"
    return _Picture(title, alt, caption, _bars(bars))


def _beside_the_paper(train: SplitStatistics) -> _Picture:
    both = [
        ("utterances per sample", train.utterances_per_sample, ENGLISH.utterances_per_sample, 2),
        ("tokens per utterance", train.tokens_per_utterance, ENGLISH.tokens_per_utterance, 1),
    ]
    bars = []
    for name, ours, paper, digits in both:  # of different size: each pair is drawn to its own scale
        most = max(ours, paper)
        bars.append(_Bar(f"{name}, here", f"{ours:.{digits}f}", [(0, ours / most, _SAMPLES)]))
        bars.append(_Bar(f"{name}, in the paper", f"{paper:.{digits}f}", [(0, paper / most, _READ)]))
    alt = "; ".join(f"{bar.name}: {bar.value}" for bar in bars)
    caption = "The paper's English samples from Reddit (appendix A); special tokens are not counted."
    return _Picture("Beside the paper", alt, caption, _bars(bars))


# -- over time --------------------------------------------------------------------------------------------


def _over_time(facts: FunnelFacts) -> _Picture:
    months = _all_months(facts)
    top, bottom, figure = _two_axes(months)
    n_read = _by_month(facts.months, "read", months)
    n_kept = np.array([facts.kept.get(month, 0) for month in months])
    n_samples = _by_month(facts.months, "samples", months)
    edges = np.arange(len(months) + 1) - 0.5
    counted = (
        ("read", n_read, _READ),
        ("kept by the rules", n_kept, _KEPT),
        ("samples", n_samples, _SAMPLES),
    )
    for name, values, colour in counted:
        top.stairs(values, edges, fill=True, color=colour, label=name)
    top.set_ylabel("messages")
    top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1)
    _count_upwards(top)
    with np.errstate(invalid="ignore"):
        for _, values, colour in counted[1:]:  # a month without messages is a gap
            marker = "o" if len(months) <= 24 else ""
            bottom.plot(100 * values / np.where(n_read, n_read, np.nan), color=colour, marker=marker, ms=4)
    bottom.set_ylim(0, 105)
    bottom.set_ylabel("share of those read")
    bottom.yaxis.set_major_formatter("{x:g}%")
    _label_months(bottom, months)
    alt = _extremes(facts, "read") + "; " + _extremes(facts, "samples")
    caption = (
        "Above: messages of each month. Below: the shares of them that are kept and that become samples."
    )
    return _Picture("Month by month", alt, caption, figure)


def _rules_over_time(facts: FunnelFacts) -> _Picture:
    from matplotlib.figure import Figure

    months = _all_months(facts)
    n_read = _by_month(facts.months, "read", months)
    totals = facts.totals()
    names = sorted((name for name in facts.rules if totals[name]), key=lambda name: -totals[name])
    rows = [(name, _by_month(facts.months, name, months)) for name in names[:N_STACKED]]
    if rest := names[N_STACKED:]:
        others = sum(_by_month(facts.months, name, months) for name in rest)
        rows.append((f"{len(rest)} other rules", np.asarray(others)))
    figure = Figure(figsize=(_WIDTH, 2.6 + 0.18 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    edges, below = np.arange(len(months) + 1) - 0.5, np.zeros(len(months))
    for (name, values), colour in zip(rows, _STACK, strict=False):
        above = below + 100 * values / np.maximum(1, n_read)
        axes.stairs(above, edges, baseline=below, fill=True, color=colour, label=name)
        below = above
    axes.set_ylim(0, max(1.0, 1.05 * float(below.max(initial=0))))
    axes.set_ylabel("share of those read")
    axes.yaxis.set_major_formatter("{x:g}%")
    _label_months(axes, months)
    if rows:
        figure.legend(loc="outside lower left", handlelength=1, reverse=True)
    alt = (
        "; ".join(f"{name}: {int(values.sum()):,} messages" for name, values in rows) or "nothing is removed"
    )
    caption = "What share of a month's messages each rule removes."
    return _Picture("Rules, month by month", alt, caption, figure)


def _two_axes(months: Sequence[str]) -> tuple[Axes, Axes, Figure]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    return top, bottom, figure


def _all_months(facts: FunnelFacts) -> list[str]:
    """From the first month to the last, those without a message too."""
    if not facts.months:
        return []
    first, last = (
        12 * int(month[:4]) + int(month[5:]) - 1 for month in (min(facts.months), max(facts.months))
    )
    if last - first >= _MOST_MONTHS:
        return sorted(facts.months)
    return [month_of(number) for number in range(first, last + 1)]


def _by_month(counts: Mapping[str, Mapping[str, int]], name: str, months: Sequence[str]) -> np.ndarray:
    return np.array([counts.get(month, {}).get(name, 0) for month in months], dtype=np.int64)


def _label_months(axes: Axes, months: Sequence[str]) -> None:
    """As many labels as have room: five months, or seven years at their Januaries."""
    steps = (1, 2, 3, 6, 12, 24, 36, 60, 120)
    step = next((n for n in steps if len(months) <= n * (5 if n < 12 else 7)), len(months))
    start = next((i for i, month in enumerate(months) if month.endswith("-01")), 0) if step >= 12 else 0
    places = range(start, len(months), step)
    axes.set_xticks(list(places), [months[i][:4] if step >= 12 else months[i] for i in places])
    axes.set_xlim(-1, len(months))
    axes.set_xlabel("year" if step >= 12 else "month")


def _extremes(facts: FunnelFacts, name: str) -> str:
    most = max(facts.months, key=lambda month: facts.months[month].get(name, 0), default="")
    n = facts.months.get(most, {}).get(name, 0)
    return f"{name}: {facts.totals()[name]:,} in {len(facts.months):,} months, most of them in {most}: {n:,}"


# -- lengths ----------------------------------------------------------------------------------------------


def _lengths(train: SplitStatistics) -> _Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    for place, (name, histogram, colour) in enumerate(
        [("context", train.context_lengths, _KEPT), ("response", train.response_lengths, _SAMPLES)], start=1
    ):
        axes = figure.add_subplot(2, 1, place)
        draw_histogram(axes, name, histogram, colour)
        _count_upwards(axes)
    alt = (
        f"Histograms: contexts have {mean_length(train.context_lengths):.1f} ids on average, responses "
        f"{mean_length(train.response_lengths):.1f}"
    )
    caption = f"Of the {train.n_samples:,} samples for training."
    return _Picture("Lengths of contexts and responses", alt, caption, figure)


def _count_upwards(axes: Axes) -> None:
    """Whole numbers with separators."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")


# -- to HTML ----------------------------------------------------------------------------------------------


def _drawing() -> dict[str, object]:
    """matplotlib's settings."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "plato2",
        "text.parse_math": False,  # a subreddit named $x$ is no formula
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": _LINE,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "savefig.transparent": True,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.titlecolor": _INK,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "axes.edgecolor": _LINE,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
    }


def _html(picture: _Picture) -> str:
    file = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    picture.figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    inner = svg[svg.index(">", box.end()) + 1 :]
    inner = re.sub(r"<g id=\"[^\"]*\">", "<g>", inner)  # the same ids in every picture
    inner = re.sub(r"<[^>]*>", lambda tag: _with_variables(tag[0]), inner)
    return (
        f"<figure>\n<h2>{escape(picture.title)}</h2>\n"
        f'<svg {box[0]} role="img" aria-label="{escape(picture.alt)}">{inner.rstrip()}\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _with_variables(tag: str) -> str:
    """A tag with its colours as CSS variables; only tags, because `<` in a text is escaped."""
    for name, (light, _) in _COLOURS.items():
        tag = tag.replace(light, f"var(--{name})")
    return tag


def _variables(column: int) -> str:
    return " ".join(f"--{name}: {colours[column]};" for name, colours in _COLOURS.items())
