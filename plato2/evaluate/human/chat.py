"""Those whom raters meet: every system replies in a thread of its own, one turn at a time.

A rater's turn is on the disk before its reply is sought, and a reply is saved only where none stands. So a
server that is killed meanwhile loses nothing: the page asks again after it is back, and one reply is kept.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from plato2.config import UserError
from plato2.evaluate.human.formats import Item
from plato2.evaluate.human.store import Store
from plato2.evaluate.speakers import read_speaker
from plato2.talk.table import printable

if TYPE_CHECKING:
    from plato2.talk.speaker import Speaker

SLOW_S = 30.0
"""Seconds after which the page says that a reply takes long."""

Standing = Literal["yours", "writing", "slow", "failed"]
"""Of a chat: it is the rater's turn, a reply is sought, has been for long, or could not be found."""


@dataclass
class _Asked:
    """A turn that wants a reply."""

    rater: str
    item: str
    place: int
    """Of the reply."""
    since: float
    tries: int = 0
    failed: bool = False


class Partners:
    """The systems of a study, each loaded when it is first met.

    Args:
        store: the study.
        load: makes a system of KIND:WHERE.
        slow_s: seconds after which a reply is slow.
    """

    def __init__(
        self,
        store: Store,
        load: Callable[[str, str], Speaker] = read_speaker,
        slow_s: float = SLOW_S,
    ) -> None:
        self.store, self.load, self.slow_s = store, load, slow_s
        self.trouble: dict[str, str] = {}
        """System -> the last thing that went wrong with it."""
        self._asked: dict[tuple[str, str], _Asked] = {}
        self._lock = threading.Lock()
        self._queues: dict[str, queue.SimpleQueue[_Asked]] = {}
        self._working: set[str] = set()

    @property
    def is_working(self) -> bool:
        """Whether a reply is being sought; the threads cannot be stopped."""
        return bool(self._working)

    def standing(self, rater: str, item: Item) -> Standing:
        """Whose turn it is in a chat; seeks a reply where one is wanted."""
        n_said = len(item.shown[0].turns)
        if n_said % 2 == 0:
            return "yours"
        with self._lock:
            asked = self._asked.get((rater, item.id))
            if asked is None or asked.place != n_said:
                asked = _Asked(rater, item.id, n_said, time.monotonic())
                self._seek(asked, item.shown[0].system)
            if asked.failed:
                return "failed"
            return "slow" if time.monotonic() - asked.since > self.slow_s else "writing"

    def retry(self, rater: str, item: Item) -> None:
        """Seeks a reply again where none was found; else one is being sought already."""
        with self._lock:
            asked = self._asked.get((rater, item.id))
            if asked is not None and asked.failed:
                again = _Asked(rater, item.id, asked.place, time.monotonic(), asked.tries + 1)
                self._seek(again, item.shown[0].system)

    def _seek(self, asked: _Asked, system: str) -> None:
        self._asked[asked.rater, asked.item] = asked
        if system not in self._queues:
            self._queues[system] = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(system,), daemon=True).start()
        self._queues[system].put(asked)

    def _work(self, system: str) -> None:
        """Replies to one turn after the other."""
        speaker = None
        while True:
            asked = self._queues[system].get()
            self._working.add(system)
            try:
                speaker = speaker or self._loaded(system)
                self._reply(speaker, asked)
            except Exception as error:  # whatever a model can do wrong: the others go on
                asked.failed = True
                self.trouble[system] = str(error) if isinstance(error, UserError) else repr(error)
                told = printable(f"{system}: no reply in chat {asked.item}: {self.trouble[system]}")
                with contextlib.suppress(OSError):  # nobody reads it; else the system would never reply again
                    print(told, file=sys.stderr)
            finally:
                self._working.discard(system)

    def _loaded(self, system: str) -> Speaker:
        assert self.store.tasks.chat is not None
        return self.load(self.store.tasks.chat.speakers[system], "speaker")

    def _reply(self, speaker: Speaker, asked: _Asked) -> None:
        """Finds a reply and saves it.

        Raises:
            UserError: it has nothing to say, or whatever the system finds wrong.
        """
        said = self.store.said(asked.rater, asked.item)
        if len(said) == asked.place:  # else it was answered before the server was killed
            seed = _seed(self.store.tasks.seed, asked)
            text = " ".join(speaker.reply_batch([said], [seed])[0].text.split())
            if not text:
                raise UserError("it has nothing to say")
            self.store.reply(asked.rater, asked.item, asked.place, text)
        with self._lock:
            if self._asked.get((asked.rater, asked.item)) is asked:  # not if the rater has gone on meanwhile
                del self._asked[asked.rater, asked.item]


def _seed(seed: int, asked: _Asked) -> int:
    """Of a turn, a function of these alone; another one where a reply is sought again."""
    key = f"{seed}/{asked.item}/{asked.rater}/{asked.place}/{asked.tries}"
    return int.from_bytes(blake2b(key.encode(), digest_size=7).digest(), "big")
