"""What a sweep of `train.py` has in common: one name, a record to resume it by, and a table at its end."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from plato2.bounded import read_file
from plato2.commands.train_overrides import as_hydra_reads_it, refuse_numbers
from plato2.config import UserError, dotted, expand_path
from plato2.files import replace_text
from plato2.formats import JSON_BYTES, Closed, parse
from plato2.runs.console import VERBS, fail, say
from plato2.runs.folder import FREE, NOT_PART_OF_A_RUN

SWEEP_STAGES = "PLATO2_SWEEP_STAGES"
"""Environment variable of the jobs of a sweep: its stages, with commas between them."""
IN_A_SWEEP = ("hydra", "logger", *NOT_PART_OF_A_RUN)
"""Parts of the configuration that may differ between the runs of a sweep."""


class SweepRecord(Closed):
    """sweep.json."""

    command: dict[str, Any]
    name: str
    finished: bool
    config: dict[str, Any] | None = None
    """Before anything was swept."""


def read_sweep(path: Path) -> SweepRecord:
    """The record of a sweep.

    Raises:
        UserError: not a sweep's record.
    """
    cure = "restore it, or move it away"
    return parse(SweepRecord, read_file(path, JSON_BYTES, cure), "not the record of a sweep", cure)


class Sweep(Callback):
    """Gives the jobs of a sweep one name, resumes an interrupted one, prints its results."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A launcher starts the jobs of a sweep: without one, this machine would train, a login node."""
        if not str(config.hydra.launcher._target_).endswith(".BasicLauncher"):
            launcher = config.hydra.runtime.choices["hydra/launcher"]
            fail(f"hydra/launcher={launcher}: starts the jobs of a sweep, also of a single job; add -m")
        sweeper = config.hydra.runtime.choices["hydra/sweeper"]
        given = any(word.startswith("hydra/sweeper=") for word in config.hydra.overrides.hydra)
        if given and sweeper != "basic":
            fail(f"hydra/sweeper={sweeper}: chooses the jobs of a sweep; add -m")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Finds the newest unfinished sweep of the same command, else starts a new one.

        A finished curriculum (`report=true`) is not trained again: its jobs are skipped, its report is shown.
        """
        if is_printed(config):
            return
        try:
            refuse_numbers(config.hydra.runtime)
        except UserError as error:  # Hydra turns a callback's error into a mere warning
            fail(str(error))
        here, named = Path(config.hydra.sweep.dir), config.run_id or os.environ.get("RUN_ID")
        sweeper: Any = OmegaConf.to_container(config.hydra.sweeper)
        params = sweeper.pop("params", None) or {}
        self.command = command = {"overrides": sorted(config.hydra.overrides.task), "params": params}
        if "sampler" in sweeper:  # how points are drawn, but for their number
            command["search"] = {key: sweeper[key] for key in ("seeds", "seed", "sampler", "pruner")}
        self.base = base = shared_configuration(config)
        for record in sorted(here.parent.glob("*/sweep.json"), reverse=True):
            try:
                earlier = read_sweep(record)
            except (OSError, UserError) as error:
                say(f"warning: {record} is skipped: {error}")
                continue
            again, name = earlier.finished, earlier.name
            same = earlier.command == command and (not again or config.report)
            if same and (name == named if named else config.resume == "auto"):
                key = changed_key(earlier.config or base, base)
                if key and again:
                    continue
                if key:
                    then, now = (dotted(one).get(key) for one in (earlier.config or {}, base))
                    fail(
                        f"{key}={now}: the unfinished sweep {name} was started with {key}={then!s:.80}, and "
                        "its runs are compared; put the old value back, or start another sweep with "
                        "resume=never"
                    )
                self.record, self.name = record, name
                say(
                    f"the sweep {self.name} is finished: showing its report (resume=never trains it again)"
                    if again
                    else f"resuming the unfinished sweep {self.name}"
                )
                break
        else:
            self.record = self._new(here) / "sweep.json"
            self.name = named or self.record.parent.name
        os.environ["RUN_ID"] = self.name
        with flag_override(config.hydra, "readonly", False):  # of this sweep, and of each of its jobs
            config.hydra.sweep.dir = str(self.record.parent)
            config.hydra.overrides.hydra.append(as_hydra_reads_it(f"hydra.sweep.dir={self.record.parent}"))
        swept = [word.partition("=") for word in command["overrides"]]
        stages = [params.get("stage", ""), *(value for key, _, value in swept if key == "stage")]
        names = (stage.strip() for value in stages for stage in str(value).split(","))
        os.environ[SWEEP_STAGES] = ",".join(filter(None, names))
        self._write(command=command, name=self.name, finished=False, config=base)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Closes the sweep's record; prints its runs, the best first, or with `report=true` the report."""
        if is_printed(config):
            return
        self._write(command=self.command, name=self.name, finished=True, config=self.base)
        for variable in ("RUN_ID", SWEEP_STAGES):
            os.environ.pop(variable, None)
        if config.plan:
            return
        output_dir = Path(expand_path(config.output_dir, "output_dir"))
        try:
            if config.report:
                from plato2.report.curriculum import report_sweep

                numbers = {"n_latent_contexts": config.latent_contexts, "n_human": config.human_rank}
                report_sweep(output_dir, self.name, **numbers)
            else:
                self._compare(output_dir, config.sweep_metric)
        except UserError as error:  # Hydra turns a callback's error into a mere warning
            fail(str(error))

    def _compare(self, output_dir: Path, metric: str | None) -> None:
        from rich.console import Console

        from plato2.evaluate.runs import compare, runs_tables, winners_first
        from plato2.report.page import Section, show
        from plato2.report.sweep import sweep_runs, sweeps, table

        if not any(output_dir.glob(f"*/{self.name}-*/lineage.json")):  # other machines' runs, not seen yet
            return
        _, paths = sweep_runs(self.record.parent)
        runs = winners_first(compare(paths, metric))
        say(f"the sweep {self.name}, the best first:")
        Console(highlight=False).print(*runs_tables(runs), sep="\n")
        several = [one for one in sweeps(self.record.parent) if any(point.runs[1:] for point in one.points)]
        if several:
            show(
                "over seeds", [Section(one.stage, [table(one)]) for one in several], Console(highlight=False)
            )
        say(f"{VERBS} report {self.record.parent} --out sweep.html draws it")

    def _new(self, folder: Path) -> Path:
        """A folder that no other sweep has: two can begin in one second."""
        for number in count(1):
            new = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                new.mkdir(parents=True)
                return new
            except FileExistsError:
                continue
            except OSError as error:  # Hydra turns a callback's error into a mere warning
                fail(f"output_dir: {new} cannot be made ({error.strerror}); choose another output_dir")
        raise AssertionError("count has no end")

    def _write(self, **entries: Any) -> None:
        replace_text(self.record, json.dumps(entries, indent=2) + "\n")


def shared_configuration(config: DictConfig) -> dict[str, Any]:
    """What the runs of a sweep share unless it is swept, as plain values."""
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(config)  # some values name the options chosen
        kept = OmegaConf.masked_copy(config, [str(key) for key in config if key not in IN_A_SWEEP])
        plain: dict[str, Any] = json.loads(json.dumps(OmegaConf.to_container(kept, resolve=True)))
    finally:
        HydraConfig.instance().cfg = before
    return plain


def changed_key(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first key, with dots, whose value is another one."""
    old, new = dotted(then), dotted(now)
    changed = (key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key))
    return next((key for key in changed if not key.startswith(FREE)), None)


def is_printed(config: DictConfig) -> bool:
    """Whether the sweep is only written down, for W&B, and nothing is trained."""
    return str(config.hydra.sweeper._target_).endswith(".WandbFile")
