"""The closed vocabularies of a run: model, optimizer, decoding and run-level keys.

Plain dataclasses that check themselves. `train.py` registers them as Hydra schemas, so a typo in any of
these keys fails before anything starts; below `train.py` they are ordinary typed arguments.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import inf, isfinite
from numbers import Integral
from typing import Any, Literal, get_args

Strategy = Literal["top_k", "top_p", "beam"]
Criterion = Literal["coherence", "forward", "backward"]
Schedule = Literal["inverse_sqrt", "linear"]
COLDEST, HOTTEST = 0.01, 2.0
"""Temperatures, above which a text is noise and below which the most probable token is taken: logits would
overflow."""
MOST_CANDIDATES = {"n_samples": 1000, "n_candidates": 1000, "beam_size": 100}
"""What may be asked for; more is a slip. Samples only take time, since they are decoded in parts; the
hypotheses of a beam are in memory together."""
LARGEST = {
    "n_layer": 1000,
    "n_head": 1000,
    "hidden_size": 65_536,
    "vocab_size": 1 << 24,
    "max_position": 1 << 20,
    "n_type": 1000,
    "n_latent": 65_536,
}
"""Far above any model there is: what is larger is a slip or a damaged file, and would not fit in memory."""


class UserError(Exception):
    """Something the user can mend: the message names the file or key, the value and the cure.

    `train.py` and the `plato2` command print it as one line, without a traceback. What both of them can call
    names an option as its field, `max_context=2`; `in_typed_words` puts the name there that was typed.
    """


def install(extra: str) -> str:
    """What to type for the packages of an extra of pyproject.toml: plato2 is in no package index."""
    return f"pip install '.[{extra}]' in the folder of plato2's source"


def in_typed_words(message: str, names: Mapping[str, str], sign: str = "=") -> str:
    """A message in which options have the names that the user typed, as `--max-context 2`.

    An option is told from a word by what stands behind it, as in `force=true`, or by a `_` in it.

    Args:
        message: of a `UserError`.
        names: what was typed for a field, e.g. `--max-context`; for `reader.`, what its options begin with.
        sign: between an option and its value; with a blank `force=true` becomes a flag.
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
    """What to say of a name that is not known: the one it resembles, else all there are."""
    known = list(known)
    key, colon, value = name.partition(":")
    if colon and key in known:
        return f"a blank is missing behind the colon: {key}: {value}"
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
        UserError: no such user or environment variable.
    """
    _require(
        path.encode("utf-8", "replace").decode() == path,
        f"{key}={path!a}: its name is not UTF-8, so it cannot be recorded; rename it, or link to it",
    )
    for bare, braced in re.findall(r"\$(?:(\w+)|\{([^}]*)\})", path):
        name = bare or braced
        _require(name in os.environ, f"{key}={path}: there is no environment variable {name}; set it first")
    found = os.path.expanduser(os.path.expandvars(path))
    _require(
        not found.startswith("~"), f"{key}={path}: there is no user of that name; write ./~ for a file's own"
    )
    return found


@dataclass
class ModelConfig:
    """The geometry of the backbone (docs/spec.md, section 4); the defaults are the paper's 93M model.

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
    dropout: float = 0.1
    """On embeddings, attention weights and both residual branches (docs/spec.md, section 4)."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: about 1.3x the time for a fraction of the memory."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for key, largest in LARGEST.items():
            value = getattr(self, key)
            _require(value >= 1, f"model.{key}={value}: must be at least 1")
            _require(value <= largest, f"model.{key}={reprlib.repr(value)}: must be at most {largest:,}")
        _require(
            self.hidden_size % self.n_head == 0,
            f"model.hidden_size={self.hidden_size} is not a multiple of model.n_head={self.n_head}",
        )
        _require(
            0 <= self.n_role <= 1000,
            f"model.n_role={reprlib.repr(self.n_role)}: use 0 for no role embeddings",
        )
        _require(0.0 <= self.dropout < 1.0, f"model.dropout={self.dropout}: must be in [0, 1)")

    @property
    def mask_id(self) -> int:
        """The id of [MASK]: the last row of the word table (docs/spec.md, section 1)."""
        return self.vocab_size - 1


@dataclass
class OptimConfig:
    """AdamW with linear warmup and then decay, by default that of Knover (docs/spec.md, section 8).

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
    """Global gradient norm, 0 = no clipping; Knover's value, small on purpose (docs/spec.md, section 8)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
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
    """How candidates are found; by default top-k sampling of one for each latent (docs/spec.md, section 9).

    Raises:
        UserError: a value decoding cannot use.
    """

    strategy: Strategy = "top_k"
    """Sample among the best `top_k` tokens, or among the most probable that together reach `top_p`; or find
    the best `beam_size` candidates of each latent by beam search."""
    top_k: int = 10
    """Sample among the k most probable tokens; 1 = greedy."""
    top_p: float = 0.9
    """Sample among the most probable tokens, as many as it takes to reach this probability; 1 = all, 0 =
    greedy."""
    beam_size: int = 10
    """Hypotheses that beam search follows for each latent; all of them become candidates."""
    temperature: float = 1.0
    """Below 1 more probable tokens, above 1 more variety; below 0.01 greedy."""
    max_tokens: int = 64
    """Longest candidate, the end token included."""
    min_tokens: int = 1
    """No end token before this many tokens."""
    no_repeat_ngram: int = 0
    """No n tokens in a row that are in a turn of the context or earlier in the candidate; 0 = off."""
    length_penalty: float | None = None
    """What the sum of a candidate's log-probabilities is divided by. None = n, its tokens with the end: the
    mean; else a in ((5 + n) / 6)^a, so 0 = the sum itself."""
    n_samples: int = 1
    """Samples for each latent."""
    n_candidates: int = 20
    """Samples of a stage-1 model, which has no latents; other models give `n_samples` for each latent."""
    stop: tuple[str, ...] = ()
    """Texts before which a candidate is cut; they are not part of it."""
    seed: int = 11

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        given = (self.stop,) if isinstance(self.stop, str) else () if self.stop is None else self.stop
        _require(
            isinstance(given, Sequence | set) and all(isinstance(text, str) for text in given),
            f"stop={reprlib.repr(self.stop)}: give texts to stop at",
        )
        self.stop = tuple(given)
        _require(all(self.stop), "stop: a text to stop at is empty")
        _require(isinstance(self.seed, Integral), f"seed={self.seed!r}: must be a whole number")
        _require(
            self.strategy in get_args(Strategy),
            f"strategy={self.strategy}: use one of {', '.join(get_args(Strategy))}",
        )
        _require(self.top_k >= 1, f"top_k={self.top_k}: must be at least 1 (1 = greedy)")
        _require(
            0 <= self.top_p <= 1,
            f"top_p={self.top_p}: must be between 0 (greedy) and 1 (all tokens)",
        )
        _require(self.beam_size >= 1, f"beam_size={self.beam_size}: must be at least 1 (1 = greedy)")
        _require(
            0 <= self.temperature <= HOTTEST,
            f"temperature={self.temperature}: must be between 0 (greedy) and {HOTTEST:g}",
        )
        _require(
            self.temperature >= COLDEST or self.strategy != "beam",
            f"temperature={self.temperature}: is greedy, and strategy=beam is not; leave one of them out",
        )
        _require(self.max_tokens >= 1, f"max_tokens={self.max_tokens}: must be at least 1")
        _require(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens={self.min_tokens}: must be between 0 and max_tokens={self.max_tokens}",
        )
        _require(
            self.no_repeat_ngram >= 0, f"no_repeat_ngram={self.no_repeat_ngram}: must be 0 (off) or more"
        )
        _require(
            self.length_penalty is None or self.length_penalty >= 0,
            f"length_penalty={self.length_penalty}: must be 0 (the sum) or more, or None (the mean)",
        )
        _require(self.n_samples >= 1, f"n_samples={self.n_samples}: must be at least 1")
        _require(
            self.n_samples == 1 or self.strategy != "beam",
            f"n_samples={self.n_samples}: a beam search always finds the same; use a larger beam_size",
        )
        _require(self.n_candidates >= 1, f"n_candidates={self.n_candidates}: must be at least 1")
        for key, most in MOST_CANDIDATES.items():
            value = getattr(self, key)
            _require(value <= most, f"{key}={reprlib.repr(value)}: must be at most {most:,}")

    @property
    def rows_per_latent(self) -> int:
        """Rows of a batch that each latent of a context takes."""
        return self.beam_size if self.strategy == "beam" else self.n_samples


@dataclass
class RankConfig:
    """What candidates are ranked by: a weighted sum of scores, less Knover's penalties (docs/spec.md,
    section 9).

    Raises:
        UserError: a criterion that there is not.
    """

    weights: Mapping[Criterion, float] | None = None
    """Of `coherence` p(l=1|c,r), `forward` log p(r|c,z) and `backward` log p(c|r), the last two the mean of a
    token; None = coherence alone, or forward where there is no evaluation model."""
    penalties: bool | None = None
    """Rank candidates that do not end, or repeat three words, behind all others, as Knover does; None =
    where an evaluation model ranks."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
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
    """Run-level keys of `train.py` (they stand at the top level of the command line)."""

    seed: int = 11
    """Seeds the weights, the order of the samples, dropout, masks, negatives and Gumbel noise."""
    init_from: str = "auto"
    """Start weights: a run folder, a checkpoint, a model folder, `scratch` (random), or `auto`: random for
    stage 1, and for the others the newest finished stage-1 run of the same geometry and tokenizer."""
    resume: str = "auto"
    """`auto` goes on with an unfinished run of the same config, `never` starts anew, or a run folder."""
    run_id: str | None = None
    """Name of the run folder; else RUN_ID, else SLURM_JOB_ID, else the time."""
    output_dir: str = "outputs"
    """Runs are written to `<output_dir>/<name>/<run_id>/`."""
    name: str = "run"
    """`<model>-<stage>`; train.yaml fills it in."""
    model_name: str = "model"
    """Name of the geometry; train.yaml fills it in."""
    checkpoint_steps: int = 1000
    """Steps between checkpoints; each validation and the last step write one too."""
    checkpoint_minutes: float = 10.0
    """Minutes after which there is a checkpoint, however few the steps."""
    sample_replies: int = 3
    """Validation contexts the model answers at each validation; 0 = none."""
    selection: int = 100
    """Validation contexts for which stage 2.2 chooses a response among ten; 0 = none."""
    human_rank: int = 50
    """Validation contexts whose human reply stage 2.2 ranks among 20 of its stage-1 model's; 0 = none."""
    latent_contexts: int = 0
    """Validation contexts on which stages with latents measure, at each validation and in the report of a
    sweep, how much candidates differ (24 take the tiny model about 13 CPU seconds); 0 = none."""
    plan: bool = False
    """Print what the run will need (parameters, memory, steps) and train nothing."""
    report: bool = False
    """Print the curriculum's closing table after a sweep over the three stages."""
    sweep_metric: str | None = None
    """Metric returned to a Hydra sweeper; the best value of the stage's own monitor when not given."""
    tags: list[str] = field(default_factory=list)
    """Free words stored with the run and sent to W&B."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for key in ("output_dir", "init_from", "resume"):
            setattr(self, key, expand_path(getattr(self, key), key))
        _require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        _require(self.checkpoint_steps >= 1, f"checkpoint_steps={self.checkpoint_steps}: must be at least 1")
        _require(
            self.checkpoint_minutes > 0, f"checkpoint_minutes={self.checkpoint_minutes}: must be above 0"
        )
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
