"""What an evaluation model is worth: choosing a context's own response, and the best of a model's candidates.

Two questions, asked of fixed validation contexts. Which of ten responses is the context's own (nine are other
contexts')? And where does the human reply come among the 20 candidates that a generation model wrote itself?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch

from plato2.config import DecodeConfig, UserError
from plato2.data.selection import CANDIDATES, Selection, TooFewResponses, read_selection
from plato2.metrics import choice, wilson
from plato2.model.networks import Evaluator, Generator
from plato2.talk.decode import decode
from plato2.talk.rank import coherence_of_records
from plato2.weights.folder import load_generation

if TYPE_CHECKING:  # a report needs no Lightning
    from pytorch_lightning import LightningModule

CONTEXTS_AT_ONCE = 16
"""Contexts that are answered in one batch."""
GROUPS_AT_ONCE = 2
"""Groups whose pairs are read in one batch; bounds the memory and changes no result."""
CHANCE = {
    "pair_acc": 0.5,
    "p1": 1 / CANDIDATES,
    "mrr": sum(1 / rank for rank in range(1, CANDIDATES + 1)) / CANDIDATES,
}

Ids = Sequence[int]


def selection_figures(evaluation: Evaluator, selection: Selection) -> dict[str, float]:
    """`pair_acc`, `p1` and `mrr` of choosing among ten (metrics.choice), and the same among ten of about one
    length with `_matched`.

    Args:
        evaluation: an evaluation network, or a stage that ranks, in evaluation mode.
        selection: contexts and responses.
    """
    figures = choice(_scores(evaluation, selection, selection.random))
    matched = choice(_scores(evaluation, selection, selection.matched))
    return figures | {f"{name}_matched": value for name, value in matched.items()}


def overlap_figures(selection: Selection) -> dict[str, float]:
    """The same of the baseline, shared words."""
    figures = choice(_overlap(selection, selection.random))
    matched = choice(_overlap(selection, selection.matched))
    return figures | {f"{name}_matched": value for name, value in matched.items()}


def human_figures(
    evaluation: Evaluator, contexts: Sequence[Ids], human: Sequence[Ids], candidates: Sequence[Sequence[Ids]]
) -> dict[str, float]:
    """Where the human reply stands among a model's own candidates, by coherence alone.

    Args:
        evaluation: as `selection_figures`.
        contexts: n contexts as ids.
        human: n records of what a human said, [CLS] words [SEP].
        candidates: for each context the records that a generation model wrote, equally many for each.

    Returns:
        `human_first`: how often the human reply is the first of all, with its 95 % interval `human_first_low`
        and `human_first_high` and its `human_first_chance`; `human_rank`: its mean rank, 1 = first.
    """
    scores = np.array(
        [
            coherence_of_records(evaluation, [(context, record) for record in (reply, *written)])
            for context, reply, written in zip(contexts, human, candidates, strict=True)
        ]
    )  # (n, 1 + K)
    above = (scores[:, 1:] > scores[:, :1]).sum(axis=1)
    equal = (scores[:, 1:] == scores[:, :1]).sum(axis=1)
    first = float(((above == 0) / (1 + equal)).mean())
    low, high = wilson(first, len(scores))
    return {
        "human_first": first,
        "human_first_low": low,
        "human_first_high": high,
        "human_first_chance": 1 / scores.shape[1],
        "human_rank": float((1 + above + equal / 2).mean()),
    }


def written_candidates(
    generation: Generator, contexts: Sequence[Ids], config: DecodeConfig | None = None
) -> list[list[list[int]]]:
    """What a generation model would choose from: one record [CLS] words [SEP] per context and latent,
    or of a stage-1 model as many samples.

    Args:
        generation: a generation network, or a `2_gen` or `1_coarse` stage, in evaluation mode.
        contexts: their ids.
        config: how to decode; fewer tokens where the model has no positions for more.
    """
    config = config or DecodeConfig()
    limit = generation.model_config.max_position
    most = min(config.max_tokens, limit - max(map(len, contexts)))
    config = replace(config, max_tokens=most, min_tokens=min(config.min_tokens, most))
    records: list[list[list[int]]] = []
    for start in range(0, len(contexts), CONTEXTS_AT_ONCE):
        found = decode(generation, contexts[start : start + CONTEXTS_AT_ONCE], config)
        for context, hypotheses in zip(contexts[start:], found, strict=False):
            records.append([[1, *h.token_ids][: limit - len(context)] for h in hypotheses])
    return records


class PreparedData(Protocol):
    """What `ValidationFigures` asks of a data module."""

    path: str
    cache_dir: str | None


class ValidationFigures:
    """All of the above of a stage that is being trained: a callable for a training callback.

    Args:
        data: the corpus; read at the first call.
        n_selection: contexts to choose a response for among ten; 0 = none.
        n_human: contexts whose human reply is ranked among candidates; 0 = none.
        parent: the model that the stage started from; it writes the candidates if it can.
    """

    def __init__(
        self, data: PreparedData, n_selection: int, n_human: int, parent: Path | None = None
    ) -> None:
        self.data, self.n_selection, self.n_human, self.parent = data, n_selection, n_human, parent
        self.device = torch.device("cpu")

    def __call__(self, stage: LightningModule) -> dict[str, float]:
        """The figures by name."""
        evaluation, chosen, self.device = cast(Evaluator, stage), self.selection, stage.device
        figures: dict[str, float] = {}
        if chosen and self.n_selection:
            baseline = {f"overlap_{name}": value for name, value in overlap_figures(chosen).items()}
            figures |= selection_figures(evaluation, chosen) | baseline
        if chosen and self.candidates:
            n = len(self.candidates)
            figures |= human_figures(evaluation, chosen.contexts[:n], chosen.responses[:n], self.candidates)
        return figures

    @cached_property
    def selection(self) -> Selection | None:
        """The contexts, of the larger of the two numbers; None for 0, or where the corpus has too few."""
        n = max(self.n_selection, self.n_human)
        if not n:
            return None
        try:
            return read_selection(self.data.path, n, cache_dir=self.data.cache_dir)
        except TooFewResponses as error:
            from pytorch_lightning.utilities import rank_zero_warn

            rank_zero_warn(str(error))
            return None

    @cached_property
    def candidates(self) -> list[list[list[int]]]:
        """What the parent writes to the first contexts; nothing if it is not there or does not generate.

        It writes where the stage is trained: on a CPU beside a GPU it would take longer than the training.
        """
        if self.parent is None or not self.n_human or not self.selection:
            return []
        try:
            generation = load_generation(self.parent).to(self.device)
        except UserError as error:
            from pytorch_lightning.utilities import rank_zero_warn

            rank_zero_warn(f"human_rank={self.n_human}: nothing to rank among ({error})")
            return []
        return written_candidates(generation, self.selection.contexts[: self.n_human])


def _scores(evaluation: Evaluator, selection: Selection, groups: np.ndarray) -> np.ndarray:
    """p(l=1|c,r) of all contexts and responses of each group: (G, 10, 10)."""
    found: list[float] = []
    for start in range(0, len(groups), GROUPS_AT_ONCE):
        pairs = [
            (selection.contexts[i], selection.responses[j])
            for group in groups[start : start + GROUPS_AT_ONCE].tolist()
            for i in group
            for j in group
        ]
        found += coherence_of_records(evaluation, pairs)
    return np.array(found).reshape(len(groups), CANDIDATES, CANDIDATES)


def _overlap(selection: Selection, groups: np.ndarray) -> np.ndarray:
    return np.stack([selection.overlap[np.ix_(group, group)] for group in groups])
