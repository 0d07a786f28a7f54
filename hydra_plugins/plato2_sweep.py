"""hydra/sweeper=basic, optuna and wandb: the jobs of a sweep, with factors of the recipe's values.

`basic` takes the place of Hydra's own sweeper of this name: it also knows factors, and a job that fails does
not end the others. `optuna` draws points from a study in the sweep's folder; Hydra's own plugin for it needs
optuna<3, cannot prune, and forgets what it knew when it is killed. `wandb` prints a file for `wandb sweep`.

Hydra looks for sweepers in packages called hydra_plugins, and imports them at each start: nothing heavy at
the top.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from math import isnan
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from plato2.config import UserError, expand_path, install
from plato2.runs.console import VERBS, is_first_process, number, say
from plato2.runs.side_by_side import workers_stop_first
from plato2.runs.space import TAG, Dimension, factor, in_hydras_words, multiplied

if TYPE_CHECKING:
    import optuna

Compose = Callable[[list[str]], DictConfig]
EMPTY = "no values; give some, as range(START,STOP), which begins at START and ends before STOP"
"""What is wrong with a range that is empty."""


def resolved(overrides: Sequence[str], compose: Compose) -> list[str]:
    """The overrides of a job with values in the place of factors: of the recipe that the others choose.

    Raises:
        UserError: a factor of 0.
    """
    parts = [(word, word.partition("=")[0], factor(word.partition("=")[2])) for word in overrides]
    if all(times is None for _, _, times in parts):
        return list(overrides)
    config = compose([word for word, _, times in parts if times is None])
    found = []
    for word, key, times in parts:
        recipe = None if times is None else OmegaConf.select(config, key.lstrip("+"))
        if times is None or not isinstance(recipe, int | float) or isinstance(recipe, bool):
            found.append(word)  # a text such as run_id=x2; of a key that does not exist Hydra says so
        else:
            found.append(f"{key}={multiplied(key, recipe, times)!r}")
    return found


def objective(config: DictConfig) -> tuple[str, str]:
    """The metric that the runs of a sweep are compared by, and `min` or `max`."""
    from plato2.runs.build import find
    from plato2.runs.saved import best_direction

    if config.sweep_metric:
        return config.sweep_metric, best_direction(config.sweep_metric)
    stage: Any = find(config.stage._target_, "stage._target_")
    metric, direction = stage.monitor
    return metric, direction


class Jobs(Sweeper):
    """What the sweepers share: overrides, the launcher, and jobs that fail without ending the others.

    Args:
        params: key -> what is swept over it, as on the command line.
    """

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.params = params
        self.launched = 0
        self.failed: list[tuple[str, str]] = []
        """Of each job that failed what it is, and why."""

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra gives a sweeper before `sweep`."""
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    @property
    def folder(self) -> Path:
        """Of the sweep."""
        return Path(self.config.hydra.sweep.dir)

    def parsed(self, arguments: Sequence[str]) -> list[Override]:
        """The overrides of the sweep's file and of the command line, which has the last word."""
        words = [in_hydras_words(f"{key}={value}") for key, value in self.params.items()]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*words, *arguments])
        return list({override.get_key_element(): override for override in overrides}.values())

    def composed(self, overrides: list[str]) -> DictConfig:
        """The configuration of a job."""
        return self.hydra_context.config_loader.load_sweep_config(self.config, overrides)

    def check(self, overrides: list[str]) -> None:
        """Composes a job, and lets the parts that have bounds check themselves.

        Raises:
            UserError: a value that is out of bounds.
        """
        config = self.composed(overrides)
        for section in (config.model, config.optim):
            OmegaConf.to_object(section)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The sweep's folder, for this command alone while the block runs.

        Raises:
            UserError: the same sweep is under way.
        """
        from plato2.files import locked

        self.folder.mkdir(parents=True, exist_ok=True)
        if not is_first_process():
            yield
            return
        with locked(self.folder / "lock", self.folder, "wait for it, or give another run_id"):
            OmegaConf.save(self.config, self.folder / "multirun.yaml")
            yield

    def launch(self, jobs: Sequence[tuple[str, Sequence[str]]]) -> list[JobReturn]:
        """Lets the launcher run jobs, and notes which fail.

        Args:
            jobs: what each is, for messages, and its overrides.
        """
        with workers_stop_first(self.launcher):
            results = self.launcher.launch([overrides for _, overrides in jobs], self.launched)
        self.launched += len(jobs)
        for (told, _), result in zip(jobs, results, strict=True):
            if result.status == JobStatus.FAILED:
                error = result._return_value
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self.failed.append((told, reason))
        return list(results)

    def refuse_failures(self, what: str, cure: str) -> None:
        """Ends a sweep in which jobs failed.

        Raises:
            UserError: there were some; names them, with the first reason.
        """
        if not self.failed:
            return
        first = self.failed[0][1]
        same = [told for told, reason in self.failed if reason == first]
        names = ", ".join(same[:3]) + (f" and {len(same) - 3} more" if same[3:] else "")
        others = len(self.failed) - len(same)
        also = f" ({others} more for other reasons, see above)" if others else ""
        rest = (
            f"; the others went on ({VERBS} report {self.folder})" if len(self.failed) < self.launched else ""
        )
        raise UserError(
            f"{len(self.failed)} of {self.launched} {what} failed: {names}: {first}{also}{rest}; {cure}"
        )


class Grid(Jobs):
    """Every combination of the values, a job each.

    Args:
        params: key -> values with commas between them.
        max_batch_size: jobs that the launcher gets at a time; None = all.
    """

    def __init__(self, params: Mapping[str, Any], max_batch_size: int | None = None) -> None:
        super().__init__(params)
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> list[list[JobReturn]]:
        """Runs all jobs.

        Raises:
            UserError: jobs failed, or a range to draw from.
        """
        jobs = [resolved(job, self.composed) for job in combinations(self.parsed(arguments))]
        for job in jobs:
            self.check(job)  # what is wrong with one is said before the first is trained
        told = [(f"job {n} ({differing(job, jobs)})", job) for n, job in enumerate(jobs)]
        size = self.max_batch_size or len(jobs)
        with self.held():
            results = [self.launch(told[n : n + size]) for n in range(0, len(told), size)]
        self.refuse_failures("jobs", "the same command tries these again")
        return results


# By this name Hydra finds it where no sweeper is given; it has stored its own before it imports this.
ConfigStore.instance().store(
    group="hydra/sweeper",
    name="basic",
    node={"_target_": "hydra_plugins.plato2_sweep.Grid", "max_batch_size": None, "params": {}},
)


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each job, factors as they are.

    Raises:
        UserError: a range to draw from, or an empty one.
    """
    for override in overrides:
        if override.is_sweep_override() and not override.is_discrete_sweep():
            raise UserError(
                f"{override.input_line}: a range, which hydra/sweeper=optuna draws from; without it list "
                f"what to try, as {override.get_key_element()}=x0.5,x1,x2"
            )
    values = [list(map(str, texts(override))) for override in overrides]
    for override, some in zip(overrides, values, strict=True):
        if not some:
            raise UserError(f"{override.input_line}: {EMPTY}")
    keys = [override.get_key_element() for override in overrides]
    return [[f"{key}={value}" for key, value in zip(keys, job, strict=True)] for job in product(*values)]


def texts(override: Override) -> list[str]:
    """The values of an override, as they can be typed; of most there is one."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def differing(job: Sequence[str], jobs: Sequence[Sequence[str]]) -> str:
    """The overrides of a job that not all have."""
    return " ".join(word for word in job if not all(word in other for other in jobs)) or "the only one"


def dimension(override: Override) -> Dimension:
    """What an override that is swept lets a search draw from: Hydra's words for it.

    Raises:
        UserError: a range that is empty.
    """
    key, sweep = override.get_key_element().removesuffix("="), override.value()
    tags = sweep.tags if isinstance(sweep, IntervalSweep | RangeSweep) else set()
    if isinstance(sweep, IntervalSweep):
        low, high, step = sweep.start, sweep.end, None
    elif isinstance(sweep, RangeSweep):
        values = list(override.sweep_iterator())
        if not values:
            raise UserError(f"{override.input_line}: {EMPTY}")
        low, high, step = min(values), max(values), abs(sweep.step)  # type: ignore[assignment,type-var]
    else:
        return Dimension(key, choices=tuple(override.sweep_string_iterator()))
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    log = bool(tags & {TAG, "log"})
    if not low < high or (log and low <= 0):
        raise UserError(f"{override.input_line}: no range to draw from; give LOW < HIGH, of log above 0")
    whole = isinstance(low, int) and isinstance(high, int) and TAG not in tags
    return Dimension(
        key, low=low, high=high, step=None if log else step, log=log, whole=whole, factor=TAG in tags
    )


class Search(Jobs):
    """Points that Optuna draws, from a study in the sweep's folder; the same command goes on after a kill.

    A point is a run for each of some seeds, and their mean is what counts. The first of them tells the study
    each validation, so that a bad point ends early and costs one short run.

    Args: those of conf/hydra/sweeper/optuna.yaml.
    """

    def __init__(
        self,
        n_trials: int,
        n_jobs: int,
        seeds: Sequence[int] | None,
        seed: int,
        sampler: Any,
        pruner: Any,
        params: Mapping[str, Any],
    ) -> None:
        super().__init__(params)
        self.n_trials, self.n_jobs, self.seed = n_trials, n_jobs, seed
        self.seeds = list(seeds or [])
        self.sampler: dict[str, Any] = OmegaConf.to_container(sampler, resolve=True)  # type: ignore[assignment]
        self.pruner: Any = None if pruner is None else OmegaConf.to_container(pruner, resolve=True)

    def space(self, arguments: Sequence[str]) -> tuple[list[Dimension], list[str], DictConfig]:
        """What is searched, the overrides that all points share, and the configuration of one point.

        Raises:
            UserError: nothing to search, or keys whose values are no points to choose among.
        """
        for key, count in {"n_trials": self.n_trials, "n_jobs": self.n_jobs}.items():
            if not isinstance(count, int) or count < 1:
                raise UserError(f"hydra.sweeper.{key}={count}: must be a whole number, at least 1")
        if len({*self.seeds}) < len(self.seeds) or not all(isinstance(seed, int) for seed in self.seeds):
            raise UserError(f"hydra.sweeper.seeds={self.seeds}: give different whole numbers, as [11,12,13]")
        overrides = self.parsed(arguments)
        space = [dimension(override) for override in overrides if override.is_sweep_override()]
        cures = {
            "seed": "give hydra.sweeper.seeds=[11,12,13]: the mean over them counts",
            "stage": "the metrics of two stages cannot be compared; give one",
        }
        for key in (one.key for one in space if one.key in cures):
            raise UserError(f"{key}: no key to search; {cures[key]}")
        if not space:
            raise UserError(
                "hydra/sweeper=optuna: nothing to search; give ranges or choices, as sweep=optuna does, or "
                "'optim.lr=x(0.25,4)' or model.dropout=0,0.1"
            )
        fixed = [
            f"{override.get_key_element()}={texts(override)[0]}"
            for override in overrides
            if not override.is_sweep_override()
        ]
        first = [one.first for one in space]
        for n, one in enumerate(space):
            for end in one.ends:  # what is wrong with one is said before a point is tried
                point = [*fixed, *first[:n], end, *first[n + 1 :]]
                self.check(resolved(point, self.composed))
        return space, fixed, self.composed(resolved([*fixed, *first], self.composed))

    def sweep(self, arguments: list[str]) -> None:
        """Tries points until there are `n_trials` of them.

        Raises:
            UserError: runs failed, or options that Optuna does not take.
        """
        space, fixed, config = self.space(arguments)
        seeds = self.seeds or [int(config.seed)]
        fixed = [word for word in fixed if not word.startswith("seed=")]
        if config.plan:
            first = resolved([*fixed, *(one.first for one in space)], self.composed)
            self.launch([("the plan of the first point", first)])
            return self.refuse_failures("plans", "see --help")
        self.refuse_processes()
        try:
            from plato2.runs.study import JOURNAL, PRUNER, TrialState, open_study, pruner, sampler
        except ModuleNotFoundError as error:
            raise UserError(f"hydra/sweeper=optuna needs {error.name}: {install('sweep')}") from None
        sampler(self.sampler, self.seed)  # what is wrong with either is said now
        pruner(self.pruner)
        metric, direction = objective(config)
        self.output_dir = Path(expand_path(config.output_dir, "output_dir"))
        with self.held():
            study = open_study(self.folder / JOURNAL, "minimize" if direction == "min" else "maximize")
            if study.user_attrs.get(PRUNER) != self.pruner:
                study.set_user_attr(PRUNER, self.pruner)
            done = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
            say(f"{self.folder / JOURNAL}: {len(done)} of {self.n_trials} points, by {metric} ({direction})")
            left = self.n_trials - len(done)
            while left > 0:
                points = self.points(study, space, min(self.n_jobs, left))
                self.try_out(study, points, fixed, seeds)
                left -= len(points)
        self.refuse_failures("runs", "the same command tries other points in their place")
        best = study.best_trial if study.get_trials(states=(TrialState.COMPLETE,)) else None
        if best:
            spread = f" ± {number(best.user_attrs['spread'])}" if "spread" in best.user_attrs else ""
            words = best.user_attrs["overrides"]
            say(f"best: point {best.number} ({words}): {number(best.value or 0)}{spread}")
        return None

    def refuse_processes(self) -> None:
        """Refuses several processes, which would each draw points of their own.

        Raises:
            UserError: torchrun or srun started several.
        """
        from plato2.runs.folder import several_processes

        if several_processes():
            raise UserError(
                f"hydra/sweeper=optuna: started {several_processes()} times by torchrun or srun, and each "
                "would draw its own points; start it once, with hydra/launcher=slurm for runs of several "
                "processes"
            )

    def points(
        self, study: optuna.Study, space: Sequence[Dimension], n: int
    ) -> list[tuple[optuna.Trial, list[str]]]:
        """The next points, with their overrides: first those that a kill has left open."""
        import numpy as np

        from plato2.runs.study import TrialState, sampler, trial

        opened = [frozen.number for frozen in study.get_trials(states=(TrialState.RUNNING,))][:n]
        there = len(study.get_trials(deepcopy=False))
        new = range(there, there + n - len(opened))
        found = []
        for which in (*opened, *new):
            # A seed for each point: one that is drawn after a kill is no copy of the first.
            seed = int(np.random.SeedSequence([self.seed, which]).generate_state(1)[0])
            study.sampler = sampler(self.sampler, seed)
            point = trial(study, which) if which in opened else study.ask()
            found.append((point, [one.drawn(point) for one in space]))
        return found

    def try_out(
        self,
        study: optuna.Study,
        points: Sequence[tuple[optuna.Trial, list[str]]],
        fixed: Sequence[str],
        seeds: Sequence[int],
    ) -> None:
        """Runs points, all seeds of each, and tells the study what came of them.

        The first seeds of all points come first where they can be pruned: the others of a bad one are saved.
        """
        from plato2.runs.study import TrialState

        rounds = [seeds] if self.pruner is None else [seeds[:1], seeds[1:]]
        values: dict[int, list[float]] = {point.number: [] for point, _ in points}
        over: set[int] = set()
        for some in rounds:
            going = [
                (point, words, seed) for point, words in points for seed in some if point.number not in over
            ]
            jobs = [self.job(*one, fixed, reports=one[2] == seeds[0]) for one in going]
            results = self.launch(jobs) if jobs else []
            for (point, _, seed), (told, _), result in zip(going, jobs, results, strict=True):
                if point.number in over:
                    continue
                value = result._return_value if result.status == JobStatus.COMPLETED else None
                if result.status == JobStatus.COMPLETED and self.was_pruned(point.number, seed):
                    study.tell(point, state=TrialState.PRUNED)
                    over.add(point.number)
                elif value is None or isnan(value):
                    if result.status == JobStatus.COMPLETED:
                        self.failed.append((told, "it has no value of the metric"))
                    study.tell(point, state=TrialState.FAIL)
                    over.add(point.number)
                else:
                    values[point.number].append(value)
        for point, _ in points:
            if point.number not in over:
                found = values[point.number]
                point.set_user_attr("values", dict(zip(map(str, seeds), found, strict=True)))
                if len(found) > 1:
                    point.set_user_attr("spread", stdev(found))
                study.tell(point, fmean(found))

    def job(
        self, point: optuna.Trial, words: list[str], seed: int, fixed: Sequence[str], reports: bool
    ) -> tuple[str, list[str]]:
        """A run of a point: what it is, and its overrides."""
        from plato2.runs.study import JOURNAL

        own = resolved([*fixed, *words], self.composed)
        shown = " ".join(own[len(fixed) :])
        if point.user_attrs.get("overrides") != shown:
            point.set_user_attr("overrides", shown)
        overrides = [*own, f"seed={seed}", f"trial={point.number}"]
        if reports:
            path = str((self.folder / JOURNAL).resolve()).replace("\\", "\\\\").replace("'", "\\'")
            overrides.append(f"study='{path}'")
        return f"point {point.number}, seed {seed} ({shown})", overrides

    def was_pruned(self, point: int, seed: int) -> bool:
        """Whether a run ended as one that its pruner found bad."""
        from plato2.runs.folder import RunFolder, run_of_point

        name = run_of_point(self.config.run_id or os.environ["RUN_ID"], point, seed)
        found = [RunFolder(path.parent) for path in self.output_dir.glob(f"*/{name}/lineage.json")]
        return any(run.lineage().get("status") == "pruned" for run in found)


class WandbFile(Search):
    """Prints the sweep as a YAML file whose jobs `wandb agent` starts; see `Search`."""

    def sweep(self, arguments: list[str]) -> None:
        """Prints it.

        Raises:
            UserError: factors of values that depend on another key that is swept.
        """
        import yaml

        space, fixed, config = self.space(arguments)
        shared = resolved(fixed, self.composed)
        base = self.composed(shared)
        nodes = [one.key for one in space if OmegaConf.is_dict(OmegaConf.select(base, one.key.lstrip("+")))]
        parameters = {}
        for one in space:
            if (one.factor or any(factor(text) for text in one.choices)) and nodes:
                raise UserError(
                    f"{one.key}: W&B cannot multiply values of another {nodes[0]}; give values, no factors"
                )
            parameters[one.key] = self.parameter(one, shared)
        if self.seeds:
            parameters["seed"] = {"values": self.seeds}
        metric, direction = objective(config)
        ranges = any(not one.choices for one in space)
        ours = Path(__file__).parents[1] / "plato2"
        program = ["-m", "plato2.commands.train"] if Path(sys.argv[0]).is_relative_to(ours) else ["train.py"]
        made: dict[str, Any] = {
            "program": program[-1],
            "method": "bayes" if ranges else "grid",
            "metric": {"name": metric, "goal": f"{direction}imize"},
            "parameters": parameters,
            "command": [
                "${env}",
                "${interpreter}",
                *program,
                "hydra.mode=RUN",
                "logger=wandb",
                *(word for word in shared if not word.startswith("logger=")),
                "${args_no_hyphens}",
            ],
        }
        if ranges:
            made["run_cap"] = self.n_trials * max(1, len(self.seeds))
            if self.pruner:
                made["early_terminate"] = {"type": "hyperband", "min_iter": 3}
        print(yaml.safe_dump(made, sort_keys=False, allow_unicode=True), end="")

    def parameter(self, one: Dimension, shared: Sequence[str]) -> dict[str, Any]:
        """A dimension in W&B's words."""

        def value(word: str) -> Any:
            read = (
                OverridesParser.create().parse_override(resolved([*shared, word], self.composed)[-1]).value()
            )
            return read if isinstance(read, int | float | bool) else str(read)

        if one.choices:
            return {"values": [value(f"{one.key}={text}") for text in one.choices]}
        low, high = (value(one.override(end if one.whole else float(end))) for end in (one.low, one.high))
        if one.step is not None:
            kind = {"distribution": "q_uniform", "q": one.step}
        elif isinstance(low, int):
            kind = (
                {"distribution": "q_log_uniform_values", "q": 1}
                if one.log
                else {"distribution": "int_uniform"}
            )
        else:
            kind = {"distribution": "log_uniform_values" if one.log else "uniform"}
        return {**kind, "min": low, "max": high}
