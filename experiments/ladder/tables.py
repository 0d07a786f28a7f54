"""The tables of the ladder as Markdown; see experiments/tables.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from experiments.tables import markdown

Results = dict[str, Any]
LABELS = {
    "L(N, D), without": "L(N, D), N without embeddings",
    "L(N, D), with": "L(N, D), N with embeddings",
    "N alone, without": "power law in N alone, without embeddings",
    "N alone, with": "power law in N alone, with embeddings",
    "D alone": "power law in D alone, of this size",
    "largest": "the loss of the largest of the four",
    "last": "the last loss that is known",
}
LETTERS = {"e": "E", "a": "A", "alpha": "alpha", "b": "B", "beta": "beta"}


def corpus(results: Results) -> str:
    """How long an epoch is."""
    found = results["corpus"]
    cells = [f"{found['samples']:,}", f"{found['tokens'] / 1e6:.2f} million", f"{found['vocabulary']:,}"]
    return markdown(["training samples", "tokens", "vocabulary"], [cells])


def sizes(results: Results) -> str:
    """Each size, what it cost, and what it reached on the test split."""
    unigram = results["corpus"]["unigram"]["test"]
    blank = [""] * 5
    rows = [["frequencies of tokens (unigram)", *blank, f"{unigram:.3f}", f"{math.exp(unigram):.1f}", ""]]
    for name in _trained(results):
        size, runs = results["sizes"][name], [seed["sizes"][name] for seed in results["seeds"].values()]
        losses = [run["test"] for run in runs]
        mean = sum(losses) / len(losses)
        each = f" ({', '.join(f'{loss:.3f}' for loss in losses)})" if len(losses) > 1 else ""
        minutes = sum(run["curve"][-1]["cpu_s"] for run in runs) / len(runs) / 60
        n = size["n"]
        rows.append(
            [
                name,
                str(size["n_head"]),
                _millions(n["without"]),
                _millions(n["with"]),
                f"{100 * (1 - n['without'] / n['with']):.0f} %",
                f"{size['rate']:.2g}",
                f"{mean:.3f}{each}",
                f"{math.exp(mean):.1f}",
                f"{minutes:.0f}",
            ]
        )
    head = ["layers x width", "heads", "N without embeddings", "with", "share of embeddings", "rate"]
    return markdown([*head, "test, nats", "perplexity", "CPU minutes"], rows)


def curves(results: Results) -> str:
    """The validation split over steps, the mean over seeds."""
    names, seeds = _trained(results), [*results["seeds"].values()]
    per_sample = results["corpus"]["tokens"] / results["corpus"]["samples"]
    rows = []
    for number, point in enumerate(seeds[0]["sizes"][names[0]]["curve"]):
        samples = point["samples"]
        step, epochs = point["step"], samples / results["corpus"]["samples"]
        before = step < results["plan"]["first"]
        use = "yes" if step in results["fitted"] else "no: warm-up" if before else "no: read twice"
        losses = (_mean([seed["sizes"][name]["curve"][number]["nll"] for seed in seeds]) for name in names)
        cells = [f"{step:,}", f"{samples * per_sample / 1e6:.2f}", f"{epochs:.2f}", use]
        rows.append([*cells, *(f"{loss:.3f}" for loss in losses)])
    return markdown(["steps", "million tokens", "epochs", "fitted", *names], rows)


def spread(results: Results) -> str:
    """How far seeds are apart at the end of the first epoch."""
    step, rows = results["fitted"][-1], []
    for name in _trained(results):
        losses = [
            next(point["nll"] for point in seed["sizes"][name]["curve"] if point["step"] == step)
            for seed in results["seeds"].values()
        ]
        rows.append([name, *(f"{loss:.3f}" for loss in losses), f"{max(losses) - min(losses):.3f}"])
    return markdown(["size", *(f"seed {seed}" for seed in results["seeds"]), "highest less lowest"], rows)


def rates(results: Results) -> str:
    """The neighbours of the rule's rate, at their last step."""
    seed, rows = results["seeds"].get("0", {}), []
    for name, found in seed.get("rates", {}).items():
        step = found["half"][-1]["step"]
        own = next(p["nll"] for p in seed["sizes"][name]["curve"] if p["step"] == step)
        losses = [found["half"][-1]["nll"], own, found["double"][-1]["nll"]]
        lost = own - min(losses)
        rate = f"{results['sizes'][name]['rate']:.2g}"
        rows.append([name, f"{step:,}", rate, *(f"{loss:.3f}" for loss in losses), f"{lost:.3f}"])
    if not rows:
        return "Seed 0 has not been run."
    head = ["size", "steps", "rate of the rule", "half of it", "the rule", "double", "lost by the rule"]
    return markdown(head, rows)


def law(results: Results) -> str:
    """The fits to the four sizes."""
    rows = []
    for key, letter in LETTERS.items():
        rows.append([letter, *(_interval(one[key]) for one in results["fits"].values())])
    rows.append(["mean error of the points, nats", *(f"{o['error']:.4f}" for o in results["fits"].values())])
    return markdown(["", *_counted(results)], rows)


def size(results: Results) -> str:
    """The held-out size."""
    found, steps = results["size"], results["fitted"]
    rows = [["measured", "", *(f"{loss:.3f}" for loss in found["actual"])]]
    for name, predicted in found["predicted"].items():
        off = _mean([abs(p - a) for p, a in zip(predicted, found["actual"], strict=True)])
        rows.append([LABELS[name], f"{off:.3f}", *(f"{loss:.3f}" for loss in predicted)])
    return markdown(["", "mean error", *(f"{step:,} steps" for step in steps)], rows)


def held_out_interval(results: Results) -> str:
    """The prediction of the held-out size at the end of the first epoch, with its interval."""
    rows = [
        [label, _interval(one["held out"]), f"{results['size']['actual'][-1]:.3f}"]
        for label, one in zip(_counted(results), results["fits"].values(), strict=True)
    ]
    return markdown(["", f"predicted at {results['fitted'][-1]:,} steps", "measured"], rows)


def coverage(results: Results) -> str:
    """How often intervals hold the truth in trials where it is known."""
    names = [*next(iter(results["coverage"].values()))]
    rows = [
        [label, *(f"{found[name]:.2f}" for name in names)]
        for label, found in zip(_counted(results), results["coverage"].values(), strict=True)
    ]
    return markdown(["", *names], [["wanted", *["0.95"] * len(names)], *rows])


def tokens(results: Results) -> str:
    """The end of the first epoch, from earlier points."""
    return _later(results["tokens"])


def repeated(results: Results) -> str:
    """The last step, from the first epoch."""
    return _later(results["repeated"])


def far(results: Results) -> str:
    """What the fits say of 93m, beside its simplest rival."""
    rows = []
    for label, found in zip(_counted(results), results["far"].values(), strict=True):
        for word, called in (("four", "the four sizes"), ("five", "all five")):
            value = found[word]
            rows.append([label, called, _interval(value["far"]), _interval(value["any size"])])
        left = found["one left out"].values()
        rows.append(
            [label, "three of the four, each left out once", f"{min(left):.3f} to {max(left):.3f}", ""]
        )
    rows.append(["", f"the loss of {_trained(results)[-1]}", f"{results['size']['actual'][-1]:.3f}", ""])
    return markdown(["", "fitted to", "93m after one epoch, nats", "any size"], rows)


def machine(results: Results) -> str:
    """What each seed was made with."""
    rows = []
    for seed, found in results["seeds"].items():
        made = found["made_with"]
        commit = (made["git"] or {}).get("commit", "")[:10]
        runs = [
            *found["sizes"].values(),
            *({"curve": c} for r in found["rates"].values() for c in r.values()),
        ]
        minutes = sum(run["curve"][-1]["cpu_s"] for run in runs) / 60
        cells = [made["cpu"], str(made["threads"]), f"`{made['precision']}`", f"`{commit}`", f"{minutes:.0f}"]
        rows.append([seed, *cells])
    return markdown(["seed", "CPU", "threads", "precision", "commit", "CPU minutes of training"], rows)


def _later(found: dict[str, Any]) -> str:
    """Sizes as columns, predictions as rows."""
    rows = [["measured", "", *(f"{loss:.3f}" for loss in found["actual"])]]
    for name, predicted in found["predicted"].items():
        off = _mean([abs(p - a) for p, a in zip(predicted, found["actual"], strict=True)])
        rows.append([LABELS[name], f"{off:.3f}", *(f"{loss:.3f}" for loss in predicted)])
    what = f"{found['step']:,} steps, from {found['known'][0]:,} to {found['known'][-1]:,}"
    return markdown([what, "mean error", *found["names"]], rows)


def _trained(results: Results) -> list[str]:
    return [name for name, size in results["sizes"].items() if "rate" in size]


def _counted(results: Results) -> list[str]:
    return [f"N {counted} embeddings" for counted in results["fits"]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _millions(n: int) -> str:
    return f"{n / 1e6:.2f} M"


def _interval(figure: Sequence[float]) -> str:
    """Exponents and losses with three digits behind the point, A and B with three that count."""
    value, low, high = (f"{one:.3f}" if abs(one) < 100 else f"{one:.3g}" for one in figure)
    return f"{value} ({low} to {high})"
