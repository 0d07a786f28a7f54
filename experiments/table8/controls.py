"""What candidates give away without their context: their length and how frequent their words are.

A score is worth something only where it knows more than that. So each score is put beside these; beside
itself with the context of another dialogue; and it is asked what it adds to the best weighted sum of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from plato2.evaluate.candidates import Query
from plato2.evaluate.scorers import Scorer, Texts
from plato2.evaluate.selection import Scores
from plato2.words import split_words

FOLDS = 5


def surface(texts: Texts) -> dict[str, Scorer]:
    """Scores that do not read the context.

    Args:
        texts: training responses, in which words are counted.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    total = sum(counts.values()) + len(counts) + 1

    def log_p(text: str) -> list[float]:
        """Of each word, one count added to each; those never seen share one more."""
        return [math.log((counts[word] + 1) / total) for word in split_words(text)]

    return {
        "few characters": lambda context, candidates: [-float(len(text)) for text in candidates],
        "frequent words, summed": lambda context, candidates: [sum(log_p(text)) for text in candidates],
        "frequent words": lambda context, candidates: [
            float(np.mean(log_p(text) or [0.0])) for text in candidates
        ],
    }


def elsewhere(scorer: Scorer, other: Mapping[tuple[str, ...], tuple[str, ...]]) -> Scorer:
    """A score with the context of another dialogue."""
    return lambda context, candidates: scorer(other[tuple(context)], candidates)


def combined(queries: Sequence[Query], scored: Sequence[Scores], names: Sequence[str]) -> list[list[float]]:
    """The best weighted sum of scores, for each query of one set.

    Weights are those of a logistic regression, fitted to the other contexts in five folds. Each score is
    taken less its mean over the candidates of a context, since only their differences choose.
    """
    features = []
    for scores in scored:
        own = np.array([scores[name] for name in names]).T  # (n, F)
        features.append(own - own.mean(axis=0))
    labels = [label for query in queries for label in query.labels]
    groups = np.repeat(np.arange(len(queries)), [len(query.labels) for query in queries])
    found = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression()),
        np.concatenate(features),
        labels,
        groups=groups,
        cv=GroupKFold(FOLDS),
        method="decision_function",
    )
    return [part.tolist() for part in np.split(found, np.flatnonzero(np.diff(groups)) + 1)]
