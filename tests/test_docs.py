"""The documents are true: commands compose and parse, names exist, links resolve, tables fit the code."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from architecture import FILE, ROOMS, X, arrows, half, picture, row
from decoders import write_decoder
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from small import ROOT, SMALL, Train, command, environment, write_dialogues
from test_imports import ALLOWED
from typer.testing import CliRunner

import hydra_plugins.plato2_sweep as sweepers
import plato2.commands.train as hydra_command
import plato2.runs.plan as plan_module
from plato2.commands import app, every_command, module_of
from plato2.config import DecodeConfig
from plato2.prepare.options import PrepareOptions
from plato2.runs.simulate import Memory

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / folder / "README.md" for folder in ("benchmarks", "experiments")]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = ("1_coarse", "2_gen", "2_eval")
HYDRA_FLAGS = {"--help", "--cfg", "--info", "--config-dir", "-m"}
OTHER_PROGRAMS = {  # Slurm's
    "--signal",
    "--requeue",
    "--nodes",
    "--ntasks-per-node",
    "--open-mode",
    "--dependency",
    "--kill-on-invalid-dep",
}
BENCHMARKS = ("train", "generate", "serve", "prepare")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    language: str
    text: str


def blocks(path: Path) -> Iterator[Block]:
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M):
        yield Block(str(path.relative_to(ROOT)), language, text)


BLOCKS = [block for path in DOCUMENTS for block in blocks(path)]


def commands_of(block: Block) -> list[str]:
    """The commands of a block, continued lines joined; nothing for blocks that are no shell."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language in ("bash", "console"):
        return [line.removeprefix("$ ") for line in lines if line.strip() and not line.startswith("#")]
    return [line for line in lines if block.language == "" and is_command(line)]


def is_command(line: str) -> bool:
    program = r"(srun |torchrun .*)?(python |\s)train\.py\b|(python -m )?(plato2 |benchmarks\.)\w|pip install"
    return bool(re.match(program, line))


README_COMMANDS = [line for block in blocks(ROOT / "README.md") for line in commands_of(block)]
COMMANDS = sorted({line for block in BLOCKS for line in commands_of(block)})
PARTS = sorted({part.strip(" &") for line in COMMANDS for part in line.split("&&")})
TRAIN_LINES = [part for part in PARTS if re.search(r"\btrain\.py\b", part)]
PLATO2_LINES = [part for part in PARTS if re.match(r"(python -m )?plato2 ", part)]
BENCHMARK_LINES = [part for part in PARTS if part.startswith("python -m benchmarks.")]


def test_every_command_is_of_a_kind_that_is_checked() -> None:
    checked = {*TRAIN_LINES, *PLATO2_LINES, *BENCHMARK_LINES, "pytest"}
    unknown = [part for part in PARTS if part not in checked and not part.startswith("pip install ")]
    assert not unknown
    assert len(TRAIN_LINES) > 30
    assert {line.split()[0] for line in TRAIN_LINES} == {"python", "srun", "torchrun"}
    assert len(PLATO2_LINES) > 8
    assert len(BENCHMARK_LINES) >= len(BENCHMARKS)


# ------------------------------------------------------------------------------------------------ train.py


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that docs/configuration.md shows and those of examples/conf/, in a folder beside conf/."""
    folder = tmp_path_factory.mktemp("conf")
    shutil.copytree(ROOT / "examples" / "conf", folder, dirs_exist_ok=True)
    for block in blocks(ROOT / "docs" / "configuration.md"):
        if block.language == "yaml" and (name := re.match(r"# conf/(\S+)\n", block.text)):
            path = folder / name[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text.split("\n", 1)[1], encoding="utf-8")
    return folder


def composed(overrides: list[str], search: Path | None = None) -> DictConfig:
    """The configuration of `python train.py OVERRIDES`."""
    return hydra_command.composed(*overrides, *([f"hydra.searchpath=[file://{search}]"] if search else []))


@pytest.fixture(autouse=True)
def _leave_hydra_as_it_was() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def jobs(overrides: list[str], multirun: bool, search: Path) -> list[list[str]]:
    """The overrides of each job of a command, of `-m` or of a sweep file; of a range its lower end."""
    swept: list[str] = []
    for word in overrides:
        if word.startswith(("experiment=", "sweep=")) and not multirun:
            file = ROOT / "conf" / f"{word.replace('=', '/')}.yaml"
            content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
            params = content.get("hydra", {}).get("sweeper", {}).get("params", {})
            swept += [f"{key}={value}" for key, value in params.items()]
    if not multirun and not swept:
        return [overrides]
    words = [hydra_command.as_hydra_reads_it(word) for word in [*swept, *overrides]]
    parsed = {one.get_key_element(): one for one in OverridesParser.create().parse_overrides(words)}.values()
    ranges = [one for one in parsed if one.is_sweep_override() and not one.is_discrete_sweep()]
    lowest = [sweepers.dimension(one).first for one in ranges]
    grid = sweepers.combinations([one for one in parsed if one not in ranges])
    return [sweepers.resolved([*job, *lowest], lambda given: composed(given, search)) for job in grid]


def train_arguments(line: str) -> tuple[list[str], set[str]]:
    words = shlex.split(line.split("train.py", 1)[1].replace("--config-dir examples/conf", ""), comments=True)
    flags = {word for word in words if word.startswith("-")}
    assert flags <= HYDRA_FLAGS, line
    values = {"job", "defaults"} if flags & {"--cfg", "--info"} else set()
    return [word for word in words if word not in flags | values], flags


def test_train_commands_compose_and_build(
    own_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With plan=true: every option is checked, stage and data module are built, nothing is trained.

    What is simulated of it has tests of its own (tests/unit/test_simulate.py, tests/smoke/test_train.py).
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "memory_of_a_rank", lambda *_: Memory(*[0.0] * 9))
    monkeypatch.setattr(plan_module, "largest_units", lambda *_: None)
    monkeypatch.setattr(hydra_command, "other_stages", list)
    write_decoder(tmp_path / "FOLDER", max_position_embeddings=256)  # of docs/pretrained.md
    found: set[tuple[str, ...]] = set()
    for line in TRAIN_LINES:
        given, flags = train_arguments(line)
        if "--help" not in flags:
            found |= {(*job, "plan=true") for job in jobs(given, "-m" in flags, own_files)}
    for job in sorted(found):
        assert hydra_command.train_composed(composed([*job], own_files)) is None, job
        assert "what the run needs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["FOLDER"]


def test_own_files_of_the_configuration_page(own_files: Path) -> None:
    own = composed(["model=40m"], own_files)
    assert own.name == "40m-1_coarse"
    assert (own.model.n_layer, own.optim.lr, own.output_dir) == (8, 1e-3, "/scratch/plato2/outputs")
    own = composed(["experiment=40m_mine"], own_files)
    assert (own.data.path, own.trainer.max_steps, own.tags) == ("data/mine", 50000, ["mine"])


# ------------------------------------------------------------------------------------------- plato2 VERB


@cache
def verb(name: str) -> Any:
    return typer.main.get_command(module_of(name).app)


@pytest.mark.parametrize("line", PLATO2_LINES)
def test_plato2_commands_parse(line: str) -> None:
    words = shlex.split(line.split("plato2 ", 1)[1], comments=True)
    if " ".join(words[:2]) in every_command():
        words = [" ".join(words[:2]), *words[2:]]
    found, arguments = verb(words[0]), words[1:]
    if hasattr(found, "commands"):
        found, arguments = found.commands[arguments[0]], arguments[1:]
    found.make_context(words[0], list(arguments))  # raises for an option or a value that is not known


def benchmark(name: str) -> Any:
    return typer.main.get_command(importlib.import_module(f"benchmarks.{name}").app)


@pytest.mark.parametrize("line", BENCHMARK_LINES)
def test_benchmarks_parse(line: str) -> None:
    name, *arguments = shlex.split(line.split("benchmarks.", 1)[1], comments=True)
    benchmark(name).make_context(name, arguments)


def test_options_named_in_the_text_exist() -> None:
    commands = [verb(name) for name in every_command()]
    commands += map(benchmark, BENCHMARKS)
    commands += [sub for found in commands for sub in getattr(found, "commands", {}).values()]
    parameters = [parameter for found in commands for parameter in found.params]
    known = {option for one in parameters for option in (*one.opts, *one.secondary_opts)}
    for path in DOCUMENTS:
        named = re.findall(r"`(--[a-z-]+)", without_blocks(path))
        unknown = [name for name in named if name not in known | HYDRA_FLAGS | OTHER_PROGRAMS]
        assert not unknown, path


@pytest.mark.parametrize(
    ("document", "name", "kind"), [("talk.md", "reply", DecodeConfig), ("data.md", "prepare", PrepareOptions)]
)
def test_tables_of_options_are_those_of_the_code(document: str, name: str, kind: type) -> None:
    given = {parameter.name: parameter for parameter in verb(name).params}
    rows = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name in given and given[field.name].param_type_name == "option":
            default = field.metadata["default_text"] or field.default
            shown = "" if any(default is none for none in (None, False, dataclasses.MISSING)) else default
            rows.append(f"| `{'` / `'.join(given[field.name].opts)}` | {shown} | {given[field.name].help} |")
    table = "\n".join(rows)
    assert table in (ROOT / "docs" / document).read_text(encoding="utf-8"), f"docs/{document} needs\n{table}"


def test_keys_named_in_the_text_exist() -> None:
    configs = [composed([f"stage={stage}", "logger=wandb", "strategy=hsdp"]) for stage in STAGES]
    groups = ["model", "stage", "data", "optim", "trainer", "strategy", "logger"]
    optional = {"stage.batch.positions"}  # documented with a plus
    found = 0
    for path in DOCUMENTS:
        modules = r"\n## Who may import whom.*?(?=\n## )"  # data.tokenizer is no key there
        text = re.sub(modules, "", without_blocks(path), flags=re.S)
        for key in re.findall(rf"`\+?((?:{'|'.join(groups)})(?:\.\w+)+)(?:=[^`]*)?`", text):
            found += 1
            assert key in optional or any(_has(config, key) for config in configs), f"{path}: {key}"
    assert found > 20


def _has(config: DictConfig, key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return False
        node = node[part]
    return True


# ------------------------------------------------------------------------------------ text, links, tables


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def headings(path: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(path), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "path",
    [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_blocks(path)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in headings(linked), f"{path.name}: {target}"


def test_extras_that_are_named_exist_and_nothing_is_installed_by_name() -> None:
    """`pip install '.[EXTRA]'` in documents and messages; plato2 is in no package index."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    files = [*DOCUMENTS, ROOT / "Dockerfile", ROOT / "train.py", *ROOT.glob("requirements*.txt")]
    files += [
        file for folder in ("plato2", "tests", "conf", "benchmarks") for file in (ROOT / folder).rglob("*")
    ]
    named: set[str] = set()
    for file in (file for file in files if file.suffix in (".md", ".py", ".yaml", ".txt", "", ".sh")):
        if file.is_file() and file != Path(__file__):
            text = file.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"pip install (-\S+ )*['\"]?plato2\b(?![./])", text), file
            named |= set(re.findall(r"'\.\\*\[(\w+)\]'|\binstall\('(\w+)'\)", text))
    names = {name for pair in named for name in pair if name}
    assert {"serve", "ui", "spark", "reddit"} <= names
    assert names <= extras["optional-dependencies"].keys()


def test_the_two_lines_are_what_ci_runs() -> None:
    lines = README_COMMANDS
    assert lines[0] == "pip install -r requirements.txt && python -m plato2 chat"
    assert lines[1] == "pip install -r requirements.txt && python train.py experiment=quickstart"
    assert lines[2] == "pip install -r requirements.txt -r requirements-dev.txt && pytest"
    ci = ROOT / ".ci" / "run"
    if not ci.exists():
        pytest.skip("no .ci/run here")
    patterns = re.findall(r"\$\(readme_line '([^']+)'\)", ci.read_text(encoding="utf-8"))
    first = [next(line for line in README.splitlines() if pattern in line) for pattern in patterns]
    assert first == lines[1:3]


def test_there_is_a_place_for_the_measured_output() -> None:
    assert README.count("<!-- quickstart -->") == 2


def test_python_blocks_import_what_exists() -> None:
    found = [block for block in BLOCKS if block.language == "python"]
    assert found
    for block in found:
        imports = [
            node for node in ast.parse(block.text).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module(imports, []), block.document, "exec"), {})


def test_recipes_have_the_values_of_the_table() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| `(\S+)` \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", re.M)
    rows = {name: values for name, *values in row.findall(text)}
    rows = {name: values for name, values in rows.items() if re.match(r"[\w.]+-\d_\w+$", name)}
    assert len(rows) == 12
    for name, values in rows.items():
        config = composed([f"recipe={name}"])
        optim = config.optim
        stated = [float(value.replace(",", "")) for value in values]
        assert [optim.lr, optim.warmup_steps, optim.batch_tokens, config.trainer.max_steps] == stated, name


def test_batches_of_the_training_page_are_those_of_the_recipes() -> None:
    """`model stage, stage | batch_tokens | unit_tokens | units a step | accumulation on 1 / 8 / 64 ranks`."""
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| ([\w.]+),? (.*?) \| ([\d,]+) \| ([\d,]+) \| (\d+) \| (.*) \|$", re.M)
    rows = row.findall(text)
    assert [name for name, *_ in rows] == ["1.6b", "1.6b", "tiny"]
    for model, stages, batch, unit, units, accumulation in rows:
        for stage in re.findall(r"`(\w+)`", stages) or [*STAGES, "backward"]:
            config = composed([f"model={model}", f"stage={stage}"])
            found = config.optim.batch_tokens, config.data.unit_tokens
            assert found == (int(batch.replace(",", "")), int(unit.replace(",", ""))), (model, stage)
        n = found[0] // found[1]
        assert int(units) == n
        ranks = [str(n // size) if n % size == 0 else "-" for size in (1, 8, 64)]
        assert accumulation == " / ".join(ranks)


def test_parameter_counts_of_the_readme() -> None:
    import torch

    from plato2.config import ModelConfig
    from plato2.stages import FineGeneration

    rows = re.findall(r"^\| `(\S+)` \| (\d+) / (\d+) / (\d+)[^|]*\| ([\d,]+) \|", README, re.M)
    assert [row[0] for row in rows] == ["tiny", "small", "93m", "314m", "1.6b", "336m_zh"]
    for name, *geometry, count in rows:
        model = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
        model.pop("defaults", None)
        assert [str(model[key]) for key in ("n_layer", "n_head", "hidden_size")] == geometry, name
        with torch.device("meta"):
            stage = FineGeneration(ModelConfig(**model))
        assert f"{sum(p.numel() for p in stage.parameters()):,}" == count, name


def test_the_import_table_is_the_one_that_is_held() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Who may import whom")[1]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.*) \|$", text.split("\n## ")[0], re.M))
    packages = ["words", "files", "metrics", "model", "stages", "data", "prepare", "runs", "weights"]
    packages += ["runs.folder", "runs.saved"]
    for package in [*packages, "talk", "serve", "evaluate", "train.py", "hydra_plugins"]:
        outside = package in ("train.py", "hydra_plugins")
        key = package.removesuffix(".py") if outside else f"plato2.{package}"
        named = {f"plato2.{name}" for name in re.findall(r"`([\w.]+)`", rows[package].split(";")[0])}
        assert named == set(ALLOWED[key]), package


def test_the_architecture_is_drawn_from_the_import_table() -> None:
    assert FILE.read_text(encoding="utf-8") == picture(), "stale: python tests/architecture.py"
    assert ROOMS.keys() == X.keys()
    for one, other in combinations(X, 2):
        apart = abs(X[one] - X[other]) >= half(one) + half(other) + 8
        assert row(one) != row(other) or apart, f"{one} lies on {other}"
    for room, name in arrows():
        for other in X:
            if row(name) < row(other) < row(room):  # an arrow passes beside the boxes between its ends
                share = (row(room) - row(other)) / (row(room) - row(name))
                passes = X[room] + share * (X[name] - X[room])
                assert abs(passes - X[other]) > half(other) + 8, f"{room} -> {name} crosses {other}"


def test_every_section_of_the_spec_that_the_code_cites_is_there() -> None:
    spec = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    titles = tuple(re.findall(r"^## (.+)", spec, re.M))
    files = [
        p
        for top in ("plato2", "conf", "tests")
        for p in (ROOT / top).rglob("*")
        if p.suffix in (".py", ".yaml")
    ]
    cited = [
        section
        for file in files
        for section in re.findall(r"docs/spec\.md,\s+(?:# )?(\w[^,;:)]*)", file.read_text(encoding="utf-8"))
    ]
    assert len(cited) > 40
    for section in cited:
        assert section.startswith(titles), section


def test_the_picture_is_well_formed_and_stands_alone() -> None:
    text = (ROOT / "docs" / "curriculum.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    names = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert names[0] == "svg"
    assert {"title", "desc"} <= set(names)
    assert "viewBox" in root.attrib
    assert not {"script", "image", "foreignObject", "use"} & set(names)
    assert "prefers-color-scheme: dark" in text
    assert "href" not in text


def test_the_citation_and_the_package_have_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    import plato2

    assert citation["version"] == plato2.__version__
    assert len(citation["preferred-citation"]["authors"]) == 9


# ------------------------------------------------------------------------------------------ really executed


def test_own_data_as_the_readme_says(
    tmp_path: Path, train_here: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepare and train with the README's commands, on a small corpus and a small model."""
    own = [line for line in README_COMMANDS if "data/mine" in line and " -m stage" not in line]
    assert own == [
        "python -m plato2 prepare jsonl chats.jsonl --out data/mine",
        "python train.py data=shards data.path=data/mine",
    ]
    monkeypatch.chdir(tmp_path)
    write_dialogues(tmp_path / "chats.jsonl")
    small = ["--vocab-pieces", "300", "--max-context", "32", "--max-response", "32"]
    prepared = CliRunner().invoke(app, [*shlex.split(own[0])[3:], *small])
    assert prepared.exit_code == 0, prepared.output
    done = train_here(*shlex.split(own[1])[2:], "run_id=first")
    assert "1_coarse after 6 steps" in done.stdout
    run = tmp_path / "outputs" / "tiny-1_coarse" / "first"
    described = (ROOT / "docs" / "train.md").read_text(encoding="utf-8").split("## The run folder")[1]
    named = re.findall(r"^    ([\w.]+)/?  ", described.split("\n## ")[0], re.M)
    assert "sample_replies=0" in SMALL  # so replies.jsonl is not there
    assert {path.name for path in run.iterdir()} == set(named) - {"replies.jsonl", "lock"}  # nobody trains


def test_help_is_a_page(corpus: Path, tmp_path: Path) -> None:
    help_command = [*command(corpus, tmp_path)[:2], "--help"]
    done = subprocess.run(help_command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0
    for group in ["model", "stage", "data", "strategy", "logger", "recipe", "experiment", "sweep"]:
        assert re.search(rf"^ +{group} ", done.stdout, re.M), group


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_what_the_documents_make_is_not_under_version_control() -> None:
    made = ("models/24L", "outputs/tiny-1_coarse", "data/chitchat", "wandb/run", "conf/local/default.yaml")
    done = subprocess.run(["git", "check-ignore", *made], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == list(made)
