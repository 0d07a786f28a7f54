"""What a sweep tries: factors of the recipe's value, `optim.lr=x0.5,x1,x2`, and ranges to draw from.

A learning rate that suits one model is a hundred times too high for another, and what is tried around it is
not. So a sweep can say by how much the recipe's own value is multiplied, whatever that is:

    optim.lr=x0.5,x1,x2       three factors
    optim.lr=x(0.25, 4)       from a quarter to four times, drawn on a logarithmic scale
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from plato2.config import UserError

if TYPE_CHECKING:
    import optuna

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
FACTOR = re.compile(rf"x({NUMBER})")
RANGE = re.compile(rf"x\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)")
TAG = "x"
"""Of a range of factors in Hydra's words: `tag(x, interval(0.25, 4))`."""


def in_hydras_words(word: str) -> str:
    """An override with a range of factors as Hydra's grammar has ranges; others as they are.

    Raises:
        UserError: the range is empty, or begins at 0: there is no logarithmic scale from there.
    """
    key, _, value = word.partition("=")
    found = RANGE.fullmatch(value.strip().strip("'\""))
    if found is None:
        return word
    low, high = map(float, found.groups())
    if not 0 < low < high or not isfinite(high):
        raise UserError(f"{word}: factors from {low:g} to {high:g}; give x(LOW,HIGH) with 0 < LOW < HIGH")
    return f"{key}=tag({TAG},interval({low!r},{high!r}))"


def factor(value: str) -> float | None:
    """The factor of an override's value; None where it is none."""
    found = FACTOR.fullmatch(value.strip().strip("'\""))
    return float(found[1]) if found else None


def multiplied(key: str, recipe: float, times: float) -> float:
    """A factor of the recipe's value, to six digits; whole numbers stay whole, and at least 1.

    Raises:
        UserError: the recipe's value is 0, and so would be every multiple of it.
    """
    if recipe == 0:
        raise UserError(
            f"{key}=x{times:g}: the recipe's value is 0, and so is every multiple of it; give values instead"
        )
    product = float(f"{recipe * times:.6g}")
    return max(1, round(product)) if isinstance(recipe, int) else product


@dataclass(frozen=True)
class Dimension:
    """What the values of a key are drawn from: choices, or a range."""

    key: str
    """With its `+`, if it has one."""
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False
    factor: bool = False

    def drawn(self, trial: optuna.Trial) -> str:
        """The value of a point as an override."""
        name = self.key.lstrip("+")
        value: str | int | float
        if self.choices:
            value = trial.suggest_categorical(name, self.choices)
        elif self.whole:
            value = trial.suggest_int(
                name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log
            )
        else:
            value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return self.override(value)

    def override(self, value: Any) -> str:
        """A value as an override, rounded to six digits."""
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        return f"{self.key}={'x' * self.factor}{text}"

    @property
    def ends(self) -> list[str]:
        """All choices, or both ends of the range, as overrides."""
        if self.choices:
            return [f"{self.key}={text}" for text in self.choices]
        return [self.override(int(end) if self.whole else float(end)) for end in (self.low, self.high)]

    @property
    def first(self) -> str:
        """One value, to compose a job with."""
        return self.ends[0]
