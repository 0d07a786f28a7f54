"""Loss over size and tokens: trains stage 1 in five sizes, fits L(N, D), and says how far to trust that.

    python experiments/ladder/ladder.py --data DIR                 # seed 0, with the neighbours of two rates
    python experiments/ladder/ladder.py --data DIR --seed 1        # one seed more in the same results.json
    python experiments/ladder/ladder.py --only-fit                 # fit and draw what results.json has

One thread. Finished runs are kept in --out, so the same command continues after a kill. Trained in this
order: the four sizes that are fitted, the one that is held out, and the neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from law import Law, coverage, fit, intervals, power_law

import plato2
from experiments.configs import keep_config
from plato2.data.shards import read_index, read_shard
from plato2.files import replace_text
from plato2.runs.folder import RunFolder, cpu_name, provenance
from plato2.runs.saved import read_metrics

HERE = Path(__file__).parent
HEAD_SIZE = 64


@dataclass(frozen=True)
class Size:
    """A geometry, with attention heads of 64 and feed-forward layers of four times the width."""

    n_layer: int
    hidden_size: int

    @property
    def n_head(self) -> int:
        """Heads of a block."""
        return max(1, self.hidden_size // HEAD_SIZE)

    @property
    def rate(self) -> float:
        """The peak of the learning rate: that of recipe tiny-1_coarse, which was tried at a width of 256, and
        for other widths in inverse proportion (Yang et al., 2022, arXiv:2203.03466, Adam's hidden matrices).
        """
        return 1.5e-3 * 256 / self.hidden_size


FITTED = {"2x64": Size(2, 64), "3x128": Size(3, 128), "4x192": Size(4, 192), "4x256": Size(4, 256)}
HELD_OUT = {"5x320": Size(5, 320)}
"""The geometry of model=small; nothing is fitted to it until it has been predicted."""
FAR = {"93m": Size(12, 768)}
"""Never trained here."""
NEIGHBOURS = {"half": 0.5, "double": 2.0}
"""Of the rate that the rule gives."""
CHECKED = ("2x64", "4x256")
"""Sizes that are also trained with the neighbours, with seed 0 alone: the ends of the rule."""
COUNTED = ("without", "with")
"""N without embeddings: blocks, last norm, the transformation before the word table. With them: everything,
the word table (it is the last layer's, too), positions, types and the bias of each word."""
TABLES = ("word.", "position.", "token_type.", "lm_bias")
POSITIONS = 128
LOGGED_EVERY, AT_ONCE, DIGITS = 10, 32, 5


# ---------------------------------------------------------------------------------------------- training


def overrides(size: Size, rate: float, steps: int, seed: int, given: argparse.Namespace) -> list[str]:
    """What train.py is given: the values of recipe tiny-1_coarse, but for geometry, rate and length.

    inverse_sqrt does not know the length of the run, so each point of a curve is the end of a shorter run.
    """
    return [
        "model=tiny", "stage=1_coarse", "data=chitchat_64", "strategy=cpu", f"data.path={given.data}",
        f"model.n_layer={size.n_layer}", f"model.n_head={size.n_head}",
        f"model.hidden_size={size.hidden_size}", f"model.max_position={POSITIONS}",
        f"optim.lr={rate:g}", "optim.schedule=inverse_sqrt", f"seed={seed}",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={given.every}",
        f"trainer.log_every_n_steps={LOGGED_EVERY}",
        "checkpoint_steps=200", "report=false", "sample_replies=0",
    ]  # fmt: skip


def train(name: str, size: Size, rate: float, steps: int, given: argparse.Namespace) -> RunFolder:
    """Trains a run to its end, or goes on with it; one that is finished is left alone."""
    run = RunFolder(given.out / "runs" / f"{name}-seed-{given.seed}")
    if not (run.finished and run.lineage()["step"] >= steps):
        where = [f"output_dir={given.out}", "name=runs", f"run_id={run.path.name}"]
        plato2.train(*overrides(size, rate, steps, given.seed, given), *where)
    keep_config(run.path, given.results / "config" / f"{run.path.name}.yaml")
    return run


def curve(run: RunFolder) -> list[dict[str, float]]:
    """Nats per token on the validation split at each validation, with samples and CPU seconds until then."""
    steps: dict[int, dict[str, float]] = {}
    for step, name, value in read_metrics(run.path / "metrics.csv"):
        steps.setdefault(step, {})[name] = value
    return [
        {
            "step": step,
            "samples": int(row["perf/samples"]),
            "cpu_s": round(row["perf/cpu_s"], 1),
            "nll": round(row["val/nll"], DIGITS),
        }
        for step, row in sorted(steps.items())
        if "val/nll" in row
    ]


# ------------------------------------------------------------------------------------------ measurements


def records(data: Path, split: str) -> Iterator[tuple[list[int], list[int]]]:
    """Context and response of the samples of a split, as ids."""
    for shard in read_index(data).splits[split].shards:
        samples = read_shard(data, shard)
        for (first, end), length in zip(pairwise(samples.offsets), samples.context_len, strict=True):
            ids = samples.token_ids[first:end].tolist()
            yield ids[:length], ids[length:]


def test_loss(run: RunFolder, data: Path) -> float:
    """Nats per token of the last checkpoint on the test split; kept beside the run."""
    from plato2.talk.score import Record, score
    from plato2.weights.folder import load_generation

    file = run.path / "test.json"
    step = run.lineage()["step"]
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if known.get("step") != step:
        network, nats, n_tokens = load_generation(run.last), 0.0, 0
        samples = sorted(records(data, "test"), key=lambda sample: len(sample[0]) + len(sample[1]))
        for start in range(0, len(samples), AT_ONCE):
            for found in score(network, [Record(c, r) for c, r in samples[start : start + AT_ONCE]]):
                nats, n_tokens = nats + found["nll"], n_tokens + found["n_tokens"]
        known = {"step": step, "nll": nats / n_tokens}
        replace_text(file, json.dumps(known) + "\n")
    return round(known["nll"], DIGITS)


def corpus_facts(data: Path) -> dict[str, Any]:
    """How long an epoch is, and what a model reaches that knows only how frequent each token is."""
    from plato2.prepare.statistics import unigram_nll

    index = read_index(data)

    def targets(split: str) -> np.ndarray:
        ids = [token for _, response in records(data, split) for token in response[1:]]
        return np.bincount(ids, minlength=index.vocab_size)

    train = index.splits["train"]
    return {
        "samples": train.samples,
        "tokens": train.tokens - train.samples,  # the last token of a sample is only predicted
        "vocabulary": index.vocab_size,
        "unigram": {
            "valid": round(index.unigram["nll"], DIGITS),
            "test": round(unigram_nll(targets("train"), targets("test")), DIGITS),
        },
    }


def parameters(size: Size, vocabulary: int) -> dict[str, int]:
    """N of a stage-1 model, by what is counted; nothing is allocated."""
    import torch

    from plato2.config import ModelConfig
    from plato2.model.backbone import Backbone

    with torch.device("meta"):
        config = ModelConfig(
            **asdict(size), n_head=size.n_head, vocab_size=vocabulary, max_position=POSITIONS
        )
        named = {name: parameter.numel() for name, parameter in Backbone(config).named_parameters()}
    rest = sum(n for name, n in named.items() if not name.startswith(TABLES))
    return {"without": rest, "with": sum(named.values())}


def make(given: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures all sizes with a seed."""
    import torch

    from plato2.runs.parallel import best_precision

    made_with = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "precision": best_precision("cpu")}
    found: dict[str, Any] = {}
    rates: dict[str, Any] = {}
    for name, size in (FITTED | HELD_OUT).items():
        run = train(name, size, size.rate, given.steps, given)
        found[name] = {"curve": curve(run), "test": test_loss(run, given.data)}
        made_with |= {key: run.lineage()[key] for key in ("git", "packages", "python", "machine", "created")}
    for name in CHECKED if given.seed == 0 else ():
        size = FITTED[name]
        rates[name] = {
            word: curve(train(f"{name}-{word}", size, size.rate * factor, given.rate_steps, given))
            for word, factor in NEIGHBOURS.items()
        }
    return {"made_with": made_with, "sizes": found, "rates": rates}


# -------------------------------------------------------------------------------------------- judgement


class Points:
    """What results.json has, as arrays: (runs, steps), a run for each seed of each size.

    Args:
        results: its `plan`, `corpus`, `sizes` and `seeds`.
    """

    def __init__(self, results: dict[str, Any]) -> None:
        self.sizes, self.corpus = results["sizes"], results["corpus"]
        self.curves = {
            name: [
                {point["step"]: point for point in seed["sizes"][name]["curve"]}
                for seed in results["seeds"].values()
            ]
            for name in FITTED | HELD_OUT
        }
        self.steps = sorted(next(iter(self.curves.values()))[0])
        first = results["plan"]["first"]
        self.fitted = [step for step in self.steps if step >= first and not self.repeats(step)]
        """After the warm-up, and before the first epoch ends."""
        self._laws: dict[tuple[tuple[str, ...], tuple[int, ...], str], Law] = {}

    def repeats(self, step: int) -> bool:
        """Whether some run has read samples twice by then."""
        return any(
            one[step]["samples"] > self.corpus["samples"] for own in self.curves.values() for one in own
        )

    def n(self, name: str, counted: str) -> int:
        """Parameters."""
        return int(self.sizes[name]["n"][counted])

    def d(self, name: str, step: int) -> float:
        """Tokens read, the mean over seeds."""
        samples = np.mean([one[step]["samples"] for one in self.curves[name]])
        return float(samples * self.corpus["tokens"] / self.corpus["samples"])

    def loss(self, name: str, step: int) -> float:
        """Nats on the validation split, the mean over seeds."""
        return float(np.mean([one[step]["nll"] for one in self.curves[name]]))

    def arrays(self, names: Sequence[str], steps: Sequence[int], counted: str) -> tuple[np.ndarray, ...]:
        """N, D and L: (runs, steps) each."""
        per_sample = self.corpus["tokens"] / self.corpus["samples"]
        runs = [(name, one) for name in names for one in self.curves[name]]
        n = [[self.n(name, counted)] * len(steps) for name, _ in runs]
        d = [[one[step]["samples"] * per_sample for step in steps] for _, one in runs]
        loss = [[one[step]["nll"] for step in steps] for _, one in runs]
        return np.array(n, float), np.array(d), np.array(loss)

    def law(self, names: Sequence[str], steps: Sequence[int], counted: str) -> Law:
        """The fit to some sizes and steps; each is computed once."""
        asked = tuple(names), tuple(steps), counted
        if asked not in self._laws:
            self._laws[asked] = fit(*(array.ravel() for array in self.arrays(names, steps, counted)))
        return self._laws[asked]


def judge(results: dict[str, Any]) -> dict[str, Any]:
    """The fits, their errors and those of simpler rivals, and what they say of 93m."""
    points = Points(results)
    end, known = points.fitted[-1], [s for s in points.fitted if s <= results["plan"]["known"]]
    return {
        "fitted": points.fitted,
        "fits": {counted: fitted(points, counted) for counted in COUNTED},
        "size": size_held_out(points),
        "tokens": tokens_held_out(points, known, end),
        "repeated": tokens_held_out(points, points.fitted, points.steps[-1]),
        "far": {counted: extrapolated(points, counted) for counted in COUNTED},
        "coverage": {counted: known_truth(points, counted) for counted in COUNTED},
    }


def fitted(points: Points, counted: str) -> dict[str, Any]:
    """The law of the four sizes with intervals, what it says of the held-out size at the end of the first
    epoch, and the mean absolute error on the points that it was fitted to, in nats."""
    law, (held_out,) = points.law([*FITTED], points.fitted, counted), HELD_OUT
    n, d, loss = points.arrays([*FITTED], points.fitted, counted)
    figures = {letter: partial(of, letter=letter) for letter in asdict(law)}
    last = points.d(held_out, points.fitted[-1])
    figures["held out"] = partial(at, n=points.n(held_out, counted), d=last)
    return with_intervals(law, (n, d, loss), figures) | {"error": float(np.abs(law(n, d) - loss).mean())}


def extrapolated(points: Points, counted: str) -> dict[str, Any]:
    """What 93m, and a model without any limit of size, would reach after one epoch.

    From the four sizes, from all five, and from three of the four.
    """
    (distant,), epoch, found = FAR, points.corpus["tokens"], {}
    n = points.n(distant, counted)
    for word, names in {"four": [*FITTED], "five": [*FITTED, *HELD_OUT]}.items():
        law, arrays = points.law(names, points.fitted, counted), points.arrays(names, points.fitted, counted)
        figures = {"far": partial(at, n=n, d=epoch), "any size": partial(at, n=np.inf, d=epoch)}
        found[word] = with_intervals(law, arrays, figures)
    found["one left out"] = {}
    for name in FITTED:
        rest = [other for other in FITTED if other != name]
        found["one left out"][name] = at(points.law(rest, points.fitted, counted), n, epoch)
    return found


def known_truth(points: Points, counted: str) -> dict[str, float]:
    """How often intervals of the held-out size and of 93m hold the truth, if the fitted law is the truth."""
    names, end = [*FITTED], points.fitted[-1]
    n, d, _ = points.arrays(names, points.fitted, counted)
    places = {name: (points.n(name, counted), points.d(names[-1], end)) for name in (*HELD_OUT, *FAR)}
    figures = {name: partial(at, n=place[0], d=place[1]) for name, place in places.items()}
    return coverage(n, d, points.law(names, points.fitted, counted), figures)


def with_intervals(
    law: Law, arrays: tuple[np.ndarray, ...], figures: dict[str, Callable[[Law], float]]
) -> dict[str, Any]:
    """Figures of a law as [value, low, high]."""
    bounds = intervals(*arrays, law, figures)
    return {name: [figure(law), *bounds[name]] for name, figure in figures.items()}


def at(law: Law, n: float, d: float) -> float:
    """The loss of N parameters after D tokens."""
    return float(law(n, d))


def of(law: Law, letter: str) -> float:
    """A parameter of a fit."""
    return float(getattr(law, letter))


def size_held_out(points: Points) -> dict[str, Any]:
    """The loss of the held-out size at each step, as predicted from the other sizes.

    Rivals: no model at all, the loss of the largest of the others at that step; and a power law in N alone,
    through the others at that step.
    """
    (name,) = HELD_OUT
    *_, largest = FITTED
    predicted: dict[str, list[float]] = {}
    for counted in COUNTED:
        law = points.law([*FITTED], points.fitted, counted)
        n = points.n(name, counted)
        predicted[f"L(N, D), {counted}"] = [at(law, n, points.d(name, step)) for step in points.fitted]
        sizes = np.array([points.n(other, counted) for other in FITTED], float)
        predicted[f"N alone, {counted}"] = [
            power_law(sizes, np.array([points.loss(other, step) for other in FITTED]), n)
            for step in points.fitted
        ]
    predicted["largest"] = [points.loss(largest, step) for step in points.fitted]
    return {"actual": [points.loss(name, step) for step in points.fitted], "predicted": predicted}


def tokens_held_out(points: Points, known: Sequence[int], step: int) -> dict[str, Any]:
    """The loss of each size at a later step, as predicted from earlier ones.

    Rivals: no model at all, the last loss that is known; and a power law in D alone, through the size's own
    earlier losses. The law has not seen the held-out size at all; the rivals have seen its earlier losses.
    """
    names = [*FITTED, *HELD_OUT]
    predicted: dict[str, list[float]] = {}
    for counted in COUNTED:
        law = points.law([*FITTED], known, counted)
        predicted[f"L(N, D), {counted}"] = [
            at(law, points.n(name, counted), points.d(name, step)) for name in names
        ]
    predicted["D alone"] = [
        power_law(
            np.array([points.d(name, one) for one in known]),
            np.array([points.loss(name, one) for one in known]),
            points.d(name, step),
        )
        for name in names
    ]
    predicted["last"] = [points.loss(name, known[-1]) for name in names]
    actual = [points.loss(name, step) for name in names]
    return {"known": list(known), "step": step, "names": names, "actual": actual, "predicted": predicted}


def rounded(found: Any) -> Any:
    """Numbers of tables with five digits that count."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


# ---------------------------------------------------------------------------------------------- picture


def draw(results: dict[str, Any], path: Path) -> None:
    """Loss over tokens for each size, and over parameters at the end of the first epoch."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    points = Points(results)
    law, end, epoch = (
        points.law([*FITTED], points.fitted, "without"),
        points.fitted[-1],
        points.corpus["tokens"],
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for number, name in enumerate(points.curves):
        colour, known = f"C{number}", name in FITTED
        d = np.array([points.d(name, step) for step in points.steps])
        loss = [points.loss(name, step) for step in points.steps]
        inside = [colour if known and step in points.fitted else "white" for step in points.steps]
        left.scatter(d / 1e6, loss, c=inside, edgecolors=colour, zorder=3)
        label = f"{name}, {points.n(name, 'without') / 1e6:.2f} M{'' if known else ', held out'}"
        x = np.geomspace(d[0], d[-1])
        fitted = law(points.n(name, "without"), x)
        left.plot(x / 1e6, fitted, "-" if known else "--", color=colour, label=label)
        right.scatter(
            points.n(name, "without"),
            points.loss(name, end),
            c=colour if known else "white",
            edgecolors=colour,
        )
    left.axvline(epoch / 1e6, color="grey", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="million tokens read (dotted: the first epoch)")
    left.set_ylabel("nats per token, validation split")
    (distant,) = FAR
    value, low, high = results["far"]["without"]["four"]["far"]
    x = np.geomspace(points.n(next(iter(FITTED)), "without"), points.n(distant, "without"))
    right.plot(x, law(x, points.d(next(iter(FITTED)), end)), color="black", linewidth=1)
    away = [[max(0.0, value - low)], [max(0.0, high - value)]]
    right.errorbar(points.n(distant, "without"), value, away, fmt="x", color="black", capsize=4)
    right.annotate(f"{distant}: extrapolated", (points.n(distant, "without"), high), ha="right", va="bottom")
    right.set(xscale="log", xlabel=f"parameters without embeddings, after {end:,} steps")
    for axis in (left, right):
        axis.axhline(points.corpus["unigram"]["valid"], color="grey", linewidth=0.8)
    left.legend(fontsize=8, title="filled: fitted; lines: L(N, D); grey: unigram", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="the prepared corpus, with a test split")
    add("--seed", type=int, default=0, help="of weights and order of samples")
    add("--steps", type=int, default=2400, help="of each size")
    add("--every", type=int, default=200, help="steps between validations")
    add("--first", type=int, default=400, help="the first step that is fitted; the warm-up takes 200")
    add("--known", type=int, default=1200, help="the last step that the first epoch's end is predicted from")
    add("--rate-steps", type=int, default=1000, help="of the neighbours of a rate")
    add("--out", type=Path, default=Path("outputs/ladder"), help="where runs are kept")
    add("--results", type=Path, default=HERE, help="folder of results.json, ladder.png and config/")
    add("--only-fit", action="store_true", help="train nothing; fit and draw what results.json has")
    given = parser.parse_args()
    if given.data is None and not given.only_fit:
        parser.error("give --data, or --only-fit")
    return given


def main() -> None:
    """Makes a seed, fits to all that there are, and draws."""
    given = arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    file = given.results / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not given.only_fit:
        import torch

        torch.set_num_threads(1)
        given.data, given.out = given.data.absolute(), given.out.absolute()
        plan = {name: getattr(given, name) for name in ("steps", "every", "first", "known", "rate_steps")}
        if results.get("plan", plan) != plan:
            raise SystemExit(f"{file} was made with {results['plan']}: give the same, or another --results")
        corpus = corpus_facts(given.data)
        sizes = {
            name: {**asdict(size), "n_head": size.n_head, "n": parameters(size, corpus["vocabulary"])}
            for name, size in (FITTED | HELD_OUT | FAR).items()
        }
        for name, size in (FITTED | HELD_OUT).items():
            sizes[name]["rate"] = size.rate
        seeds = {**results.get("seeds", {}), str(given.seed): make(given)}
        seeds = dict(sorted(seeds.items(), key=lambda item: int(item[0])))
        results = {"plan": plan, "corpus": corpus, "sizes": sizes, "seeds": seeds}
    results |= rounded(judge(results)) | {"fitted_with": provenance() | {"scipy": scipy.__version__}}
    replace_text(file, json.dumps(results, indent=1) + "\n")
    draw(results, given.results / "ladder.png")


if __name__ == "__main__":
    main()
