"""The tables of latents as Markdown; see experiments/tables.py. With several seeds: the mean, and each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from experiments.tables import markdown

Results = dict[str, Any]
SETS = {"test": "test split", "dailydialog": "DailyDialog"}
MEASURES = {
    "distinct_2": ("distinct-2", 3),
    "greedy_different": ("greedy: how many differ", 1),
    "words": ("words", 1),
    "chrf_one": ("chrF, one at random", 1),
    "chrf_best": ("chrF, best of 20", 1),
    "chrf_coverage": ("covered, by chrF", 3),
    "cosine_one": ("cosine, one at random", 3),
    "cosine_best": ("cosine, best of 20", 3),
    "cosine_coverage": ("covered, by cosine", 3),
}
"""Label and digits."""


def started(results: Results) -> str:
    """What a stage 2.1 has of the stage 1 that it starts from."""
    rows = []
    for name, one in _first(results)["started"].items():
        equal = f"{one['equal']}, of which the backbone has {one['backbone']}"
        rows.append([name, one["told"], equal, " x ".join(map(str, one["latents"]))])
    return markdown(["", "what the run says", "tensors equal to stage 1's", "latent table"], rows)


def training(results: Results) -> str:
    """What each run cost."""
    rows = []
    for name in _first(results)["runs"]:
        found = [seed["runs"][name] for seed in results["seeds"].values()]
        cpu_s, samples = ([one[key] for one in found] for key in ("cpu_s", "samples"))
        rows.append([name, f"{found[0]['steps']:,}", _several(samples, 0), _several(cpu_s, 0)])
    return markdown(["", "steps", "samples", "CPU s"], rows)


def curve(results: Results) -> str:
    """Mutual information and greedy candidates at each validation, and the alarms there."""
    first, names = _first(results), _latents(results)
    rows = []
    for number, point in enumerate(first["runs"][names[0]]["curve"]):
        row = [f"{point['step']:,}"]
        for name in names:
            points = [seed["runs"][name]["curve"][number] for seed in results["seeds"].values()]
            row.append(_several([one["z_mutual_information"] for one in points], 3))
            if name != "K = 1":
                row.append(_several([one["greedy_different"] for one in points], 1))
                row.append(_times([bool(one["alarms"]) for one in points]))
            row.append(_times([one["warned"] for one in points]))
        rows.append(row)
    head = ["step"]
    for name in names:
        more = [] if name == "K = 1" else [f"{name}: greedy that differ", f"{name}: alarm"]
        head += [f"{name}: nats", *more, f"{name}: warning"]
    return markdown(head, rows)


def information(results: Results) -> str:
    """What z knows of a response."""
    rows = []
    for of, name, ones in _by_set(results, "information"):
        bound = ones[0]["bound"]
        cells = [_interval([one["mutual_information"] for one in ones], 3), f"{bound:.3f}"]
        cells += [_interval([one["latents_in_effect"] for one in ones], 1)]
        cells += [_several([one["in_use"] for one in ones], 0)]
        cells += [_interval([one["named"] for one in ones], 3)]
        cells += [_several([one["named_by_chance"] for one in ones], 3)]
        rows.append([SETS[of], name, *cells])
    head = ["set", "", "mutual information", "at most", "latents in effect", "with 2 % or more"]
    return markdown([*head, "recognised z is the likeliest", "by chance"], rows)


def within(results: Results) -> str:
    """What z knows of a response once its context is known."""
    rows = []
    for of, name, ones in _by_set(results, "information"):
        if "within" in ones[0]:
            both = (_interval([one[key] for one in ones], 3) for key in ("within", "within_shuffled"))
            rows.append([SETS[of], name, *both])
    if not rows:
        return "The set with several references was not measured."
    return markdown(["set", "", "replies to one context", "as many replies to any contexts"], rows)


def perplexity(results: Results) -> str:
    """Perplexity by where z comes from."""
    ways = ("mixture", "uniform", "other", "right", "paid")
    rows = [
        [SETS[of], name, *(_interval([one.get(way) for one in ones], 2) for way in ways)]
        for of, name, ones in _by_set(results, "perplexity")
    ]
    heads = ("p(r\\|c)", "z uniform", "z of another response", "z from the posterior", "and the nats of z")
    return markdown(["set", "", *heads], rows)


def gains(results: Results) -> str:
    """How many nats per token better than with a uniform z."""
    ways = {"other": "z of another response", "right": "z from the posterior", "mixture": "the mean over z"}
    rows = [
        [SETS[of], name, *(_interval([one[way] for one in ones], 4, sign=True) for way in ways)]
        for of, name, ones in _by_set(results, "gains")
    ]
    return markdown(["set", "", *ways.values()], rows)


def candidates(results: Results) -> str:
    """The 20 candidates on the test split."""
    return _candidates(results, "test")


def dailydialog(results: Results) -> str:
    """The 20 candidates on the set with several references."""
    return _candidates(results, "dailydialog")


def differences(results: Results) -> str:
    """K = 20 less others, over the same contexts, of each seed with its interval."""
    rows = []
    for of, pair, ones in _by_set(results, "differences"):
        for measure in ("nats", *MEASURES):
            if measure in ones[0]:
                label, digits = MEASURES.get(measure, ("nats per token, of p(r\\|c)", 4))
                found = [one[measure] for one in ones]
                mean = sum(one[0] for one in found) / len(found)
                each = "; ".join(_cell(one, digits, sign=True) for one in found)
                rows.append([SETS[of], pair, label, f"{mean:+.{digits}f}", each])
    return markdown(["set", "difference", "of", "mean", "each seed, 95 % interval"], rows)


def says(results: Results) -> str:
    """What each z says, of the first seed."""
    rows = []
    for name, one in _first(results)["heard"].items():
        for line in one["lines"] if name != "K = 1" else ():
            shares = [f"{line[key]:.0%}" for key in ("posterior", "wins", "questions")]
            words = ", ".join(f"`{word}`" for word, _ in line["typical"] if "|" not in word)
            rows.append([name, str(line["z"]), *shares, f"{line['length']:.1f}", words])
    return markdown(["", "z", "posterior", "wins", "questions", "words", "typical words"], rows)


def heard(results: Results) -> str:
    """What `plato2 evaluate latents` finds at the end, and its alarms."""
    keys = {
        "greedy_different": "greedy: how many differ",
        "greedy_distinct_2": "greedy: distinct-2",
        "distinct_2_between_z": "distinct-2, one sample of each z",
        "distinct_2_within_z": "as many samples of one z",
        "most_wins": "share of the most frequent winner",
    }
    rows = []
    for name in _latents(results):
        ones = [seed["heard"][name] for seed in results["seeds"].values()]
        cells = [
            _interval([one["figures"][key] for one in ones], 1 if key == "greedy_different" else 3)
            for key in keys
        ]
        fired = "; ".join(dict.fromkeys(text.split(":")[0] for one in ones for text in one["alarms"]))
        rows.append([name, *cells, fired or "none"])
    return markdown(["", *keys.values(), "alarms"], rows)


def sets(results: Results) -> str:
    """What was asked."""
    rows = []
    for of, one in _first(results)["sets"].items():
        near = ", ".join(f"{kind} {value:.3f}" for kind, value in one["near"].items())
        rows.append([SETS[of], f"{one['responses']:,}", f"{one['tokens']:,}", f"{one['contexts']:,}", near])
    return markdown(["set", "responses scored", "their tokens", "contexts answered", "near from"], rows)


def cost(results: Results) -> str:
    """Machine and CPU minutes of each seed."""
    rows = []
    for seed, one in results["seeds"].items():
        made = one["made_with"]
        minutes = [f"{seconds / 60:.0f}" for seconds in made["cpu_s"].values()]
        commit = (made["git"] or {}).get("commit", "")[:10]
        rows.append([seed, made["cpu"], str(made["threads"]), *minutes, f"`{commit}`"])
    head = ["seed", "CPU", "threads", "CPU minutes of training, with validations", "of measuring", "commit"]
    return markdown(head, rows)


# --------------------------------------------------------------------------------------------------- cells


def _first(results: Results) -> dict[str, Any]:
    return next(iter(results["seeds"].values()))


def _latents(results: Results) -> list[str]:
    return [*_first(results)["heard"]]


def _by_set(results: Results, part: str) -> list[tuple[str, str, list[Any]]]:
    """Set, name and what each seed has of it, in the order of the first seed."""
    return [
        (of, name, [seed["sets"][of][part][name] for seed in results["seeds"].values()])
        for of, one in _first(results)["sets"].items()
        for name in one[part]
    ]


def _candidates(results: Results, of: str) -> str:
    if of not in _first(results)["sets"]:
        return "Not measured."
    found = [(name, ones) for there, name, ones in _by_set(results, "candidates") if there == of]
    shown = [measure for measure in MEASURES if any(measure in ones[0] for _, ones in found)]
    rows = [
        [name, *(_interval([one.get(measure) for one in ones], MEASURES[measure][1]) for measure in shown)]
        for name, ones in found
    ]
    return markdown(["", *(MEASURES[measure][0] for measure in shown)], rows)


def _several(values: Sequence[float], digits: int) -> str:
    """The mean, and each where there are several."""
    return _mean_and_each(values, lambda value: f"{value:,.{digits}f}")


def _mean_and_each(values: Sequence[float], text: Callable[[float], str]) -> str:
    mean = text(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({', '.join(map(text, values))})"


def _interval(found: Sequence[Sequence[float | None] | None], digits: int, sign: bool = False) -> str:
    """Of one seed the value and its interval, of several as `_several`; nothing where there is no value."""
    if found[0] is None:
        return ""
    if len(found) == 1:
        return _cell(found[0], digits, sign)
    plus = "+" if sign else ""
    return _mean_and_each(
        [one[0] for one in found if one and one[0] is not None], f"{{:{plus}.{digits}f}}".format
    )


def _cell(figure: Sequence[float | None], digits: int, sign: bool = False) -> str:
    plus = "+" if sign else ""
    value, low, high = figure
    text = f"{value:{plus}.{digits}f}"
    return text if low is None else f"{text} ({low:{plus}.{digits}f} to {high:{plus}.{digits}f})"


def _times(fired: Sequence[bool]) -> str:
    """Whether something fired; of several seeds in how many."""
    if len(fired) == 1:
        return "yes" if fired[0] else ""
    return f"{sum(fired)} of {len(fired)}" if any(fired) else ""
