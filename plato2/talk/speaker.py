"""Whoever can take part in a dialogue: history in, candidates out; PLATO-2 is one, its rivals are others.

`talk.self_chat` plays any `Speaker`; those of other models are in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from plato2.config import DecodeConfig

if TYPE_CHECKING:  # an API as a speaker needs no torch
    from torch import nn

    from plato2.talk.bot import PlatoBot

LogProbs = Callable[[Sequence[str], Sequence[str]], Sequence[tuple[float, int]]]
"""(turns of the context, oldest first; replies) -> of each reply a log-probability, summed over its tokens,
and how many those are."""
DIGITS = 6
"""Of the scores that are written: beyond them a float32 depends on what else is in the batch."""
SAMPLED_WEIGHTS = 1024
"""Values of each parameter that tell one model from another."""


@dataclass(frozen=True)
class Said:
    """What a speaker says to a history."""

    candidates: Sequence[Mapping[str, Any]] = ()
    """Best first, as they are written: text, latent, log_prob, coherence, and more if there is. None: nothing
    to say."""
    refusal: str | None = None
    """What it says instead of a candidate."""

    @property
    def text(self) -> str:
        """What is said if the listener can read everything; nothing to say is an empty text."""
        best = self.candidates[0]["text"] if self.candidates else ""
        return best if self.refusal is None else self.refusal


class Speaker(Protocol):
    """A system that replies.

    It is deterministic: the same history and seed give the same reply, whatever else is in the batch.
    """

    @property
    def name(self) -> str:
        """What its turns are marked with."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """How it finds candidates, without the seed; plain values."""

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """What it says to each history.

        Args:
            histories: the turns of each, oldest first; the last one is answered.
            seeds: one for each history.
        """

    def reads(self, text: str) -> bool:
        """Whether anything is left of a text once it is read."""

    def describe(self) -> dict[str, Any]:
        """What tells this model from others; plain values."""


@runtime_checkable
class Likely(Protocol):
    """A speaker that also says how probable a given reply is."""

    def likelihoods(self) -> dict[str, LogProbs]:
        """`forward`, log p(r|c), and where it has a model of that `backward`, log p(c|r)."""


@dataclass(frozen=True)
class PlatoSpeaker:
    """A PLATO-2 model as a speaker."""

    name: str
    """Where it was loaded from."""
    bot: PlatoBot
    decode: DecodeConfig
    """How to find candidates, but for the seed."""

    @property
    def settings(self) -> dict[str, Any]:
        """As `Speaker.settings`."""
        settings = asdict(self.decode)
        del settings["seed"]
        return settings

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """As `Speaker.reply_batch`."""
        return [
            Said(
                [c.to_dict(digits=DIGITS) for c in reply.candidates], reply.text if reply.is_refusal else None
            )
            for reply in self.bot.reply_batch(histories, self.decode, seeds)
        ]

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return bool(self.bot.tokenizer.encode(text))

    def describe(self) -> dict[str, Any]:
        """Hashes of its tokenizer and networks."""
        bot = self.bot
        networks = {"generation": bot.generation, "evaluation": bot.evaluation, "backward": bot.backward}
        hashes = {
            name: None if network is None else weights_hash(cast("nn.Module", network))
            for name, network in networks.items()
        }
        return {"tokenizer": bot.tokenizer.sha256[:16], **hashes}


def weights_hash(network: nn.Module) -> str:
    """Of some values of each parameter: another training differs in all of them."""
    found = sha256()
    for _, stored in sorted(network.state_dict().items()):
        weights = stored.dequantize() if hasattr(stored, "qdata") else stored  # see model/int8.py
        found.update(weights.flatten()[:SAMPLED_WEIGHTS].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
