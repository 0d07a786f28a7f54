"""What table 8 chooses among: DailyDialog++, and the held-out conversations of a prepared corpus.

A corpus has one right reply for each context, so the wrong ones are replies of other conversations, drawn in
two ways: at random, and those of nearly the same length, where length tells nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from plato2.config import UserError
from plato2.data.samples import Dialogue
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import EOS_ID, Tokenizer
from plato2.evaluate.candidates import Query, read_queries
from plato2.prepare.corpora import ReadReport, read_corpus
from plato2.prepare.options import PrepareOptions
from plato2.prepare.survey import Survey

WRONG = 9
"""Wrong replies of a context, of each kind."""
NAMES = {
    "dev random": "DailyDialog++ random",
    "dev adversarial": "DailyDialog++ adversarial",
}


@dataclass(frozen=True)
class Source:
    """Contexts with their candidates."""

    name: str
    queries: list[Query]
    other: list[int]
    """For each context the number of one of another dialogue, for a control."""
    about: dict[str, Any]
    """How it came about."""


def dailydialog(path: Path, limit: int | None) -> Source:
    """DailyDialog++: five right replies, five random and five adversarial wrong ones; each line is of another
    dialogue."""
    queries = [
        replace(query, sets={NAMES.get(name, name): numbers for name, numbers in query.sets.items()})
        for query in read_queries(path, "dailydialog++")[:limit]
    ]
    n = len(queries)
    return Source("dailydialog", queries, [(number + n // 2) % n for number in range(n)], {"contexts": n})


def held_out(data: Path, n: int, seed: int) -> Source:
    """Contexts of the test split, each with its own reply, nine random ones and nine of about its length.

    Wrong replies are of other conversations and differ from the right one and from each other. Left out are
    samples whose reply was cut, those that two test conversations share, and of those with the same reply all
    but one.

    Args:
        data: a prepared corpus with a test split, whose source is still there.
        n: contexts; fewer where there are fewer.
        seed: of the draw.

    Raises:
        UserError: no test split.
    """
    random = np.random.default_rng(seed)
    tokenizer = Tokenizer.load(data / "tokenizer")
    conversation_of = _conversations(data, tokenizer)
    samples = list(records(data, "test"))
    found: dict[tuple[int, ...], tuple[list[list[int]], int]] = {}  # by reply
    left_out = {"cut": 0, "of no or several conversations": 0, "the same reply": 0}
    for place in random.permutation(len(samples)):
        context, response = samples[place]
        turns, reply = _turns(context), tuple(response[1:-1])
        if response[-1] != EOS_ID:
            left_out["cut"] += 1
        elif len(said_in := conversation_of[tuple(turns[-1]), reply]) != 1:
            left_out["of no or several conversations"] += 1
        elif reply in found:
            left_out["the same reply"] += 1
        else:
            found[reply] = turns, next(iter(said_in))
    replies, conversation = list(found), np.array([number for _, number in found.values()])
    length = np.array([len(reply) for reply in replies])
    texts = [tokenizer.decode(reply) for reply in replies]
    queries, other, differences = [], [], []
    for own, (turns, number) in enumerate(list(found.values())[:n]):
        others = random.permutation(np.flatnonzero(conversation != number))
        near = others[np.argsort(np.abs(length[others] - length[own]), kind="stable")][:WRONG]
        candidates = [own, *others[:WRONG], *near]
        queries.append(_query([tokenizer.decode(turn) for turn in turns], [texts[one] for one in candidates]))
        differences.append(np.abs(length[candidates] - length[own])[1:].reshape(2, WRONG).mean(axis=1))
        other.append(next(int(one) for one in others if one < n))
    about = {
        "contexts": len(queries),
        "conversations": len({*conversation[: len(queries)].tolist()}),
        "replies drawn from": len(replies),
        "test samples": len(samples),
        "left out": left_out,
        "tokens that wrong and right replies differ by": dict(
            zip(("random", "matched"), np.mean(differences, axis=0).round(2).tolist(), strict=True)
        ),
    }
    return Source("heldout", queries, other, about)


def _query(context: list[str], candidates: list[str]) -> Query:
    """The right candidate first, then the random and the matched ones."""
    sets = {
        "chitchat random": range(1 + WRONG),
        "chitchat matched": (0, *range(1 + WRONG, 1 + 2 * WRONG)),
    }
    labels = tuple(number == 0 for number in range(len(candidates)))
    return Query(tuple(context), tuple(candidates), labels, sets, f"test context {context[-1]!r}")


def records(data: Path, split: str) -> Iterator[tuple[list[int], list[int]]]:
    """Context and response of the samples of a split, as ids.

    Raises:
        UserError: no such split.
    """
    splits = read_index(data).splits
    if split not in splits:
        raise UserError(f"{data}: has no {split} split; prepare it again, `plato2 prepare` makes one")
    for shard in splits[split].shards:
        samples = read_shard(data, shard)
        for (first, end), length in zip(pairwise(samples.offsets), samples.context_len, strict=True):
            ids = samples.token_ids[first:end].tolist()
            yield ids[:length], ids[length:]


def _conversations(data: Path, tokenizer: Tokenizer) -> dict[tuple[tuple[int, ...], ...], set[int]]:
    """(a turn, the next turn) -> the test conversations in which they follow each other.

    Shards do not say which conversation a sample is of. So the corpus is read once more, and divided as when
    it was prepared.
    """
    options = PrepareOptions.from_dict({**read_index(data).prepare, "out": str(data)})

    def dialogues() -> Iterator[Dialogue]:
        return read_corpus(options.corpus, options.files, ReadReport(), options.reader)

    survey = Survey(strict=False)
    for dialogue in dialogues():
        survey.add(dialogue)
    is_test = survey.choose_splits(options)["test"]
    found: dict[tuple[tuple[int, ...], ...], set[int]] = defaultdict(set)
    for number, dialogue in enumerate(dialogues()):
        if is_test[number]:
            turns = tokenizer.encode_batch([turn.text for turn in dialogue.turns])
            for pair in pairwise(map(tuple, turns)):
                found[pair].add(number)
    return found


def _turns(context: list[int]) -> list[list[int]]:
    """The ids of each turn of [CLS] (turn [SEP])*."""
    ends = [place for place, token in enumerate(context) if token == EOS_ID]
    return [context[first + 1 : end] for first, end in pairwise(chain([0], ends))]
