"""The DataModule inside a real Trainer: positions, resuming, and errors that name their cure."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from synthetic import write_corpus

from plato2.config import UserError
from plato2.data.collate import CoherenceBatch, GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.data.selection import read_selection
from plato2.data.shards import SplitIndex, read_index, write_index
from plato2.data.stream import Step

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"unit_tokens": 256, "row_length": 64, "window_samples": 50, "batch_tokens": 512}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 150, 40, shard_samples=20, prepare={"policy": "split", "max_context": 20})
    return str(folder)


def module(path: str, **options: Any) -> DialogueDataModule:
    batch = options.pop("batch", GenerationBatch())
    return DialogueDataModule(path, batch, **(OPTIONS | options))


class Stopped(Exception):
    """The run was killed."""


class Recorder(pl.LightningModule):
    """Trains one weight and notes which samples each step had."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fail_at, self.seen, self.validated = fail_at, [], []
        self.states: dict[int, dict[str, Any]] = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, step: Step, step_number: int) -> None:
        begun = self.trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        assert begun["step"] == self.trainer.global_step  # the step at hand does not count yet
        if self.trainer.global_step == self.fail_at:
            raise Stopped
        self.seen.append([unit["sample_ids"].tolist() for unit in step["units"]])
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward((self.weight - 1) ** 2)
        optimizer.step()  # type: ignore[union-attr]
        done = self.trainer.datamodule.state_dict()  # type: ignore[attr-defined]
        assert done["step"] == self.trainer.global_step
        assert [done[key] for key in ("epoch", "window", "unit")] == step["position"].tolist()

    def validation_step(self, batch: Step, batch_number: int) -> None:
        self.validated += batch["units"][0]["sample_ids"].tolist()


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=30,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )


@pytest.fixture(scope="module")
def whole(path: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The samples of every step of an uninterrupted run over more than one epoch."""
    recorder, data = Recorder(), module(path)
    trainer(tmp_path_factory.mktemp("whole"), enable_checkpointing=False).fit(recorder, data)
    assert data.state_dict()["epoch"] > 0
    assert len(recorder.seen) == 30
    return recorder.seen


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize("stop_at", [1, 13, 29])
def test_a_resumed_run_sees_the_rest(
    path: str, whole: list[Any], tmp_path: Path, n_workers: int, stop_at: int
) -> None:
    """Through Lightning's own checkpoints, the stop in the middle of a step, validation in between."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    first = Recorder(fail_at=stop_at)
    with pytest.raises(Stopped):
        trainer(tmp_path, callbacks=[saver], val_check_interval=7).fit(
            first, module(path, n_workers=n_workers)
        )
    assert first.seen == whole[:stop_at]
    second, data = Recorder(), module(path, n_workers=n_workers)
    checkpoint = tmp_path / f"step={stop_at}.ckpt"
    stored = torch.load(checkpoint, weights_only=True)["DialogueDataModule"]
    assert stored["step"] == stop_at
    trainer(tmp_path, enable_checkpointing=False, val_check_interval=7).fit(
        second, data, ckpt_path=checkpoint
    )
    assert second.seen == whole[stop_at:]
    if stop_at < 28:  # the last of the validations, one every 7 steps
        assert sorted(set(second.validated)) == list(range(40))
    assert data.state_dict()["step"] == 30


def test_training_never_opens_the_test_split(path: str, whole: list[Any], tmp_path: Path) -> None:
    """Its shards are not even there: training and validation are what they are without it."""
    shutil.copytree(path, tmp_path / "corpus")
    index = read_index(path)
    missing = replace(index.splits["train"].shards[0], file="test-00000.parquet")
    with_test = index.splits | {"test": SplitIndex((missing,))}
    write_index(tmp_path / "corpus", replace(index, splits=with_test))
    recorder, data = Recorder(), module(str(tmp_path / "corpus"))
    trainer(tmp_path, enable_checkpointing=False, val_check_interval=7).fit(recorder, data)
    assert recorder.seen == whole
    assert sorted(set(recorder.validated)) == list(range(40))
    assert data.identity | {"path": path} == module(path).identity
    with pytest.raises(UserError, match=r"test-00000\.parquet: shard is missing"):
        read_selection(data.path, 10, "test")


def test_position_without_a_trainer(path: str) -> None:
    """The way a benchmark uses it: every batch that was taken counts."""
    data = module(path)
    for taken, step in enumerate(data.train_dataloader(), 1):
        data.on_before_batch_transfer(step, 0)
        if taken == 5:
            break
    state = data.state_dict()
    assert state["step"] == 5
    again = module(path)
    again.load_state_dict(state)
    following = next(iter(again.train_dataloader()))
    expected = next(iter(data.train_dataloader()))["position"]
    assert torch.equal(following["position"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 12}, r"seed was 11, is 12"),
        ({"row_length": 128}, r"data\.row_length was 64, is 128"),
        ({"window_samples": 60}, r"data\.window_samples was 50, is 60"),
        ({"batch": CoherenceBatch()}, r"batch was .GenerationBatch.*is .CoherenceBatch"),
    ],
)
def test_a_position_of_another_order_is_refused(path: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message + r".*start a new run with init_from"):
        module(path, **change).load_state_dict(module(path).state_dict())


def test_a_position_of_other_data_is_refused(path: str, tmp_path: Path) -> None:
    write_corpus(tmp_path, 150, 40, shard_samples=20, seed=5)
    with pytest.raises(UserError, match=r"cannot resume in the middle of .*data was"):
        module(str(tmp_path)).load_state_dict(module(path).state_dict())


def test_another_batch_size_may_go_on(path: str) -> None:
    """Positions are counted in units, so batch_tokens and the number of workers or steps may change."""
    state = module(path).state_dict()
    other = module(path, batch_tokens=1024, n_workers=2)
    other.load_state_dict(state)
    assert other.state_dict() == state


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_tokens": 600},
            r"optim\.batch_tokens=600 .*data\.unit_tokens=256: use optim\.batch_tokens=512 or 768$",
        ),
        ({"batch_tokens": 100}, r"use optim\.batch_tokens=256$"),
        ({"n_workers": -1}, r"data\.n_workers=-1"),
        ({"valid_units": 0}, r"data\.valid_units=0"),
        ({"mode": "pack"}, r"data\.mode='pack'"),
    ],
)
def test_bad_options_are_named(path: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        module(path, **options)


def with_ranks(data: DialogueDataModule, world_size: int) -> DialogueDataModule:
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=0, global_step=0)  # type: ignore[assignment]
    return data


def test_steps_must_be_shared_equally(path: str) -> None:
    with_ranks(module(path, batch_tokens=1024), 2).setup("fit")
    with pytest.raises(UserError, match=r"3 ranks .* 4 units .*use optim\.batch_tokens=768 or 1536"):
        with_ranks(module(path, batch_tokens=1024), 3).setup("fit")
    with pytest.raises(UserError, match=r"2 ranks .* 1 unit of .*, or optim\.batch_tokens=512"):
        with_ranks(module(path, batch_tokens=256), 2).setup("fit")


def test_more_ranks_than_units_in_the_corpus(path: str) -> None:
    n_units = len({step["position"][2] for step in islice(module(path).train_dataloader(), 30)})
    assert n_units < 64
    with pytest.raises(
        UserError, match=r"fills \d+ unit\(s\) of data\.unit_tokens=256, fewer than the 64 ranks"
    ):
        with_ranks(module(path, batch_tokens=64 * 256), 64).setup("fit")


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path=.*none: no prepared corpus there; .*`plato2 prepare`"):
        module(str(tmp_path / "none")).setup("fit")
    (tmp_path / "part").mkdir()
    write_corpus(tmp_path / "part", 10, 0)
    with pytest.raises(UserError, match=r"split 'valid' is missing or empty"):
        module(str(tmp_path / "part")).setup("fit")
