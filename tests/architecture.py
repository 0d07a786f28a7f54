"""docs/architecture.svg: who may import whom, drawn from the table of test_imports.py.

    python tests/architecture.py

writes it anew. Rows follow from the table, so an arrow can only go down; a new room needs a place in `X`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from test_imports import ALLOWED, part_of

FILE = Path(__file__).parents[1] / "docs" / "architecture.svg"
X = {
    "report": 907,
    "evaluate": 387,
    "serve": 146,
    "runs": 376,
    "talk": 759,
    "weights": 214,
    "runs.folder": 97,
    "stages": 1065,
    "prepare": 513,
    "model": 185,
    "runs.saved": 76,
    "runs.traces": 671,
    "data": 793,
    "words": 283,
    "batch": 677,
    "random": 363,
    "runs.console": 475,
    "weights.names": 789,
    "runs.distributed": 942,
    "files": 151,
    "formats": 54,
    "bounded": 593,
    "metrics": 1070,
    "runs.panels": 252,
}
"""The middle of each room's box."""
ABOVE = (
    "plato2", "plato2.__main__", "plato2.commands", "plato2.commands.train",
    "plato2.commands.train_overrides", "plato2.commands.train_sweep",
    "train", "benchmarks", "hydra_plugins",
)  # fmt: skip
BELOW = "plato2.config"
WIDTH, ROW, BOX = 1120, 84, 34

HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-labelledby="title description" font-size="14" \
font-family="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif">
  <title id="title">Who may import whom</title>
  <desc id="description">{description}</desc>
  <defs>
    <marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">
      <path d="M0 0 L10 5 L0 10 z" fill="#57606a" />
    </marker>
  </defs>
  <rect width="{width}" height="{height}" rx="10" fill="#ffffff" />
"""


def rooms() -> dict[str, set[str]]:
    """Each room and those it may import; a module without a line of its own stands for its package."""
    drawn = {room: allowed for room, allowed in ALLOWED.items() if room not in (*ABOVE, BELOW)}
    found = {room: {part_of(name) for name in allowed} - {room, BELOW} for room, allowed in drawn.items()}
    return {short(room): {short(name) for name in names} for room, names in found.items()}


def short(room: str) -> str:
    return room.removeprefix("plato2.")


ROOMS = rooms()


@cache
def reached(room: str) -> frozenset[str]:
    """All that lies below a room, by one arrow or several."""
    return frozenset(ROOMS[room].union(*map(reached, ROOMS[room])))


@cache
def row(room: str) -> int:
    """From 0, the lowest; a room stands above all that it may import."""
    return 1 + max(map(row, ROOMS[room]), default=-1)


def arrows() -> list[tuple[str, str]]:
    """What a room may import, but for what another arrow leads to as well."""
    return [
        (room, name)
        for room in X
        for name in X
        if name in ROOMS[room] and not any(name in reached(other) for other in ROOMS[room])
    ]


def top(room: str) -> int:
    return 40 + BOX + ROW * (max(map(row, ROOMS)) - row(room)) + ROW - BOX


def half(room: str) -> int:
    """Half the width of a box."""
    return 14 + 4 * len(room)


def box(middle: int, y: int, half_width: int, text: str, fill: str) -> str:
    return (
        f'  <rect x="{middle - half_width}" y="{y}" width="{2 * half_width}" height="{BOX}" rx="6" '
        f'fill="{fill}" stroke="#57606a" />\n'
        f'  <text x="{middle}" y="{y + 22}" text-anchor="middle" fill="#1f2328">{text}</text>\n'
    )


def picture() -> str:
    lowest = max(map(top, X)) + ROW - 20
    everywhere = "commands, called by train.py and plato2.train: may import everything"
    base = "config: almost every room imports it"
    text = HEAD.format(
        width=WIDTH,
        height=lowest + BOX + 20,
        description="; ".join(f"{room}: {', '.join(sorted(ROOMS[room])) or 'none'}" for room in X),
    )
    for room, name in arrows():
        ends = f'x1="{X[room]}" y1="{top(room) + BOX}" x2="{X[name]}" y2="{top(name)}"'
        text += f'  <line {ends} stroke="#57606a" stroke-width="1.3" marker-end="url(#arrow)" />\n'
    text += box(WIDTH // 2, 20, WIDTH // 2 - 20, everywhere, "#fff8c5")
    for room in X:
        text += box(X[room], top(room), half(room), room, "#ddf4ff" if "." not in room else "#f6f8fa")
    return text + box(WIDTH // 2, lowest, WIDTH // 2 - 20, base, "#dafbe1") + "</svg>\n"


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
