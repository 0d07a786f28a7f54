"""Contexts to candidates: replies for each latent z, up to 320 rows at once (docs/spec.md, Decoding).

1. The prefix of every row, [z] context [CLS], is encoded once into a key/value cache. Context attends to the
   latent, so a stage-2.1 model has a prefix for each (context, latent); several samples of one latent, or of
   a stage-1 model, share theirs, and so do the hypotheses of a beam. With `latent_at=response` the latent
   comes after the context, which all of them share.
2. Token after token goes through the cache. A row samples among its top k, or top p, tokens with random
   numbers that are a function of (seed, context, candidate) alone, whatever else is in the batch; or it takes
   part in the beam search of its prefix.
3. Rows that have ended leave the batch (samples, when they are a quarter of it); all done, or `max_tokens`:
   stop.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from plato2.batch import Unit, on_device
from plato2.config import COLDEST, DecodeConfig, UserError
from plato2.data.samples import encode_prefix
from plato2.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, Tokenizer
from plato2.data.units import Pairs, Records, build_unit, one_a_row
from plato2.model import masks
from plato2.model.backbone import Backbone, KeyValueCache
from plato2.model.heads import Latents
from plato2.model.networks import Generator
from plato2.model.noise import uniform

ROWS_AT_ONCE = 320
"""Rows of a batch: 16 contexts with 20 candidates. More candidates are found part by part, since a row takes
2 MB of memory with the smallest model and 14 MB with 93 M parameters."""
LEAVE_AT = 0.25
"""Share of ended rows at which they leave the batch: moving the cache costs about as much as a step."""
NO_TOKEN = -1
"""Between turns, and where there is nothing yet, in the tokens that must not be repeated."""
BLOCKED = -1e9
"""Logit of a token that would repeat an n-gram; finite, so that there is something when all are blocked."""


@dataclass(frozen=True)
class Hypothesis:
    """One generated response, as ids."""

    token_ids: tuple[int, ...]
    """Tokens after [CLS]; the last one is [SEP] unless `max_tokens` came first."""
    latent: int | None
    """z, or None from a stage-1 model."""
    log_prob: float
    """Mean log-probability of the generated tokens, [SEP] included, or as `length_penalty` says (Knover's
    decode_score)."""

    @property
    def words(self) -> tuple[int, ...]:
        """The tokens without the final [SEP]."""
        return self.token_ids[:-1] if self.has_end else self.token_ids

    @property
    def has_end(self) -> bool:
        """Whether it ended before `max_tokens` cut it."""
        return self.token_ids[-1:] == (EOS_ID,)

    def stopped(self, stop: Sequence[str], tokenizer: Tokenizer) -> "Hypothesis":
        """What comes before the first of these texts, if one is in it: where it begins counts as the end."""
        text = tokenizer.decode([word for word in self.words if word > EOS_ID])
        places = [place for end in stop if (place := text.find(end)) >= 0]
        if not places:
            return self
        return replace(self, token_ids=(*tokenizer.encode(text[: min(places)]), EOS_ID))


@dataclass
class Rows:
    """Unfinished hypotheses, one per row of the batch, and what their next tokens follow from."""

    cache: KeyValueCache
    bias: Tensor
    """Additive mask (rows, 1, 1, prefix + max_tokens) over the cache's slots, those of later steps included;
    the padding between a short prefix and its response is shut."""
    h: Tensor
    """(rows, H) the backbone's output at the last token, from which the next one follows."""
    position: Tensor
    """(rows,) of the next token."""
    history: Tensor
    """(rows, W + max_tokens) ids in which n-grams are looked up: the turns, `NO_TOKEN` after each, and then
    the response."""
    filled: int
    """Columns of `history` that are filled already; the last one has the last token of every row."""

    def keep(self, index: Tensor) -> None:
        """Keeps these rows, in this order, some perhaps several times: (rows',) indices."""
        self.cache.keep(index)
        self.bias, self.h, self.position = self.bias[index], self.h[index], self.position[index]
        self.history = self.history[index]

    def feed(self, generator: Generator, token: Tensor) -> None:
        """Extends each row by the token that was chosen for it, (rows,): of type 1 and role 0."""
        token, zeros = token[:, None], torch.zeros_like(token[:, None])
        position = self.position[:, None]
        x = generator.backbone.embed(token, zeros + 1, position, zeros)  # (rows, 1, H)
        bias = self.bias[..., : self.cache.length + 1]
        self.h = generator.backbone.encode(x, bias, self.cache, pos_ids=position)[:, 0]
        self.position = self.position + 1
        self.history[:, self.filled] = token[:, 0]
        self.filled += 1


def n_candidates(generator: Generator, config: DecodeConfig) -> int:
    """Candidates that `decode` finds of each context."""
    if generator.recognition is None and config.strategy != "beam":
        return config.n_candidates
    n_latents = 1 if generator.recognition is None else generator.model_config.n_latent
    return n_latents * config.rows_per_latent


@torch.no_grad()
def decode(
    generator: Generator,
    contexts: Sequence[Sequence[int]],
    config: DecodeConfig,
    seeds: Sequence[int] | None = None,
    uniforms: Tensor | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    latents: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Candidates of each context.

    They are n = K * `n_samples`, candidate i with latent i % K (stage 2.1), or n = `n_candidates` samples
    (stage 1); of a beam search K * `beam_size`, or `beam_size`, the best of a latent first.

    The token probabilities are Knover's: softmax of logits / temperature without [UNK] and [MASK], without
    [SEP] before `min_tokens` and without what would repeat an n-gram. A sampled token is drawn from the
    `top_k` best (ties kept) or from the `top_p` nucleus, and scored in the full softmax.

    Args:
        generator: a generation network, or a `1_coarse` or `2_gen` stage, in evaluation mode.
        contexts: B lists of ids, [CLS] (turn [SEP])*.
        config: how to decode.
        seeds: one per context, instead of `config.seed`.
        uniforms: (n * B, max_tokens) numbers in [0, 1) to sample with, row = candidate * B + context; by
            default a function of the context's seed, its ids and the candidate.
        prefixes: B lists of ids with which the responses begin, without [CLS]; they are part of the
            hypotheses, but count neither as tokens generated nor in their scores.
        latents: the values of z to try (stage 2.1) in place of all K; candidate i has number i % len(latents)
            of them.

    Raises:
        UserError: context, prefix and `max_tokens` are longer than the model's positions, the beam is wider
            than its vocabulary, or its weights give no probabilities.
    """
    if generator.training:
        raise ValueError("decode needs the generator in evaluation mode: generator.eval()")
    if config.temperature < COLDEST:
        config = replace(config, strategy="top_k", top_k=1, temperature=1.0)
    if not contexts:
        return []
    prefixes = [()] * len(contexts) if prefixes is None else prefixes
    _check_size(generator, contexts, prefixes, config)
    has_latents, is_beam = generator.recognition is not None, config.strategy == "beam"
    latents = range(generator.model_config.n_latent) if latents is None else latents
    n_latents = len(latents) if has_latents else 1
    copies = 1 if is_beam else config.n_samples if has_latents else config.n_candidates
    n = n_latents * copies
    width = config.beam_size if is_beam else 1  # hypotheses of a (candidate, context)
    if uniforms is None and not is_beam:
        keys = _row_keys(contexts, n, [config.seed] * len(contexts) if seeds is None else seeds)
        uniforms = uniform(keys, config.max_tokens)
    found: list[list[Hypothesis]] = [[] for _ in contexts]
    for part in _parts(n, n_latents, len(contexts) * width):
        own = [latents[candidate % n_latents] for candidate in part[:n_latents]]
        drawn = None if uniforms is None else uniforms[part.start * len(contexts) : part.stop * len(contexts)]
        tokens, sums = _decode_part(generator, contexts, prefixes, config, own, drawn)
        more = _hypotheses(tokens, sums, config, prefixes, own if has_latents else [None])
        for hypotheses, of_part in zip(found, more, strict=True):
            hypotheses += of_part
    return found


def _hypotheses(
    tokens: Tensor,
    sums: Tensor,
    config: DecodeConfig,
    prefixes: Sequence[Sequence[int]],
    latents: Sequence[int | None],
) -> list[list[Hypothesis]]:
    """What was found for each context: row = (candidate * B + context) * beam + place in it."""
    lengths = _lengths(tokens)
    scores = (sums / _norm(lengths, config.length_penalty)).tolist()
    beam = config.beam_size if config.strategy == "beam" else 1
    found: list[list[Hypothesis]] = [[] for _ in prefixes]
    for number, (row, length, score) in enumerate(
        zip(tokens.tolist(), lengths.tolist(), scores, strict=True)
    ):
        candidate, context = divmod(number // beam, len(prefixes))
        latent = latents[candidate % len(latents)]
        found[context].append(Hypothesis((*prefixes[context], *row[:length]), latent, score))
    return found


def _parts(n: int, n_latents: int, rows: int) -> Iterator[range]:
    """The candidates 0 .. n - 1, of which each takes this many rows, in parts that are decoded at once.

    A part has no latent twice, or all of them equally often: those of one latent share its prefix.
    """
    size = max(1, ROWS_AT_ONCE // rows)
    if size > n_latents:
        size -= size % n_latents
    for first in range(0, n, size):
        yield range(first, min(first + size, n))


def _decode_part(
    generator: Generator,
    contexts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    config: DecodeConfig,
    latents: Sequence[int],
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Candidates of these latents: a beam search of each, or as many samples as there are `uniforms`.

    Returns:
        Tokens (rows, steps), row = candidate * B + context, or in a beam search `beam_size` rows for each of
        these; and sums of their log-probabilities (rows,).
    """
    device = generator.backbone.device
    with generator.backbone.own_precision():  # the cache has it, too
        rows = _prefill(generator, contexts, prefixes, config.max_tokens, latents)
        if config.strategy == "beam":
            return _beam_search(generator, rows, config)
        assert uniforms is not None
        if (copies := len(uniforms) // len(rows.h)) > 1:
            rows.keep(torch.arange(len(rows.h), device=device).repeat(copies))
        return _sample(generator, rows, config, uniforms.to(device))


def _sample(
    generator: Generator, rows: Rows, config: DecodeConfig, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws token after token.

    Returns:
        Tokens (rows, steps), meaningless after a row's [SEP], and sums of their log-probabilities (rows,).
    """
    n_rows = len(uniforms)
    number = torch.arange(n_rows, device=uniforms.device)  # the row of the result each row of the batch is
    ended = torch.zeros_like(number, dtype=torch.bool)
    tokens = torch.full((n_rows, config.max_tokens), PAD_ID, device=number.device)
    log_probs = torch.zeros(n_rows, config.max_tokens, device=number.device)
    for step in range(config.max_tokens):
        full = _log_probs(generator, rows, config, step)  # (rows, V)
        if config.strategy == "top_p":
            token = choose_top_p(full, config.top_p, uniforms[number, step])
        else:
            token = choose(full, config.top_k, uniforms[number, step])
        tokens[number, step] = token
        log_probs[number, step] = full.gather(1, token[:, None])[:, 0]
        ended |= token == EOS_ID
        n_ended = int(ended.sum())
        if n_ended == len(ended) or step + 1 == config.max_tokens:
            break
        if n_ended >= LEAVE_AT * len(ended):
            going = (~ended).nonzero()[:, 0]
            rows.keep(going)
            number, ended, token = number[going], ended[going], token[going]
        rows.feed(generator, token)
    tokens, log_probs = tokens[:, : step + 1], log_probs[:, : step + 1]
    inside = torch.arange(step + 1, device=tokens.device) < _lengths(tokens)[:, None]
    return tokens, (log_probs.double() * inside).sum(dim=1)


def _beam_search(generator: Generator, rows: Rows, config: DecodeConfig) -> tuple[Tensor, Tensor]:
    """The best b hypotheses of each row, which are compared by their scores as they stand at each step.

    An ended hypothesis keeps its score and stays as long as it is among the best; only those that go on are
    rows of the batch.

    Returns:
        Tokens (rows * b, steps), best first, and the sums of their log-probabilities (rows * b,).
    """
    n, width, device = len(rows.h), config.beam_size, rows.h.device
    tokens = torch.full((n, 1, config.max_tokens), PAD_ID, device=device)  # one hypothesis each: nothing yet
    sums = torch.zeros(n, 1, dtype=torch.double, device=device)
    lengths = torch.zeros(n, 1, dtype=torch.long, device=device)
    ended = torch.zeros(n, 1, dtype=torch.bool, device=device)
    for step in range(config.max_tokens):
        best = _log_probs(generator, rows, config, step).topk(width, dim=-1)  # (rows going on, b)
        going = ~ended
        row = (going.flatten().cumsum(dim=0) - 1).view_as(going)  # where in the batch
        lengths = lengths + going
        token = torch.full((*ended.shape, width), PAD_ID, device=device)  # (n, parents, b): the candidates
        token[going] = best.indices
        total = sums[..., None].repeat(1, 1, width)
        total[going] += best.values.double()
        score = total / _norm(lengths, config.length_penalty)[..., None]
        score[..., 1:].masked_fill_(ended[..., None], float("-inf"))  # what has ended competes once
        chosen = score.flatten(1).topk(width, dim=-1).indices.sort(dim=-1).values  # by parent, then by score
        parent = chosen // width
        sums, token = total.flatten(1).gather(1, chosen), token.flatten(1).gather(1, chosen)
        tokens = tokens.gather(1, parent[..., None].expand(-1, -1, config.max_tokens))
        tokens[..., step] = token
        lengths = lengths.gather(1, parent)
        ended = ended.gather(1, parent) | (token == EOS_ID)
        if bool(ended.all()) or step + 1 == config.max_tokens:
            break
        rows.keep(row.gather(1, parent)[~ended])
        rows.feed(generator, token[~ended])
    order = (sums / _norm(lengths, config.length_penalty)).argsort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(1, order[..., None].expand(-1, -1, config.max_tokens))
    return tokens[..., : step + 1].flatten(0, 1), sums.gather(1, order).flatten()


def _prefill(
    generator: Generator,
    contexts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    max_tokens: int,
    latents: Sequence[int],
) -> Rows:
    """Encodes [z] context [CLS] and what is given of the response: row = number of z * B + context."""
    backbone = generator.backbone
    device = backbone.device
    responses = [encode_prefix(prefix, len(prefix) + 1) for prefix in prefixes]
    if generator.recognition is not None and backbone.config.latent_at == "response":
        cache, bias, h, position = _after_context(
            backbone, generator.recognition, contexts, responses, max_tokens, latents
        )
        return _rows(cache, bias, h, position, contexts, prefixes, max_tokens)
    unit = on_device(_one_a_row(backbone, list(zip(contexts, responses, strict=True))), device)
    x = backbone.embed_unit(unit)  # (B, T, H)
    real, types, positions = unit["segment_ids"] > 0, unit["type_ids"], unit["pos_ids"]  # (B, T)
    lengths = real.sum(dim=1)
    n = 1
    if generator.recognition is not None:
        n = len(latents)
        x = _with_latents(backbone, generator.recognition, x, latents)
        real = F.pad(real, (1, 0), value=True).repeat(n, 1)  # the front slot: type 0, position 0
        types, positions = (F.pad(each, (1, 0)).repeat(n, 1) for each in (types, positions))
    cache = backbone.cache(len(x), x.shape[1] + max_tokens, x.dtype)
    last = torch.arange(len(x), device=device) * x.shape[1] + real.sum(dim=1) - 1  # flat slots
    mask = backbone.dense_mask(real.long(), types, x.dtype)
    h = backbone.encode(x, mask, cache, read=last, pos_ids=positions)
    response = real.new_ones(len(real), max_tokens)
    bias = masks.additive(torch.cat([real, response], dim=1)[:, None, :], x.dtype)
    return _rows(cache, bias, h, lengths.repeat(n), contexts, prefixes, max_tokens)


def _after_context(
    backbone: Backbone,
    recognition: Latents,
    contexts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    max_tokens: int,
    latents: Sequence[int],
) -> tuple[KeyValueCache, Tensor, Tensor, Tensor]:
    """Encodes each context once, and after it [CLS] + z and what is given of the response, for each z.

    Returns:
        Cache, mask over its slots, output at the last token and position of the next, as in `Rows`.
    """
    device, n = backbone.device, len(latents)
    first, second = (
        on_device(_one_a_row(backbone, pairs), device)
        for pairs in ([(context, ()) for context in contexts], [((), response) for response in responses])
    )
    x = backbone.embed_unit(first)  # (B, C, H)
    c_real, r_real = first["segment_ids"] > 0, second["segment_ids"] > 0  # (B, C), (B, R)
    room = x.shape[1] + r_real.shape[1] + max_tokens
    cache = backbone.cache(len(x), room, x.dtype)
    mask = backbone.dense_mask(first["segment_ids"], first["type_ids"], x.dtype)
    backbone.encode(
        x, mask, cache, read=torch.zeros(1, dtype=torch.long, device=device), pos_ids=first["pos_ids"]
    )
    cache.keep(torch.arange(len(x), device=device).repeat(n))

    second["pos_ids"] = second["pos_ids"] + c_real.sum(dim=1, keepdim=True)
    vectors = _vectors(recognition, latents, x).repeat_interleave(len(x), dim=0)  # (n * B, H)
    y = backbone.embed_unit(second).repeat(n, 1, 1)  # (n * B, R, H)
    y = torch.cat([y[:, :1] + vectors[:, None], y[:, 1:]], dim=1)
    seen = torch.cat(
        [c_real[:, None].expand(-1, y.shape[1], -1), masks.causal(second["segment_ids"])], dim=2
    ).repeat(n, 1, 1)  # (n * B, R, C + R)
    lengths, positions = r_real.sum(dim=1).repeat(n), second["pos_ids"].repeat(n, 1)
    last = torch.arange(len(y), device=device) * y.shape[1] + lengths - 1  # flat slots
    h = backbone.encode(y, masks.additive(seen, x.dtype), cache, read=last, pos_ids=positions)
    going_on = c_real.new_ones(len(x), max_tokens)
    slots = torch.cat([c_real, r_real, going_on], dim=1).repeat(n, 1)
    bias = masks.additive(slots[:, None, :], x.dtype)
    return cache, bias, h, lengths + c_real.sum(dim=1).repeat(n)


def _one_a_row(backbone: Backbone, pairs: Pairs) -> Unit:
    """Records of lists of ids, each in a row of its own, with their last ids."""
    records = Records.of(pairs)
    layout = one_a_row(records.length.sum(axis=1))
    return build_unit(records, layout, drop_last=False, roles=backbone.role is not None)


def _rows(
    cache: KeyValueCache,
    bias: Tensor,
    h: Tensor,
    position: Tensor,
    contexts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    max_tokens: int,
) -> Rows:
    """`Rows` before the first step, with what was said so far."""
    history = _history(contexts, prefixes, max_tokens).to(h.device)
    filled = history.shape[1] - max_tokens
    return Rows(cache, bias, h, position, history.repeat(len(h) // len(history), 1), filled)


def _history(contexts: Sequence[Sequence[int]], prefixes: Sequence[Sequence[int]], max_tokens: int) -> Tensor:
    """`Rows.history` before the first step: context on the left, prefix on the right, room for the rest."""
    width = max(map(len, contexts)) + max(map(len, prefixes))
    history = []
    for context, prefix in zip(contexts, prefixes, strict=True):
        turns = [NO_TOKEN if token in (BOS_ID, EOS_ID) else token for token in context]
        gap = width - len(context) - len(prefix)
        history.append([*turns, *[NO_TOKEN] * gap, *prefix, *[NO_TOKEN] * max_tokens])
    return torch.tensor(history)


def _with_latents(backbone: Backbone, recognition: Latents, x: Tensor, latents: Sequence[int]) -> Tensor:
    """Every context behind each latent's vector: (B, T, H) -> (n * B, 1 + T, H), row = number * B + b."""
    vectors = _vectors(recognition, latents, x).repeat_interleave(len(x), dim=0)  # (n * B, H)
    rows = torch.cat([torch.zeros_like(x[:, :1]), x], dim=1).repeat(len(latents), 1, 1)
    front = torch.arange(len(rows), device=x.device) * rows.shape[1]
    return backbone.put_front(rows, front, vectors)


def _vectors(recognition: Latents, latents: Sequence[int], like: Tensor) -> Tensor:
    """The vectors of these latents, (n, H), on the device and in the precision of `like`."""
    n_latent = recognition.latent_embedding.shape[1]
    one_hot = torch.eye(n_latent, device=like.device, dtype=like.dtype)[list(latents)]  # (n, K)
    return recognition.latent(one_hot)


def _log_probs(generator: Generator, rows: Rows, config: DecodeConfig, step: int) -> Tensor:
    """log softmax(logits / temperature) of each row's next token, without what is forbidden: (rows, V)."""
    logits = generator.backbone.lm_logits(rows.h).float()
    if config.no_repeat_ngram:
        history = rows.history[:, : rows.filled]
        logits.masked_fill_(repeating(history, config.no_repeat_ngram, logits.shape[1]), BLOCKED)
    logits[:, [UNK_ID, generator.model_config.mask_id]] = float("-inf")
    if step < config.min_tokens:
        logits[:, EOS_ID] = float("-inf")
    log_probs = (logits / config.temperature).log_softmax(dim=-1)
    if bool(log_probs[:, PAD_ID].isnan().any()):  # one that is no number makes all of its row so
        raise UserError(
            "the model's probabilities are not numbers: its weights are damaged, or training diverged; take "
            "an earlier checkpoint"
        )
    return log_probs


def repeating(history: Tensor, n: int, n_tokens: int) -> Tensor:
    """The tokens that would make an n-gram which is there already.

    Args:
        history: (rows, W) ids; an n-gram does not reach over `NO_TOKEN`. The next token follows the last.
        n: 1 forbids every token that is there.
        n_tokens: V.

    Returns:
        (rows, V) bool.
    """
    blocked = torch.zeros(len(history), n_tokens + 1, dtype=torch.bool, device=history.device)
    if history.shape[1] >= n:
        last = history[:, history.shape[1] - n + 1 :]  # (rows, n - 1)
        windows = history.unfold(1, n, 1)  # (rows, W - n + 1, n)
        found = (windows[..., :-1] == last[:, None]).all(dim=-1) & (last != NO_TOKEN).all(dim=-1)[:, None]
        token = torch.where(found & (windows[..., -1] != NO_TOKEN), windows[..., -1], n_tokens)
        blocked.scatter_(1, token, True)
    return blocked[:, :n_tokens]


def choose(log_probs: Tensor, top_k: int, uniforms: Tensor) -> Tensor:
    """Draws one token per row among those at least as probable as the k-th best (ties are kept).

    Args:
        log_probs: (rows, V).
        top_k: k; 1 takes the most probable token.
        uniforms: (rows,) in [0, 1): the point of the cumulative distribution, in the order of the ids.

    Returns:
        (rows,) token ids.
    """
    if top_k == 1:
        return log_probs.argmax(dim=-1)
    least = log_probs.topk(min(top_k, log_probs.shape[-1]), dim=-1).values[:, -1:]
    kept = log_probs >= least  # (rows, V); what is not kept is left out, so that few are drawn from
    count = kept.sum(dim=-1, keepdim=True)
    column = torch.arange(int(count.max()), device=count.device) < count  # (rows, n), the ids in order
    best = log_probs.new_full(column.shape, float("-inf")).masked_scatter_(column, log_probs[kept])
    ids = torch.zeros_like(column, dtype=torch.long).masked_scatter_(column, kept.nonzero()[:, 1])
    return ids.gather(1, _draw(best, uniforms)[:, None])[:, 0]


def choose_top_p(log_probs: Tensor, top_p: float, uniforms: Tensor) -> Tensor:
    """Draws one token per row among the most probable; a token is out when those before it reach `top_p`.

    Args:
        log_probs: (rows, V).
        top_p: p; 1 keeps all tokens, 0 the most probable one.
        uniforms: (rows,) in [0, 1): the point of the cumulative distribution, the most probable token first.

    Returns:
        (rows,) token ids.
    """
    best = log_probs.sort(dim=-1, descending=True, stable=True)
    kept = best.values
    if top_p < 1:  # rounding may bring the sum to 1 before the last token
        probs = kept.double().exp()
        before = probs.cumsum(dim=-1) - probs
        kept = kept.masked_fill(before >= max(top_p, 1e-9), float("-inf"))
    return best.indices.gather(1, _draw(kept, uniforms)[:, None])[:, 0]


def _draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draws one column of (rows, V) per row: those of -inf never, the others in proportion."""
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    point = uniforms.double()[:, None] * cumulative[:, -1:]  # in double u * total < total: never beyond
    return torch.searchsorted(cumulative, point, right=True)[:, 0]


def _lengths(tokens: Tensor) -> Tensor:
    """Tokens of each row up to its [SEP], which is one of them: (rows, steps) -> (rows,)."""
    is_end = tokens == EOS_ID
    return torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, tokens.shape[1])


def _norm(lengths: Tensor, length_penalty: float | None) -> Tensor:
    """What the summed log-probabilities of that many tokens are divided by to be a score."""
    lengths = lengths.double()
    return lengths if length_penalty is None else ((5 + lengths) / 6) ** length_penalty


def _row_keys(contexts: Sequence[Sequence[int]], n: int, seeds: Sequence[int]) -> Tensor:
    """(n * B,) int64 keys, a hash of seed, candidate number and context."""
    texts = [" ".join(map(str, context)) for context in contexts]
    rows = (
        f"{seed}/{candidate}/{text}".encode()
        for candidate in range(n)
        for seed, text in zip(seeds, texts, strict=True)
    )
    keys = [int.from_bytes(blake2b(row, digest_size=8).digest(), "big", signed=True) for row in rows]
    return torch.tensor(keys)


def _check_size(
    generator: Generator,
    contexts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    config: DecodeConfig,
) -> None:
    limit = generator.model_config.max_position
    longest = max(len(context) + len(prefix) for context, prefix in zip(contexts, prefixes, strict=True))
    if longest + config.max_tokens > limit:
        raise UserError(
            f"max_tokens={config.max_tokens}: with a context of {longest} tokens that is more than the "
            f"model's {limit} positions; use at most {max(limit - longest, 0)} or a shorter context"
        )
    n_usable = generator.model_config.vocab_size - 3  # [UNK], [MASK] and, at first, [SEP] are not
    if config.strategy == "beam" and config.beam_size > n_usable:
        raise UserError(
            f"beam_size={config.beam_size}: the model has {n_usable} tokens; use at most that many"
        )
