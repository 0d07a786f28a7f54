"""What a stage that is still being trained says: replies, and their variety, beside its validation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from plato2.config import DecodeConfig, UserError
from plato2.data.examples import Example, read_examples
from plato2.data.tokenizer import Tokenizer
from plato2.model.networks import Generator
from plato2.talk.bot import PlatoBot
from plato2.talk.variety import variety

if TYPE_CHECKING:  # a report needs no Lightning
    from pytorch_lightning import LightningModule

    from plato2.stages import Stage


class PreparedData(Protocol):
    """What is needed of a data module."""

    path: str
    cache_dir: str | None

    def save_tokenizer(self, folder: Path) -> None:
        """Copies the corpus's tokenizer into a folder."""


class ValidationReplies:
    """Answers the same validation contexts again and again: a callable for a training callback.

    Args:
        data: the corpus; read at the first call.
        n_contexts: contexts to answer, spread over the validation split.
        n_candidates: candidates to show of each.
    """

    def __init__(self, data: PreparedData, n_contexts: int, n_candidates: int = 3) -> None:
        self.data, self.n_contexts, self.n_candidates = data, n_contexts, n_candidates
        self.tokenizer: Tokenizer | None = None
        self.examples: list[Example] = []

    def __call__(self, stage: LightningModule) -> list[dict[str, Any]]:
        """See `sample_replies`."""
        from plato2.stages import Stage

        assert isinstance(stage, Stage)
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.data)
            self.examples = read_examples(
                self.data.path, self.tokenizer, self.n_contexts, cache_dir=self.data.cache_dir
            )
        contexts = [example.turns for example in self.examples]
        references = [example.reference for example in self.examples]
        return sample_replies(stage, self.tokenizer, contexts, references, self.n_candidates)


class ValidationVariety:
    """Measures what talking shows of the latents on the same validation contexts again and again.

    Args:
        data: the corpus; read at the first call.
        n_contexts: contexts to answer, spread over the validation split.
    """

    def __init__(self, data: PreparedData, n_contexts: int) -> None:
        self.data, self.n_contexts = data, n_contexts
        self.tokenizer: Tokenizer | None = None
        self.contexts: list[list[int]] = []

    def __call__(self, stage: LightningModule) -> dict[str, float]:
        """Means over the contexts, by name; training goes on bit for bit, as after `sample_replies`.

        Raises:
            UserError: no validation context is short enough for the model.
        """
        self.tokenizer = self.tokenizer or tokenizer_of(self.data)
        generator = cast(Generator, stage)
        bot = PlatoBot(generator, self.tokenizer)
        self.contexts = self.contexts or validation_contexts(
            self.data.path, bot, self.n_contexts, self.data.cache_dir
        )
        with evaluating(stage):
            found = variety(generator, self.contexts, sampling=bot.decode_config)
        return {
            "greedy_different": found.greedy_different.mean,
            "greedy_distinct_2": found.greedy_distinct_2.mean,
            "distinct_2_between_z": found.distinct_2_between_z.mean,
            "distinct_2_within_z": found.distinct_2_within_z.mean,
        }


def sample_replies(
    stage: Stage,
    tokenizer: Tokenizer,
    contexts: Sequence[Sequence[str]],
    references: Sequence[str],
    n_candidates: int = 3,
    decode: DecodeConfig | None = None,
) -> list[dict[str, Any]]:
    """The candidates of each context beside what a human said.

    Training mode is restored and no random number of the run is used, so training goes on bit for bit.

    Args:
        stage: a `2_gen` or `1_coarse` stage, on any device.
        tokenizer: its tokenizer.
        contexts: turns of each conversation.
        references: what a human said.
        n_candidates: how many candidates to keep, the most probable first (of a stage-1 model: to sample).
        decode: how to sample.

    Returns:
        `{"context", "reference", "candidates": [{"text", "latent", "log_prob", "coherence"}]}`, one per
        context.
    """
    config = decode or DecodeConfig(n_candidates=n_candidates)
    with evaluating(stage):
        replies = PlatoBot(cast(Generator, stage), tokenizer, decode=config).reply_batch(contexts)
    return [
        {
            "context": list(context),
            "reference": reference,
            "candidates": [candidate.to_dict() for candidate in reply.candidates[:n_candidates]],
        }
        for context, reference, reply in zip(contexts, references, replies, strict=True)
    ]


def validation_contexts(
    data: str | Path, bot: PlatoBot, n: int, cache_dir: str | Path | None = None
) -> list[list[int]]:
    """Up to n contexts, spread over the validation split, that the bot's model has positions for.

    Raises:
        UserError: there is none, or as `read_examples`.
    """
    examples = read_examples(data, bot.tokenizer, n, max_context=bot.max_context, cache_dir=cache_dir)
    if not examples:
        raise UserError(
            f"latent contexts {n}: no validation context of {data} has at most {bot.max_context} tokens, "
            "half of the model's positions; use 0 or a model with a larger max_position"
        )
    return [example.context_ids for example in examples]


def tokenizer_of(data: PreparedData) -> Tokenizer:
    """The corpus's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        data.save_tokenizer(Path(folder))
        return Tokenizer.load(folder)


@contextmanager
def evaluating(stage: LightningModule) -> Iterator[None]:
    """Evaluation mode; afterwards each part is in the mode it was in."""
    modes = {module: module.training for module in stage.modules()}
    stage.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
