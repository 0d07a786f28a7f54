"""The Python API: `PlatoBot.load(generation, evaluation).reply(["hi"])` -> the reply and all candidates.

    bot = PlatoBot.load("outputs/tiny-2_gen/RUN", "outputs/tiny-2_eval/RUN")
    reply = bot.reply(["hi , how was your day ?"])
    reply.text, [(c.text, c.latent, c.log_prob, c.coherence) for c in reply.candidates]

Everything runs in float32: the same seed gives the same reply to the same context, in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plato2.config import DecodeConfig, UserError
from plato2.data.samples import encode_context
from plato2.data.tokenizer import Tokenizer
from plato2.model.networks import Evaluator, Generator
from plato2.talk.decode import decode
from plato2.talk.rank import Candidate, rank
from plato2.weights.folder import has_evaluation, load_evaluation, load_generation, saved_tokenizer

CONTEXTS_AT_ONCE = 16
"""Contexts decoded in one batch, fewer with several samples or beams of each latent; bounds the memory of
`reply_batch` and changes no result."""


@dataclass(frozen=True)
class Reply:
    """What the bot says, and what else it could have said."""

    text: str
    candidates: list[Candidate]
    """All candidates, best first; `text` is the first one's."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: `{"reply": ..., "candidates": [...]}`."""
        return {"reply": self.text, "candidates": [as_dict(candidate) for candidate in self.candidates]}


def as_dict(candidate: Candidate) -> dict[str, Any]:
    """A candidate in plain values: text, latent, log_prob, coherence."""
    return {
        "text": candidate.text,
        "latent": candidate.latent,
        "log_prob": candidate.log_prob,
        "coherence": candidate.coherence,
    }


class PlatoBot:
    """A generation model, its tokenizer and, to pick among the candidates, an evaluation model.

    Args:
        generation: a `2_gen` model (one candidate for each latent) or a `1_coarse` model (samples).
        tokenizer: the one both models were trained with.
        evaluation: a `2_eval` model; None ranks by log-probability.
        decode: how to sample; a model with room for fewer than `max_tokens` response tokens stops there.

    Raises:
        UserError: the models differ in vocabulary or length.
    """

    def __init__(
        self,
        generation: Generator,
        tokenizer: Tokenizer,
        evaluation: Evaluator | None = None,
        decode: DecodeConfig | None = None,
    ) -> None:
        self.generation, self.tokenizer, self.evaluation = generation, tokenizer, evaluation
        decode = decode or DecodeConfig()
        config = generation.model_config
        if config.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the generation model {config.vocab_size}; "
                "give the tokenizer of its run"
            )
        if evaluation is not None and evaluation.model_config.max_position < config.max_position:
            raise UserError(
                f"the evaluation model has {evaluation.model_config.max_position} positions, the generation "
                f"model {config.max_position}: it cannot read all candidates; give one with as many"
            )
        self.max_context = config.max_position // 2  # the other half is the response's (spec section 2)
        room = config.max_position - self.max_context
        self.decode_config = replace(decode, max_tokens=min(decode.max_tokens, room))

    @classmethod
    def load(
        cls,
        generation: str | Path,
        evaluation: str | Path | None = None,
        device: str = "auto",
        decode: DecodeConfig | None = None,
    ) -> "PlatoBot":
        """A bot from run folders, checkpoint files or model folders.

        Args:
            generation: a `2_gen` or `1_coarse` model.
            evaluation: a `2_eval` model with the same tokenizer; None takes the one in `generation` when
                that is a model folder that has one.
            device: `auto` (the GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
            decode: how to sample.

        Raises:
            UserError: a path, checkpoint, tokenizer or device that does not fit.
        """
        where = pick_device(device)
        generator, tokenizer = load_generation(generation, "--generation"), saved_tokenizer(generation)
        if evaluation is None and has_evaluation(generation):
            evaluation = generation
        judge = None
        if evaluation is not None:
            judge = load_evaluation(evaluation, "--evaluation").to(where)
            theirs = saved_tokenizer(evaluation)
            if theirs.sha256 != tokenizer.sha256:
                raise UserError(
                    f"--evaluation {evaluation}: trained with another tokenizer (sha256 "
                    f"{theirs.sha256[:12]}) than --generation {generation} ({tokenizer.sha256[:12]}); give "
                    "runs of one curriculum"
                )
        return cls(generator.to(where), tokenizer, judge, decode)

    def reply(self, context: Sequence[str]) -> Reply:
        """The reply to a conversation.

        Args:
            context: the turns so far, oldest first; the last one is answered. Turns that do not fit into
                the model's context are dropped from the oldest on; a last turn that alone is too long keeps
                its end.

        Raises:
            UserError: no turns, or nothing in the last one.
        """
        return self.reply_batch([context])[0]

    def reply_batch(self, contexts: Sequence[Sequence[str]]) -> list[Reply]:
        """The replies to several conversations; each is what `reply` would have said.

        Raises:
            UserError: as `reply`.
        """
        return self.reply_to_ids([self.encode(context) for context in contexts], contexts)

    def reply_to_ids(
        self, contexts: Sequence[Sequence[int]], turns: Sequence[Sequence[str]] | None = None
    ) -> list[Reply]:
        """The replies to contexts that are ids already, [CLS] (turn [SEP])*, as in prepared data.

        Args:
            contexts: the ids.
            turns: all that was said, as text; by default the text of `contexts`. See `rank`.
        """
        replies = []
        rows = (
            self.decode_config.beam_size
            if self.decode_config.strategy == "beam"
            else self.decode_config.n_samples
        )
        step = max(1, CONTEXTS_AT_ONCE // rows)
        for start in range(0, len(contexts), step):
            some = contexts[start : start + step]
            hypotheses = decode(self.generation, some, self.decode_config)
            said = None if turns is None else turns[start : start + step]
            penalties = self.decode_config.penalties
            for candidates in rank(self.tokenizer, some, hypotheses, self.evaluation, said, penalties):
                replies.append(Reply(candidates[0].text, candidates))
        return replies

    def encode(self, context: Sequence[str]) -> list[int]:
        """Context ids of a conversation, cut to the model's context.

        Raises:
            UserError: no turns, or nothing in the last one.
        """
        turns = self.tokenizer.encode_batch(context[-self.max_context :])  # a turn has one id at least
        if not turns or not turns[-1]:
            raise UserError("the message is empty: give at least one word to answer")
        ids = encode_context(turns, self.max_context, cut_turn=True)
        assert ids is not None  # cut_turn
        return ids


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
