"""Evaluation sets whose texts a corpus must not teach: which samples have to do with them.

Texts are compared as words (lower case, no punctuation, as the tokenizer leaves them) over the turns of a
sample together. A sample has to do with a text when they share `n_words` words in a row (a text of fewer
words must be all of the sample), or when they are nearly the same: the Jaccard index of their runs of three
words is at least `similarity`. MinHash (datasketch) finds the candidates for that.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from plato2.bounded import read_text
from plato2.config import UserError, install
from plato2.data.tokenizer import EOS_ID, Tokenizer
from plato2.files import file_sha256
from plato2.prepare.clean import message_key
from plato2.random import hashed
from plato2.words import split_words

RULES = ("n-gram", "near-duplicate")
N_EXAMPLES = 5
FILE_BYTES = 1 << 28
"""The largest evaluation set."""
_SHINGLE = 3
_PERMUTATIONS = 128
_PRIME = np.uint64(0x9E3779B97F4A7C15 | 1)
_REPLIES = (
    "candidates",
    "positive_responses",
    "adversarial_negative_responses",
    "random_negative_responses",
    "options",
)


@dataclass(frozen=True)
class WithoutOptions:
    """Which evaluation sets, and what is too much alike."""

    files: tuple[str, ...]
    n_words: int = 13
    similarity: float = 0.8
    """0: near-duplicates are not looked for."""
    names: tuple[str, ...] = ()
    """What the files are called in reports, where these are copies."""

    def identity(self) -> list[Any]:
        """All that decides what is removed: the files' hashes too."""
        return [[file_sha256(Path(file)) for file in self.files], self.n_words, self.similarity]


@dataclass(frozen=True)
class Match:
    """What a sample has to do with an evaluation set."""

    file: int
    rule: str
    """One of `RULES`."""


def check_sets(files: Sequence[str], similarity: float) -> None:
    """Refuse what would fail after hours.

    Raises:
        UserError: a file that cannot be read or has no text, or datasketch is missing.
    """
    for file in files:
        for _ in read_texts(file):
            pass
    if files and similarity:
        _min_hash_classes()


def _min_hash_classes() -> Any:
    """(MinHash, MinHashLSH) of datasketch."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise UserError(
            f"without: near-duplicates need datasketch: {install('without')}, or set without_similarity=0"
        ) from None
    return MinHash, MinHashLSH


class EvaluationTexts:
    """The texts of evaluation sets, to be held against samples.

    A file is held as 8 bytes for each run of words, and some hundred for each text's MinHash.

    Args:
        options: the files and the limits.
        tokenizer: the corpus's: both sides are read as it writes them.

    Raises:
        UserError: a file that cannot be read or has no text, or datasketch is missing.
    """

    def __init__(self, options: WithoutOptions, tokenizer: Tokenizer) -> None:
        """Read the files."""
        self._n_words, self._similarity, self._tokenizer = options.n_words, options.similarity, tokenizer
        self._turn_keys = lru_cache(1 << 14)(self._keys_of_turn)
        self._word_key = lru_cache(1 << 18)(message_key)
        grams: list[np.ndarray] = []
        files: list[np.ndarray] = []
        self._shingles: list[tuple[int, np.ndarray]] = []
        for number, file in enumerate(options.files):
            for text in dict.fromkeys(read_texts(file)):
                words = self._word_keys(tokenizer.encode(text))
                if not len(words):
                    continue
                grams.append(_grams(words, min(self._n_words, len(words))))
                files.append(np.full(len(grams[-1]), number))
                self._shingles.append((number, _shingles(words)))
        together = np.concatenate(grams or [np.zeros(0, dtype=np.uint64)])
        self._grams, first = np.unique(together, return_index=True)  # of several files the first
        self._files = np.concatenate(files or [np.zeros(0, dtype=np.int64)])[first]
        self._template: Any = None
        self._index: Any = self._min_hashes() if options.similarity else None

    def matches(self, records: Sequence[Sequence[int] | np.ndarray]) -> list[Match | None]:
        """What each sample (its whole record of ids) has to do with the sets; None: nothing."""
        words = [self._word_keys(record) for record in records]
        found = self._shared(words)
        if self._index is not None:
            for number, of_sample in enumerate(words):
                if found[number] is None and len(of_sample):
                    found[number] = self._alike(of_sample)
        return found

    def text_of(self, response: np.ndarray) -> str:
        """The text of a response's ids."""
        return self._tokenizer.decode(response[response > EOS_ID].tolist())

    def _shared(self, words: list[np.ndarray]) -> list[Match | None]:
        """By runs of words; of all samples at once."""
        found: list[Match | None] = [None] * len(words)
        grams = [_grams(one, min(self._n_words, len(one))) for one in words]
        sample = np.repeat(np.arange(len(words)), [len(one) for one in grams])
        keys = np.concatenate([np.zeros(0, dtype=np.uint64), *grams])
        if not len(keys) or not len(self._grams):
            return found
        place = np.minimum(np.searchsorted(self._grams, keys), len(self._grams) - 1)
        hits = np.flatnonzero(self._grams[place] == keys)
        for number, file in zip(sample[hits].tolist(), self._files[place[hits]].tolist(), strict=True):
            before = found[number]
            if before is None or file < before.file:
                found[number] = Match(file, RULES[0])
        return found

    def _alike(self, words: np.ndarray) -> Match | None:
        shingles = _shingles(words)
        for number in sorted(self._index.query(self._min_hash(shingles))):
            file, of_text = self._shingles[number]
            n_shared = len(np.intersect1d(shingles, of_text, assume_unique=True))
            if n_shared >= self._similarity * (len(shingles) + len(of_text) - n_shared):
                return Match(file, RULES[1])
        return None

    def _min_hashes(self) -> Any:
        """The index of the texts' MinHashes."""
        MinHash, MinHashLSH = _min_hash_classes()
        self._template = MinHash(_PERMUTATIONS, seed=1, hashfunc=int, scheme="affine64")
        # Candidates are compared exactly, so that missing one weighs more than one too many.
        index = MinHashLSH(self._similarity, _PERMUTATIONS, weights=(0.1, 0.9))
        for number, (_, shingles) in enumerate(self._shingles):
            index.insert(number, self._min_hash(shingles), check_duplication=False)
        return index

    def _min_hash(self, shingles: np.ndarray) -> Any:
        found = self._template.copy()
        found.update_batch(shingles.tolist())
        return found

    def _word_keys(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(words,) uint64: the words of a record, or of a text's ids."""
        flat = np.asarray(ids, dtype=np.int64)
        if not len(flat):
            return np.zeros(0, dtype=np.uint64)
        is_special = flat <= EOS_ID
        turns = np.split(flat, np.flatnonzero(is_special))
        return np.concatenate([self._turn_keys(turn[turn > EOS_ID].tobytes()) for turn in turns])

    def _keys_of_turn(self, ids: bytes) -> np.ndarray:
        text = self._tokenizer.decode(np.frombuffer(ids, dtype=np.int64).tolist())
        return np.array([self._word_key(word) for word in split_words(text)], dtype=np.uint64)


@lru_cache(maxsize=1)
def evaluation_texts(options: WithoutOptions, tokenizer: str) -> EvaluationTexts:
    """The texts, read once in every process that works; `tokenizer` is a folder."""
    return EvaluationTexts(options, Tokenizer.load(tokenizer))


class Removed:
    """Counts what has to do with evaluation sets, with examples; addable in a fixed order."""

    def __init__(self, files: Sequence[str]) -> None:
        """Nothing is found yet."""
        self._names = [Path(file).name for file in files]
        self.counts: Counter[str] = Counter()
        """By `split:number of the file:rule`."""
        self.examples: list[str] = []

    def add(self, split: str, match: Match, response: str) -> None:
        """Count one sample of a split."""
        self.counts[f"{split}:{match.file}:{match.rule}"] += 1
        if split == "train" and len(self.examples) < N_EXAMPLES:
            self.examples.append(f"{self._names[match.file]}, {match.rule}: ... {response[:100]}")

    def merge(self, counts: Mapping[str, int], examples: Sequence[str]) -> None:
        """Add what was found elsewhere."""
        self.counts.update(counts)
        self.examples = [*self.examples, *examples][:N_EXAMPLES]

    def total(self, split: str) -> int:
        """Samples of a split."""
        return sum(n for key, n in self.counts.items() if key.startswith(f"{split}:"))

    def rows(self) -> list[dict[str, Any]]:
        """By file and rule: samples removed from training, and those that are in validation and test."""
        return [
            {"file": name, "rule": rule}
            | {split: self.counts[f"{split}:{number}:{rule}"] for split in ("train", "valid", "test")}
            for number, name in enumerate(self._names)
            for rule in RULES
        ]


def read_texts(path: str) -> Iterator[str]:
    """The texts of an evaluation set: dialogues or a selection set as JSON lines, or one text a line.

    Of a dialogue, its turns together and, before each reference, those that it answers; of a selection set,
    each candidate after its context. `.gz` is decompressed.

    Raises:
        UserError: the file cannot be read, or has no text.
    """
    cure = "give dialogues or a selection set (JSON lines), or one text a line"
    n_texts = 0
    for number, line in enumerate(read_text(path, FILE_BYTES, cure, "without=").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            texts = _texts(json.loads(line)) if line.lstrip().startswith("{") else [line]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"without={path}: line {number} is no dialogue and no context; {cure}") from None
        n_texts += len(texts)
        yield from texts
    if not n_texts:
        raise UserError(f"without={path}: no text in it; {cure}")


def _texts(record: dict[str, Any]) -> list[str]:
    """The texts of one line: a dialogue, or a context and what may follow it."""
    if "turns" in record:
        turns = [turn if isinstance(turn, str) else turn["text"] for turn in record["turns"]]
        return [" ".join(turns), *(" ".join([*turns[:-1], one]) for one in record.get("references") or [])]
    context = [record["article"]] if "article" in record else record["context"]
    replies = [reply for key in _REPLIES for reply in record.get(key, [])]
    return [" ".join([*context, reply]) for reply in replies] or [" ".join(context)]


def _grams(words: np.ndarray, n: int) -> np.ndarray:
    """(words - n + 1,) uint64: a key for each run of n words."""
    n_grams = len(words) - n + 1 if n else 0
    keys = np.full(n_grams, n, dtype=np.uint64)
    for place in range(n):
        keys = keys * _PRIME + words[place : place + n_grams]
    return hashed(keys)


def _shingles(words: np.ndarray) -> np.ndarray:
    """The different runs of three words, or all of a shorter text; sorted."""
    return np.unique(_grams(words, min(_SHINGLE, len(words))))
