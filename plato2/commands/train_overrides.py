"""Overrides of `train.py`: a person's words in Hydra's grammar; what is wrong with them is one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from plato2.config import UserError, did_you_mean, expand_path, install
from plato2.runs.keys import known_keys, nearest_key, options_with
from plato2.runs.space import FACTOR, in_hydras_words

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


def chosen_files(runtime: Any) -> list[Path]:
    """The files that Hydra has composed: train.yaml, and those of the options."""
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    names = ["train", *(f"{group}/{option}" for group, option in runtime.choices.items() if option)]
    files = (folder / f"{name}.yaml" for name in names for folder in folders)
    return [file for file in files if file.is_file()]


def broken_file(error: Exception, conf: Path, words: Sequence[str] = ()) -> str | None:
    """Which file of a configuration is not YAML in UTF-8, and where; None where none is.

    Args:
        error: what reading it raised.
        conf: the folder of the configuration.
        words: of the command line, which may name another with `--config-dir`.
    """
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not valid YAML ({error.problem}); correct that line"
    given = get_args_parser().parse_known_args(list(words))[0].config_dir
    for folder in (Path(given) if given else conf, conf):
        for file in sorted(folder.rglob("*.yaml")):
            try:
                file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as found:
                return f"{file}: byte {found.start + 1} is not UTF-8; save the file as UTF-8"
    return None


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
    missing = re.search(r"^Missing mandatory value: .* full_key: (\S+)", told)
    if missing:
        return f"{missing[1]}: has no default; give it as {missing[1]}=VALUE {where}"
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
    """The nearest key to one that is not known; where none is near, those of its group."""
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
    if near:
        return f"did you mean {near}?"
    group = key.partition(".")[0]
    own = [known.partition(".")[2] for known in known_keys(conf) if known.startswith(f"{group}.")]
    return f"{group} has {', '.join(own)}" if own else "no key is similar"
