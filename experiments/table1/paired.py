"""How two systems differ over dialogues with the same starts.

A measure is a share: a sum over a dialogue's utterances over another one, such as words over utterances.
Dialogues are drawn again, with both systems' utterances, for the interval of a difference. Distinct is no
such share: it falls as a corpus grows, and when a dialogue is drawn twice. So two systems are compared at the
same number of words of each start, and the interval is the jackknife's over starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from plato2.evaluate.metrics import SelfRepetition, Words, n_grams
from plato2.evaluate.said import System, by_dialogue
from plato2.metrics import bootstrap

REPEATED = 3
"""Words in a row that a speaker should not say again."""
Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""(texts, other texts) -> cosines (texts, others)."""
Difference = tuple[float, float, float]
"""Value, and its 95 % interval: low and high."""


def shares(said: System, n: int, similarity: Similarity | None = None) -> dict[str, np.ndarray]:
    """The sums of each dialogue.

    Args:
        said: a system's utterances.
        n: dialogues.
        similarity: None leaves the topic out.

    Returns:
        Measure -> (n, 2): what is summed, over what. `length`: words per utterance; `repeated_3`: trigrams
        said before; `topic`: similarity of an utterance to the dialogue's start; `topic_other`: to the start
        of the next dialogue.
    """
    names = ["length", "repeated_3", *(["topic", "topic_other"] if similarity is not None else [])]
    found = {name: np.zeros((n, 2)) for name in names}
    dialogues = by_dialogue(said)
    for dialogue, other in zip(dialogues, dialogues[1:] + dialogues[:1], strict=True):
        row, words = dialogue[0].dialogue, [one.words for one in dialogue]
        found["length"][row] = sum(map(len, words)), len(words)
        repetition = SelfRepetition(REPEATED)
        repetition.update(words)
        found["repeated_3"][row] = float(repetition.repeated[0]), float(repetition.total[0])
        if similarity is not None:
            texts = [one.text for one in dialogue]
            for name, start in (("topic", dialogue[0].start), ("topic_other", other[0].start)):
                found[name][row] = similarity(texts, [start]).sum(), len(texts)
    return found


def share(sums: np.ndarray) -> float:
    """The share over all dialogues, (n, 2) -> a number; nan where there is nothing."""
    over, under = sums.sum(axis=0)
    return float(over / under) if under else math.nan


def of_share(sums: np.ndarray) -> Difference:
    """A share with its interval over dialogues."""
    return (share(sums), *bootstrap(lambda draw: share(sums[draw]), len(sums)))


def difference(some: np.ndarray, others: np.ndarray) -> Difference:
    """A share less that of another system, (n, 2) each, row by row of the same start."""
    low, high = bootstrap(lambda draw: share(some[draw]) - share(others[draw]), len(some))
    return share(some) - share(others), low, high


def words_by_dialogue(said: System, n: int) -> list[list[Words]]:
    """The utterances of each of n dialogues, as words."""
    found: list[list[Words]] = [[] for _ in range(n)]
    for one in said:
        found[one.dialogue].append(one.words)
    return found


def equal_size(some: list[list[Words]], others: list[list[Words]]) -> tuple[list[list[Words]], ...]:
    """Both with as many words of each dialogue as the one that says less in it; the rest is cut off."""
    sizes = [min(sum(map(len, a)), sum(map(len, b))) for a, b in zip(some, others, strict=True)]
    return tuple([_cut(said, most) for said, most in zip(one, sizes, strict=True)] for one in (some, others))


def _cut(utterances: Sequence[Words], most: int) -> list[Words]:
    left, found = most, []
    for words in utterances:
        found.append(words[:left])
        left -= len(found[-1])
    return found


def distinct_difference(some: list[list[Words]], others: list[list[Words]], n: int) -> Difference:
    """Distinct-n of a system less that of another, at equal size, with the jackknife's interval over starts.

    Args:
        some: the utterances of each dialogue, as words.
        others: those of the other system, with the same starts.
        n: words of an n-gram.
    """
    (a, a_left), (b, b_left) = (distinct_left_out(one, n) for one in equal_size(some, others))
    left = a_left - b_left
    half = 1.96 * math.sqrt((len(left) - 1) * float(left.var())) if len(left) > 1 else math.nan
    return a - b, a - b - half, a - b + half


def distinct_left_out(dialogues: list[list[Words]], n: int) -> tuple[float, np.ndarray]:
    """Distinct-n as in section 3.3.2 (different n-grams over words), and without each dialogue in turn."""
    held: dict[tuple[str, ...], set[int]] = {}
    for number, utterances in enumerate(dialogues):
        for words in utterances:
            for n_gram in n_grams(words, n):
                held.setdefault(n_gram, set()).add(number)
    lost = np.zeros(len(dialogues))  # n-grams that only this dialogue has
    for numbers in held.values():
        if len(numbers) == 1:
            lost[min(numbers)] += 1
    size = np.array([sum(map(len, utterances)) for utterances in dialogues])
    with np.errstate(all="ignore"):
        return float(len(held) / size.sum()), (len(held) - lost) / (size.sum() - size)
