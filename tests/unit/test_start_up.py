"""What a verb does not import: talking to a run needs neither Lightning nor a compiler."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import KNOVER, make_corpus, make_run, write_metrics
from small import ROOT

from plato2.stages import stage_class

HEAVY = {"pytorch_lightning", "lightning_fabric", "torch._dynamo", "torchmetrics", "wandb", "hydra"}


def imported(program: str, *arguments: object, is_server: bool = False) -> tuple[set[str], str]:
    """Which of HEAVY a program has imported at its end, and what it printed before.

    A server is ended when it has printed that it is ready.
    """
    told = f"{program}\nimport sys\nprint('IMPORTED', *({HEAVY} & sys.modules.keys()))"
    process = subprocess.Popen(
        [sys.executable, "-c", told, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ready = ""
    if is_server:
        assert process.stdout
        ready = process.stdout.readline()
        process.terminate()
    printed, errors = process.communicate("hi there .\n", timeout=300)
    assert process.returncode == 0, errors
    printed, _, names = printed.rpartition("IMPORTED")
    return set(names.split()), ready + printed


VERBS = f"""
import json, sys
from plato2.commands import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
    print(end="\\0", flush=True)
    assert not {HEAVY} & sys.modules.keys(), words
"""


@pytest.mark.slow
def test_what_loads_run_folders(tmp_path: Path) -> None:
    lines, out = tmp_path / "lines.tsv", tmp_path / "talks.jsonl"
    lines.write_text("hi there .\tyes .\n")
    data = make_corpus(tmp_path / "data", [([f"question {n} ?"], f"answer {n} .") for n in range(9)])
    given = {}
    for option, stage in (("coarse", "1_coarse"), ("generation", "2_gen"), ("evaluation", "2_eval")):
        given[option] = run = make_run(tmp_path / stage, stage)
        write_metrics(run, [(1, stage_class(stage).monitor[0], 0.5)])
    coarse, *both = (f"--{option}={run}" for option, run in given.items())
    verbs = {
        "reply --json hi": '"reply"',
        "chat --max-tokens 8": "\nbot ",
        f"score {lines}": '"coherence"',
        f"self-chat --starts {lines} --out {out} --utterances 2 --json": '"dialogues": 1',
        f"report {coarse} --data {data} --json --latent-contexts 1": '"contexts"',
    }
    names, printed = imported(VERBS, json.dumps([[*verb.split(), *both] for verb in verbs]))
    parts = printed.split("\0")
    for part, words in zip(parts[:-1], verbs.values(), strict=True):
        assert words in part
    assert json.loads(parts[-2])["contexts"]
    assert names == set()


@pytest.mark.slow
def test_a_server_loads_run_folders(tmp_path: Path) -> None:
    both = [("generation", "2_gen"), ("evaluation", "2_eval")]
    words = [f"--{option}={make_run(tmp_path / stage, stage)}" for option, stage in both]
    names, printed = imported(VERBS, json.dumps([["serve", "--port", "0", *words]]), is_server=True)
    assert "/v1 serves " in printed
    assert names == set()


@pytest.mark.parametrize("arguments", ["--help", "runs --help", "runs {tmp}"])
def test_a_full_disk_behind_stdout_is_one_line(tmp_path: Path, arguments: str) -> None:
    for name in ("1_coarse", "2_gen"):
        make_run(tmp_path / "tiny" / name, name)
    command = [sys.executable, "-m", "plato2", *arguments.format(tmp=tmp_path).split()]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (
        1,
        "error: stdout: No space left on device; free some space there\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "runs {run}",
        pytest.param("tokenizer show {tokenizer} hi", marks=pytest.mark.slow),
        pytest.param("score {run}/pairs.tsv --generation {run}", marks=pytest.mark.slow),
        pytest.param("serve {run}/no", marks=pytest.mark.slow),
    ],
)
def test_closed_streams_are_no_traceback(tmp_path: Path, arguments: str) -> None:
    run = make_run(tmp_path / "run", "2_gen")
    (run / "pairs.tsv").write_text("hi\tyes\n")
    command = f"{sys.executable} -m plato2 {arguments.format(run=run, tokenizer=KNOVER)} <&- >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    is_mistake = arguments.startswith("serve")
    assert (done.returncode, done.stderr.count("\n")) == (2 * is_mistake, is_mistake), done.stderr
    silent = subprocess.run(["sh", "-c", f"{command} 2>&-"], cwd=ROOT, timeout=300)
    assert silent.returncode == done.returncode


@pytest.mark.parametrize(
    "module", ["plato2.runs.folder", "plato2.runs.saved", "plato2.runs.start", "plato2.prepare.reddit.local"]
)
def test_what_reads_runs_or_prepares_does_without_lightning_and_torch(module: str) -> None:
    program = f"import {module}, sys\nassert 'torch' not in sys.modules"
    assert imported(program)[0] == set()


@pytest.mark.parametrize(
    ("command", "module", "number", "codes"),
    [
        (["-m", "plato2", "chat", "--generation", "x"], "typer.colors", signal.SIGINT, {-2, 130}),
        (["-m", "plato2", "chat", "--generation", "x"], "torch.version", signal.SIGINT, {130}),
        (["train.py", "experiment=smoke"], "omegaconf.errors", signal.SIGINT, {-2, 130}),
        (["train.py", "experiment=smoke"], "torch._subclasses.fake_tensor", signal.SIGTERM, {143}),
    ],
)
def test_a_signal_while_modules_are_imported_is_quiet(
    command: list[str], module: str, number: int, codes: set[int], tmp_path: Path
) -> None:
    """Sent when that module has been imported, which `-X importtime` tells."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    place = [str(ROOT / word) if word == "train.py" else word for word in command]
    process = subprocess.Popen(
        [sys.executable, "-u", "-X", "importtime", *place],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if line.rpartition("|")[2].strip() == module:
            break
    process.send_signal(number)
    printed, errors = process.communicate(timeout=100)
    told = [line for line in errors.splitlines() if not line.startswith("import time:")]
    assert printed == ""
    assert [line for line in told if not line.startswith("stopped: nothing was being trained")] == []
    assert process.returncode in codes
