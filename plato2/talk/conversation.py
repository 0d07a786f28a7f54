"""A conversation of a person with a bot, as the terminal and the web page keep it.

    conversation = Conversation()
    reply = bot.reply([*conversation.turns, "hi"])
    conversation = conversation.answered("hi", reply, bot.decode_config, asked_at=now())
    conversation = conversation.choose(2)

Nothing changes a conversation; each step makes a new one. So a step that fails leaves the old one as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plato2.config import DecodeConfig

if TYPE_CHECKING:  # importing torch takes seconds
    from plato2.talk.bot import Reply
    from plato2.talk.rank import Candidate


@dataclass(frozen=True)
class Exchange:
    """A message and what was said to it."""

    message: str
    asked_at: str
    reply: Reply
    answered_at: str
    decode: DecodeConfig
    chosen: int | None
    """Rank of the candidate that the conversation continues from, 1 = best; None where the filter refused."""

    @property
    def candidate(self) -> Candidate | None:
        """The candidate that the conversation continues from."""
        return None if self.chosen is None else self.reply.candidates[self.chosen - 1]

    @property
    def text(self) -> str:
        """What the bot said: the candidate, or the refusal."""
        candidate = self.candidate
        return self.reply.text if candidate is None else candidate.text


@dataclass(frozen=True)
class Conversation:
    """Messages and what was said to them, oldest first."""

    exchanges: tuple[Exchange, ...] = ()

    @property
    def turns(self) -> list[str]:
        """All that was said, oldest first: message, reply, message, reply, ..."""
        return [text for exchange in self.exchanges for text in (exchange.message, exchange.text)]

    @property
    def last(self) -> Exchange | None:
        """The last exchange; None if nothing has been said yet."""
        return self.exchanges[-1] if self.exchanges else None

    def answered(self, message: str, reply: Reply, decode: DecodeConfig, asked_at: str) -> Conversation:
        """With one more exchange, answered now. Ids of candidates are not kept: a conversation may be long.

        Args:
            message: what the person said.
            reply: the reply to all turns and the message.
            decode: how its candidates were found.
            asked_at: when the message came, from `now`.
        """
        slim = [replace(candidate, token_ids=()) for candidate in reply.candidates]
        chosen = None if reply.is_refusal else 1
        exchange = Exchange(message, asked_at, replace(reply, candidates=slim), now(), decode, chosen)
        return Conversation((*self.exchanges, exchange))

    def choose(self, rank: int) -> Conversation:
        """Continued from another candidate of the last reply, by its rank, 1 = best."""
        return Conversation((*self.exchanges[:-1], replace(self.exchanges[-1], chosen=rank)))

    def undo(self) -> Conversation:
        """Without the last message and its reply."""
        return Conversation(self.exchanges[:-1])

    def export(self, held: Callable[[Candidate], bool]) -> str:
        """A line of JSON for each turn; see docs/page.md.

        Args:
            held: whether a candidate's text is not to be seen, such as `PlatoBot.holds_back`.
        """
        lines: list[dict[str, Any]] = []
        for exchange in self.exchanges:
            reply = exchange.reply
            lines.append({"role": "user", "text": exchange.message})
            lines.append(
                {
                    "role": "bot",
                    "text": exchange.text,
                    "chosen": exchange.chosen,
                    "candidates": [c.to_dict(ranking=True, held=held(c)) for c in reply.candidates],
                    "flags": [asdict(flag) for flag in reply.flags],
                    "settings": asdict(exchange.decode),
                    "seen": reply.seen,
                    "timing": asdict(reply.timing),
                }
            )
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def to_dict(self, models: Mapping[str, str | None], decode: DecodeConfig) -> dict[str, Any]:
        """One dialogue in plain values; see docs/talk.md.

        Args:
            models: the names of the bot's models.
            decode: the settings as they are now; a turn names those that were others.
        """
        settings, turns = asdict(decode), []
        for exchange in self.exchanges:
            turns.append({"speaker": "human", "text": exchange.message, "time": exchange.asked_at})
            answer: dict[str, Any] = {"speaker": "bot", "text": exchange.text, "time": exchange.answered_at}
            if exchange.candidate:
                answer |= exchange.candidate.to_dict() | {"rank": exchange.chosen}
            if exchange.reply.flags:
                answer["flags"] = [asdict(flag) for flag in exchange.reply.flags]
            others = {key: value for key, value in asdict(exchange.decode).items() if value != settings[key]}
            turns.append(answer | ({"settings": others} if others else {}))
        seed = settings.pop("seed")
        return {"turns": turns, "models": models, "settings": settings, "seed": seed, "saved_at": now()}

    def save(self, file: Path, models: Mapping[str, str | None], decode: DecodeConfig) -> bool:
        """Appends `to_dict` to a file as a line of JSON; False where nothing was in it before.

        Raises:
            OSError: the file cannot be written.
        """
        line = json.dumps(self.to_dict(models, decode), ensure_ascii=False).encode() + b"\n"
        with file.open("a+b") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(size - 1, 0))
            whole = opened.read(1) in (b"", b"\n")  # in case the last line there has no end
            opened.write(line if whole else b"\n" + line)
        return size > 0


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
