"""Every key of `train.py` with a line on what it does, for `--help` and for the nearest key to a typo.

The lines are the code's own: of a dataclass the help of each field's `option`, or the text below the field;
of another class the `Args` of its docstring; for what is passed on to Lightning the comment in conf/. All are
read as text and nothing is imported, so that `--help` needs no torch.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).parents[1]
CLASSES = {
    "": "plato2.config.RunConfig",
    "model": "plato2.config.ModelConfig",
    "optim": "plato2.config.OptimConfig",
    "data.prepare": "plato2.prepare.options.PrepareOptions",
    "data.prepare.clean": "plato2.prepare.clean.CleanRules",
}
"""What has all keys of a group; the keys of the other groups are those of their files."""
COLUMN = " " * 30
"""Before the lines on the keys."""
INDENT = 2
"""Hydra's, of the whole text."""
FILES = ("stage", "data", "trainer", "strategy", "logger", "callbacks")
TITLES = {
    "": "at the top level",
    "data.prepare": "data.prepare (options of `plato2 prepare`; write +data.prepare.KEY=VALUE)",
    "data.prepare.clean": "data.prepare.clean (also with the plus)",
    "trainer": "trainer (any other argument of Lightning's Trainer: +trainer.KEY=VALUE)",
}


@cache
def known_keys(conf: Path) -> dict[str, str]:
    """Key -> what it does, for every key of the configuration in `conf`."""
    keys: dict[str, str] = {}
    for group in ("", "model", "optim", *FILES, "data.prepare", "data.prepare.clean"):
        found = documented(CLASSES[group]) if group in CLASSES else _keys_of_files(conf / group)
        keys |= {f"{group}.{key}".lstrip("."): line for key, line in found.items()}
    return {key: line for key, line in keys.items() if key != "data.prepare.out"}  # it is data.path


def help_text(conf: Path, width: int) -> str:
    """All keys with their lines, group by group."""
    titles = list(dict.fromkeys(_group(key) for key in known_keys(conf)))
    parts = []
    for title in titles:
        own = {key: line for key, line in known_keys(conf).items() if _group(key) == title}
        lines = [f"Keys {TITLES.get(title, title)}:\n"]
        for key, line in own.items():
            said = textwrap.fill(line, width - INDENT, initial_indent=COLUMN, subsequent_indent=COLUMN)
            lines.append(f"  {key:26}  {said.lstrip()}" if len(key) <= 26 else f"  {key}\n{said}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def nearest_key(name: str, conf: Path) -> str | None:
    """The key that was meant by one that is not known: the same in its group, or a name that resembles it."""
    keys = [*known_keys(conf), *(path.name for path in conf.iterdir() if path.is_dir())]
    if name in keys:
        return name
    last = name.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    alike = get_close_matches(name, keys, n=1) or get_close_matches(last, keys, n=1)
    tails = {key.rpartition(".")[2]: key for key in reversed(keys)}
    far = [tails[tail] for tail in get_close_matches(last, tails, n=1)]
    return next(iter([*same, *alike, *far]), None)


def options_with(key: str, conf: Path) -> list[str]:
    """The options of a key's group that have the key, by their files."""
    group, _, own = key.partition(".")
    files = sorted((conf / group).glob("*.yaml")) if own else []
    return [file.stem for file in files if own in _paths(_merged(file))]


def _merged(file: Path) -> dict[str, Any]:
    """An option with those that its defaults name."""
    node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    merged: dict[str, Any] = {}
    for name in node.pop("defaults", []):
        if isinstance(name, str) and name != "_self_":
            merged |= _merged(file.with_name(f"{name}.yaml"))
    return merged | node


def _paths(node: dict[str, Any]) -> set[str]:
    """All keys of a node, with dots."""
    found = set(node)
    for key, child in node.items():
        if isinstance(child, dict):
            found |= {f"{key}.{inner}" for inner in _paths(child)}
    return found


def _group(key: str) -> str:
    prefixes = [group for group in (*CLASSES, *FILES) if key.startswith(f"{group}.")]
    return max(prefixes, key=len, default="")


def _keys_of_files(folder: Path) -> dict[str, str]:
    """The keys of all files of a group: what the class that they name says of them, else their comment."""
    keys: dict[str, str] = {}
    for file in sorted(folder.glob("*.yaml")):
        above: list[str] = []  # of the line at hand; nodes are indented by two
        said: dict[str, dict[str, str]] = {}  # by the class that a node names
        for line in file.read_text(encoding="utf-8").splitlines():
            found = re.match(r"( *)(\w+):(?: +([^#\s]\S*))?.*?(?:# (.*))?$", line)
            if not found or found[2] == "defaults":
                continue
            above = [*above[: len(found[1]) // 2], found[2]]
            node, key = ".".join(above[:-1]), ".".join(above)
            if found[2] == "_target_":
                said[node] = documented(found[3]) if found[3].startswith("plato2.") else {}
            elif found[3] and not key.startswith("prepare."):
                keys[key] = said.get(node, {}).get(found[2]) or keys.get(key) or _sentence(found[4] or "")
    return keys


@cache
def documented(dotted: str) -> dict[str, str]:
    """Field or argument -> the first sentence on it, of a class of ours."""
    module, _, name = dotted.rpartition(".")
    path = PACKAGE.joinpath(*module.split(".")[1:])
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return {**_arguments(ast.get_docstring(node) or ""), **_fields(node)}
    raise LookupError(dotted)


def _fields(node: ast.ClassDef) -> dict[str, str]:
    lines = {}
    for field, text in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            said = text.value if isinstance(text, ast.Expr) else None
            if isinstance(field.value, ast.Call):  # of `option`
                said = next((word.value for word in field.value.keywords if word.arg == "help"), said)
            lines[field.target.id] = _sentence(str(said.value)) if isinstance(said, ast.Constant) else ""
    return {name: line for name, line in lines.items() if not name[0].isupper()}


def _arguments(docstring: str) -> dict[str, str]:
    block = inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", block, re.M)
    return {name: _sentence(text) for name, text in entries}


def _sentence(text: str) -> str:
    first = re.split(r"(?:(?<=\w\w\.)|(?<=\)\.))\s", " ".join(text.split()))[0].removesuffix(".")
    word = first.partition(" ")[0]
    return first[:1].upper() + first[1:] if word.isalpha() else first  # bf16-mixed is a value, typed as it is
