"""A fixed set of contexts and their responses, in groups to choose among.

Choosing a context's own response among those of the other members of its group is how an evaluation model is
measured. A second set of groups has responses of about one length, so that length tells nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plato2.config import UserError
from plato2.data.shards import ShardIndex, read_index, read_shard
from plato2.data.tokenizer import BOS_ID, EOS_ID
from plato2.random import permutation

CANDIDATES = 10
"""Responses in a group: a context's own and nine others."""
MOST_SAMPLES = 65_536
"""A selection is made from this many samples of its split, or a shard's more."""
COUNTED_SAMPLES = 20_000
"""Words are counted in the responses of this many training samples, or a shard's more."""


class TooFewResponses(UserError):
    """A split is too small to choose from."""


@dataclass(frozen=True)
class Selection:
    """n contexts, each with its own response; no two responses are equal."""

    contexts: list[list[int]]
    """[CLS] (turn [SEP])*."""
    responses: list[list[int]]
    """[CLS] words [SEP]."""
    random: np.ndarray
    """(n / 10, 10) the members of each group."""
    matched: np.ndarray
    """(n / 10, 10) the same in groups of responses of about one length."""
    overlap: np.ndarray
    """(n, n) words that context i and response j share, rare ones counting more: the baseline."""


def read_selection(
    folder: str | Path, n: int, split: str = "valid", cache_dir: str | Path | None = None
) -> Selection:
    """The same set at every call.

    Args:
        folder: a prepared corpus, local or fsspec address.
        n: contexts; rounded up to a multiple of 10, or as many as there are.
        split: `test`, `valid` or `train`.
        cache_dir: where copies of remote shards are kept.

    Raises:
        UserError: no corpus.
        TooFewResponses: fewer than 10 different responses in the split.
    """
    index = read_index(folder)
    records = _records(folder, index, split, cache_dir, MOST_SAMPLES)
    first = {tuple(response): row for row, (_, response) in reversed(list(enumerate(records)))}
    rows = np.array(sorted(first.values()), dtype=np.int64)
    n_groups = min(-(-n // CANDIDATES), len(rows) // CANDIDATES)
    rows = rows[permutation(len(rows), key=0)][: n_groups * CANDIDATES]
    if not len(rows):
        raise TooFewResponses(
            f"{folder}: {len(first)} different responses in the {split} split, fewer than the {CANDIDATES} "
            "to choose from; prepare the corpus with more validation dialogues, or set selection=0"
        )
    contexts, responses = [records[row][0] for row in rows], [records[row][1] for row in rows]
    by_length = np.argsort([len(response) for response in responses], kind="stable")
    counted = _records(folder, index, "train", cache_dir, COUNTED_SAMPLES)
    rarity = inverse_document_frequency([response for _, response in counted], index.vocab_size)
    return Selection(
        contexts,
        responses,
        np.arange(len(rows)).reshape(-1, CANDIDATES),
        by_length.reshape(-1, CANDIDATES),
        overlap(contexts, responses, rarity),
    )


def inverse_document_frequency(texts: Sequence[Sequence[int] | np.ndarray], vocab_size: int) -> np.ndarray:
    """log((N + 1) / (n_w + 1)) of each word w, which is in n_w of N texts: (V,). Special ids have 0."""
    holds = np.zeros(vocab_size)
    for text in texts:
        holds[np.unique(text)] += 1
    rarity = np.log((len(texts) + 1) / (holds + 1))
    rarity[: max(BOS_ID, EOS_ID) + 1] = 0.0
    return rarity


def overlap(
    contexts: Sequence[Sequence[int] | np.ndarray],
    responses: Sequence[Sequence[int] | np.ndarray],
    rarity: np.ndarray,
) -> np.ndarray:
    """How much of each response's words is in each context: the simplest way to tell what belongs together.

    The cosine of tf-idf vectors of 0 or idf, without the context's norm, which is the same for all of its
    candidates: sum of idf(w)^2 over the words w of both, over the root of that sum over the response's.

    Args:
        contexts: n lists of ids.
        responses: m lists of ids.
        rarity: (V,) idf of each id.

    Returns:
        (n, m).
    """
    of_context, of_response = (
        np.stack([_weights(text, rarity) for text in texts]) for texts in (contexts, responses)
    )
    norm = np.maximum(np.linalg.norm(of_response, axis=1), 1e-12)
    return of_context @ of_response.T / norm


def _weights(text: Sequence[int] | np.ndarray, rarity: np.ndarray) -> np.ndarray:
    weights = np.zeros(len(rarity), dtype=np.float32)
    words = np.unique(text)
    weights[words] = rarity[words]
    return weights


def _records(
    folder: str | Path, index: ShardIndex, split: str, cache_dir: str | Path | None, n: int
) -> list[tuple[list[int], list[int]]]:
    """Context and response of the samples of a split, shard by shard until there are n."""
    records: list[tuple[list[int], list[int]]] = []
    for shard in index.splits[split].shards if split in index.splits else ():
        if len(records) >= n:
            break
        samples = read_shard(folder, shard, 0, cache_dir)
        for number, context_len in enumerate(samples.context_len.tolist()):
            ids = samples.token_ids[samples.offsets[number] : samples.offsets[number + 1]].tolist()
            records.append((ids[:context_len], ids[context_len:]))
    return records
