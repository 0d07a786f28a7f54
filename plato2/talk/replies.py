"""Replies of a stage that is still being trained, for a table beside its validation."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from pytorch_lightning import LightningModule

from plato2.config import DecodeConfig
from plato2.data.examples import Example, read_examples
from plato2.data.tokenizer import Tokenizer
from plato2.model.networks import Generator
from plato2.stages import Stage
from plato2.talk.bot import PlatoBot, as_dict


class PreparedData(Protocol):
    """What `ValidationReplies` asks of a data module."""

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
        assert isinstance(stage, Stage)
        if self.tokenizer is None:
            with tempfile.TemporaryDirectory() as folder:
                self.data.save_tokenizer(Path(folder))
                self.tokenizer = Tokenizer.load(folder)
            self.examples = read_examples(
                self.data.path, self.tokenizer, self.n_contexts, cache_dir=self.data.cache_dir
            )
        contexts = [example.turns for example in self.examples]
        references = [example.reference for example in self.examples]
        return sample_replies(stage, self.tokenizer, contexts, references, self.n_candidates)


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
        One `{"context", "reference", "candidates": [{"text", "latent", "log_prob", "coherence"}]}` a context.
    """
    config = decode or DecodeConfig(n_candidates=n_candidates)
    modes = {module: module.training for module in stage.modules()}
    stage.eval()
    try:
        replies = PlatoBot(cast(Generator, stage), tokenizer, decode=config).reply_batch(contexts)
    finally:
        for module, training in modes.items():
            module.training = training
    return [
        {
            "context": list(context),
            "reference": reference,
            "candidates": [as_dict(candidate) for candidate in reply.candidates[:n_candidates]],
        }
        for context, reference, reply in zip(contexts, references, replies, strict=True)
    ]
