"""What automatic evaluation counts of texts, as torchmetrics: variety, repetition, coverage.

Each keeps the counts of every case (a dialogue, or a context) apart, so that it can say how sure it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Words = Sequence[str]


def n_grams(words: Words, n: int) -> list[tuple[str, ...]]:
    """All n words in a row."""
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


class Distinct(Metric):
    """Corpus-level distinct-n: different n-grams of all utterances over all their words (section 3.3.2).

    The denominator is the number of words, as in the paper, not of n-grams. No n-gram reaches from one
    utterance into the next. The value falls as the corpus grows: compare corpora of one size.

    With `vocabulary` it is the expectation-adjusted distinct of single words (Liu et al., 2022,
    arXiv 2202.13587): different words over V (1 - ((V - 1) / V)^C), as many as C words drawn evenly from a
    vocabulary of V would have.
    """

    full_state_update = False
    hashes: list[Tensor]
    n_hashes: list[Tensor]
    n_words: list[Tensor]

    def __init__(self, n: int = 1, vocabulary: int | None = None) -> None:
        super().__init__()
        if vocabulary is not None and n != 1:
            raise ValueError("the expected number of different n-grams is known of single words only")
        self.n, self.vocabulary = n, vocabulary
        for state in ("hashes", "n_hashes", "n_words"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, utterances: Sequence[Words]) -> None:
        """Adds a case: the utterances of a dialogue, or the replies to a context, as words."""
        found = [_hash(n_gram) for words in utterances for n_gram in n_grams(words, self.n)]
        self.hashes.append(torch.tensor(found, dtype=torch.int64))
        self.n_hashes.append(torch.tensor([len(found)]))
        self.n_words.append(torch.tensor([sum(map(len, utterances))]))

    def compute(self) -> Tensor:
        """The value; nan where nothing has a word."""
        hashes, _, n_words = self._counts()
        return torch.tensor(self._value(len(np.unique(hashes)), n_words.sum()))

    def interval(self) -> tuple[float, float]:
        """The 95 % interval by the jackknife over cases; nan for fewer than two.

        A bootstrap would draw cases twice, which lowers distinct by itself: its interval often lies below
        the value. The jackknife leaves one case out at a time, and its variance is at least the true one in
        expectation (Efron and Stein, 1981).
        """
        hashes, n_hashes, n_words = self._counts()
        cases = len(n_words)
        if cases < 2:
            return math.nan, math.nan
        value = float(self.compute())
        _, place = np.unique(hashes, return_inverse=True)
        pairs = np.unique(np.stack([place, np.repeat(np.arange(cases), n_hashes)]), axis=1)
        only_there = np.bincount(pairs[0]) == 1
        lost = np.bincount(pairs[1][only_there[pairs[0]]], minlength=cases)
        total, words = int(only_there.size), n_words.sum()
        left = np.array([self._value(total - lost[i], words - n_words[i]) for i in range(cases)])
        half = 1.96 * math.sqrt((cases - 1) * float(np.var(left)))
        most = 1.0 if self.vocabulary is None else math.inf
        return max(value - half, 0.0), min(value + half, most)  # in this order nan stays nan

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not self.n_words:
            nothing = np.zeros(0, dtype=np.int64)
            return nothing, nothing, nothing
        states = (self.hashes, self.n_hashes, self.n_words)
        hashes, n_hashes, n_words = (dim_zero_cat(state).cpu().numpy() for state in states)
        return hashes, n_hashes, n_words

    def _value(self, different: int, words: int) -> float:
        if words <= 0:
            return math.nan
        if self.vocabulary is None:
            return different / words
        v = self.vocabulary
        return different / (v * -math.expm1(words * math.log1p(-1 / v)))


class SelfRepetition(Metric):
    """How much of what a speaker says they have said before in the same dialogue.

    With n, the share of the n-grams of an utterance that are in earlier ones of that speaker; without, the
    share of utterances that are, word for word. Repeating oneself inside an utterance does not count.
    """

    full_state_update = False
    repeated: list[Tensor]
    total: list[Tensor]

    def __init__(self, n: int | None = None) -> None:
        super().__init__()
        self.n = n
        self.add_state("repeated", [], dist_reduce_fx="cat")
        self.add_state("total", [], dist_reduce_fx="cat")

    def update(self, *speakers: Sequence[Words]) -> None:
        """Adds a dialogue: for each speaker their utterances, in order, as words."""
        repeated = total = 0
        for utterances in speakers:
            said: set[tuple[str, ...]] = set()
            for words in utterances:
                parts = n_grams(words, self.n) if self.n else [tuple(words)] * bool(words)
                repeated += sum(part in said for part in parts)
                total += len(parts)
                said.update(parts)
        self.repeated.append(torch.tensor([repeated]))
        self.total.append(torch.tensor([total]))

    def compute(self) -> Tensor:
        """The share over all dialogues; nan where nothing could be repeated."""
        if not self.total:
            return torch.tensor(math.nan)
        return dim_zero_cat(self.repeated).sum().double() / dim_zero_cat(self.total).sum()


class Coverage(Metric):
    """How many of a context's human references some of k candidates comes near.

    Near is a similarity of at least `near`. Where there are more than k candidates, it is the mean over all
    choices of k of them, so that systems with unequal numbers of candidates can be compared.
    """

    full_state_update = False
    covered: list[Tensor]
    total: list[Tensor]

    def __init__(self, near: float, k: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        self.near, self.k = near, k
        self.add_state("covered", [], dist_reduce_fx="cat")
        self.add_state("total", [], dist_reduce_fx="cat")

    def update(self, similarity: np.ndarray) -> None:
        """Adds a context: (references, candidates), the similarity of each pair."""
        n_references, n_candidates = similarity.shape
        k = min(self.k, n_candidates)
        near = (similarity >= self.near).sum(axis=1)
        choices = math.comb(n_candidates, k)
        missed = [math.comb(n_candidates - int(n), k) / choices if n_candidates else 1.0 for n in near]
        self.covered.append(torch.tensor([n_references - sum(missed)], dtype=torch.float64))
        self.total.append(torch.tensor([n_references]))

    def compute(self) -> Tensor:
        """The share of all references; nan without any."""
        if not self.total:
            return torch.tensor(math.nan)
        return dim_zero_cat(self.covered).sum() / dim_zero_cat(self.total).sum()


def _hash(n_gram: tuple[str, ...]) -> int:
    """64 bits, the same in every process."""
    data = "\0".join(n_gram).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little", signed=True)
