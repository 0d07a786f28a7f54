"""What the first pass over a corpus learns: counts, times and repeated messages, in a few bytes each."""

from __future__ import annotations

from array import array
from datetime import UTC, datetime
from hashlib import blake2b
from math import isnan, nan

import numpy as np

from plato2.config import UserError
from plato2.data.samples import Dialogue
from plato2.data.tokenizer import SENTENCE_BYTES
from plato2.prepare.clean import RepeatCounter
from plato2.prepare.corpora import ReadReport
from plato2.prepare.options import PrepareOptions
from plato2.prepare.splits import held_out


class Survey:
    """Counts over a corpus; `report` holds what could not be read."""

    def __init__(self, strict: bool) -> None:
        """Start with no dialogue; `strict` stops at the first broken record."""
        self.report = ReadReport(strict)
        self.messages = RepeatCounter()
        self.n_long = 0
        """Messages of more characters than SentencePiece trains on at once."""
        self.n_joined = 0
        """Turns that were joined to one of the same speaker before them."""
        self.n_turns = array("I")
        """Turns of each dialogue."""
        self.times = array("d")
        """Time of each dialogue, that of its first turn with one; nan without."""

        self.keys = array("Q")
        """Stand for the texts of each dialogue; case and white space do not count."""

        self.n_pairs = 0

        self.last_time = nan

    @property
    def n_dialogues(self) -> int:
        """Dialogues read."""
        return len(self.n_turns)

    def add(self, dialogue: Dialogue) -> None:
        """Count one dialogue."""
        times = [turn.time for turn in dialogue.turns if turn.time is not None]
        self.times.append(times[0] if times else nan)
        if times:
            self.last_time = max(times) if isnan(self.last_time) else max(self.last_time, *times)
        self.n_turns.append(len(dialogue.turns))
        self.n_pairs += max(0, len(dialogue.turns) - max(1, dialogue.first_response))
        keys = array("Q")
        for turn in dialogue.turns:
            keys.append(self.messages.add(turn.text))
            self.n_long += len(turn.text) > SENTENCE_BYTES
            self.n_joined += turn.n_joined
        self.keys.append(int.from_bytes(blake2b(keys.tobytes(), digest_size=8).digest(), "little"))

    def usable(self) -> np.ndarray:
        """Numbers of the dialogues with at least two turns."""
        return np.flatnonzero(np.frombuffer(self.n_turns, dtype=np.uint32) >= 2)

    def has_times(self) -> bool:
        """Whether each usable dialogue has a time."""
        return not np.isnan(np.frombuffer(self.times)[self.usable()]).any()

    def choose_splits(self, options: PrepareOptions) -> dict[str, np.ndarray]:
        """Whether each dialogue is in a split: train, valid or test.

        For validation are the latest ones, by time where all have one; for test random ones of the others.
        Dialogues of the same texts are not divided between training and test, nor validation and test.

        Raises:
            UserError: nothing would be left to train on.
        """
        usable = self.usable()
        n_valid = options.valid_dialogues or max(1, round(options.valid_fraction * len(usable)))
        n_test = options.test_dialogues or round(options.test_fraction * len(usable))
        if n_valid + n_test >= len(usable):
            raise UserError(self._too_few(options, n_valid))
        if self.has_times():
            usable = usable[np.argsort(np.frombuffer(self.times)[usable], kind="stable")]

        is_valid, is_test = (np.zeros(self.n_dialogues, dtype=bool) for _ in range(2))
        is_valid[usable[len(usable) - n_valid :]] = True
        keys = np.frombuffer(self.keys, dtype=np.uint64)
        others = usable[: len(usable) - n_valid]
        others = others[~np.isin(keys[others], keys[is_valid])]
        is_test[others] = held_out(keys[others], np.ones(len(others)), n_test)
        return {"train": ~(is_valid | is_test), "valid": is_valid, "test": is_test}

    def _too_few(self, options: PrepareOptions, n_valid: int) -> str:
        n = len(self.usable())
        asked = ["valid_dialogues" if options.valid_dialogues else "valid_fraction"]
        if n_valid < n:
            asked.append("test_dialogues" if options.test_dialogues else "test_fraction")
        given = ", ".join(f"{name}={getattr(options, name)}" for name in asked)
        dropped = self.report.sentence()
        return (
            f"{given}: the corpus {options.corpus} has {n} dialogue(s) of two or more turns and some must be "
            "left to train on; choose fewer or add dialogues" + (f"; {dropped}" if dropped else "")
        )

    def counts(self) -> dict[str, int]:
        """The beginning of the funnel, for the card."""
        return {
            "broken": self.report.n_broken,
            "dialogues": self.n_dialogues,
            "dialogues_of_two_or_more_turns": len(self.usable()),
            "turns": len(self.messages),
            "pairs": self.n_pairs,
        }

    def dates(self) -> dict[str, str]:
        """First and last day, where there are times."""
        times = np.frombuffer(self.times)
        if isnan(self.last_time) or not len(times):
            return {}
        days = {"first_day": float(np.nanmin(times)), "last_day": self.last_time}
        return {name: datetime.fromtimestamp(time, UTC).date().isoformat() for name, time in days.items()}
