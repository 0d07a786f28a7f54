"""DialoGPT, Blender and chat models of Hugging Face transformers as speakers, from folders on this machine.

A folder is what `save_pretrained` writes. Nothing in it is executed: weights are read from safetensors, or
from a `pytorch_model.bin` without unpickling objects, code that comes with a model is refused, and nothing
is downloaded. Replies do not depend on the batch in float32: a sample's random numbers are a function of its
seed, and padding is masked.

They also say how probable a given reply is: `likelihoods`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from plato2.bounded import read_file
from plato2.config import COLDEST, DecodeConfig, UserError, install
from plato2.evaluate.openai_chat import chat_messages
from plato2.formats import JSON_BYTES, Open, parse
from plato2.model.noise import uniform
from plato2.random import draw_key
from plato2.talk.decode import choose, choose_top_p
from plato2.talk.speaker import DIGITS, LogProbs, Said, weights_hash

ROWS_AT_ONCE = 64
"""Samples or beams that are decoded together; changes no result."""
SCORED_AT_ONCE = 8
"""Texts whose logits are in memory together."""
NEWLINE = "__newln__"
"""A line break among BlenderbotSmall's tokens."""
OPENING = "Start a conversation."
"""What a chat template gets before a conversation that its assistant has begun, if it wants a user first."""

SAMPLING = ("strategy", "top_k", "top_p", "temperature", "min_tokens", "max_tokens", "n_samples")
BEAM_SEARCH = ("beam_size", "min_tokens", "max_tokens", "no_repeat_ngram", "length_penalty")
"""Fields of `DecodeConfig` that hold for models that sample, and for Blender."""
DIALOGPT = DecodeConfig(max_tokens=128)
DIALOGPT_SAMPLES = 16
"""With a reverse model: section 3.2 of Zhang et al. 2020 ranks 16 samples of top-k 10."""
BLENDER = DecodeConfig(
    strategy="beam", beam_size=10, min_tokens=20, max_tokens=128, no_repeat_ngram=3, length_penalty=0.65
)
"""Roller et al. 2021, and ParlAI's defaults."""
CHAT = DecodeConfig(strategy="top_p", top_p=0.9, max_tokens=128)


@dataclass(frozen=True)
class Pretrained:
    """A model, its tokenizer, and what its class has by one name or another."""

    model: Any
    tokenizer: Any
    positions: int | None
    """Tokens it can read, or None without a limit."""

    @classmethod
    def load(cls, folder: str | Path, device: torch.device, types: Sequence[str] = ()) -> Pretrained:
        """A model of transformers.

        Args:
            folder: what `save_pretrained` wrote.
            device: where it computes.
            types: those of `model_type` that will do; none = any that continues a text.

        Raises:
            UserError: transformers is not installed, no such folder, another model, or one that is damaged or
                wants to run code.
        """
        folder = Path(folder)
        cure = "give a folder that transformers' save_pretrained wrote"
        try:
            data = read_file(folder / "config.json", JSON_BYTES, cure)
        except OSError:
            raise UserError(f"{folder}: there is no config.json in it; {cure}") from None
        found = parse(_Config, data, f"{folder}/config.json", cure).model_type
        if types and found not in types:
            raise UserError(f"{folder}: its model_type is {found}, not {' or '.join(types)}")
        try:
            import transformers
        except ImportError:
            raise UserError(f"{folder}: needs transformers: {install('eval')}") from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        is_blender = "blenderbot" in found
        kind = transformers.AutoModelForSeq2SeqLM if is_blender else transformers.AutoModelForCausalLM
        given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # with WANDB_MODE=offline it prints at an import
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
                model: Any = kind.from_pretrained(folder, weights_only=True, dtype=torch.float32, **given)
        except Exception as error:  # whatever a damaged file makes it raise
            reason = str(error).strip().split("\n")[0][:300]
            raise UserError(
                f"{folder}: cannot be loaded ({type(error).__name__}: {reason}); {cure}"
            ) from None
        positions = getattr(model.config, "max_position_embeddings", None)
        return cls(model.to(device).eval(), tokenizer, positions)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.model.parameters()).device

    def encode(self, text: str) -> list[int]:
        """The ids of a text; what looks like a special token is text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """A text on one line."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return " ".join(text.replace(NEWLINE, " ").split())

    def describe(self) -> dict[str, str]:
        """Hashes of weights and vocabulary."""
        vocabulary = repr(sorted(self.tokenizer.get_vocab().items()))
        words = sha256((vocabulary + str(self.tokenizer.chat_template)).encode())
        return {"weights": weights_hash(self.model), "tokenizer": words.hexdigest()[:16]}


class _Config(Open):
    """What is read of config.json here."""

    model_type: str = Field(min_length=1)


@dataclass(frozen=True)
class Sample:
    """What a model wrote."""

    ids: list[int]
    log_prob: float
    """Mean log-probability per token, the end included, in the softmax at the sampling temperature."""


class Sampler:
    """A causal language model that speaks: what `DialoGPT` and `ChatModel` share."""

    def __init__(self, name: str, model: Pretrained, decode: DecodeConfig, ends: Sequence[int]) -> None:
        self.name, self.model, self.ends = name, model, list(ends)
        most = decode.max_tokens if model.positions is None else min(decode.max_tokens, model.positions // 2)
        self.decode = replace(decode, max_tokens=most, min_tokens=min(decode.min_tokens, most))
        self.room = None if model.positions is None else model.positions - most
        """Tokens of the history that can be read."""

    @property
    def settings(self) -> dict[str, Any]:
        """As `Speaker.settings`."""
        return {key: value for key, value in asdict(self.decode).items() if key in SAMPLING}

    def read(self, history: Sequence[str]) -> list[int]:
        """The ids that a reply continues."""
        raise NotImplementedError

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return bool(text.strip() and self.model.encode(text))

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`."""
        return self.model.describe()

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """As `Speaker.reply_batch`."""
        found: list[Said] = []
        step = max(1, ROWS_AT_ONCE // self.decode.n_samples)
        for start in range(0, len(histories), step):
            part = slice(start, start + step)
            contexts = [self.read(history) for history in histories[part]]
            drawn = sample(self.model.model, contexts, self.decode, seeds[part], self.ends)
            found += [
                Said(self.ranked(h, samples)) for h, samples in zip(histories[part], drawn, strict=True)
            ]
        return found

    def likelihoods(self) -> dict[str, LogProbs]:
        """As `Likely.likelihoods`."""
        return {"forward": self.log_probs}

    def log_probs(self, history: Sequence[str], replies: Sequence[str]) -> list[tuple[float, int]]:
        """log p(r|c) of given replies and their tokens, the end included; any of its ends will do.

        A reply that is longer than the longest of its own is cut, and has no end.
        """
        context = self.read(history)
        targets = [[*self.model.encode(text), self.ends[0]][: self.decode.max_tokens] for text in replies]
        return _summed(continued(self.model.model, context, targets, self.ends), targets)

    def ranked(self, history: Sequence[str], samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Candidates, the most probable one first."""
        found = [as_candidate(self.model, one) for one in samples]
        return sorted(found, key=lambda candidate: -candidate["log_prob"])


def as_candidate(model: Pretrained, one: Sample) -> dict[str, Any]:
    """As it is written."""
    log_prob = round(one.log_prob, DIGITS)
    return {"text": model.decode(one.ids), "latent": None, "log_prob": log_prob, "coherence": None}


class DialoGPT(Sampler):
    """DialoGPT (Zhang et al. 2020): GPT-2 on turns that each end with its end-of-text token.

    Args:
        folder: of GPT-2's class.
        reverse: of the same class, a model of p(c|r), to rank by as section 3.2 does (maximum mutual
            information): it reads the reply, then the turns from the last to the first.
        decode: how to sample; by default as the paper, with 16 samples if there is a reverse model.
        device: where to compute.
        name: what its turns are marked with.

    Raises:
        UserError: a folder that does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        reverse: str | Path | None = None,
        decode: DecodeConfig | None = None,
        device: torch.device | str = "cpu",
        name: str = "",
    ) -> None:
        device = torch.device(device)
        model = Pretrained.load(folder, device, ["gpt2"])
        self.end = model.tokenizer.eos_token_id
        decode = decode or replace(DIALOGPT, n_samples=DIALOGPT_SAMPLES if reverse else 1)
        super().__init__(name or f"dialogpt:{folder}", model, decode, [self.end])
        self.reverse = None if reverse is None else Pretrained.load(reverse, device, ["gpt2"])
        if self.reverse is not None and (
            self.reverse.model.config.vocab_size != model.model.config.vocab_size
            or (self.reverse.positions or 0) < (model.positions or 0)
        ):
            raise UserError(f"reverse={reverse}: has another vocabulary, or fewer positions, than {folder}")

    def read(self, history: Sequence[str]) -> list[int]:
        """The ids of the turns that fit, each with the end token behind it."""
        return [token for turn in self._turns(history) for token in turn]

    def _turns(self, history: Sequence[str]) -> list[list[int]]:
        """Whole turns are kept from the right; a last turn that alone is too long keeps its end."""
        room = (self.room or 1 << 30) - 1  # a candidate without an end gets one from the reverse model
        kept: list[list[int]] = []
        for text in reversed(history):
            turn = [*self.model.encode(text), self.end]
            if len(turn) > room:
                return kept or [turn[-room:]]
            kept.insert(0, turn)
            room -= len(turn)
        return kept

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`."""
        return super().describe() | ({} if self.reverse is None else {"reverse": self.reverse.describe()})

    def likelihoods(self) -> dict[str, LogProbs]:
        """As `Likely.likelihoods`; `backward` is that of the reverse model."""
        reverse = self.reverse
        if reverse is None:
            return super().likelihoods()

        def backward(history: Sequence[str], replies: Sequence[str]) -> list[tuple[float, int]]:
            words = [self.model.encode(text)[: self.decode.max_tokens] for text in replies]
            return self._backward(reverse, history, words)

        return super().likelihoods() | {"backward": backward}

    def _backward(
        self, reverse: Pretrained, history: Sequence[str], replies: Sequence[list[int]]
    ) -> list[tuple[float, int]]:
        """log p(c|r) of the turns from the last to the first, and their tokens, given the ids of replies."""
        source = [token for turn in reversed(self._turns(history)) for token in turn]
        given, sources = [[*ids, self.end] for ids in replies], [source] * len(replies)
        return _summed(mean_log_probs(reverse.model, given, sources), sources)

    def ranked(self, history: Sequence[str], samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """Candidates; the one first from which the reverse model best tells the history."""
        if self.reverse is None:
            return super().ranked(history, samples)
        backward = self._backward(self.reverse, history, [one.ids for one in samples])
        found = [
            as_candidate(self.model, one) | {"backward": round(summed / n_tokens, DIGITS)}
            for one, (summed, n_tokens) in zip(samples, backward, strict=True)
        ]
        return sorted(found, key=lambda candidate: -candidate["backward"])


class ChatModel(Sampler):
    """A chat model with a chat template: the other side of the dialogue is its user.

    Args:
        folder: of a causal language model whose tokenizer has a chat template.
        decode: how to sample; by default top-p 0.9.
        device: where to compute.
        name: what its turns are marked with.

    Raises:
        UserError: a folder that does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        decode: DecodeConfig | None = None,
        device: torch.device | str = "cpu",
        name: str = "",
    ) -> None:
        model = Pretrained.load(folder, torch.device(device))
        if not model.tokenizer.chat_template:
            raise UserError(
                f"{folder}: its tokenizer has no chat template; give a model that was made to chat"
            )
        ends = [model.model.generation_config.eos_token_id, model.tokenizer.eos_token_id]
        flat = [
            end for some in ends for end in (some if isinstance(some, list) else [some]) if end is not None
        ]
        super().__init__(name or f"hf:{folder}", model, decode or CHAT, list(dict.fromkeys(flat)))

    def read(self, history: Sequence[str]) -> list[int]:
        """The template's text of the turns that fit; the oldest ones are dropped."""
        for first in range(len(history)):
            ids = self._templated(history[first:])
            if self.room is None or len(ids) <= self.room:
                return ids
        return ids[-(self.room or 0) :]

    def _templated(self, turns: Sequence[str]) -> list[int]:
        """As the template has it."""
        import jinja2

        messages = chat_messages(turns)
        tokenizer = self.model.tokenizer
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError:  # many want the user to speak first
            messages = [{"role": "user", "content": OPENING}, *messages]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except jinja2.TemplateError as error:
                raise UserError(f"{self.name}: its chat template refuses a conversation ({error})") from None
        return tokenizer.encode(text, add_special_tokens=False)


class Blender:
    """Blender (Roller et al. 2021), by beam search: the seed changes nothing.

    Turns are joined as ParlAI does: for Blenderbot (400M and larger) by two blanks, each turn with a blank
    before it and the end token after the last; for BlenderbotSmall (90M) by a line break, without an end.

    Args:
        folder: of the class BlenderbotForConditionalGeneration or BlenderbotSmallForConditionalGeneration.
        decode: the search; by default 10 beams, at least 20 tokens, no three tokens twice, neither those of
            the reply nor those of the history.
        device: where to compute.
        name: what its turns are marked with.

    Raises:
        UserError: a folder that does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        decode: DecodeConfig | None = None,
        device: torch.device | str = "cpu",
        name: str = "",
    ) -> None:
        types = ("blenderbot", "blenderbot-small")
        self.model = Pretrained.load(folder, torch.device(device), types)
        self.name, self.config = name or f"blender:{folder}", self.model.model.config
        decode, positions = decode or BLENDER, self.config.max_position_embeddings
        most = min(decode.max_tokens, positions - 1)
        self.decode = replace(decode, max_tokens=most, min_tokens=min(decode.min_tokens, most))
        self.settings = {key: value for key, value in asdict(self.decode).items() if key in BEAM_SEARCH}

    def read(self, history: Sequence[str]) -> list[int]:
        """The ids of the history's end, as many as fit."""
        if self.config.model_type == "blenderbot-small":
            ids = self.model.encode("\n".join(history))
        else:
            ids = [*self.model.encode("  ".join(f" {turn}" for turn in history)), self.config.eos_token_id]
        return ids[-self.config.max_position_embeddings :]

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return bool(text.strip() and self.model.encode(text))

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`."""
        return self.model.describe()

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """As `Speaker.reply_batch`."""
        step = max(1, ROWS_AT_ONCE // self.decode.beam_size)
        parts = [histories[start : start + step] for start in range(0, len(histories), step)]
        found = [beams for part in parts for beams in self.search([self.read(history) for history in part])]
        return [Said([as_candidate(self.model, beam) for beam in beams]) for beams in found]

    @torch.no_grad()
    def search(self, contexts: Sequence[Sequence[int]]) -> list[list[Sample]]:
        """The beams of each context, best first."""
        from transformers import GenerationConfig

        config, model, n = self.config, self.model.model, self.decode.beam_size
        ids, mask = padded(contexts, self.model.device, left=False)
        model.generation_config = GenerationConfig(  # or the folder's would fill the gaps
            num_beams=n,
            num_return_sequences=n,
            min_new_tokens=self.decode.min_tokens,
            max_new_tokens=self.decode.max_tokens,
            no_repeat_ngram_size=self.decode.no_repeat_ngram,
            encoder_no_repeat_ngram_size=self.decode.no_repeat_ngram,
            length_penalty=self.decode.length_penalty,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        end = config.eos_token_id
        found = [
            [*beam[: beam.index(end)], end] if end in beam else beam
            for beam in model.generate(input_ids=ids, attention_mask=mask)[:, 1:].tolist()
        ]
        means = self._mean_log_probs([context for context in contexts for _ in range(n)], found)
        samples = [Sample(beam, mean) for beam, mean in zip(found, means, strict=True)]
        return [samples[first : first + n] for first in range(0, len(samples), n)]

    def likelihoods(self) -> dict[str, LogProbs]:
        """As `Likely.likelihoods`."""
        return {"forward": self.log_probs}

    def log_probs(self, history: Sequence[str], replies: Sequence[str]) -> list[tuple[float, int]]:
        """As `Sampler.log_probs`."""
        blank = "" if self.config.model_type == "blenderbot-small" else " "  # as before each turn
        ends = [self.config.eos_token_id]
        targets = [
            [*self.model.encode(blank + text if text else ""), *ends][: self.decode.max_tokens]
            for text in replies
        ]
        return _summed(self._mean_log_probs([self.read(history)] * len(targets), targets), targets)

    @torch.no_grad()
    def _mean_log_probs(
        self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> list[float]:
        """The mean log p of each target's tokens after its context."""
        found: list[float] = []
        for first in range(0, len(targets), SCORED_AT_ONCE):
            part = targets[first : first + SCORED_AT_ONCE]
            ids, mask = padded(contexts[first : first + SCORED_AT_ONCE], self.model.device, left=False)
            inputs = [[self.config.decoder_start_token_id, *target[:-1]] for target in part]
            read, _ = padded(inputs, self.model.device, left=False)
            out = self.model.model(input_ids=ids, attention_mask=mask, decoder_input_ids=read)
            found += [_mean(logits, target) for logits, target in zip(out.logits, part, strict=True)]
        return found


def padded(rows: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Ids (B, T) of rows of unequal length, 0 in the gaps, and which are no gaps (B, T)."""
    width = max(map(len, rows))
    gaps = [[0] * (width - len(row)) for row in rows]
    ids = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [[*gap, *one] if left else [*one, *gap] for one, gap in zip(ones, gaps, strict=True)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@torch.no_grad()
def sample(
    model: Any,
    contexts: Sequence[Sequence[int]],
    config: DecodeConfig,
    seeds: Sequence[int],
    ends: Sequence[int],
) -> list[list[Sample]]:
    """Continues each context `n_samples` times.

    Args:
        model: a causal language model of transformers in evaluation mode.
        contexts: B lists of ids.
        config: `strategy` top_k or top_p, temperature, lengths.
        seeds: B of them.
        ends: ids of which any ends a sample.

    Returns:
        B lists.
    """
    device, n = next(model.parameters()).device, config.n_samples
    is_greedy = config.temperature < COLDEST
    temperature, top_k = (1.0, 1) if is_greedy else (config.temperature, config.top_k)
    keys = [draw_key(seed, number) - (1 << 63) for seed in seeds for number in range(n)]
    uniforms = uniform(torch.tensor(keys), config.max_tokens).to(device)  # (B * n, max_tokens)
    x, mask = padded(contexts, device, left=True)
    position = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def logits_of(x: Tensor, mask: Tensor, position: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        given = {"position_ids": position} if takes_positions else {}
        out = model(input_ids=x, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1, **given)
        return out.logits[:, -1].float(), out.cache

    logits, cache = logits_of(x, mask, position)
    if n > 1:
        cache.batch_repeat_interleave(n)
    logits, mask = logits.repeat_interleave(n, dim=0), mask.repeat_interleave(n, dim=0)
    position = position[:, -1:].repeat_interleave(n, dim=0)
    is_end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)
    is_end[list(ends)] = True
    tokens, scores, done = [], [], torch.zeros(len(logits), dtype=torch.bool, device=device)
    for step in range(config.max_tokens):
        if step < config.min_tokens:
            logits = logits.masked_fill(is_end, float("-inf"))
        log_probs = (logits / temperature).log_softmax(dim=-1)
        if config.strategy == "top_p" and not is_greedy:
            token = choose_top_p(log_probs, config.top_p, uniforms[:, step])
        else:
            token = choose(log_probs, top_k, uniforms[:, step])
        tokens.append(token.masked_fill(done, -1))
        scores.append(log_probs.gather(1, token[:, None])[:, 0].masked_fill(done, 0.0))
        done = done | is_end[token]
        if bool(done.all()) or step == config.max_tokens - 1:
            break
        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1), position + 1
        logits, cache = logits_of(token[:, None], mask, position, cache)
    found = _samples(torch.stack(tokens, dim=1), torch.stack(scores, dim=1), ends)
    return [found[first : first + n] for first in range(0, len(found), n)]


def _samples(tokens: Tensor, scores: Tensor, ends: Sequence[int]) -> list[Sample]:
    """Of each row of ids (rows, T), which are -1 after its end, and of their log-probabilities."""
    means = (scores.double().sum(dim=1) / (tokens >= 0).sum(dim=1)).tolist()
    rows = [[token for token in row if token >= 0 and token not in ends] for row in tokens.tolist()]
    return [Sample(row, mean) for row, mean in zip(rows, means, strict=True)]


@torch.no_grad()
def mean_log_probs(
    model: Any, given: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[float]:
    """The mean log p of each target's tokens after what is given, by a causal language model."""
    found: list[float] = []
    for first in range(0, len(given), SCORED_AT_ONCE):
        part = slice(first, first + SCORED_AT_ONCE)
        rows = [[*before, *after] for before, after in zip(given[part], targets[part], strict=True)]
        ids, mask = padded(rows, next(model.parameters()).device, left=False)
        logits = model(input_ids=ids, attention_mask=mask).logits
        for row, before, after in zip(logits, given[part], targets[part], strict=True):
            found.append(_mean(row[len(before) - 1 :], after))
    return found


@torch.no_grad()
def continued(
    model: Any, context: Sequence[int], targets: Sequence[Sequence[int]], ends: Sequence[int]
) -> list[float]:
    """The mean log p of each target's tokens after one context, which is read only once.

    A target that ends with one of `ends` may end with any of them.
    """
    device, found = next(model.parameters()).device, list[float]()
    read = model(input_ids=torch.tensor([list(context)], device=device), use_cache=True, logits_to_keep=1)
    for first in range(0, len(targets), SCORED_AT_ONCE):
        part = targets[first : first + SCORED_AT_ONCE]
        cache = copy.deepcopy(read.cache)
        cache.batch_repeat_interleave(len(part))
        ids, mask = padded(part, device, left=False)
        mask = torch.cat([mask.new_ones(len(part), len(context)), mask], dim=1)
        after = model(input_ids=ids, attention_mask=mask, cache=cache).logits
        logits = torch.cat([read.logits[:, -1:].expand(len(part), 1, -1), after], dim=1)
        found += [_mean(rows, target, ends) for rows, target in zip(logits, part, strict=True)]
    return found


def _mean(logits: Tensor, target: Sequence[int], ends: Sequence[int] = ()) -> float:
    """The mean log p of the target's tokens, the first of which the first row of logits predicts."""
    ids = torch.tensor(list(target), device=logits.device)
    rows = logits[: len(target)].float()
    if target[-1] in ends:  # all ends are one token
        together = rows[-1, list(ends)].logsumexp(dim=0)
        rows[-1, list(ends)] = float("-inf")
        rows[-1, target[-1]] = together
    return -float(F.cross_entropy(rows, ids))


def _summed(means: Sequence[float], targets: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """Sums and numbers of tokens."""
    return [(mean * len(target), len(target)) for mean, target in zip(means, targets, strict=True)]
