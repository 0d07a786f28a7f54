"""Who may import whom: every import of every module, also those inside functions, against one table.

The table is that of docs/design.md: text flows from data to stages to weights to talk to evaluate, nothing
flows back, and Hydra stops at commands/train*.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED: dict[str, tuple[str, ...]] = {
    "plato2": (  # plato2/__init__.py: the version, `train` and `load`
        "plato2.talk",
        "plato2.runs.train",
        "plato2.commands.train",
    ),
    "plato2.__main__": ("plato2.commands",),
    "plato2.config": (),
    "plato2.batch": (),
    "plato2.bounded": ("plato2.config",),
    "plato2.formats": ("plato2.config",),
    "plato2.files": ("plato2.config",),
    "plato2.words": ("plato2.bounded", "plato2.config"),
    "plato2.metrics": ("plato2.config",),
    "plato2.random": (),
    "plato2.model": ("plato2.batch", "plato2.random", "plato2.bounded", "plato2.config"),
    "plato2.runs": (
        "plato2.talk",
        "plato2.stages",
        "plato2.data",
        "plato2.weights",
        "plato2.prepare",
        "plato2.model",
        "plato2.batch",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.runs.console": (),
    "plato2.runs.distributed": ("plato2.config",),
    "plato2.runs.panels": (),
    "plato2.runs.saved": (
        "plato2.runs.distributed",
        "plato2.weights.names",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.runs.traces": ("plato2.formats", "plato2.bounded", "plato2.files", "plato2.config"),
    "plato2.runs.folder": (
        "plato2.runs.saved",
        "plato2.runs.console",
        "plato2.stages",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.stages": ("plato2.model", "plato2.batch", "plato2.config"),
    "plato2.data": (
        "plato2.batch",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.random",
        "plato2.config",
    ),
    "plato2.prepare": (
        "plato2.data",
        "plato2.random",
        "plato2.words",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.weights": (
        "plato2.stages",
        "plato2.model",
        "plato2.runs.folder",
        "plato2.runs.saved",
        "plato2.data.tokenizer",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.weights.names": ("plato2.config",),
    "plato2.talk": (
        "plato2.weights",
        "plato2.stages",
        "plato2.model",
        "plato2.data.tokenizer",
        "plato2.data.samples",
        "plato2.data.packing",
        "plato2.data.units",
        "plato2.batch",
        "plato2.random",
        "plato2.data.selection",
        "plato2.data.examples",
        "plato2.words",
        "plato2.metrics",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.serve": ("plato2.talk", "plato2.data.samples", "plato2.files", "plato2.config"),
    "plato2.evaluate": (
        "plato2.serve",
        "plato2.talk",
        "plato2.metrics",
        "plato2.model",
        "plato2.weights",
        "plato2.runs.console",
        "plato2.runs.folder",
        "plato2.runs.saved",
        "plato2.data",
        "plato2.metrics",
        "plato2.words",
        "plato2.formats",
        "plato2.bounded",
        "plato2.random",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.report": (
        "plato2.evaluate",
        "plato2.talk",
        "plato2.weights",
        "plato2.model",
        "plato2.runs.console",
        "plato2.runs.panels",
        "plato2.runs.folder",
        "plato2.runs.saved",
        "plato2.runs.traces",
        "plato2.data",
        "plato2.metrics",
        "plato2.formats",
        "plato2.bounded",
        "plato2.files",
        "plato2.config",
    ),
    "plato2.commands": ("plato2",),
    "plato2.commands.train": ("plato2",),
    "plato2.commands.train_overrides": ("plato2",),
    "plato2.commands.train_sweep": ("plato2",),
    "train": ("plato2.commands.train",),
    "benchmarks": ("plato2", "benchmarks"),
    "hydra_plugins": ("plato2.runs", "plato2.files", "plato2.config"),
}
COMPOSERS = (
    "plato2.commands.train",
    "plato2.commands.train_overrides",
    "plato2.commands.train_sweep",
    "benchmarks",
    "hydra_plugins",
)
ONLY_COMPOSERS = ("hydra", "omegaconf", "conf")
NOBODY = (
    "train",
    "experiments",
    "tests",
    "benchmarks",
    "hydra_plugins.plato2_local",
    "hydra_plugins.plato2_slurm",
    "hydra_plugins.plato2_sweep",
)
"""Nobody but those whose line above names it."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PACKAGES = ("plato2", "benchmarks", "hydra_plugins")
FILES = [ROOT / "train.py", *sorted(path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py"))]
MODULES = {module_name(path): path for path in FILES}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def part_of(module: str) -> str:
    """The line of the table a module belongs to: the longest package that holds it."""
    return max((part for part in ALLOWED if inside(module, part)), key=len)


def imports(module: str, source: str, is_package: bool = False) -> list[tuple[int, str]]:
    """(line, dotted name) of every import statement and literal `import_module(...)`, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if is_package else module.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from plato2.model import losses` is an import of plato2.model.losses
                full = f"{origin}.{alias.name}"
                found.append((node.lineno, full if full in MODULES else origin))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    part = part_of(module)
    wrong = []
    for line, name in imports(module, source, is_package):
        ours = inside(name, "plato2") and name != "plato2"  # plato2 itself is lazy
        own = part != "plato2" and inside(name, part)
        if (
            any(inside(name, forbidden) for forbidden in NOBODY if forbidden not in ALLOWED[part])
            or (part not in COMPOSERS and any(inside(name, forbidden) for forbidden in ONLY_COMPOSERS))
            or (ours and not own and not any(inside(name, allowed) for allowed in ALLOWED[part]))
        ):
            wrong.append(f"{module}:{line} imports {name}")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module: str) -> None:
    path = MODULES[module]
    found = violations(module, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    assert not found, "\n".join(found)


def test_every_package_has_its_line() -> None:
    packages = {".".join(name.split(".")[: 2 if inside(name, "plato2") else 1]) for name in MODULES}
    assert packages - ALLOWED.keys() == set(), "add the package to ALLOWED and to docs/design.md"


@pytest.mark.parametrize(
    ("module", "source", "n_wrong"),
    [
        ("plato2.data.stream", "from plato2.stages import Stage", 1),
        ("plato2.stages.coarse", "def f():\n    import plato2.data.collate", 1),
        ("plato2.stages.coarse", "from ..data import collate", 1),
        ("plato2.stages.coarse", "from .base import Stage\nfrom plato2.model import losses", 0),
        ("plato2.model.heads", "import importlib\nimportlib.import_module('plato2.stages.optim')", 1),
        ("plato2.talk.variety", "from plato2.metrics import distinct_n", 0),
        ("plato2.metrics", "from plato2.model import losses", 1),
        ("plato2.talk.bot", "from plato2.data import tokenizer, module", 1),
        ("plato2.config", "from omegaconf import OmegaConf\nimport hydra", 2),
        ("plato2.report.curriculum", "import train\nfrom plato2.commands import main", 2),
        ("plato2.commands.reply", "from plato2.talk.bot import PlatoBot\nfrom train import train", 1),
        ("plato2.commands.train", "import hydra\nimport train", 1),
        ("train", "import benchmarks.device", 1),
        ("plato2.commands.report", "from benchmarks.device import machine", 1),
        ("benchmarks.device", "import hydra\nfrom plato2.talk.bot import PlatoBot", 0),
        ("benchmarks.device", "import experiments.choices", 1),
        ("hydra_plugins.plato2_slurm", "import hydra\nfrom plato2.runs.console import say", 0),
        ("hydra_plugins.plato2_slurm", "from plato2.talk.bot import PlatoBot", 1),
        ("plato2.commands.train", "import hydra_plugins.plato2_slurm", 1),
    ],
)
def test_the_check_itself_finds_what_is_wrong(module: str, source: str, n_wrong: int) -> None:
    assert len(violations(module, source)) == n_wrong
