"""Dialogue turns to the ids of one sample (docs/spec.md, Records).

context   c = [CLS] turn [SEP] turn [SEP] ...     type 0, whole turns kept from the right, <= max_context ids
response  r = [CLS] ids [SEP]                     type 1, cut on the right to max_response ids

A record is c + r in one list; `context_len` says where r starts. A response that is too long loses its
[SEP]: the model is not taught to stop in the middle of a sentence. The functions work on ids, so that
preparing data and talking to the model share them.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from plato2.config import UserError
from plato2.data.tokenizer import BOS_ID, EOS_ID, Tokenizer


@dataclass
class Turn:
    """One message of a dialogue."""

    text: str
    speaker: str | None = None
    time: float | None = None
    """Seconds since 1970, UTC."""
    knowledge: list[str] = field(default_factory=list)
    """Texts this turn was written with."""
    n_joined: int = 0
    """Turns of the same speaker right after it that a reader joined to it."""


@dataclass
class Dialogue:
    """One conversation, as a corpus reader yields it."""

    turns: list[Turn]
    persona: dict[str | None, list[str]] = field(default_factory=dict)
    """Profile sentences by speaker; under None: of whoever responds."""
    id: str | None = None
    first_response: int = 1
    """The first turn that may be a response; the turns before it are context only."""


def as_texts(texts: str | Sequence[str]) -> Sequence[str]:
    """A list of texts; one text becomes a list of that text, not of its letters.

    Raises:
        UserError: something else, such as messages of a chat API, bytes or a generator.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray | memoryview):
        raise UserError(f"{reprlib.repr(texts)}: give one text (str), or a list of texts")
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"text {n} of the list is {reprlib.repr(text)}: give texts (str) only")
    return texts


@dataclass(frozen=True)
class Context:
    """A conversation whose last turn is to be answered, as a model reads it."""

    turns: Sequence[str]
    """Everything said so far, oldest first."""
    ids: list[int]
    """[CLS] (turn [SEP])* of the turns that fit."""
    is_cut: bool
    """Whether that is less than everything said."""
    unread: float
    """Share of the last turn's letters and numbers that the tokenizer cannot read."""

    @property
    def seen(self) -> int:
        """Turns that fit, the last one included."""
        return self.ids.count(EOS_ID)


def read_context(turns: str | Sequence[str], tokenizer: Tokenizer, max_context: int = 128) -> Context:
    """A conversation, cut to what a model can read. Each turn is cut into tokens once.

    Args:
        turns: oldest first; one text is one turn. Turns that do not fit are dropped from the oldest on; a
            last turn that alone is too long keeps its end.
        tokenizer: the model's.
        max_context: ids.

    Raises:
        UserError: no turns, nothing in the last one, or not texts.
    """
    turns = as_texts(turns)
    ids = tokenizer.encode_batch(turns[-max_context:])  # a turn that fits takes one id at least, its [SEP]
    if not ids or not ids[-1]:
        raise UserError("the message is empty: give at least one word to answer")
    context = encode_context(ids, max_context, cut_turn=True)
    assert context is not None  # cut_turn
    is_cut = context.count(EOS_ID) < len(turns) or len(ids[-1]) > max_context - 2
    return Context(turns, context, is_cut, tokenizer.unread_share(turns[-1], ids[-1]))


def encode_context(
    turns: Sequence[Sequence[int]],
    max_context: int = 128,
    *,
    cut_turn: bool = False,
    truncate_first_turn: bool = False,
) -> list[int] | None:
    """Context ids [CLS] (turn [SEP])*, at most `max_context` of them.

    Whole turns are kept from the right; the older ones are dropped. None when not even the last turn fits.

    Args:
        turns: ids of each turn, oldest first, without special ids. A turn may be empty.
        max_context: ids kept, [CLS] and every [SEP] included.
        cut_turn: when the last turn alone is too long, keep its end instead of losing the sample.
        truncate_first_turn: Knover's option: when the oldest turn is the one that overflows, keep its
            beginning, as much as fits (its last kept id gives way to [SEP]).
    """
    first_kept, total = len(turns), 1
    while first_kept > 0 and total + len(turns[first_kept - 1]) + 1 <= max_context:
        first_kept -= 1
        total += len(turns[first_kept]) + 1
    ids = [BOS_ID]
    room = max_context - total
    if truncate_first_turn and first_kept == 1 and room > 0:
        ids += [*turns[0][: room - 1], EOS_ID]
    elif first_kept == len(turns):
        if not (cut_turn and turns and max_context > 2):
            return None
        return [BOS_ID, *turns[-1][-(max_context - 2) :], EOS_ID]
    for turn in turns[first_kept:]:
        ids += turn
        ids.append(EOS_ID)
    return ids


def encode_response(ids: Sequence[int], max_response: int = 128) -> list[int]:
    """Response ids [CLS] ids [SEP], cut on the right: a long response has no [SEP]."""
    return [BOS_ID, *ids, EOS_ID][:max_response]


def encode_prefix(ids: Sequence[int] = (), max_response: int = 128) -> list[int]:
    """What a decoder starts from: [CLS], or [CLS] and the beginning of a response; no [SEP]."""
    return [BOS_ID, *ids][:max_response]
