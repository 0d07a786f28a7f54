"""What is counted while the samples of a split are written: lengths, utterances and the unigram baseline."""

from __future__ import annotations

import numpy as np

from plato2.data.tokenizer import EOS_ID


class SplitStatistics:
    """Counts over the samples of one split.

    `context_lengths[n]` and `response_lengths[n]` are the numbers of samples whose context or response has n
    ids (special ids included); `targets[v]` counts the ids a model predicts: the responses without [CLS].
    """

    def __init__(self, max_context: int, max_response: int, vocab_size: int) -> None:
        """Start at zero."""
        self.context_lengths = np.zeros(max_context + 1, dtype=np.int64)
        self.response_lengths = np.zeros(max_response + 1, dtype=np.int64)
        self.targets = np.zeros(vocab_size, dtype=np.int64)
        self.n_samples = 0
        self.n_utterances = 0
        self.n_tokens = 0
        """Ids of the utterances, without the special ones."""

    def add(self, token_ids: np.ndarray, offsets: np.ndarray, context_len: np.ndarray) -> None:
        """Count samples: sample i is the record `token_ids[offsets[i]:offsets[i + 1]]`."""
        if not len(context_len):
            return
        lengths = np.diff(offsets)
        place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        n_context = np.repeat(context_len, lengths)
        contexts, targets = token_ids[place < n_context], token_ids[place > n_context]
        self.context_lengths += np.bincount(context_len, minlength=len(self.context_lengths))
        self.response_lengths += np.bincount(lengths - context_len, minlength=len(self.response_lengths))
        self.targets += np.bincount(targets, minlength=len(self.targets))
        n, n_turns = len(context_len), int((contexts == EOS_ID).sum())
        n_ends = int((targets == EOS_ID).sum())
        self.n_samples += n
        self.n_utterances += n_turns + n
        self.n_tokens += len(contexts) - n_turns - n + len(targets) - n_ends

    @property
    def utterances_per_sample(self) -> float:
        """Turns of the context and the response."""
        return self.n_utterances / max(1, self.n_samples)

    @property
    def tokens_per_utterance(self) -> float:
        """Special ids not counted."""
        return self.n_tokens / max(1, self.n_utterances)


def unigram_nll(train_targets: np.ndarray, valid_targets: np.ndarray) -> float:
    """Nats per valid target under the add-one-smoothed unigram distribution of the train targets.

    Args:
        train_targets: (V,) counts of each id.
        valid_targets: (V,) counts of each id; at least one.
    """
    probabilities = (train_targets + 1) / (train_targets.sum() + len(train_targets))
    return float(-(valid_targets * np.log(probabilities)).sum() / valid_targets.sum())
