"""A kill at any write or rename of a run: the same command then ends as a run that was never killed.

Weights, optimizer, position in the data, best checkpoint, metrics, replies and record are compared.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from small import ROOT, command

from plato2.files import check_sha256
from plato2.runs.checkpoint import put_in_place
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics

STEPS = [
    "trainer.max_steps=3",
    "trainer.val_check_interval=2",
    "checkpoint_steps=1",
    "sample_replies=1",
    "selection=0",
    "run_id=k",
]
"""Saves: step 1 alone, step 2 with the first best, step 3 with another best and the end."""


def outcome(run: RunFolder) -> dict[str, Any]:
    """All that must be the same, as plain values and tensors."""
    lineage = run.lineage()
    checkpoints = {}
    for path in (run.last, run.best):
        assert path.name in ("last.ckpt", "best.ckpt")
        check_sha256(path, "")
        found = torch.load(path, weights_only=True)
        parts = ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "DialogueDataModule")
        checkpoints[path.name] = {part: found[part] for part in parts}
        checkpoints[path.name]["best_value"] = found["callbacks"]["Checkpoints"]["best_value"]
    replies = run.path / "replies.jsonl"
    return {
        "metrics": [row for row in read_metrics(run.path / "metrics.csv") if not row[1].startswith("perf/")],
        "replies": replies.read_text() if replies.exists() else None,
        "checkpoints": checkpoints,
        "status": (lineage["status"], lineage["step"]),
        "closing": {k: v for k, v in lineage["metrics"].items() if not k.startswith("perf/") and k != "step"},
        "files": sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.suffix != ".tmp"),
    }


def assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}: {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (value, its) in enumerate(zip(one, other, strict=True)):
            assert_same(value, its, f"{where}[{number}]")
    else:
        assert one == other, where


def killed_everywhere(
    forks: Forks, corpus: Path, folder: Path, overrides: list[str], cut: bool, after: str, every: int = 1
) -> int:
    """Kills at each change after the first one to a file; returns at how many."""
    stage = overrides[0].removeprefix("stage=")
    arguments = command(corpus, folder / "outputs", *STEPS, *overrides)[2:]
    run = RunFolder(folder / "outputs" / f"tiny-{stage}" / "k")

    def start(kill_at: int = 0) -> tuple[int, list[list[str]], str]:
        at = {"folder": folder, "kill_at": kill_at, "cut": cut}
        return forks.run(ROOT / "train.py", *arguments, **at)

    code, changes, output = start()
    assert code == 0, output
    whole = outcome(run)
    paths = [path for _, path in changes]
    first = next(number for number, path in enumerate(paths, 1) if path.endswith(after))
    points = [n for n in range(first, len(paths) + 1) if not cut or changes[n - 1][0] == "open"][::every]
    for point in points:
        shutil.rmtree(folder / "outputs")
        where = f"killed at change {point}: {changes[point - 1]}"
        code, _, output = start(point)
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ, *([0] if cut else [])), f"{where}: {output}"
        if code:
            refused = 2 if run.finished else 0  # nothing is left to train
            code, _, output = start()
            assert code == refused, f"{where}: {output}"
        assert_same(whole, outcome(run), where)
    return len(points)


STAGES = [
    ["stage=1_coarse"],
    ["stage=2_gen", "init_from=scratch"],
    ["stage=2_eval", "init_from=scratch"],
    ["stage=2_eval_dual", "init_from=scratch"],
    ["stage=backward", "init_from=scratch", "data.n_workers=1"],
    ["stage=plato"],
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", STAGES, ids=lambda overrides: overrides[0])
def test_a_kill_before_any_change(forks: Forks, corpus: Path, tmp_path: Path, overrides: list[str]) -> None:
    every = 1 if overrides == STAGES[0] else 4  # what the others write differs little
    at_least = 31 if every == 1 else 7
    assert killed_everywhere(forks, corpus, tmp_path, overrides, False, "last.ckpt", every) >= at_least


@pytest.mark.slow
def test_a_kill_in_the_middle_of_any_write(forks: Forks, corpus: Path, tmp_path: Path) -> None:
    assert killed_everywhere(forks, corpus, tmp_path, STAGES[0], cut=True, after="lock") > 20


def test_a_kill_before_some_changes(forks: Forks, corpus: Path, tmp_path: Path) -> None:
    """Two or three of the points, for the short run of the tests; with logs of every second step."""
    overrides = [*STAGES[1], "trainer.log_every_n_steps=2"]
    killed = killed_everywhere(forks, corpus, tmp_path, overrides, cut=False, after="last.ckpt", every=25)
    assert killed >= 2


def test_a_sharded_checkpoint_is_whole_at_any_moment(forks: Forks, tmp_path: Path) -> None:
    """Folders cannot take each other's place in one step: `.old` has it in between."""
    script = tmp_path / "save.py"
    script.write_text(
        "import sys, torch\n"
        "import torch.distributed.checkpoint as dcp\n"
        "from pathlib import Path\n"
        "from plato2.runs.checkpoint import put_in_place\n"
        "from plato2.files import file_sha256\n"
        "folder, step = Path('run/checkpoints'), int(sys.argv[1])\n"
        "new = folder / 'new.ckpt'\n"
        "dcp.save({'a': torch.full((3,), step)}, checkpoint_id=new, no_dist=True)\n"
        "torch.save({'global_step': step}, new / 'meta.pt')\n"
        "put_in_place(new, folder / 'last.ckpt', file_sha256(new))\n"
    )
    run = RunFolder(tmp_path / "run")

    def save(step: int, kill_at: int = 0) -> tuple[int, list[list[str]], str]:
        return forks.run(script, str(step), folder=tmp_path, kill_at=kill_at)

    def newest() -> int:
        path, _ = run.newest_whole()
        assert path is not None
        return int(torch.load(path / "meta.pt", weights_only=True)["global_step"])

    save(1)
    _, changes, output = save(2)
    assert newest() == 2, output
    for point in range(1, len(changes) + 1):
        shutil.rmtree(run.path)
        save(1)
        assert save(2, kill_at=point)[0] == -signal.SIGKILL
        assert newest() in (1, 2), changes[point - 1]
        assert save(3)[0] == 0
        assert newest() == 3
        assert not run.last.with_suffix(".old").exists()


@pytest.mark.parametrize("inside", ["", "/meta.pt"], ids=["file", "folder"])
def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    """What a power cut may undo: whatever was not synced."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def replaced(old: Path, new: Path) -> None:
        replace(old, new)
        done.append(f"{old.name} -> {new.name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    for _ in range(2):
        new = Path(f"{tmp_path}/new.ckpt{inside}")
        new.parent.mkdir(exist_ok=True)
        new.write_bytes(b"weights")
        done.clear()
        put_in_place(tmp_path / "new.ckpt", tmp_path / "last.ckpt", "0" * 64)
        here, hashed = done.index("new.ckpt -> last.ckpt"), done.index("last.ckpt.sha256.tmp")
        assert set(done[:hashed]) == {f"new.ckpt{inside}", "new.ckpt"}
        assert done[here + 1] == done[-1] == "."  # the new names, too


def test_what_is_compared_tells_runs_apart() -> None:
    one = {"a": [torch.zeros(2), (1, "x")]}
    assert_same(one, {"a": [torch.zeros(2), (1, "x")]}, "")
    for other in ({"a": [torch.ones(2), (1, "x")]}, {"a": [torch.zeros(2), (2, "x")]}, {"b": []}):
        with pytest.raises(AssertionError):
            assert_same(one, other, "")
