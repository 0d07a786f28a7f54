"""`python train.py` and `plato2 train`: Hydra composes what is trained, sweeps run job after job.

Hydra stops here, at overrides (train_overrides.py) and at what jobs of a sweep share (train_sweep.py): below,
in runs/train.py, there are only plain typed arguments.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import shutil
import sys
import traceback
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import hydra
import typer
import yaml
from hydra import compose, initialize_config_dir
from hydra.conf import RuntimeConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from plato2.commands import leave_stdout
from plato2.commands.train_overrides import (
    as_hydra_reads_it,
    broken_file,
    chosen_files,
    explain,
    flags_first,
    refuse_numbers,
    refuse_unknown_flags,
)
from plato2.commands.train_sweep import SWEEP_STAGES
from plato2.config import (
    ModelConfig,
    OptimConfig,
    TrainConfig,
    UserError,
    did_you_mean,
    expand_path,
)
from plato2.runs.build import check_keys
from plato2.runs.console import (
    WARNINGS,
    Stopped,
    fail,
    is_first_process,
    print_any_text,
    quiet_torchao,
    say,
    signals_stop_at_once,
)
from plato2.runs.job import CURRICULUM, Job
from plato2.runs.keys import help_text
from plato2.runs.side_by_side import is_worker, refuse_after_a_signal
from plato2.runs.traces import RankError
from plato2.runs.train import Trained, train

PACKAGE = Path(__file__).parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration of an installed plato2, or of its source."""
ConfigStore.instance().store(name="schema", node=TrainConfig)
OmegaConf.register_new_resolver("path", lambda path: expand_path(path, "output_dir"), replace=True)


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if told := broken_file(error, CONF):
            raise UserError(told) from error
        raise
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


def hydra_runtime() -> Any:
    """What Hydra knows of the folders and options that it has composed, if it has."""
    return HydraConfig.get().runtime if HydraConfig.initialized() else RuntimeConf(config_sources=[])


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


def command_line(conf: Path = CONF) -> None:
    """`main`, where what Hydra finds wrong with the command line or conf/ is one line, too.

    Args:
        conf: the folder of the configuration.
    """
    conf = conf.absolute()
    OmegaConf.register_new_resolver("known_keys", lambda: explained_keys(conf), replace=True)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it finds
    print_any_text()
    quiet_torchao()
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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if told := broken_file(error, conf, sys.argv[1:]):
            fail(told)
        raise
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
