"""`python train.py` and `plato2 train`: Hydra composes what is trained, sweeps run job after job.

The only module that knows Hydra. Overrides are read as a person writes them, and what is wrong with them is
one line; below (runs/train.py) there are only plain typed arguments.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
from contextlib import nullcontext
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import hydra
import typer
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.conf import RuntimeConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from plato2.bounded import read_file
from plato2.commands import leave_stdout
from plato2.config import (
    ModelConfig,
    OptimConfig,
    TrainConfig,
    UserError,
    did_you_mean,
    dotted,
    expand_path,
    install,
)
from plato2.files import replace_text
from plato2.formats import JSON_BYTES, Closed, parse
from plato2.runs.build import check_keys
from plato2.runs.console import (
    WARNINGS,
    Stopped,
    is_first_process,
    leave_report,
    print_any_text,
    say,
    signals_stop_at_once,
)
from plato2.runs.folder import FREE, NOT_PART_OF_A_RUN
from plato2.runs.job import CURRICULUM, Job
from plato2.runs.keys import help_text, nearest_key, options_with
from plato2.runs.side_by_side import is_worker, refuse_after_a_signal
from plato2.runs.space import FACTOR, in_hydras_words
from plato2.runs.traces import RankError
from plato2.runs.train import Trained, train

PACKAGE = Path(__file__).parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration of an installed plato2, or of its source."""
ConfigStore.instance().store(name="schema", node=TrainConfig)
OmegaConf.register_new_resolver("path", lambda path: expand_path(path, "output_dir"), replace=True)
SWEEP_STAGES = "PLATO2_SWEEP_STAGES"
"""Environment variable of the jobs of a sweep: its stages, with commas between them."""
IN_A_SWEEP = ("hydra", "logger", *NOT_PART_OF_A_RUN)
"""Parts of the configuration that may differ between the runs of a sweep."""
TEXT_KEYS = (
    "run_id",
    "init_from",
    "resume",
    "output_dir",
    "sweep_metric",
    "study",
    "name",
    "model_name",
    "tags",
    "model.path",
    "data.path",
    "data.cache_dir",
    "data.prepare.files",
    "data.prepare.tokenizer",
    "logger.wandb.project",
    "logger.wandb.entity",
    "logger.tensorboard.name",
    "hydra.sweep.dir",
)
"""Keys whose values are names, paths or words, whatever they look like."""
KINDS = {"float": "a number", "integer": "a whole number", "bool": "true or false"}
"""What OmegaConf calls a kind of value, and what messages say."""
PLUGINS = {
    "hydra.launcher": "each launcher has keys of its own; choose one, as hydra/launcher=joblib or slurm",
    "hydra.sweeper": "each sweeper has keys of its own; choose one, as hydra/sweeper=optuna or sweep=optuna",
}
"""What a key may lack that belongs to a plugin of Hydra's."""


app = typer.Typer(add_completion=False)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
)
def verb(ctx: typer.Context) -> None:
    """`plato2 train`: Hydra, in this process's place, reads the rest of the command line itself."""
    os.execv(sys.executable, [sys.executable, "-m", __name__, *ctx.args])


def explained_keys(conf: Path) -> str:
    """The keys in `--help`: indented by Hydra's template, with no dollar that it would replace."""
    width = min(shutil.get_terminal_size().columns, 100)
    return help_text(conf, width).replace("$", "$$")


def train_composed(config: DictConfig) -> Trained | None:
    """Trains what Hydra has composed; see `runs.train.train`."""
    refuse_unknown(config)
    refuse_numbers(hydra_runtime())
    keys: TrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return train(keys, resolved, job(keys))


def train_overrides(*overrides: str) -> Trained | None:
    """Composes and trains, from Python; see `plato2.train`.

    Raises:
        UserError: anything a user can fix.
    """
    try:
        config = composed(*overrides)
        if in_sweep():
            raise UserError(
                f"plato2.train: {' '.join(overrides)} is a sweep; start it on the command line, or one "
                "run of it with hydra.mode=RUN and stage=STAGE"
            )
        return train_composed(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, CONF)) from error
    finally:
        HydraConfig.instance().cfg = None


def composed(*overrides: str) -> DictConfig:
    """What Hydra makes of a command line, its own part of it taken out."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        words = [as_hydra_reads_it(word) for word in overrides]
        config = compose("train", words, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with flag_override(config, ["struct", "readonly"], False):
        del config["hydra"]
    return config


def other_stages() -> list[TrainConfig]:
    """The same command for the curriculum's other stages; none where the stage is not one of them."""
    own = hydra_runtime().choices.get("stage")
    if own not in CURRICULUM:
        return []
    given = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] != "stage"]
    more = list(HydraConfig.get().overrides.hydra)
    given += [word for word in more if word.startswith("hydra.searchpath=")]
    found: list[TrainConfig] = []
    before, initialized = HydraConfig.get(), GlobalHydra.instance().is_initialized()
    with nullcontext() if initialized else initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        for stage in (stage for stage in CURRICULUM if stage != own):
            try:
                config = compose("train", [*given, f"stage={stage}"], return_hydra_config=True)
                HydraConfig.instance().set_config(config)
                with flag_override(config, ["struct", "readonly"], False):
                    del config["hydra"]
                found.append(OmegaConf.to_object(config))  # type: ignore[arg-type]
            except (HydraException, OmegaConfBaseException):  # a key of this stage alone, such as stage.tau
                continue
            finally:
                HydraConfig.instance().cfg = OmegaConf.create({"hydra": before})  # type: ignore[assignment]
    return found


def job(keys: TrainConfig) -> Job:
    """What Hydra knows of the job."""
    if not in_sweep():
        return Job(command=command_but_for_stage(keys), other_stages=other_stages)
    side_by_side = not str(HydraConfig.get().launcher._target_).endswith(".BasicLauncher")
    hydra_job = HydraConfig.get().job
    number = 0 if OmegaConf.is_missing(hydra_job, "num") else hydra_job.num  # it is when nothing is started
    stages = tuple(os.environ.get(SWEEP_STAGES, "").split(","))
    command = command_but_for_stage(keys)
    return Job(number, tuple(job_overrides()), stages, side_by_side, command, other_stages)


def refuse_unknown(config: DictConfig) -> None:
    """Refuses what Hydra lets pass: `+key=value` where keys are closed, and a recipe that does not exist.

    Raises:
        UserError: names it.
    """
    for section, schema in {"": TrainConfig, "model": ModelConfig, "optim": OptimConfig}.items():
        node, prefix = (config[section], f"{section}.") if section else (config, "")
        check_keys(node, [field.name for field in fields(schema)], prefix, "the configuration")
    choices = hydra_runtime().choices
    recipe, own = choices.get("recipe"), f"{choices.get('model')}-{choices.get('stage')}"
    if recipe not in (None, own) and not any(
        file.parent.name == "recipe" for file in chosen_files(hydra_runtime())
    ):
        raise UserError(f"recipe={recipe}: no such recipe; choose one of conf/recipe/, none, or leave it out")


def refuse_numbers(runtime: Any) -> None:
    """Refuses what a file gives a name or a path if YAML reads a number there: the text is lost by then.

    To take it as text, each file would have to be read again without numbers, and Hydra's own order of files
    be repeated to know which one has the last word.

    Args:
        runtime: `hydra.runtime`.

    Raises:
        UserError: names file and key.
    """
    for file in chosen_files(runtime):
        node: Any = OmegaConf.to_container(OmegaConf.load(file))
        is_global = re.match(r"# *@package +_global_\b", file.read_text(encoding="utf-8"))
        prefix = "" if is_global or file.name == "train.yaml" else f"{file.parent.name}."
        for key in (key for key in TEXT_KEYS if key.startswith(prefix)):
            given = node
            for name in key.removeprefix(prefix).split("."):
                given = given.get(name) if isinstance(given, dict) else None
            for value in given if isinstance(given, list) else [given]:
                if isinstance(value, bool | int | float):
                    raise UserError(
                        f"{file}: {key} is a text, and YAML reads {value} there; put what you wrote in quotes"
                    )


def hydra_runtime() -> Any:
    """What Hydra knows of the folders and options that it has composed, if it has."""
    return HydraConfig.get().runtime if HydraConfig.initialized() else RuntimeConf(config_sources=[])


def chosen_files(runtime: Any) -> list[Path]:
    """The files that Hydra has composed: train.yaml, and those of the options."""
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    names = ["train", *(f"{group}/{option}" for group, option in runtime.choices.items() if option)]
    files = (folder / f"{name}.yaml" for name in names for folder in folders)
    return [file for file in files if file.is_file()]


def job_overrides() -> list[str]:
    """How a job of a sweep differs from the others, apart from the stage."""
    given = HydraConfig.get().overrides.task if in_sweep() else []
    return [word for word in given if not word.startswith(("stage=", "study=", "trial="))]


def command_but_for_stage(keys: TrainConfig) -> str:
    """The command for another stage of the same model, data and strategy; `stage=` is still to be added."""
    groups = ("experiment", "model", "data", "strategy", "output_dir")
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    program = ["plato2", "train"] if own_conf() == PACKAGE / "conf" else ["python", "train.py"]
    kept = [word for word in given if re.split("[.=]", word.lstrip("+~"))[0] in groups]
    return shlex.join([*program, *(kept or [f"model={keys.model_name}"])])


def own_conf() -> Path:
    """The folder that Hydra composes from, ours or the one beside train.py."""
    sources = hydra_runtime().config_sources
    return next((Path(source.path) for source in sources if source.provider == "main"), CONF)


def in_sweep() -> bool:
    """Whether this is a job of `-m` or of a sweep file."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


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
        say(f"plato2 report {self.record.parent} --out sweep.html draws it")

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


def explain(error: Exception, conf: Path) -> str:
    """What Hydra or OmegaConf found, on one line; without the advice to force an unknown key with `+`.

    Args:
        error: what was raised.
        conf: the folder of the configuration.
    """
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else ""
    lines = f"{error}\n{cause}".split("Config search path:")[0].splitlines()
    left_out = ("To append to", "reference_type", "object_type")
    told = " ".join(" ".join(line.strip() for line in lines if not line.strip().startswith(left_out)).split())
    where = "(--help lists groups, options and keys, --cfg job prints their values)"
    if "hydra/launcher/submitit_slurm'" in told:
        return f"hydra/launcher=slurm needs hydra-submitit-launcher: {install('slurm')}"
    if "hydra/launcher/joblib'" in told:
        return f"hydra/launcher=joblib needs hydra-joblib-launcher: {install('sweep')}"
    alone = re.search(
        rf"Value '({FACTOR.pattern})' of type 'str' could not be converted.* full_key: (\S+)", told
    )
    if alone:
        key = alone[3]
        return f"{key}={alone[1]}: a factor of the recipe's value, for sweeps: -m {key}=x0.5,x1,x2"
    if isinstance(error, OverrideParseException) and "=" not in error.override:
        word = error.override
        groups = sorted(file.parent.name for file in conf.glob("*/*.yaml") if file.stem == word)
        near = f"did you mean {groups[0]}={word}?" if groups else "--help lists groups, options and keys"
        return f"{word}: what is trained is said as KEY=VALUE; {near}"
    several = re.search(r"^Ambiguous value for argument '([^=]*)=(.*?)' 1\. ", told)
    if several:
        key, values = several.groups()
        return f"{key}={values}: several values are a sweep, which needs -m; a list is written [{values}]"
    kind = re.search(
        r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+).* full_key: (\S+)",
        told,
    )
    if kind and kind[2].lower() in KINDS:
        return f"{kind[3]}={kind[1]}: must be {KINDS[kind[2].lower()]}"
    nothing = re.search(r"field '([^']*)' is not Optional", told)
    if nothing:
        return f"{nothing[1]}=null: must have a value"
    unknown = re.search(r"Key '[^']*' (?:is )?not in .*full_key: (\S+)", told)
    if unknown:
        part = ".".join(unknown[1].split(".")[:2])
        near = PLUGINS.get(part) or meant(unknown[1], conf)
        return f"{unknown[1]}: no such key; {near} {where}"
    no_list = re.search(r" is not a ListConfig\b.* full_key: (\S+)", told)
    if no_list:
        return (
            f"{no_list[1]}: takes a list; write {no_list[1]}=[VALUE,VALUE] or, of one, {no_list[1]}=[VALUE]"
        )
    option = re.search(
        r"Could not find '((?:hydra/)?[^/']+)/([^']+)' Available options in '[^']*': (.*)", told
    )
    if option:
        return (
            f"{option[1]}={option[2]}: no such option; {did_you_mean(option[2], option[3].split())} {where}"
        )
    return f"{told} {where}"


def meant(key: str, conf: Path) -> str:
    """The nearest key to one that is not known."""
    near = nearest_key(key, conf)
    if ":" in key:
        return did_you_mean(key, [key.partition(":")[0]])
    if near == key:
        options = options_with(key, conf)
        return (
            f"only {key.partition('.')[0]}={' or '.join(options)} has it"
            if options
            else f"write +{key}=VALUE"
        )
    return f"did you mean {near}?" if near else "no key is similar"


def fail(sentence: str, on_all_ranks: bool = False) -> NoReturn:
    """Ends with one line for the person at the terminal.

    Under torchrun only the first process prints it, unless it is about ranks; all leave theirs for the report
    that torchrun ends with.
    """
    by_torchrun = leave_report(sentence)
    if is_first_process() or not by_torchrun or on_all_ranks:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def leave(stop: Stopped) -> NoReturn:
    """Ends what a signal stopped before it trained, or after.

    Raises:
        SystemExit: with the code of `stop`.
    """
    logging.disable(logging.INFO)  # torch, half imported, would print statistics at its end
    say(f"stopped: {stop.told}")
    if stop.number in WARNINGS:
        from plato2.runs.folder import requeue

        requeue()
    raise SystemExit(stop.code)


def refuse_unknown_flags(words: list[str], conf: Path) -> None:
    """Refuses what Hydra would answer with a page of usage; keys are given without dashes.

    Raises:
        UserError: names the flag and what was probably meant.
    """
    parser = get_args_parser()
    for flag in (word for word in parser.parse_known_args(words)[1] if word.startswith("-")):
        name, _, value = flag.lstrip("-").replace("-", "_").partition("=")
        key = nearest_key(name, conf) or ""
        flags = [option for action in parser._actions for option in action.option_strings]
        is_key = key.rpartition(".")[2] == name
        near = f"did you mean {key}={value or 'VALUE'}?" if is_key else did_you_mean(flag, flags)
        raise UserError(f"{flag}: no such flag; {near}")


def flags_first(words: list[str]) -> list[str]:
    """The command line with its flags, and their values, before its overrides, as Hydra's parser wants them:
    `a=1 -m b=2`, `a=1 --cfg job b=2`.
    """
    known = {flag: action for action in get_args_parser()._actions for flag in action.option_strings}
    flags: list[str] = []
    overrides: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        action = known.get(word.partition("=")[0])
        (overrides if action is None else flags).append(word)
        if action is None or action.nargs == 0 or "=" in word or not left:
            continue
        if action.nargs is None or left[0] in (action.choices or ()):  # `--info` also works without a value
            flags.append(left.pop(0))
    return [*flags, *overrides]


def main(config: DictConfig) -> float | None:
    """Runs one job; a user's mistake is one line and exit code 2.

    Raises:
        UserError: the job is one of a sweep, which goes on with the others.
    """
    try:
        refuse_after_a_signal()
        # A launcher's job does not come from `command_line`, and has others' handlers.
        with signals_stop_at_once():
            found = train_composed(config)
        return found.value if found else None
    except SystemExit as stop:
        if is_worker():
            refuse_after_a_signal(number=int(stop.code or 0) - 128)
        if isinstance(stop, Stopped):
            leave(stop)
        raise
    except Exception as error:
        sentence = mistake(error, config)
        if not in_sweep():
            if sentence is None:
                raise
            fail(sentence, on_all_ranks=isinstance(error, RankError))
        if sentence is None:
            traceback.print_exc()
            raise
        if is_first_process() or "TORCHELASTIC_ERROR_FILE" not in os.environ:
            print(f"failed: {sentence}", file=sys.stderr, flush=True)
        raise UserError(sentence) from error


def mistake(error: Exception, config: DictConfig) -> str | None:
    """What a person can do about an error, on one line; None where it is ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OmegaConfBaseException):  # a value that is missing, found when it is needed
        return explain(error, own_conf())
    if isinstance(error, OSError):
        place = error.filename or config.output_dir
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{place}: {error.strerror}; make it writable, or choose another output_dir"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"{place}: {error.strerror}; what was saved is intact: free some space and start the same "
                f"command again{' with resume=auto' * (config.resume == 'never')}"
            )
    return None


def as_hydra_reads_it(word: str) -> str:
    """A word of the command line: ranges of factors in Hydra's grammar, quotes around odd texts."""
    return in_quotes(in_hydras_words(as_text(word)))


def in_quotes(override: str) -> str:
    """An override with quotes around each text that Hydra's grammar has no room for: `~/数据`, `a=b`, `it's`.

    Options of Hydra's own stay as they are, but for `~` and variables in the path of `--config-dir`.

    Raises:
        UserError: Hydra cannot read it even so.
    """
    key, sign, value = override.partition("=")
    if key == "--config-dir" and sign:
        return f"{key}={expand_path(value, key)}"
    if not sign or override.startswith("-") or (problem := _unreadable(override)) is None:
        return override
    name = r"[\w ]+: *(?!//)" if value.startswith("{") else r"[\w ]+: "  # `://` is that of an address
    quoted = re.sub(  # what stands between brackets and commas, after the name in a mapping
        rf'({name})?([^][{{}},"]+)',
        lambda text: text[0] if _unreadable(f"{key}={text[2]}") is None else f'{text[1] or ""}"{text[2]}"',
        value,
    )
    if _unreadable(f"{key}={quoted}") is None:
        return f"{key}={quoted}"
    escaped = value.replace('"', '\\"')
    whole = f'{key}="{escaped}"'
    cure = f"if it is one text, write {shlex.quote(whole)}" if _unreadable(whole) is None else "see --help"
    if value.startswith("{"):
        cure = (
            f"a mapping is {key}={{NAME: VALUE, NAME: [VALUE, VALUE]}}, with a space after each colon "
            "and quotes around odd texts"
        )
    raise UserError(f"{override}: Hydra cannot read this override ({problem}); {cure}")


def _unreadable(override: str) -> str | None:
    """What Hydra has against an override; None = nothing."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        return str(error).splitlines()[0]
    return None


def as_text(word: str) -> str:
    """An override of a name or path, with quotes where Hydra would read a number: 12e4567 is no infinity."""
    key, is_override, value = word.partition("=")
    if not is_override or key.lstrip("+") not in TEXT_KEYS or value[:1] in ("'", '"'):
        return word

    def quoted(part: re.Match[str]) -> str:
        text = part[0].strip()
        try:
            float(text.replace("_", ""))
        except ValueError:
            return f"'{text}'" if text.lower() in ("true", "false") else part[0]
        return f"'{text}'"

    return "=".join([key, re.sub(r"[^,\[\]]+", quoted, value)])


def command_line(conf: Path = CONF) -> None:
    """`main`, where what Hydra finds wrong with the command line or conf/ is one line, too.

    Args:
        conf: the folder of the configuration.
    """
    conf = conf.absolute()
    OmegaConf.register_new_resolver("known_keys", lambda: explained_keys(conf), replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it finds
    print_any_text()
    try:
        with signals_stop_at_once():
            refuse_unknown_flags(sys.argv[1:], conf)
            sys.argv[1:] = [as_hydra_reads_it(word) for word in flags_first(sys.argv[1:])]
            hydra.main(version_base="1.3", config_path=str(conf), config_name="train")(main)()
    except UserError as error:
        fail(str(error))
    except Stopped as stop:
        leave(stop)
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error, conf))
    except ValueError as error:
        if "Only one of --run" in str(error):
            fail(f"{error}; leave out the others")
        if "Config group override" not in str(error):
            raise
        for group, _, value in (word.partition("=") for word in sys.argv[1:]):
            if (conf / group).is_dir() and isinstance(yaml.safe_load(value), bool | int | float):
                options = sorted(file.stem for file in (conf / group).glob("*.yaml"))
                fail(f"{group}={value}: no such option; {did_you_mean(value, options)}")
        raise
    except BrokenPipeError:  # `--help | head`
        leave_stdout()
        sys.exit(1)


if __name__ == "__main__":
    from plato2.commands.train import command_line as command_line_of_the_module

    command_line_of_the_module()  # a launcher sends its jobs the name of `main`: not __main__'s
