"""The closed vocabularies of a run: model, optimizer, decoding and run-level keys.

Plain dataclasses that check themselves. `train.py` registers them as Hydra schemas, so a typo in any of
these keys fails before anything starts; below `train.py` they are ordinary typed arguments.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from math import inf, isfinite
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

Strategy = Literal["top_k", "top_p", "beam"]
Criterion = Literal["coherence", "forward", "backward"]
"""p(l=1|c,r), log p(r|c,z) and log p(c|r), the last two as means per token."""
SMALL = "small"
"""The model that comes with plato2, by its name."""
SMOLLM2 = "smollm2"
"""Adapters of a pretrained decoder that come with plato2, and what they call their base."""
Role = Literal["generation", "evaluation", "backward"]
Head = Literal["first", "dual", "pmi", "mask"]
"""Of p(l|c,r): see model/heads.py, `coherence_head`."""
Schedule = Literal["inverse_sqrt", "linear"]
ContextMask = Literal["prefix", "causal"]
LatentAt = Literal["front", "response"]
Adapter = Literal["none", "lora"]
BaseDtype = Literal["float32", "bfloat16"]
COLDEST, HOTTEST = 0.01, 2
"""Temperatures, above which a text is noise and below which the most probable token is taken: logits would
overflow."""
MOST_CANDIDATES = {"n_samples": 1000, "n_candidates": 1000, "beam_size": 100}
"""The most that may be asked for; more is a slip. Samples only take time, since they are decoded in parts;
the hypotheses of a beam are in memory together."""
LARGEST = {
    "n_layer": 1000,
    "n_head": 1000,
    "hidden_size": 65_536,
    "vocab_size": 1 << 24,
    "max_position": 1 << 20,
    "n_type": 1000,
    "n_latent": 65_536,
    "adapter_rank": 65_536,
}
"""Far above any existing model: anything larger is a slip or a damaged file, and would not fit in memory."""


class UserError(Exception):
    """Something the user can fix: the message names the file or key, the value and the cure.

    `train.py` and the `plato2` command print it as one line, without a traceback. What both of them can call
    names an option as its field, `max_context=2`; `in_typed_words` puts the name there that was typed.
    """


def install(extra: str) -> str:
    """What to type for the packages of an extra of pyproject.toml: plato2 is in no package index."""
    return f"pip install '.[{extra}]' in the folder of plato2's source"


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{below}": leaf for below, leaf in dotted(value).items()}
        else:
            found[key] = value
    return found


def in_typed_words(message: str, names: Mapping[str, str], sign: str = "=") -> str:
    """A message in which options have the names that the user typed, as `--max-context 2`.

    An option is told from a word by what follows it, as in `force=true`, or by a `_` in it.

    Args:
        message: of a `UserError`.
        names: what was typed for a field, e.g. `--max-context`; for `reader.`, what its options begin with.
        sign: between an option and its value; with a space `force=true` becomes a flag.
    """

    def typed(found: re.Match[str]) -> str:
        group, name, given = found.groups("")
        if group:
            return names[group] + name + given if group in names else found[0]
        if name not in names or not (given or "_" in name):
            return found[0]
        return names[name] + (given if sign == "=" else given.removesuffix("=true").replace("=", sign))

    return re.sub(r"(?<![\w./='-])([a-z]+\.)?([a-z]\w*)(=true\b|=|(?![\w/]|\.\w))", typed, message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to say about an unknown name: the one it resembles, else all known ones."""
    known = list(known)
    key, colon, value = name.partition(":")
    if colon and key in known:
        return f"a space is missing after the colon: {key}: {value}"
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(known)}" if known else "there are none"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def expand_path(path: str, key: str) -> str:
    """A path or address with `~`, `~name`, `$NAME` and `${NAME}` written out.

    A shell does this for a bare word only, not for `--out=~/x`, and not at all in a file.

    Args:
        path: as the user gave it.
        key: what the user gave it by, for messages.

    Raises:
        UserError: no such user or environment variable, or a number that YAML has read.
    """
    _require(isinstance(path, str), f"{key}={path}: a path, which YAML reads as a number; put it in quotes")
    _require(
        path.encode("utf-8", "replace").decode() == path,
        f"{key}={path!a}: its name is not UTF-8, so it cannot be recorded; rename it, or link to it",
    )
    for bare, braced in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", path):
        name = bare or braced
        _require(name in os.environ, f"{key}={path}: there is no environment variable {name}; set it first")
    found = os.path.expanduser(os.path.expandvars(path))
    _require(
        not found.startswith("~"),
        f"{key}={path}: there is no user of that name; write ./~ if a file has that name",
    )
    return found


def option(
    default: Any = MISSING,
    *,
    help: str,
    ge: float | None = None,
    le: float | None = None,
    means: Mapping[float, str] | None = None,
    factory: Callable[[], Any] | Any = MISSING,
    default_text: str = "",
) -> Any:
    """A field of a dataclass of options, with all that is shown or checked of it.

    They are `check_options`, `--help`, the server's API, the web page and the tables in docs/. The choices of
    a field are those of its type, a `Literal`.

    Args:
        default: its value when it is not given; none = it must be given.
        help: a sentence or two, without the bounds.
        ge: the least value.
        le: the greatest value.
        means: what a bound stands for, such as `{0: "off"}`.
        factory: makes the default.
        default_text: the default in words, where the value itself says little.
    """
    said = {"help": help, "ge": ge, "le": le, "means": means or {}, "default_text": default_text}
    return field(default=default, default_factory=factory, metadata=said)


def _with_meaning(known: Field[Any], value: float) -> str:
    means = known.metadata["means"]
    return f"{value:,} ({means[value]})" if value in means else f"{value:,}"


def _bounds(known: Field[Any]) -> list[str]:
    """What a number must be, in words: each of its bounds, or the range of one that may be a fraction."""
    least, most, means = (known.metadata[key] for key in ("ge", "le", "means"))
    if least is not None and most is not None and isinstance(known.default, float):
        return [f"between {_with_meaning(known, least)} and {_with_meaning(known, most)}"]
    said = []
    if least == 0:
        said.append(f"{_with_meaning(known, 0)} or more")
    elif least is not None:
        said.append(f"at least {least:,}" + (f" ({least:,} = {means[least]})" if least in means else ""))
    return said if most is None else [*said, f"at most {most:,}"]


def explained(known: Field[Any], most: float | None = None) -> str:
    """What an option is for, with its bounds.

    Args:
        known: made by `option`.
        most: the greatest value, where a place has its own.
    """
    least, most = known.metadata["ge"], known.metadata["le"] if most is None else most
    said = " ".join(_bounds(known))
    if least is not None and most is not None:
        said = f"{_with_meaning(known, least)} to {_with_meaning(known, most)}"
    return f"{known.metadata['help']} {said[0].upper()}{said[1:]}." if said else known.metadata["help"]


def check_options(options: Any) -> None:
    """Refuse values that are not among a field's choices or within its bounds.

    Raises:
        UserError: names the first such field.
    """
    types = get_type_hints(type(options))
    for known in fields(options):
        value = getattr(options, known.name)
        if get_origin(types[known.name]) is Literal:
            choices = get_args(types[known.name])
            _require(value in choices, f"{known.name}={value}: use one of {', '.join(choices)}")
        if value is None and known.default is None:
            continue
        least, most = known.metadata.get("ge"), known.metadata.get("le")
        if not (least is most is None or isinstance(value, Real)):
            raise UserError(f"{known.name}={value!r}: must be a number")
        is_low = least is not None and not value >= least
        if is_low or (most is not None and not value <= most):
            told = _bounds(known)[0 if is_low else -1]
            raise UserError(f"{known.name}={reprlib.repr(value)}: must be {told}")


@dataclass
class ModelConfig:
    """The geometry of the backbone (docs/spec.md, Backbone); the defaults are the paper's 93M model.

    Raises:
        UserError: a value that no model can have.
    """

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads of a block; they share hidden_size equally."""
    hidden_size: int = 768
    """Width of the model; the feed-forward layers are four times as wide."""
    vocab_size: int = 8001
    """Rows of the word table, [MASK] included (8,000 pieces + 1)."""
    max_position: int = 256
    """Positions in one sample: 128 of context + 128 of response."""
    n_type: int = 2
    """Token types: 0 context, 1 response."""
    n_role: int = 0
    """Role embeddings; 0 = none (PLATO-2 has none)."""
    n_latent: int = 20
    """K, the number of latent speech acts z."""
    latent_at: str = "front"
    """Where z is put: `front` = in a slot of its own before the context, which sees it, as in the paper;
    `response` = added to the response's [CLS], so that all latents share one pass over the context."""
    latent_scale: float | None = 1.0
    """What the vectors of latents are multiplied by: they are drawn as short as our own word embeddings.
    Null: so that they begin as long as those of the pretrained decoder, measured."""
    dropout: float = 0.1
    """On embeddings, attention weights and both residual branches (docs/spec.md, Backbone)."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: about 1.3x the time for a fraction of the memory."""
    path: str = ""
    """Folder of a Hugging Face causal decoder that the backbone is made of (docs/pretrained.md); its geometry
    is read there, but for max_position."""
    context_mask: str = "prefix"
    """What slots of a context see, of a pretrained decoder: `prefix` = all of it, as ours; `causal` = what
    comes before them, as it was pretrained."""
    architecture: str = ""
    """Filled in from `path`: its config.json and special tokens, so that a checkpoint needs no other file."""
    adapter: str = "none"
    """What is trained of a pretrained decoder: `none` = all of it; `lora` = low-rank additions to the linear
    layers of its blocks, by peft, while its own weights stay as they are (docs/pretrained.md)."""
    adapter_rank: int = 16
    """Rank of the additions, peft's `r`."""
    adapter_alpha: float = 32.0
    """They are scaled by adapter_alpha / adapter_rank, peft's `lora_alpha`."""
    base_dtype: str = "float32"
    """What the frozen matrices are kept in while an adapter is trained: `bfloat16` takes half the memory, and
    goes with strategy.precision=bf16-mixed."""
    base_sha256: str = ""
    """Filled in from `path`: the hash of the weights there, or of those that an adapter was trained on."""
    base: str = ""
    """Filled in for an adapter whose base are not the weights in `path`, but those of a run that trained all
    of them and that it started from: its checkpoint."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for key, largest in LARGEST.items():
            value = getattr(self, key)
            _require(value >= 1, f"model.{key}={value}: must be at least 1")
            _require(value <= largest, f"model.{key}={reprlib.repr(value)}: must be at most {largest:,}")
        self.path = expand_path(self.path, "model.path")
        _require(
            self.context_mask in get_args(ContextMask),
            f"model.context_mask={self.context_mask}: use one of {', '.join(get_args(ContextMask))}",
        )
        _require(
            self.latent_at in get_args(LatentAt),
            f"model.latent_at={self.latent_at}: use one of {', '.join(get_args(LatentAt))}",
        )
        scale = self.latent_scale
        _require(
            scale is None or 0 < scale < inf, f"model.latent_scale={scale}: must be a number above 0, or null"
        )
        _require(
            self.is_pretrained or scale is not None,
            "model.latent_scale=null: is for a pretrained decoder; leave it out",
        )
        _require(
            self.is_pretrained or self.context_mask == "prefix",
            f"model.context_mask={self.context_mask}: is for a pretrained decoder; leave it out, or give "
            "model=pretrained model.path=FOLDER",
        )
        _require(
            self.adapter in get_args(Adapter),
            f"model.adapter={self.adapter}: use one of {', '.join(get_args(Adapter))}",
        )
        _require(
            self.is_pretrained or not self.has_adapter,
            f"model.adapter={self.adapter}: is for a pretrained decoder; leave it out, or give "
            "model=pretrained model.path=FOLDER",
        )
        _require(
            self.base_dtype in get_args(BaseDtype),
            f"model.base_dtype={self.base_dtype}: use one of {', '.join(get_args(BaseDtype))}",
        )
        _require(
            self.has_adapter or self.base_dtype == "float32",
            f"model.base_dtype={self.base_dtype}: is for frozen weights; leave it out, or give "
            "model.adapter=lora",
        )
        alpha = self.adapter_alpha
        _require(0 < alpha < inf, f"model.adapter_alpha={alpha}: must be a number above 0")
        _require(
            self.is_pretrained or self.hidden_size % self.n_head == 0,
            f"model.hidden_size={self.hidden_size} is not a multiple of model.n_head={self.n_head}",
        )
        _require(
            0 <= self.n_role <= 1000,
            f"model.n_role={reprlib.repr(self.n_role)}: use 0 for no role embeddings",
        )
        _require(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout}: must be in [0, 1)")

    @property
    def is_pretrained(self) -> bool:
        """Whether the backbone is made of a pretrained decoder."""
        return bool(self.path or self.architecture)

    @property
    def has_adapter(self) -> bool:
        """Whether the weights of the pretrained decoder stay as they are."""
        return self.adapter != "none"

    @property
    def mask_id(self) -> int:
        """The id of [MASK]: the last row of the word table (docs/spec.md, Ids and text)."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class Use:
    """What a trained stage is used for. It is stored with the weights, so that talking needs no stage."""

    role: Role
    """`generation` writes candidates, p(r|c) or p(r|c,z); the others rank them, by p(l|c,r) or by p(c|r)."""
    has_latents: bool = False
    """For a generation model: whether it has a candidate for each z."""
    training_only: tuple[str, ...] = ()
    """Beginnings of the names of parameters that only its losses need; a released model may lack them."""
    coherence_head: Head | None = None
    """For a generation model: the head of its own p(l|c,r), which ranks its candidates, if it has one."""

    def serves(self, role: Role) -> bool:
        """Whether a model is of this role, or of another and ranks by coherence all the same."""
        return role == self.role or (role == "evaluation" and self.coherence_head is not None)


@dataclass
class OptimConfig:
    """AdamW with linear warmup and then decay, by default that of Knover (docs/spec.md, Optimizer).

    Raises:
        UserError: a value the optimizer cannot use.
    """

    lr: float = 1e-3
    """Peak learning rate, reached at step `warmup_steps`."""
    warmup_steps: int = 4000
    """Steps of linear warmup; 0 with `inverse_sqrt` = constant learning rate."""
    schedule: str = "inverse_sqrt"
    """After the warmup: `inverse_sqrt` = Knover's, peak * sqrt(warmup / step), whatever the run's length;
    `linear` = to 0 at `trainer.max_steps`, better for runs of a known length (Bergsma et al., 2025,
    arXiv:2502.15938)."""
    batch_tokens: int = 65536
    """Tokens in one optimizer step over all ranks, padding included; accumulation follows from it."""
    weight_decay: float = 0.01
    """On everything but biases and layer norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's, of the means of gradients and of their squares."""
    eps: float = 1e-8
    """AdamW's, added to the root of the second mean."""
    clip_norm: float = 0.1
    """Global gradient norm, 0 = no clipping; Knover's value, small on purpose (docs/spec.md, Optimizer)."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        self.betas = tuple(map(float, self.betas))  # type: ignore[assignment]
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={list(self.betas)}: must be two numbers in [0, 1)",
        )
        for key in ("lr", "eps"):
            value = getattr(self, key)
            _require(0 < value < inf, f"optim.{key}={value}: must be a number above 0")
        _require(
            self.schedule in get_args(Schedule),
            f"optim.schedule={self.schedule}: use one of {', '.join(get_args(Schedule))}",
        )
        _require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}: must be 0 or more")
        _require(self.batch_tokens >= 1, f"optim.batch_tokens={self.batch_tokens}: must be at least 1")
        _require(
            0 <= self.weight_decay < inf, f"optim.weight_decay={self.weight_decay}: must be 0 (off) or more"
        )
        _require(0 <= self.clip_norm < inf, f"optim.clip_norm={self.clip_norm}: must be 0 (off) or more")


@dataclass
class DecodeConfig:
    """How candidates are found; by default top-k sampling, one for each latent (docs/spec.md, Decoding).

    Raises:
        UserError: a value decoding cannot use.
    """

    strategy: Strategy = option("top_k", help="top_k or top_p (sampling), or beam (search).")
    top_k: int = option(10, help="Sample among the k most probable tokens.", ge=1, means={1: "greedy"})
    top_p: float = option(
        0.9,
        help="For top_p: sample among the likeliest tokens that together reach it.",
        ge=0,
        le=1,
        means={0: "greedy", 1: "all tokens"},
    )
    beam_size: int = option(
        10,
        help="For beam: hypotheses per latent; all become candidates.",
        ge=1,
        le=MOST_CANDIDATES["beam_size"],
        means={1: "greedy"},
    )
    temperature: float = option(
        1.0,
        help="Below 1: more probable tokens; above 1: more variety; below 0.01: greedy.",
        ge=0,
        le=HOTTEST,
        means={0: "greedy"},
    )
    max_tokens: int = option(
        64,
        help="Longest candidate, the end token included; never more than half of the model's positions.",
        ge=1,
    )
    min_tokens: int = option(1, help="No end before this many tokens.", ge=0)
    no_repeat_ngram: int = option(
        0,
        help="Never repeat n tokens in a row, of the reply or of a turn of the context.",
        ge=0,
        means={0: "off"},
    )
    length_penalty: float | None = option(
        None,
        help="The a in ((5 + n) / 6)^a, by which the log-probability of a candidate of n tokens, the end "
        "included, is divided; None = by n.",
        ge=0,
        means={0: "the sum"},
    )
    n_samples: int = option(1, help="Candidates per latent.", ge=1, le=MOST_CANDIDATES["n_samples"])
    n_candidates: int = option(
        20,
        help="Candidates of a stage-1 model, which has no latents.",
        ge=1,
        le=MOST_CANDIDATES["n_candidates"],
    )
    stop: tuple[str, ...] = option((), help="Texts before which a candidate is cut; they are not part of it.")
    seed: int = option(11, help="The same seed gives the same candidates to the same conversation.")

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        given = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        _require(
            isinstance(given, Sequence | set) and all(isinstance(text, str) for text in given),
            f"stop={reprlib.repr(self.stop)}: give texts to stop at",
        )
        self.stop = tuple(given)
        _require(all(self.stop), "stop: a text to stop at is empty")
        _require(isinstance(self.seed, Integral), f"seed={self.seed!r}: must be a whole number")
        check_options(self)
        _require(
            self.temperature >= COLDEST or self.strategy != "beam",
            f"temperature={self.temperature}: is greedy, and strategy=beam is not; leave one out",
        )
        _require(
            self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens}: must be between 0 and max_tokens={self.max_tokens}",
        )
        _require(
            self.n_samples == 1 or self.strategy != "beam",
            f"n_samples={self.n_samples}: a beam search always finds the same; use a larger beam_size",
        )

    @property
    def rows_per_latent(self) -> int:
        """Rows of a batch that each latent of a context takes."""
        return self.beam_size if self.strategy == "beam" else self.n_samples


@dataclass
class RankConfig:
    """What candidates are ranked by: a weighted sum of scores, less Knover's penalties (docs/spec.md,
    Decoding).

    Raises:
        UserError: an unknown criterion.
    """

    weights: Mapping[Criterion, float] | None = option(
        None,
        help="coherence, forward, backward, or a weighted sum: coherence=1,backward=0.5.",
        default_text="coherence; forward without an evaluation model",
    )
    penalties: bool | None = option(
        None,
        help="Rank candidates that do not end, or repeat three words, after all others, as Knover does.",
        default_text="where an evaluation model ranks",
    )

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        known = get_args(Criterion)
        for name, weight in (self.weights or {}).items():
            _require(name in known, f"rank={name}: no such score; {did_you_mean(name, known)}")
            _require(isfinite(weight), f"rank={name}={weight}: must be a finite number")
        _require(
            self.weights is None or any(self.weights.values()),
            f"rank={','.join(f'{name}={weight}' for name, weight in (self.weights or {}).items())}: "
            "give a score a weight other than 0",
        )

    @classmethod
    def parse(cls, text: str) -> RankConfig:
        """`coherence`, `backward` or `coherence=1,backward=0.5` as typed by a user.

        Raises:
            UserError: no such score, or a weight that is not a number.
        """
        weights = {}
        for part in text.split(","):
            name, _, weight = part.partition("=")
            _require(name.strip() not in weights, f"rank={text}: {name.strip()} has two weights")
            try:
                weights[name.strip()] = float(weight) if weight else 1.0
            except ValueError:
                raise UserError(f"rank={part}: the weight is not a number") from None
        return cls(weights)  # type: ignore[arg-type]


@dataclass
class RunConfig:
    """Run-level keys of `train.py` (at the top level of the command line)."""

    seed: int = 11
    """Seeds the weights, the order of the samples, dropout, masks, negatives and Gumbel noise."""
    init_from: str = "auto"
    """Initial weights: a run folder, a checkpoint, a model folder, `scratch` (random), or `auto`: random for
    stage 1 and `plato`, and for the others the newest finished run of the stage that they start from (stage
    1, for ours), with the same geometry and tokenizer."""
    resume: str = "auto"
    """`auto` resumes an unfinished run of the same config, `never` starts a new one; or a run folder."""
    run_id: str | None = None
    """Name of the run folder; default: RUN_ID, else the Slurm job's id, else the time."""
    output_dir: str = "outputs"
    """Runs are written to `<output_dir>/<name>/<run_id>/`."""
    name: str = "run"
    """`<model>-<stage>`; train.yaml fills it in."""
    model_name: str = "model"
    """Name of the geometry; train.yaml fills it in."""
    checkpoint_steps: int = 1000
    """Steps between checkpoints; each validation and the last step write one too."""
    checkpoint_minutes: float = 10.0
    """Minutes after which a checkpoint is written, however few the steps."""
    startup_timeout_s: float = 300.0
    """Seconds that several ranks wait for each other at the start and in the first step, a validation, a save
    or a load; then the run ends with a line that names the rank that is missing or behind."""
    step_timeout_s: float = 100.0
    """The same for each further step."""
    sample_replies: int = 3
    """Validation contexts the model answers at each validation; 0 = none."""
    selection: int = 100
    """Validation contexts for which stage 2.2 chooses a response among ten; 0 = none."""
    human_rank: int = 50
    """Validation contexts whose human reply stage 2.2 ranks among 20 of its stage-1 model's; 0 = none."""
    latent_contexts: int = 0
    """Validation contexts on which stages with latents measure, at each validation and in the report of a
    sweep, how much candidates differ (24 take the tiny model about 13 CPU seconds); 0 = none."""
    plan: bool | str = False
    """Print what the run will need (parameters, memory, time, cost) and train nothing; `json` = as JSON."""
    plan_mfu: float = 0.4
    """Share of a GPU's peak that a plan assumes; typical of dense transformers in bf16."""
    plan_gb_per_s: float = 350.0
    """GB/s at which a plan lets each rank receive while it sends: NCCL's bus bandwidth, 350 with NVLink and
    eight network cards of 400 Gbit/s a machine, about 10 with one card of 100 Gbit/s."""
    plan_gpu_hour_price: float | None = None
    """What a plan lets a GPU cost an hour, in any currency."""
    report: bool = False
    """Print the curriculum's closing table after a sweep over the three stages."""
    sweep_metric: str | None = None
    """Metric returned to a Hydra sweeper; the best value of the stage's own monitor when not given."""
    study: str | None = None
    """Set by `hydra/sweeper=optuna` for its runs: the journal of the study that is told each validation."""
    trial: int | None = None
    """Set by `hydra/sweeper=optuna` for its runs: the number of the point in the study."""
    tags: list[str] = field(default_factory=list)
    """Free-form words stored with the run and sent to W&B."""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        for key in ("output_dir", "init_from", "resume"):
            setattr(self, key, expand_path(getattr(self, key), key))
            _require(getattr(self, key) != "", f"{key}=: is empty; give a value, or leave it out")
        _require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        _require(self.plan in (True, False, "json"), f"plan={self.plan}: choose true or json")
        _require(0 < self.plan_mfu <= 1, f"plan_mfu={self.plan_mfu}: must be above 0 and at most 1")
        _require(self.plan_gb_per_s > 0, f"plan_gb_per_s={self.plan_gb_per_s}: must be above 0")
        price = self.plan_gpu_hour_price
        _require(price is None or price >= 0, f"plan_gpu_hour_price={price}: must be 0 or more")
        _require(self.checkpoint_steps >= 1, f"checkpoint_steps={self.checkpoint_steps}: must be at least 1")
        _require(
            self.checkpoint_minutes > 0, f"checkpoint_minutes={self.checkpoint_minutes}: must be above 0"
        )
        for key in ("startup_timeout_s", "step_timeout_s"):
            value = getattr(self, key)
            _require(0 < value < inf, f"{key}={value}: must be a number of seconds above 0")
        _require(
            self.selection == 0 or self.selection >= 10, f"selection={self.selection}: use 10 or more, or 0"
        )
        _require(self.human_rank >= 0, f"human_rank={self.human_rank}: use 0 for none")
        _require(self.sample_replies >= 0, f"sample_replies={self.sample_replies}: use 0 for none")
        _require(self.latent_contexts >= 0, f"latent_contexts={self.latent_contexts}: use 0 for none")


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Everything that training takes; groups without a schema are checked by the constructors they name."""

    model: ModelConfig
    optim: OptimConfig
    stage: dict[str, Any]
    data: dict[str, Any]
    trainer: dict[str, Any]
    strategy: dict[str, Any]
    logger: dict[str, Any]
    callbacks: dict[str, Any] = field(default_factory=dict)
