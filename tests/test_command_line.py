"""`python train.py`: what --help and --cfg print, and typos and wrong values in keys, groups and files."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small import ROOT, Train, assert_one_line, train_in_process

from plato2.commands.train_overrides import flags_first
from plato2.config import ModelConfig, OptimConfig, RunConfig
from plato2.prepare.options import PrepareOptions
from plato2.runs.keys import help_text, known_keys

CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def test_help_names_groups_and_is_quick() -> None:
    program = (
        "import runpy, sys\nsys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit: pass\n"
        "print('IMPORTED', sorted({'torch', 'pytorch_lightning', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "IMPORTED []" in done.stdout, done.stdout + done.stderr
    for group in ("model", "stage", "data", "strategy", "logger", "experiment", "recipe", "sweep"):
        assert f"{group}: {', '.join(options(group))}\n" in done.stdout
    for word in ("init_from", "resume", "run_id", "plan", "optim.lr", "data.prepare.clean.urls"):
        assert re.search(rf"^ +{word}  ", done.stdout, re.M), word


def test_help_explains_every_key_with_a_line() -> None:
    """Every key that the configuration has, and every one has its line."""
    lines = known_keys(CONF)
    for group in ("model", "stage", "data", "strategy", "logger", "optim", "trainer"):
        for file in (CONF / group).glob("*.yaml"):
            node = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            missing = {f"{group}.{key}" for key in leaves(node)} - lines.keys()
            assert not {key for key in missing if not key.startswith("data.prepare.")}, file
    schemas = (RunConfig, "", ModelConfig, "model.", OptimConfig, "optim.", PrepareOptions, "data.prepare.")
    for schema, prefix in zip(schemas[::2], schemas[1::2], strict=True):
        names = {f"{prefix}{field.name}" for field in dataclasses.fields(schema)}
        assert names - lines.keys() <= {"data.prepare.out"}
    assert not [key for key, line in lines.items() if not line]
    assert lines["data.prepare.clean.min_letters"].endswith("among the characters that are not blank")
    shown = help_text(CONF, 80)
    assert all(f"  {key}" in shown for key in lines)
    assert max(map(len, shown.splitlines())) <= 80


def test_help_names_all_options_and_nothing_of_the_code() -> None:
    template = (CONF / "train.yaml").read_text(encoding="utf-8")
    assert all(re.search(rf"[ ,:]{name}\b", template) for name in options("experiment") + options("stage"))
    shown = help_text(CONF, 100)
    assert re.search(r"strategy.precision +bf16-mixed where", shown)  # a value as it is typed
    assert ".py" not in shown
    assert "(docs/spec.md, Optimizer)" in " ".join(shown.split())
    assert "spec section" not in " ".join(shown.split())
    assert "order.B" not in shown


def test_flags_may_stand_after_overrides() -> None:
    words = ["experiment=smoke", "-m", "optim.lr=1e-3,1e-2", "--config-dir=x"]
    assert flags_first(words) == ["-m", "--config-dir=x", "experiment=smoke", "optim.lr=1e-3,1e-2"]
    assert flags_first(["a=1", "--cfg", "job", "b=2"]) == ["--cfg", "job", "a=1", "b=2"]
    assert flags_first(["a=1", "--info", "defaults", "b=2"]) == ["--info", "defaults", "a=1", "b=2"]
    assert flags_first(["a=1", "--info", "b=2"]) == ["--info", "a=1", "b=2"]


def test_flags_that_exclude_each_other(train_here: Train) -> None:
    assert_one_line(
        train_here("-m", "--cfg=job", expect=2).stderr, "Only one of --run", "leave out the others"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(train_here: Train) -> None:
    assert_one_line(train_here("strategy=gpu", expect=2).stderr, "give strategy=cpu, or strategy=auto")


def leaves(node: dict[str, Any]) -> set[str]:
    found = set()
    for key, value in node.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}" for inner in leaves(value)}
        elif key not in ("_target_", "defaults"):
            found.add(key)
    return found


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr=3", "lr: no such key; did you mean optim.lr?"),
        ("optim.learning_rate=3", "optim.learning_rate: no such key; optim has lr, "),
        ("modle=tiny", "modle: no such key; did you mean model?"),
        ("data.n_worker=3", "data.n_worker: no such key; did you mean data.n_workers?"),
        ("model=tinny", "model=tinny: no such option; did you mean tiny?"),
        ("stage.batch.rolez=true", "did you mean stage.batch.roles?"),
        ("strategy.num_nodes=2", "no such key; only strategy=ddp_64 or fsdp_64 or hsdp_64 has it"),
        (
            "stage.head=third",
            "only stage=2_eval or 2_eval_dual or 2_eval_pmi has it",
        ),
        ("data.prepare.lower_case=true", "data.prepare.lower_case: no such key; write +data.prepare."),
        ("stage=3", "error: stage=3: no such option; there are 1_coarse, 2_eval, 2_eval_dual, 2_eval_pmi, "),
        ("tags=abc", "tags: takes a list; write tags=["),
        ("optim.betas=0.9", "optim.betas: takes a list; write optim.betas=["),
        (
            "optim.lr=1e-3,2e-3",
            "error: optim.lr=1e-3,2e-3: several values are a sweep, which needs -m; a list is",
        ),
        ("2_gen", "error: 2_gen: what is trained is said as KEY=VALUE; did you mean stage=2_gen?"),
        ("--mutlirun", "--mutlirun: no such flag; did you mean --multirun?"),
        ("--stage=2_gen", "--stage=2_gen: no such flag; did you mean stage=2_gen?"),
        ("--n-layer=2", "did you mean model.n_layer=2?"),
    ],
)
def test_what_was_meant(train_here: Train, word: str, meant: str) -> None:
    assert_one_line(train_here(word, expect=2).stderr, meant)


def test_a_key_without_default_is_asked_for(tmp_path: Path) -> None:
    done = train_in_process(["data=shards"], tmp_path, ROOT / "train.py")
    assert done.returncode == 2
    assert_one_line(done.stderr, "data.path: has no default; give it as data.path=VALUE")


def test_cfg_job_prints_what_will_be_used(train_here: Train) -> None:
    printed = yaml.safe_load(train_here("--cfg=job", "model=tiny", "stage=2_gen").stdout)
    assert printed["stage"]["tau"] == 0.67
    assert printed["optim"]["lr"] == 5e-4


TYPOS_ON_THE_COMMAND_LINE = {
    "seeed=3": "seeed",
    "+seeed=3": "seeed",
    "model.n_layr=3": "n_layr",
    "+model.n_layr=3": "n_layr",
    "optim.lrr=1": "lrr",
    "+optim.lrr=1": "lrr",
    "stage.taux=1": "taux",
    "+stage.taux=1": "taux",
    "stage.batch.rolez=true": "rolez",
    "+stage.batch.rolez=true": "rolez",
    "data.row_lenght=64": "row_lenght",
    "+data.row_lenght=64": "row_lenght",
    "+data.prepare={corpus: jsonl, max_dialoges: 3}": "max_dialoges",
    "trainer.max_stepz=3": "max_stepz",
    "+trainer.max_stepz=3": "max_stepz",
    "strategy.precison=32": "precison",
    "+strategy.precison=32": "precison",
    "logger.csv.foldr=x": "foldr",
    "+logger.csv.foldr=x": "foldr",
    "model=tinny": "tinny",
    "stage=3": "stage=3",
    "stage=3_gen": "3_gen",
    "recipe=tinny": "tinny",
    "experiment=smoky": "smoky",
    "strategy=dpp": "dpp",
    "stage._target_=plato2.stages.Coarse": "plato2.stages.Coarse",
}


def mostly_slow(cases: Iterable[str], quick: Iterable[str]) -> list[Any]:
    """Parameters of which only some run by default: each composes a whole configuration."""
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]


QUICK_TYPOS = [
    *("seeed=3", "+model.n_layr=3", "stage.taux=1", "+stage.batch.rolez=true", "+data.row_lenght=64"),
    *("+trainer.max_stepz=3", "+strategy.precison=32", "+logger.csv.foldr=x", "model=tinny", "stage=3"),
    *(
        "recipe=tinny",
        "stage._target_=plato2.stages.Coarse",
        "+data.prepare={corpus: jsonl, max_dialoges: 3}",
    ),
]


@pytest.mark.parametrize("override", mostly_slow(TYPOS_ON_THE_COMMAND_LINE, QUICK_TYPOS))
def test_typos_on_the_command_line(train_here: Train, override: str) -> None:
    assert_one_line(train_here(override, expect=2).stderr, TYPOS_ON_THE_COMMAND_LINE[override])


WRONG_VALUES = {
    "model.n_layer=two": "error: model.n_layer=two: must be a whole number",
    "optim.lr=xx2": "error: optim.lr=xx2: must be a number",
    "optim.lr=null": "error: optim.lr=null: must have a value",
    "model.checkpoint_activations=maybe": "error: model.checkpoint_activations=maybe: must be true or false",
    "optim.betas=[0.9]": "optim.betas=[0.9]",
    "optim.betas=[0.9,2]": "optim.betas=[0.9, 2.0]",
    "seed=-1": "seed=-1",
    "data.unit_tokens=big": "data.unit_tokens=big: must be a whole number",
    "data.n_workers=true": "data.n_workers=True: must be a whole number",
    "data.mode=pakced": "data.mode=pakced: must be packed or buckets or padded",
    "data.path=???": "data.path",
    "data.path=": "error: data.path=: is empty; give the folder of a corpus",
    "output_dir=": "error: output_dir=: is empty; give a value",
    "init_from=": "error: init_from=: is empty; give a value",
    "trainer.max_steps=many": "trainer.max_steps=many: must be",
    "trainer.max_steps=0": "trainer.max_steps=0: must be",
    "trainer.val_check_interval=0.5": "trainer.val_check_interval=0.5: must be",
    "trainer.log_every_n_steps=0": "trainer.log_every_n_steps=0: must be",
    "strategy.precision=bf15": "strategy.precision=bf15: must be",
    "strategy.accelerator=tpux": "tpux",
    "strategy.devices=0": "devices=0",
    "+trainer.accumulate_grad_batches=2": "use optim.batch_tokens",
    "+trainer.limit_train_batches=9": "limit_train_batches=9: the stages do this themselves; use trainer.",
    "+trainer.gradient_clip_val=1": "trainer.gradient_clip_val=1: the stages do this themselves; use optim.",
    "optim.eps=-1": "optim.eps=-1.0: must be a number above 0",
    "optim.lr=inf": "optim.lr=inf: must be a number above 0",
    "optim.weight_decay=nan": "optim.weight_decay=nan: must be 0 (off) or more",
    "stage.batch.roles=true": "add model.n_role=4",
    "model.n_role=4": "add stage.batch.roles=true",
    "strategy.accelerator=tpu": "strategy.accelerator=tpu: must be auto or cpu or gpu",
    "strategy.devices=-1": "strategy.devices=-1: must be a number of devices from 1 on",
    "strategy.devices=abc": "strategy.devices=abc: must be a number of devices from 1 on",
    "run_id=a/b": "run_id=a/b",
    f"run_id={'z' * 300}": "run_id=zzzzzzzzzzzzzzzzzzzz...: 300 bytes long",
    "resume=nowhere": "resume=nowhere",
}


@pytest.mark.parametrize("override", WRONG_VALUES)
def test_wrong_values(train_here: Train, tmp_path: Path, override: str) -> None:
    assert_one_line(train_here(override, expect=2).stderr, WRONG_VALUES[override])
    assert not list(tmp_path.glob("outputs/*/*"))  # refused before a run began


STAGE_2_VALUES = {
    "stage.tau=0": "stage.tau=0: must be positive",
    "stage.tau=cold": "stage.tau=cold: must be a number",
    "stage.bow_head=tide": "stage.bow_head=tide: must be tied or linear",
    "stage.validation_noise=some": "stage.validation_noise=some: must be fixed or none",
}


@pytest.mark.parametrize("override", STAGE_2_VALUES)
def test_wrong_values_of_stage_2(train_here: Train, override: str) -> None:
    done = train_here("stage=2_gen", "init_from=scratch", override, expect=2)
    assert_one_line(done.stderr, STAGE_2_VALUES[override])


TYPOS_IN_FILES = {
    "train.yaml": ("name: ", "seeed: 3\nname: ", "seeed: no such key; did you mean seed?"),
    "model/tiny.yaml": ("n_layer:", "n_layr:", "model.n_layr: no such key; did you mean model.n_layer?"),
    "optim/adamw.yaml": ("clip_norm:", "clip_nrom:", "did you mean optim.clip_norm?"),
    "stage/1_coarse.yaml": ("batch:", "taux: 1\nbatch:", "stage.taux: CoarseGeneration has no such option"),
    "stage/1_coarse.yaml ": (
        "roles:",
        "rolez:",
        "stage.batch.rolez: GenerationBatch has no such option; did",
    ),
    # SMALL sets the right name: unknown then
    "data/shards.yaml": ("row_length:", "row_lenght:", "data.row_length: no such key"),
    "data/shards.yaml ": ("n_workers:", "n_worker:", "did you mean n_workers?"),
    "trainer/default.yaml": ("log_every_n_steps:", "log_every_n_stepz:", "did you mean log_every_n_steps?"),
    "strategy/cpu.yaml": (
        "devices:",
        "devicez:",
        "strategy.devicez: Trainer has no such option; did you mean",
    ),
    "logger/csv.yaml": (
        "csv:\n",
        "csv:\n  foldr: x\n",
        "logger.csv.foldr: MetricsCsv has no such option; did",
    ),
    "recipe/tiny-1_coarse.yaml": ("warmup_steps:", "warmup_step:", "did you mean optim.warmup_steps?"),
    "experiment/smoke.yaml": ("checkpoint_steps:", "checkpoint_step:", "did you mean checkpoint_steps?"),
    "experiment/smoke.yaml ": ("n_layer:", "n_layr:", "did you mean model.n_layer?"),
}


QUICK_FILES = ["train.yaml", "model/tiny.yaml", "stage/1_coarse.yaml ", "recipe/tiny-1_coarse.yaml"]


@pytest.mark.parametrize("file", mostly_slow(TYPOS_IN_FILES, QUICK_FILES))
def test_typos_in_files(train_here: Train, tmp_path: Path, file: str) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    shutil.copytree(CONF, tmp_path / "conf")
    right, wrong, told = TYPOS_IN_FILES[file]
    path = tmp_path / "conf" / file.strip()
    text = path.read_text(encoding="utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    assert_one_line(train_here(expect=2, script=tmp_path / "train.py").stderr, told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"# @package _global_\nmodel: {n_layer: 2\nseed: 3\n", "own.yaml:3: not valid YAML ("),
        (b"# @package _global_\nseed:\t3\n", "own.yaml:2: not valid YAML ("),
        (
            "# @package _global_\ntags: [caf\u00e9]\n".encode("latin-1"),
            "own.yaml: byte 31 is not UTF-8; save",
        ),
    ],
)
def test_a_file_that_is_not_yaml_is_one_line(
    train_here: Train, tmp_path: Path, text: bytes, told: str
) -> None:
    own = tmp_path / "mine" / "experiment" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_bytes(text)
    done = train_here(f"--config-dir={tmp_path / 'mine'}", "experiment=own", "--cfg=job", expect=2)
    assert_one_line(done.stderr, told)


def test_own_paths_in_conf_local_lose_against_experiments_only(
    train_here: Train, tmp_path: Path, corpus: Path
) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "local").mkdir(exist_ok=True)
    own = "# @package _global_\ncheckpoint_steps: 7\ntags: [mine]\noptim: {lr: 0.25}\n"
    (tmp_path / "conf" / "local" / "default.yaml").write_text(own)
    printed = yaml.safe_load(train_here("--cfg=job", script=tmp_path / "train.py").stdout)
    assert printed["tags"] == ["mine"]
    assert printed["optim"]["lr"] == 0.25  # beats the recipe
    assert printed["checkpoint_steps"] == 2  # experiment=smoke


@pytest.mark.parametrize("value", ["12e4567", "1e3", "0x10", "1_000", "007", "1:30", "yes"])
def test_a_name_in_a_file_that_yaml_reads_as_a_number(train_here: Train, tmp_path: Path, value: str) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    shutil.copytree(CONF, tmp_path / "conf")
    own = tmp_path / "conf" / "experiment" / "own.yaml"

    def refused(node: str, *flags: str) -> str:
        own.write_text(f"# @package _global_\ndefaults: [smoke]\n{node}\n")
        given = [*flags, "experiment=own", "plan=true"]
        return train_here(*given, expect=2, script=tmp_path / "train.py").stderr

    assert_one_line(refused(f"run_id: {value}"), f"{own}: run_id", "is a text", "in quotes")
    if value == "1e3":
        assert_one_line(refused("tags: [a, 1e3]"), f"{own}: tags", "is a text", "in quotes")
        assert_one_line(refused("data: {path: 1e3}"), f"{own}: data", "is a text", "in quotes")
        assert_one_line(refused("run_id: 1e3", "-m"), f"{own}: run_id")
    own.write_text(f"# @package _global_\nrun_id: '{value}'\ntags: [2026-11-28]\n")
    printed = train_here("experiment=own", "--cfg=job", script=tmp_path / "train.py").stdout
    assert yaml.safe_load(printed)["run_id"] == value


@pytest.mark.parametrize(
    ("node", "meant"),
    [
        ("optim: {lr:3}", "optim.lr: 3"),
        ("data: {n_workers:3}", "n_workers: 3"),
        ("data: {path: NOWHERE, prepare: {corpus:jsonl}}", "corpus: jsonl"),
    ],
)
def test_a_mapping_in_a_file_without_a_blank(
    train_here: Train, tmp_path: Path, node: str, meant: str
) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    shutil.copytree(CONF, tmp_path / "conf")
    node = node.replace("NOWHERE", str(tmp_path / "no"))
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(f"# @package _global_\n{node}\n")
    done = train_here("experiment=own", "data=shards", expect=2, script=tmp_path / "train.py")
    assert_one_line(done.stderr, f"a space is missing after the colon: {meant}")
