"""The Python API: `PlatoBot.load(generation, evaluation).reply(["hi"])` -> the reply and all candidates.

    bot = PlatoBot.load("outputs/tiny-2_gen/RUN", "outputs/tiny-2_eval/RUN")
    reply = bot.reply(["hi , how was your day ?"])
    reply.text, [(c.text, c.latent, c.log_prob, c.coherence) for c in reply.candidates], reply.timing

In float32, the default, the same seed gives the same reply to the same context, in any batch.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from plato2.config import SMALL, DecodeConfig, RankConfig, UserError
from plato2.data.samples import Context, read_context
from plato2.data.tokenizer import MOST_UNREAD, Tokenizer
from plato2.model.int8 import quantise
from plato2.model.networks import EvaluationNetwork, Evaluator, GenerationNetwork, Generator, own_evaluator
from plato2.talk.decode import decode
from plato2.talk.rank import Candidate, doubt, rank, score_weights
from plato2.talk.safety import Flag, Safety
from plato2.weights.folder import (
    has_evaluation,
    load_backward,
    load_evaluation,
    load_generation,
    saved_tokenizer,
)

Network = TypeVar("Network", GenerationNetwork, EvaluationNetwork)
CONTEXTS_AT_ONCE = 16
"""Contexts decoded in one batch, fewer with several samples or beams of each latent; bounds the memory of
`reply_batch` and changes no result."""
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
"""What is computed in; with `int8` the matrices of the blocks are also kept as int8 (model/int8.py)."""


@dataclass(frozen=True)
class Timing:
    """Seconds the batch took in which a reply was found."""

    decode_s: float = 0.0
    rank_s: float = 0.0
    contexts: int = 0
    """Contexts in that batch."""


@dataclass(frozen=True)
class Reply:
    """What the bot says, and the other candidates."""

    text: str
    candidates: list[Candidate]
    """All candidates, best first; `text` is the first one's. Those that a safety filter blocks come last, and
    there are none where the message itself was blocked."""
    flags: tuple[Flag, ...] = ()
    """What the safety filter found in the message, and in candidates that would have been said."""
    timing: Timing = field(default=Timing(), compare=False)
    unread: float = 0.0
    """Share of the message's letters and numbers that the tokenizer cannot read."""
    seen: int = field(default=0, compare=False)
    """Turns of the conversation that the model read, the message included."""

    @property
    def warning(self) -> str | None:
        """A warning if the message was hardly read; the reply is then to what was left of it."""
        if self.unread <= MOST_UNREAD:
            return None
        return (
            f"the model cannot read {self.unread:.0%} of this message: its tokenizer was made for another "
            "language or script"
        )

    @property
    def is_refusal(self) -> bool:
        """Whether the safety filter left nothing to say but its refusal."""
        return all(candidate.flag for candidate in self.candidates) and any(
            flag.action == "block" for flag in self.flags
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: reply, candidates and timing; flags and a warning if there are any."""
        found: dict[str, Any] = {
            "reply": self.text,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "timing": asdict(self.timing),
        }
        found |= {"flags": [asdict(flag) for flag in self.flags]} if self.flags else {}
        return found | ({"warning": self.warning} if self.warning else {})


class PlatoBot:
    """A generation model, its tokenizer and, to pick among the candidates, an evaluation model.

    Args:
        generation: a `2_gen` or `plato` model (one candidate for each latent) or a `1_coarse` one (samples).
        tokenizer: the one all models were trained with.
        evaluation: a `2_eval` model; None ranks by the generation model's own coherence, or by
            log-probability if it has none.
        decode: how to find candidates; a model with room for fewer than `max_tokens` response tokens stops
            there.
        backward: a model of stage `backward`, for ranking by log p(c|r).
        rank: what to rank by.
        safety: a filter on messages and candidates.

    Raises:
        UserError: the models differ in vocabulary or length, or ranking needs one that is not given.
    """

    def __init__(
        self,
        generation: Generator,
        tokenizer: Tokenizer,
        evaluation: Evaluator | None = None,
        decode: DecodeConfig | None = None,
        backward: Generator | None = None,
        rank: RankConfig | None = None,
        safety: Safety | None = None,
    ) -> None:
        evaluation = own_evaluator(generation) if evaluation is None else evaluation
        self.generation, self.tokenizer, self.evaluation = generation, tokenizer, evaluation
        self.backward, self.rank_config, self.safety = backward, rank or RankConfig(), safety
        score_weights(self.rank_config, evaluation, backward)
        config = generation.model_config
        if config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the generation model {config.vocab_size}; "
                "give the tokenizer of its run"
            )
        for name, judge in (("evaluation", evaluation), ("backward", backward)):
            if judge is not None and judge.model_config.max_position < config.max_position:
                raise UserError(
                    f"the {name} model has {judge.model_config.max_position} positions, the generation "
                    f"model {config.max_position}: it cannot read all candidates; give one with as many"
                )
        self.max_context = (
            config.max_position // 2
        )  # the other half is the response's (docs/spec.md, Records)
        self.max_tokens = config.max_position - self.max_context
        self.decode_config = self.fitting(decode or DecodeConfig())

    @classmethod
    def load(
        cls,
        generation: str | Path = SMALL,
        evaluation: str | Path | None = None,
        device: str = "auto",
        decode: DecodeConfig | None = None,
        backward: str | Path | None = None,
        rank: RankConfig | None = None,
        safety: Safety | None = None,
        precision: str = "float32",
    ) -> "PlatoBot":
        """A bot from run folders, checkpoint files or model folders.

        Args:
            generation: a `2_gen`, `plato` or `1_coarse` model; `small` is the one that comes with plato2.
            evaluation: a `2_eval` model with the same tokenizer; None takes the one in `generation`: of a
                model folder that has two models, or of a model that ranks its own candidates.
            device: `auto` (the GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
            decode: how to find candidates.
            backward: a model of stage `backward` with the same tokenizer.
            rank: what to rank by.
            safety: a filter on messages and candidates.
            precision: `float32`, or `bfloat16`, which is faster; then the rest of a batch may change a last
                digit, and so a word. `int8` is for a CPU: slower than that, in less memory.

        Raises:
            UserError: a path, checkpoint, tokenizer, device or precision that does not fit.
        """
        where = pick_device(device)
        if precision not in PRECISIONS:
            raise UserError(f"--precision {precision}: use float32, bfloat16 or int8")
        if precision == "int8" and where.type != "cpu":
            raise UserError(f"--precision int8: is for a CPU, not {where}; use bfloat16, or --device cpu")

        def ready(network: Network) -> Network:
            network = network.to(where, PRECISIONS[precision])
            if precision == "int8":
                quantise(network.backbone)
            return network

        generator = ready(load_generation(generation, "--generation"))
        tokenizer = saved_tokenizer(generation)
        if evaluation is None and has_evaluation(generation):
            evaluation = generation
        for option, path in (("evaluation", evaluation), ("backward", backward)):
            theirs = tokenizer if path is None else saved_tokenizer(path)
            if theirs.sha256 != tokenizer.sha256:
                raise UserError(
                    f"--{option} {path}: trained with another tokenizer (sha256 {theirs.sha256[:12]}) than "
                    f"--generation {generation} ({tokenizer.sha256[:12]}); give runs of one curriculum"
                )
        judge = ready(load_evaluation(evaluation, "--evaluation", generator)) if evaluation else None
        reader = ready(load_backward(backward, "--backward", generator)) if backward else None
        return cls(generator, tokenizer, judge, decode, reader, rank, safety)

    @property
    def doubt(self) -> str | None:
        """Why the order of the candidates is not to be trusted, if that is known."""
        return doubt(getattr(self.evaluation, "figures", {})) if self.evaluation is not None else None

    def reply(self, context: Sequence[str], decode: DecodeConfig | None = None) -> Reply:
        """The reply to a conversation.

        Args:
            context: the turns so far, oldest first; the last one is answered. One text is one turn. Turns
                that do not fit into the model's context are dropped from the oldest on; a last turn that
                alone is too long keeps its end.
            decode: other settings than the bot's own.

        Raises:
            UserError: no turns, or nothing in the last one.
        """
        return self.reply_batch([context], decode)[0]

    def reply_batch(
        self,
        contexts: Sequence[Sequence[str]],
        decode: DecodeConfig | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """The replies to several conversations; each is what `reply` would have said.

        Args:
            contexts: the turns of each; one text is one turn.
            decode: other settings than the bot's own.
            seeds: one per conversation, instead of the settings'.

        Raises:
            UserError: as `reply`, or one text instead of a list of conversations.
        """
        if isinstance(contexts, str):
            raise UserError("reply_batch takes a list of conversations; reply answers one")
        return self.reply_to([self.read(context) for context in contexts], decode, seeds)

    def reply_to(
        self,
        contexts: Sequence[Context],
        decode: DecodeConfig | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """The replies to conversations that were `read`, with what the safety filter says of each message.

        Args:
            contexts: from `read`.
            decode: other settings than the bot's own.
            seeds: one per context, instead of the settings'.
        """
        safety = self.safety or Safety([])
        found = safety.check("input", [context.turns[-1] for context in contexts])
        flags = [() if rule is None else (safety.flag("input", rule),) for rule in found]
        replies = [Reply(safety.refusal, [], some) for some in flags]
        going = [n for n, some in enumerate(flags) if not any(flag.action == "block" for flag in some)]
        answers = self.reply_to_ids(
            [contexts[n].ids for n in going],
            [contexts[n].turns for n in going],
            decode,
            None if seeds is None else [seeds[n] for n in going],
        )
        for n, answer in zip(going, answers, strict=True):
            replies[n] = replace(answer, flags=flags[n] + answer.flags)
        return [
            replace(reply, unread=context.unread, seen=context.seen)
            for reply, context in zip(replies, contexts, strict=True)
        ]

    def reply_to_ids(
        self,
        contexts: Sequence[Sequence[int]],
        turns: Sequence[Sequence[str]] | None = None,
        decode: DecodeConfig | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """The replies to contexts that are ids already, [CLS] (turn [SEP])*, as in prepared data.

        Args:
            contexts: the ids.
            turns: everything said so far, as text; by default the text of `contexts`. See `rank`.
            decode: other settings than the bot's own.
            seeds: one per context, instead of the settings'.
        """
        config = self.decode_config if decode is None else self.fitting(decode)
        replies = []
        step = max(1, CONTEXTS_AT_ONCE // config.rows_per_latent)
        for start in range(0, len(contexts), step):
            part = slice(start, start + step)
            replies += self._reply(
                contexts[part],
                None if turns is None else turns[part],
                config,
                None if seeds is None else seeds[part],
            )
        return replies

    def read(self, context: Sequence[str]) -> Context:
        """A conversation, cut to the model's context.

        Raises:
            UserError: no turns, or nothing in the last one.
        """
        return read_context(context, self.tokenizer, self.max_context)

    def encode(self, context: Sequence[str]) -> list[int]:
        """The ids of `read`."""
        return self.read(context).ids

    def holds_back(self, candidate: Candidate) -> bool:
        """Whether the safety filter keeps a candidate from being said or seen."""
        return self.safety is not None and self.safety.output == "block" and candidate.flag is not None

    def fitting(self, decode: DecodeConfig) -> DecodeConfig:
        """The settings with `max_tokens` that the model has positions for."""
        most = min(decode.max_tokens, self.max_tokens)
        return replace(decode, max_tokens=most, min_tokens=min(decode.min_tokens, most))

    def _reply(
        self,
        contexts: Sequence[Sequence[int]],
        turns: Sequence[Sequence[str]] | None,
        config: DecodeConfig,
        seeds: Sequence[int] | None,
    ) -> list[Reply]:
        """One batch."""
        began = perf_counter()
        hypotheses = decode(self.generation, contexts, config, seeds)
        if config.stop:
            hypotheses = [[h.stopped(config.stop, self.tokenizer) for h in found] for found in hypotheses]
        decoded = perf_counter()
        ranked = rank(
            self.tokenizer, contexts, hypotheses, self.evaluation, turns, self.rank_config, self.backward
        )
        timing = Timing(decoded - began, perf_counter() - decoded, len(contexts))
        return [self._choose(candidates, timing) for candidates in ranked]

    def _choose(self, candidates: list[Candidate], timing: Timing) -> Reply:
        """The best candidate that the safety filter lets through."""
        if self.safety is None:
            return Reply(candidates[0].text, candidates, (), timing)
        found = self.safety.check("output", [candidate.text for candidate in candidates])
        candidates = [
            replace(candidate, flag=rule) for candidate, rule in zip(candidates, found, strict=True)
        ]
        if self.safety.output == "warn":
            said = found[0]
            flags = (self.safety.flag("output", said),) if said else ()
            return Reply(candidates[0].text, candidates, flags, timing)
        passed = [candidate for candidate in candidates if candidate.flag is None]
        before = candidates[: candidates.index(passed[0])] if passed else candidates
        passed_over = tuple(self.safety.flag("output", c.flag) for c in before if c.flag)
        text = passed[0].text if passed else self.safety.refusal
        return Reply(text, passed + [c for c in candidates if c.flag], passed_over, timing)


def pick_device(device: str) -> torch.device:
    """The device of that name; `auto` is the GPU if there is one.

    Raises:
        UserError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {device}: cannot be used here ({reason}); use auto or cpu") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: plato2 runs on cpu and cuda; use one of them or auto")
    return found
