"""A sweep on the report's page: its points with mean and spread over seeds, what each key does, what matters.

A point is what was swept over, but for the seed: runs that differ in their seed alone are one point. What a
run is worth is what the sweep compared: the best value of its stage's monitor, or the last of `sweep_metric`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from plato2.bounded import read_file
from plato2.config import UserError, dotted, install
from plato2.evaluate.runs import UNSAID, compare
from plato2.formats import JSON_BYTES, Open, parse
from plato2.report.curriculum import place_in_curriculum
from plato2.report.page import Block, Paragraph, Picture, Section, Table
from plato2.runs.console import number
from plato2.runs.folder import DECODER, FREE, RunFolder
from plato2.runs.saved import best_direction, last_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RECORD = "sweep.json"
SEED = "seed"
FEWEST = 4
"""Points from which on it is said which key matters."""


class _Record(Open):
    """What is read of `sweep.json`."""

    name: str


@dataclass(frozen=True)
class Point:
    """The runs of a sweep that differ in their seed alone."""

    values: dict[str, str]
    """Key -> value, of the keys that were swept."""
    stage: str
    runs: list[str]
    seeds: list[str]
    results: list[float]
    """Of the runs that were finished."""
    mean: float | None
    spread: float | None
    """Standard deviation over the seeds; None of one."""
    status: str
    """`finished`, `pruned at step 40`, `failed`, ..."""


@dataclass(frozen=True)
class SweepOfRuns:
    """A sweep of one stage: what it compares, and its points, the best first."""

    path: str
    name: str
    stage: str
    metric: str
    direction: str
    keys: list[str]
    points: list[Point]
    importance: dict[str, float] | None
    """Key -> share of what changes the metric, adding up to 1; None where that cannot be said."""
    unsaid: str | None
    """Why not."""


def is_sweep(place: Path) -> bool:
    """Whether a folder is that of a sweep: it holds the record, its runs are elsewhere."""
    return (place / RECORD).is_file()


def sweep_runs(place: Path) -> tuple[str, list[Path]]:
    """The name of a sweep, and its run folders, which lie beside `sweeps/`.

    Raises:
        UserError: not a sweep's record, or it has no runs.
    """
    cure = "restore it, or move it away"
    data = read_file(place / RECORD, JSON_BYTES, cure)
    name = parse(_Record, data, f"{place / RECORD}: not the record of a sweep", cure).name
    outputs = [place.resolve().parents[1]]
    if (multirun := place / "multirun.yaml").is_file():  # where hydra.sweep.dir leads elsewhere
        lines = multirun.read_text(encoding="utf-8").splitlines()
        outputs += [
            Path(line.partition(": ")[2].strip("'\"")) for line in lines if line.startswith("output_dir: ")
        ]
    for folder in outputs:
        found = [path.parent for path in sorted(folder.glob(f"*/{name}-*/lineage.json"))]
        if own := [path for path in found if RunFolder(path).lineage().get("curriculum") == name]:
            return name, own
    raise UserError(
        f"{place}: no run of the sweep {name} in {outputs[0]}; run its command, or move them there"
    )


def sweeps(place: Path) -> list[SweepOfRuns]:
    """A sweep, by stage, in the order of the curriculum.

    Raises:
        UserError: it has no runs, or runs of two configurations.
    """
    name, paths = sweep_runs(place)
    lineages = {path: RunFolder(path).lineage() for path in paths}
    found = []
    by_stage = {str(lineage.get("stage")): lineage for lineage in lineages.values()}
    for stage in sorted(by_stage, key=lambda stage: place_in_curriculum(by_stage[stage])):
        own = {path: lineage for path, lineage in lineages.items() if str(lineage.get("stage")) == stage}
        found.append(_of_stage(place, name, stage, own))
    return found


def _of_stage(place: Path, name: str, stage: str, lineages: Mapping[Path, dict[str, Any]]) -> SweepOfRuns:
    overrides = {path: _overrides(lineage) for path, lineage in lineages.items()}
    keys = sorted({key for given in overrides.values() for key in given})
    swept = [key for key in keys if len({given.get(key) for given in overrides.values()}) > 1]
    _refuse_two_configurations(place, lineages, swept)
    config = next(iter(lineages.values())).get("config") or {}
    metric, direction = next(iter(lineages.values())).get("monitor") or ("val/loss", "min")
    chosen = config.get("sweep_metric")
    if chosen:
        metric, direction = chosen, best_direction(chosen)
    values: dict[Path, float | None]
    if chosen:
        values = {path: last_metrics(path / "metrics.csv").get(metric) for path in lineages}
    else:
        values = {Path(run.path): run.best for run in compare(list(lineages))}
    groups: dict[tuple[str, ...], list[Path]] = {}
    without_seed = [key for key in swept if key != SEED]
    for path, given in overrides.items():
        groups.setdefault(tuple(given.get(key, "") for key in without_seed), []).append(path)
    points = [
        _point(dict(zip(without_seed, group, strict=True)), stage, own, lineages, values)
        for group, own in groups.items()
    ]

    def place_of(point: Point) -> tuple[bool, bool, float]:
        value = math.inf if point.mean is None else point.mean
        return point.status != "finished", point.mean is None, value if direction == "min" else -value

    points.sort(key=place_of)
    importance, unsaid = _importance(points, without_seed)
    return SweepOfRuns(str(place), name, stage, metric, direction, without_seed, points, importance, unsaid)


def _overrides(lineage: Mapping[str, Any]) -> dict[str, str]:
    """Key -> value of what a run was given."""
    parts = (str(word).partition("=") for word in lineage.get("overrides") or [])
    given = {key.lstrip("+~"): value for key, _, value in parts}
    config = lineage.get("config") or {}
    return given | ({SEED: str(config[SEED])} if SEED in config else {})


def _refuse_two_configurations(
    place: Path, lineages: Mapping[Path, dict[str, Any]], swept: Sequence[str]
) -> None:
    """Refuses runs that differ in what was not swept: their values cannot be compared.

    Raises:
        UserError: names the key.
    """
    if any("." not in key and key != SEED for key in swept):
        return  # a group, such as model: it has keys of other groups in its recipe
    first, *others = lineages
    flat = {path: _plain(lineage) for path, lineage in lineages.items()}
    for other in others:
        for key in sorted(flat[first].keys() | flat[other].keys()):
            own = any(key == one or key.startswith(f"{one}.") for one in swept)
            then, now = flat[first].get(key), flat[other].get(key)
            if then != now and not own and not key.startswith(FREE):
                raise UserError(
                    f"{place}: runs of two configurations: {key}={then!s:.80} in {first.name} and "
                    f"{now!s:.80} in {other.name}, which is not swept; report the runs themselves, or move "
                    "those of one away"
                )


def _plain(lineage: Mapping[str, Any]) -> dict[str, Any]:
    config = lineage.get("config") or {}
    found = dotted({key: value for key, value in config.items() if key not in UNSAID})
    if found.get("model.base_sha256"):  # the weights of a decoder, wherever its folder was
        found.pop(DECODER, None)
    return found


def _point(
    values: dict[str, str],
    stage: str,
    runs: Sequence[Path],
    lineages: Mapping[Path, dict[str, Any]],
    found: Mapping[Path, float | None],
) -> Point:
    states = {path: str(lineages[path].get("status")) for path in runs}
    results = [
        value
        for path in runs
        if states[path] == "finished" and (value := found.get(path)) is not None and math.isfinite(value)
    ]
    ended = next((path for path in runs if states[path] != "finished"), None)
    status = "finished" if ended is None else states[ended]
    if ended is not None and status == "pruned":
        status = f"pruned at step {lineages[ended].get('step')}"
        if not results and (value := found.get(ended)) is not None:
            results = [value]
    return Point(
        values=values,
        stage=stage,
        runs=[str(path) for path in runs],
        seeds=[_overrides(lineages[path]).get(SEED, "") for path in runs],
        results=results,
        mean=fmean(results) if results else None,
        spread=stdev(results) if len(results) > 1 else None,
        status=status,
    )


def _importance(points: Sequence[Point], keys: Sequence[str]) -> tuple[dict[str, float] | None, str | None]:
    """What share of the metric's changes goes back to each key: Optuna's functional ANOVA.

    Of a grid and of a search alike: a study is made of the points that were finished.
    """
    done = [point for point in points if point.status == "finished" and point.mean is not None]
    several = [key for key in keys if len({point.values[key] for point in done}) > 1]
    if len(several) < 2 or len(done) < FEWEST:
        return None, f"importance needs two keys and {FEWEST} finished points" if several else None
    try:
        import optuna
        import sklearn  # noqa: F401  of functional ANOVA
    except ModuleNotFoundError as error:
        return None, f"importance needs {error.name}: {install('sweep')}"
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    spaces: dict[str, Any] = {}
    for key in several:
        drawn = numbers([point.values[key] for point in done])
        if drawn is None:
            spaces[key] = CategoricalDistribution(sorted({point.values[key] for point in done}))
        else:
            spaces[key] = FloatDistribution(min(drawn), max(drawn), log=is_log(drawn))
    for point in done:
        given = {
            key: float(point.values[key]) if isinstance(space, FloatDistribution) else point.values[key]
            for key, space in spaces.items()
        }
        study.add_trial(optuna.trial.create_trial(params=given, distributions=spaces, value=point.mean))
    if len({point.mean for point in done}) == 1:
        return None, "all points are equally good"
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)), None


def numbers(texts: Sequence[str]) -> list[float] | None:
    """Values as numbers; None where one of them is none."""
    try:
        found = [float(text) for text in texts]
    except ValueError:
        return None
    return found if all(map(math.isfinite, found)) else None


def is_log(values: Sequence[float]) -> bool:
    """Whether numbers are better drawn on a logarithmic scale: the largest is three times the smallest."""
    return min(values) > 0 and max(values) >= 3 * min(values)


def section(sweep: SweepOfRuns) -> Section:
    """A sweep on the page."""
    best = next((point for point in sweep.points if point.mean is not None), None)
    blocks: list[Block] = []
    if best is not None:
        told = " ".join(f"{key}={short(value)}" for key, value in best.values.items()) or "the only point"
        spread = "" if best.spread is None else f" ± {best.spread:.2g} over {len(best.results)} seeds"
        blocks.append(
            Paragraph(
                f"Best by {sweep.metric} ({sweep.direction}): {told}: {number(best.mean or 0)}{spread}.", True
            )
        )
    blocks.append(table(sweep))
    if sweep.importance:
        rows = [[key, f"{share:.2f}"] for key, share in sweep.importance.items()]
        caption = (
            "What changes the measure: the share of each key (functional ANOVA over the finished points)"
        )
        blocks.append(Table(["key", "importance"], rows, caption))
    elif sweep.unsaid:
        blocks.append(Paragraph(f"No importance of keys: {sweep.unsaid}."))
    if sweep.keys and any(point.mean is not None for point in sweep.points):
        alt = f"a line for each point through its values of {', '.join(sweep.keys)} to its {sweep.metric}"
        blocks.append(Picture(parallel_coordinates(sweep), alt))
        told = (
            "A line is a point: the thick one is the best, the darker the better; grey ones did not finish."
        )
        blocks.append(Paragraph(told))
    return Section(f"The sweep {sweep.name}, {sweep.stage}", blocks)


def table(sweep: SweepOfRuns) -> Table:
    """Every point with its mean and spread, the best first."""
    rows = []
    for point in sweep.points:
        extreme = min if sweep.direction == "min" else max
        names = (Path(run).name.removeprefix(f"{sweep.name}-") for run in point.runs)
        rows.append(
            [
                "" if point.mean is None else number(point.mean),
                "" if point.spread is None else f"{point.spread:.2g}",
                "" if not point.results else number(extreme(point.results)),
                *(short(point.values[key]) for key in sweep.keys),
                point.status,
                str(len(point.results)),
                " ".join(names),
            ]
        )
    caption = (
        f"By {sweep.metric} ({sweep.direction}); the spread is the standard deviation over seeds; names of "
        f"run folders begin with {sweep.name}-"
    )
    return Table(["mean", "spread", "best", *sweep.keys, "status", "runs", "run folders"], rows, caption)


def short(value: str) -> str:
    """A value as it was given; of a drawn number, which has 17 digits, the first four."""
    drawn = numbers([value])
    return number(drawn[0]) if drawn and len(value) > 8 else value


def parallel_coordinates(sweep: SweepOfRuns) -> Figure:
    """An axis for each key and one for the measure, a line for each point; what was pruned is grey."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [point for point in sweep.points if point.mean is not None]
    axes = [*sweep.keys, sweep.metric]
    columns = [[point.values[key] for point in shown] for key in sweep.keys]
    heights, ticks = zip(*[_axis(column) for column in columns], strict=True)
    means = [point.mean or 0.0 for point in shown]
    last, marks = _axis([repr(mean) for mean in means], log=False)
    figure = Figure(figsize=(max(6, 2 * len(axes)), 4.5), dpi=96, layout="tight")
    panel = figure.subplots()
    colours = matplotlib.colormaps["viridis"]
    done_means = [point.mean or 0.0 for point in shown if point.status == "finished"] or means
    low, high = min(done_means), max(done_means)
    for n, point in enumerate(shown):
        share = (means[n] - low) / (high - low or 1)
        share = share if sweep.direction == "min" else 1 - share
        done = point.status == "finished"
        panel.plot(
            range(len(axes)),
            [*(height[n] for height in heights), last[n]],
            color=colours(share) if done else "#bbbbbb",
            linewidth=2.5 if n == 0 else 1.2,
            zorder=2 if done else 1,
        )
    for x, marked in enumerate([*ticks, marks]):
        panel.axvline(x, color="#555555", linewidth=0.8)
        for y, label in marked:
            panel.annotate(
                label,
                (x, y),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize="small",
                va="center",
                bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
                zorder=3,
            )
    panel.set(xticks=range(len(axes)), xticklabels=axes, yticks=[], xlim=(-0.1, len(axes) - 0.6))
    for side in ("left", "right", "top", "bottom"):
        panel.spines[side].set_visible(False)
    return figure


def _axis(texts: Sequence[str], log: bool | None = None) -> tuple[list[float], list[tuple[float, str]]]:
    """Where values stand between 0 and 1, and the labels of the axis."""
    found = numbers(texts)
    if found is None:
        names = sorted(set(texts))
        at = {name: n / max(1, len(names) - 1) for n, name in enumerate(names)}
        return [at[text] for text in texts], [(y, name) for name, y in at.items()]
    scaled = [math.log(value) for value in found] if (is_log(found) if log is None else log) else found
    low, high = min(scaled), max(scaled)
    heights = [(value - low) / (high - low) if high > low else 0.5 for value in scaled]
    ends = {min(found): heights[found.index(min(found))], max(found): heights[found.index(max(found))]}
    few = dict(zip(found, heights, strict=True)) if len(set(found)) <= 6 else ends
    return heights, [(y, number(value)) for value, y in few.items()]
