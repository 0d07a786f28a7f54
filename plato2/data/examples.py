"""A few samples of a prepared corpus as text, to look at or to answer."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plato2.config import UserError
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import EOS_ID, Tokenizer


@dataclass(frozen=True)
class Example:
    """A context and what a human said to it."""

    sample_id: int
    turns: list[str]
    """The context, oldest turn first."""
    context_ids: list[int]
    """[CLS] (turn [SEP])*, as prepared."""
    reference: str
    reference_ids: list[int]
    """Without [CLS] and [SEP]."""


def read_examples(
    folder: str | Path,
    tokenizer: Tokenizer,
    n: int,
    split: str = "valid",
    max_context: int | None = None,
    cache_dir: str | Path | None = None,
) -> list[Example]:
    """Up to n samples spread evenly over a split; the same ones at every call.

    Args:
        folder: a prepared corpus, local or fsspec address.
        tokenizer: the one it was prepared with.
        n: how many.
        split: `test`, `valid` or `train`.
        max_context: take the next sample instead of one with a longer context, counted in ids.
        cache_dir: where copies of remote shards are kept.

    Raises:
        UserError: no corpus, another tokenizer, an empty split, a damaged shard.
    """
    index = read_index(folder)
    if index.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{folder}: prepared with another tokenizer (sha256 {index.tokenizer_sha256[:12]}) than this "
            f"model's ({tokenizer.sha256[:12]}); give the data the model was trained on"
        )
    shards = index.splits[split].shards if split in index.splits else ()
    total = sum(shard.samples for shard in shards)
    if not total:
        raise UserError(f"{folder}: the {split} split is empty; prepare the corpus again with more dialogues")
    wanted = sorted({(2 * number + 1) * total // (2 * n) for number in range(n)})
    examples: list[Example] = []
    first = 0
    for shard in shards:
        here = [sample - first for sample in wanted if first <= sample < first + shard.samples]
        if here:
            samples = read_shard(folder, shard, first, cache_dir)
            fits = np.flatnonzero(samples.context_len <= (max_context or samples.context_len.max()))
            rows = [int(fits[fits >= row][0]) for row in here if (fits >= row).any()]
            for row in dict.fromkeys(rows):
                ids = samples.token_ids[samples.offsets[row] : samples.offsets[row + 1]].tolist()
                examples.append(_example(tokenizer, first + row, ids, int(samples.context_len[row])))
        first += shard.samples
    return examples


def split_to_measure(folder: str | Path, split: str | None) -> str:
    """The split that figures are made of: the one asked for, else test, or valid in a corpus without test.

    Raises:
        UserError: no corpus, or not such a split.
    """
    splits = [name for name in ("test", "valid") if name in read_index(folder).splits]
    if split is None and splits:
        return splits[0]
    if split not in splits:
        raise UserError(
            f"--split {split}: {folder} has {' and '.join(splits) or 'no split'} to measure on; give one it "
            "has, or prepare the corpus again"
        )
    return split


def _example(tokenizer: Tokenizer, sample_id: int, ids: list[int], context_len: int) -> Example:
    context, response = ids[:context_len], ids[context_len + 1 :]
    turns: list[list[int]] = [[]]
    for token in context[1:]:
        if token == EOS_ID:
            turns.append([])
        else:
            turns[-1].append(token)
    reference = response[:-1] if response[-1:] == [EOS_ID] else response
    texts = [tokenizer.decode(turn) for turn in turns[:-1]]  # every turn ends with [SEP]
    return Example(sample_id, texts, context, tokenizer.decode(reference), reference)
