"""Sharded checkpoints as files: what is written while training goes on, and what is refused."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from plato2.config import UserError
from plato2.runs import distributed
from plato2.runs.folder import RunFolder
from plato2.runs.saved import checkpoint_step, read_checkpoint
from plato2.runs.start import named_start

Group = torch.distributed.ProcessGroup


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.new_group(backend="gloo")
    torch.distributed.destroy_process_group()


@pytest.fixture
def folder(group: Group, tmp_path: Path) -> Path:
    """A checkpoint of two weights."""
    weights = {"backbone.a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    state = {name: {"exp_avg": weight / 2, "step": torch.tensor(3.0)} for name, weight in weights.items()}
    groups = [{"lr": 0.1, "params": ["b"]}, {"lr": 0.1, "params": ["backbone.a"]}]
    rest = {"global_step": 3, "optimizer_groups": groups}
    path = tmp_path / "last.ckpt"
    distributed.write(distributed.named(weights, state), rest, path, group).result()
    return path


def test_training_goes_on_while_it_is_written(group: Group, tmp_path: Path) -> None:
    """Also on CPUs, where a weight and its copy could be the same memory."""
    weight = torch.zeros(3_000_000)
    writing = distributed.write({"state_dict.a": weight}, {}, tmp_path / "c", group)
    for _ in range(50):
        weight += 1
    writing.result()
    assert torch.equal(distributed.read_tensors(tmp_path / "c", "state_dict.")["a"], torch.zeros(3_000_000))


def test_one_file_of_it_is_what_an_unsharded_run_has(folder: Path) -> None:
    found = distributed.read_whole(folder)
    (optimizer,) = found["optimizer_states"]
    assert torch.equal(found["state_dict"]["backbone.a"], torch.arange(6.0).view(2, 3))
    assert [group["params"] for group in optimizer["param_groups"]] == [[0], [1]]
    assert torch.equal(optimizer["state"][0]["exp_avg"], torch.ones(4) / 2)
    assert distributed.with_names(optimizer, [{"params": ["b"]}, {"params": ["backbone.a"]}])[
        "state"
    ].keys() == {
        "b",
        "backbone.a",
    }


@pytest.mark.parametrize("lost", [".metadata", "meta.pt"])
def test_a_half_written_one(folder: Path, lost: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(UserError, match=f"not written to its end .no {lost}.; choose another one"):
        checkpoint_step(folder)
    with pytest.raises(UserError, match=r"not written to its end|neither a run folder"):
        read_checkpoint(named_start(str(folder), "2_gen", ("1_coarse",)))


def test_a_share_is_lost_or_cut(folder: Path) -> None:
    share = folder / "__0_0.distcp"
    content = share.read_bytes()
    for changed in (content[: len(content) // 2], content[:-1], None):
        share.unlink() if changed is None else share.write_bytes(changed)
        with pytest.raises(UserError, match=r"whose __0_0.distcp is lost or cut; choose another one"):
            distributed.read_whole(folder)


@pytest.mark.parametrize("told", [None, 5, {"a": 5}, "../other", "/other"])
def test_where_shares_are_is_told_otherwise(folder: Path, told: Any) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    if isinstance(told, str):
        for tensor in found.storage_data.values():
            tensor.relative_path = told
    else:
        found.storage_data = told
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match=r"not a readable checkpoint \(.*choose another one"):
        checkpoint_step(folder)


def test_tensors_that_are_larger_than_the_files_are_not_made(folder: Path) -> None:
    found = pickle.loads((folder / ".metadata").read_bytes())
    found.state_dict_metadata["state_dict.b"].size = torch.Size([10**12])
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match="larger than its files"):
        distributed.read_whole(folder)


def test_training_goes_on_from_the_one_before_where_a_share_is_cut_and_its_hash_is_gone(
    folder: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    shutil.copytree(folder, run.checkpoints / "best.ckpt")
    folder.rename(run.last)
    assert run.newest_whole() == (run.last, "")
    share = run.last / "__0_0.distcp"
    share.write_bytes(share.read_bytes()[:-1])
    found, said = run.newest_whole()
    assert found == run.checkpoints / "best.ckpt"
    assert "__0_0.distcp is lost or cut" in said
    assert "resuming from step 3 with best.ckpt" in said


class _Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harm",)


def test_nothing_in_it_is_executed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UserError, match="mkdir does not describe a tensor"):
        distributed.read_whole(folder)
    (folder / ".metadata").write_bytes(whole)
    dcp.save({"state_dict.a": {"x": _Bomb()}}, storage_writer=dcp.FileSystemWriter(tmp_path / "other"))
    shutil.copy(folder / "meta.pt", tmp_path / "other")
    with pytest.raises(UserError, match="BytesStorageMetadata does not describe a tensor"):
        distributed.read_whole(tmp_path / "other")
    assert not (tmp_path / "harm").exists()


def test_it_cannot_be_written(group: Group, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writing = distributed.write({"state_dict.a": torch.ones(2)}, {}, tmp_path / "file" / "c", group)
    with pytest.raises(CheckpointException, match="Not a directory"):
        writing.result()
