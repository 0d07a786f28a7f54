"""What chooses among candidates: a scorer is a function from a context and its candidates to numbers.

The higher number is the better candidate. Anything that can be called like this can be measured: a language
model's log-probability, a classifier, counted words. Here are those of plato2's models, the scores of
section 2.2, and the baselines that need no model.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from plato2.config import RankConfig, UserError
from plato2.data.examples import read_examples
from plato2.data.samples import encode_context, encode_response
from plato2.data.selection import inverse_document_frequency, overlap
from plato2.data.tokenizer import EOS_ID, Tokenizer
from plato2.model.networks import EvaluationNetwork, GenerationNetwork
from plato2.talk.rank import backward_log_probs, coherence
from plato2.talk.score import Record, score
from plato2.talk.speaker import Likely, LogProbs, PlatoSpeaker, Speaker, weights_hash
from plato2.weights.folder import load_backward, load_evaluation, load_generation, saved_tokenizer
from plato2.words import split_words

Texts = Sequence[str]
Scorer = Callable[[Texts, Texts], Sequence[float]]
"""(context turns, oldest first; candidates) -> a number for each candidate, the higher the better."""
WAYS = {"per-token": ("",), "summed": (", summed",), "both": ("", ", summed")}
"""How log-probabilities count, and what is added to their names."""
COUNTED_RESPONSES = 20_000
"""Words are counted in the responses of this many training samples of a corpus."""


class LogProb:
    """A log-probability of candidates, as a sum over tokens or per token.

    Args:
        find: (context, candidates) -> the sum and the number of tokens of each.
    """

    def __init__(self, find: LogProbs) -> None:
        self.find = find
        self._last: tuple[tuple[Texts, Texts], np.ndarray] | None = None

    def per_token(self, context: Texts, candidates: Texts) -> list[float]:
        """The mean over tokens, [SEP]s included."""
        summed, n_tokens = self._read(context, candidates)
        return list((summed / n_tokens).tolist())

    def summed(self, context: Texts, candidates: Texts) -> list[float]:
        """The sum over tokens."""
        return list(self._read(context, candidates)[0].tolist())

    def _read(self, context: Texts, candidates: Texts) -> np.ndarray:
        """(2, n): the sum and the number of tokens; the last context's are kept, for the other way."""
        asked = tuple(context), tuple(candidates)
        if self._last is None or self._last[0] != asked:
            self._last = asked, np.array(self.find(context, candidates)).T
        return self._last[1]


def forward(network: GenerationNetwork, tokenizer: Tokenizer) -> LogProbs:
    """log p(r|c) of a generation model.

    With latents it is log (1/K) sum_z p(r|c,z): a candidate of unknown origin may come from any z, and z is
    uniform when talking.
    """
    limit = network.model_config.max_position // 2

    def log_probs(context: Texts, candidates: Texts) -> list[tuple[float, int]]:
        c, responses = _encode(context, candidates, tokenizer, network)
        records = [Record(c, encode_response(words, limit)) for words in responses]
        return [(-_nll(found), found["n_tokens"]) for found in score(network, records)]

    return log_probs


def backward(network: GenerationNetwork, tokenizer: Tokenizer) -> LogProbs:
    """log p(c|r) of a backward model."""

    def log_probs(context: Texts, candidates: Texts) -> list[tuple[float, int]]:
        c, responses = _encode(context, candidates, tokenizer, network)
        n = len(c) - 1
        means = backward_log_probs(network, [(c, words) for words in responses])
        return [(mean * n, n) for mean in means]

    return log_probs


class Coherence:
    """p(l=1|c,r) of an evaluation model."""

    def __init__(self, network: EvaluationNetwork, tokenizer: Tokenizer) -> None:
        self.network, self.tokenizer = network, tokenizer

    def __call__(self, context: Texts, candidates: Texts) -> list[float]:
        """The probabilities."""
        c, responses = _encode(context, candidates, self.tokenizer, self.network)
        return coherence(self.network, [(c, words) for words in responses])


class WordOverlap:
    """How much of a candidate's words is in the context, rare ones counting more (see data/selection.py).

    Args:
        texts: those in which it is counted how rare a word is.
    """

    def __init__(self, texts: Texts) -> None:
        self.ids: dict[str, int] = {}
        counted = [self._encode(text) for text in texts]
        rarity = inverse_document_frequency(counted, EOS_ID + 1 + len(self.ids))
        self.rarity = np.append(rarity, math.log(len(texts) + 1))  # the last: every word not counted
        self.unknown = len(rarity)

    def __call__(self, context: Texts, candidates: Texts) -> list[float]:
        """The shared weight of each candidate."""
        said = self._encode(" ".join(context))
        texts = [self._encode(candidate) for candidate in candidates]
        words = np.unique(np.concatenate([said, *texts]))  # few of the vocabulary's: small vectors
        short, *shorts = [np.searchsorted(words, text) for text in (said, *texts)]
        return list(overlap([short], shorts, self.rarity[np.minimum(words, self.unknown)])[0].tolist())

    def _encode(self, text: str) -> np.ndarray:
        ids = [self.ids.setdefault(word, EOS_ID + 1 + len(self.ids)) for word in split_words(text)]
        return np.array(ids, dtype=np.int64)


class BM25:
    """BM25 of a candidate, where the context is the question and all candidates are the documents (bm25s).

    Args:
        candidates: those of all contexts.
    """

    def __init__(self, candidates: Texts) -> None:
        import bm25s

        self.place = {text: number for number, text in enumerate(dict.fromkeys(candidates))}
        documents = [split_words(text) for text in self.place]
        self.index = bm25s.BM25() if any(documents) else None
        if self.index is not None:
            self.index.index(documents, show_progress=False)

    def __call__(self, context: Texts, candidates: Texts) -> list[float]:
        """The scores; 0 where there are no words."""
        words = split_words(" ".join(context))
        if not words or self.index is None:
            return [0.0] * len(candidates)
        found = self.index.get_scores(words)
        return [float(found[self.place[text]]) for text in candidates]


def random_scores(seed: int) -> Scorer:
    """Numbers that know nothing; the same for the same context."""

    def scores(context: Texts, candidates: Texts) -> list[float]:
        key = zlib.crc32("\n".join(context).encode("utf-8", "surrogatepass"))
        return list(np.random.default_rng([seed, key]).random(len(candidates)).tolist())

    return scores


def shortness(context: Texts, candidates: Texts) -> list[float]:
    """The fewer words, the better: all that a sum of log-probabilities may have found."""
    return [-float(len(split_words(text))) for text in candidates]


def corpus_texts(data: str | Path) -> list[str]:
    """Responses of a prepared corpus's training split, to count words in.

    Raises:
        UserError: no corpus, or no such split.
    """
    tokenizer = Tokenizer.load(Path(data) / "tokenizer")
    return [example.reference for example in read_examples(data, tokenizer, COUNTED_RESPONSES, "train")]


def baselines(
    contexts: Sequence[Texts], candidates: Texts, texts: Texts | None, seed: int
) -> dict[str, Scorer]:
    """Random numbers, shared words, BM25, few words.

    Args:
        contexts: the contexts of all queries.
        candidates: of all queries.
        texts: in which it is counted how rare a word is; None: in the contexts.
        seed: of the random numbers.
    """
    counted = [" ".join(context) for context in contexts] if texts is None else texts
    return {
        "random": random_scores(seed),
        "shared words": WordOverlap(counted),
        "BM25": BM25(candidates),
        "short": shortness,
    }


def model_scorers(
    generation: Path | None,
    evaluations: Sequence[Path],
    backward_model: Path | None,
    ranks: Sequence[str],
    length: str,
    device: torch.device,
) -> tuple[dict[str, Scorer], dict[str, Any]]:
    """The scores of models, each alone and in weighted sums.

    Args:
        generation: a model of stage 1 or 2.1.
        evaluations: models of stage 2.2, side by side.
        backward_model: a model of stage `backward`.
        ranks: weighted sums as `coherence=1,backward=0.5`.
        length: how log-probabilities count: `per-token`, the mean, as when talking, `summed`, or `both`.
        device: where they are computed.

    Returns:
        The scorers by name, and a hash of each model's weights.

    Raises:
        UserError: a model that does not fit, or a sum of scores that were not given.
    """
    networks: dict[str, Any] = {}
    log_probs: dict[str, LogProb] = {}

    def first() -> Any:
        """What the others share a base with, where they can."""
        return next(iter(networks.values()), None)

    if generation:
        networks["forward"] = load_generation(generation, "--generation").to(device)
        log_probs["forward"] = LogProb(forward(networks["forward"], saved_tokenizer(generation)))
    if backward_model:
        networks["backward"] = load_backward(backward_model, "--backward", first()).to(device)
        log_probs["backward"] = LogProb(backward(networks["backward"], saved_tokenizer(backward_model)))
    short = len({path.name for path in evaluations}) == len(evaluations)
    judges = {
        "" if len(evaluations) == 1 else f" {path.name if short else path}": Coherence(
            load_evaluation(path, "--evaluation", first()).to(device), saved_tokenizer(path)
        )
        for path in evaluations
    }
    scorers: dict[str, Scorer] = {f"coherence{judge}": found for judge, found in judges.items()}
    for name, found in log_probs.items():
        scorers |= _by_length(name, found, length)
    ways = WAYS[length]
    for rank in ranks:
        weights = RankConfig.parse(rank).weights or {}
        for name in weights:
            option = {"coherence": "evaluation", "forward": "generation"}.get(name, name)
            if not any(known.startswith(name) for known in scorers):
                raise UserError(f"--rank {rank}: {name} needs a model; give --{option}")
        for judge in judges if "coherence" in weights else [""]:
            for way in ways if {*weights} & {*log_probs} else [""]:
                of = {name: f"{name}{judge if name == 'coherence' else way}" for name in weights}
                parts = [(float(weights[name]), scorers[of[name]]) for name in weights]
                scorers[f"{rank}{way}{judge}"] = weighted(parts)
    networks |= {f"coherence{judge}": found.network for judge, found in judges.items()}
    return scorers, {name: weights_hash(network) for name, network in networks.items()}


def speaker_scorers(speaker: Speaker, length: str) -> dict[str, Scorer]:
    """The scores of a system that can say how probable a given reply is, and a model's coherence.

    They are named `forward NAME`, `forward NAME, summed`, `backward NAME` and `coherence NAME`.

    Args:
        speaker: PLATO-2, DialoGPT, Blender, a chat model.
        length: as in `model_scorers`.

    Raises:
        UserError: an API or a log, which only say replies.
    """
    found: dict[str, LogProbs] = {}
    scorers: dict[str, Scorer] = {}
    if isinstance(speaker, PlatoSpeaker):
        bot = speaker.bot
        found["forward"] = forward(cast(GenerationNetwork, bot.generation), bot.tokenizer)
        if bot.backward is not None:
            found["backward"] = backward(cast(GenerationNetwork, bot.backward), bot.tokenizer)
        if bot.evaluation is not None:
            scorers[f"coherence {speaker.name}"] = Coherence(
                cast(EvaluationNetwork, bot.evaluation), bot.tokenizer
            )
    elif isinstance(speaker, Likely):
        found = speaker.likelihoods()
    else:
        raise UserError(
            f"--speaker {speaker.name}: gives replies but no probabilities, so it cannot choose; "
            "leave it out, or give plato2:, dialogpt:, blender: or hf:"
        )
    for name, log_probs in found.items():
        scorers |= _by_length(f"{name} {speaker.name}", LogProb(log_probs), length)
    return scorers


def speaker_hash(speaker: Speaker) -> dict[str, Any]:
    """What the scores of a system depend on."""
    return {**speaker.describe(), "max_tokens": speaker.settings.get("max_tokens")}


def _by_length(name: str, found: LogProb, length: str) -> dict[str, Scorer]:
    """A log-probability per token, summed, or both."""
    return {f"{name}{way}": found.summed if way else found.per_token for way in WAYS[length]}


def weighted(parts: Sequence[tuple[float, Scorer]]) -> Scorer:
    """The sum of weight times score."""

    def scores(context: Texts, candidates: Texts) -> list[float]:
        found = [weight * np.asarray(scorer(context, candidates)) for weight, scorer in parts]
        return list(np.sum(found, axis=0).tolist())

    return scores


def _encode(
    context: Texts, candidates: Texts, tokenizer: Tokenizer, network: GenerationNetwork | EvaluationNetwork
) -> tuple[list[int], list[list[int]]]:
    """Ids; the context is cut as when talking: half of the network's positions are its."""
    most = network.model_config.max_position // 2
    ids = encode_context(tokenizer.encode_batch(context[-most:]), most, cut_turn=True)
    assert ids is not None  # cut_turn
    return ids, tokenizer.encode_batch(candidates)


def _nll(found: Mapping[str, Any]) -> float:
    """-log p(r|c); with latents -log of the mean of p(r|c,z) over z."""
    if "nll" in found:
        return float(found["nll"])
    by_latent = -np.asarray(found["nll_by_latent"])
    return float(math.log(len(by_latent)) - np.logaddexp.reduce(by_latent))
