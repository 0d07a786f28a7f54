"""What a run says of its length: tokens and epochs at the start, the time after its first steps, warnings."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small import Train, stopped_at

from plato2.data.collate import BackwardBatch, CoherenceBatch, GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.data.shards import read_index
from plato2.runs import length
from plato2.runs.length import RunLength, TimeLeft, duration, in_words, rounded

START = re.compile(
    r"(\d+) steps x ([\d,]+) tokens = (.*) tokens: (.*) epochs? of (\S+) \((.*) tokens each\)$", re.M
)
TIME = re.compile(r"^about (.+) at ([\d,.]+) tokens/s, validations not counted$", re.M)
QUICK = ["trainer.max_steps=26", "trainer.val_check_interval=10", "checkpoint_steps=100"]
SMALL_CORPUS = 3000  # steps of 1,024 tokens that are absurdly many epochs of it


def module(corpus: Path, batch: Any, **options: Any) -> DialogueDataModule:
    given = {"row_length": 128, "unit_tokens": 512, "batch_tokens": 1024, **options}
    return DialogueDataModule(str(corpus), batch, **given)


# ------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize("mode", ["packed", "buckets", "padded"])
@pytest.mark.parametrize(
    "batch", [GenerationBatch(), GenerationBatch(latent_slot=True), BackwardBatch(), CoherenceBatch()]
)
def test_an_epoch_is_as_long_as_the_stream_makes_it(corpus: Path, batch: Any, mode: Any) -> None:
    for window_samples, share in ((65536, 0.0), (128, 0.2)):  # of the first window it is exact
        data = module(corpus, batch, mode=mode, window_samples=window_samples)
        units = 0
        for _, _, after in data.train_dataloader().dataset._units():  # type: ignore[attr-defined]
            units += 1
            if after.epoch == 1:
                break
        assert data.epoch_tokens == pytest.approx(units * 512, rel=share)


def test_padding_and_second_readings_count(corpus: Path) -> None:
    ids = read_index(corpus).splits["train"].tokens
    packed = module(corpus, GenerationBatch()).epoch_tokens
    assert packed == pytest.approx(ids, rel=0.05)
    assert module(corpus, GenerationBatch(), mode="padded").epoch_tokens > 1.3 * packed
    assert module(corpus, CoherenceBatch()).epoch_tokens == pytest.approx(2 * ids, rel=0.1)


def test_the_sentence() -> None:
    run = RunLength("data/chitchat", 1000, 0, 4096, 16_700_000)
    told = "1,000 steps x 4,096 tokens = 4.1 million tokens: about 0.25 epochs of data/chitchat "
    assert run.sentence() == told + "(16.7 million tokens each)"
    assert run.warning() == ""
    resumed = RunLength("data/chitchat", 1000, 900, 4096, 409_600)
    assert resumed.sentence().startswith("900 of 1,000 steps are done; 100 steps x 4,096 tokens = 409,600 ")
    assert ": about 1 epoch of data" in resumed.sentence()
    assert "less than 0.01 epochs" in RunLength("d", 1, 0, 4096, 10**9).sentence()
    absurd = RunLength("data/chitchat", 200_000, 0, 524_288, 16_700_000)  # model=93m on chitchat
    assert "= 105 billion tokens: about 6,300 epochs of" in absurd.sentence()
    assert absurd.warning().startswith("warning: about 6,300 epochs: ")
    for cure in ("trainer.max_steps=319 (10 epochs", "model=tiny", "data.path=DIR"):
        assert cure in absurd.warning()
    tiny = RunLength("data/chitchat", 200_000, 0, 524_288, 16_700_000, model="tiny")
    assert tiny.warning() == absurd.warning().replace(
        ", or model=tiny, whose recipe is for small corpora", ""
    )
    assert "trainer.max_steps=1 (" in RunLength("d", 200_000, 0, 524_288, 1000).warning()
    assert RunLength("d", 100, 0, 10, 10).warning() == ""  # 100 epochs are not yet too many
    assert RunLength("d", 101, 0, 10, 10).warning() != ""


def test_words_for_numbers() -> None:
    assert [duration(s) for s in (0.3, 1, 119, 2460, 7200, 11_500)] == [
        *("0.3 seconds", "1 seconds", "120 seconds", "41 minutes", "2 hours", "3.2 hours"),
    ]
    assert [duration(86_400 * days) for days in (1, 12.3, 730, 731, 40_000)] == [
        *("24 hours", "12 days", "730 days", "2 years", "110 years"),
    ]
    assert [in_words(n) for n in (512, 999_999, 4_096_000, 104_857_600_000, 2e12)] == [
        *("512", "999,999", "4.1 million", "105 billion", "2 trillion"),
    ]
    assert [rounded(n) for n in (0.0123, 1.0, 9.96, 5749, 123)] == ["0.012", "1", "10", "5,700", "120"]


# ------------------------------------------------------------------------------------------------ the clock


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.now, self.capsys = 1000.0, capsys
        monkeypatch.setattr(length.time, "perf_counter", lambda: self.now)
        for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)

    def run(
        self, steps: int, units: int, unit_s: float, ranks: int = 1, done: int = 0, **said: Any
    ) -> list[str]:
        """What is said of a run whose units take so long; a validation of a day comes after step 2."""
        trainer: Any = SimpleNamespace(
            is_global_zero=said.get("first", True), world_size=ranks, max_steps=steps, global_step=done
        )
        left = TimeLeft(unit_tokens=100, units_per_step=units)
        left.on_train_start(trainer, None)  # type: ignore[arg-type]
        for step in range(done, min(steps, done + 2000)):  # what is said is said in the first of them
            left.on_train_batch_start(trainer, None, None, step)  # type: ignore[arg-type]
            for _ in range(units // ranks):
                self.now += unit_s if left.units >= 3 else max(3.0, unit_s)  # the first ones are slow
                left.on_after_backward(trainer, None)  # type: ignore[arg-type]
            trainer.global_step += 1
            if step == done + 2:
                left.on_validation_start(trainer, None)  # type: ignore[arg-type]
                self.now += 86_400.0
        return self.capsys.readouterr().err.splitlines()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Clock:
    return Clock(monkeypatch, capsys)


def test_the_time_is_that_of_the_units_after_the_first_ones(clock: Clock) -> None:
    at = "tokens/s, validations not counted"
    assert clock.run(steps=1023, units=1, unit_s=0.5) == [f"about 8.3 minutes at 200 {at}"]
    assert clock.run(steps=1023, units=8, unit_s=0.5, ranks=4) == [f"about 17 minutes at 800 {at}"]
    assert clock.run(steps=1000, units=1, unit_s=0.5, done=800) == [f"about 88 seconds at 200 {at}"]
    assert clock.run(steps=1000, units=64, unit_s=40.0)[0] == f"about 30 days at 2.5 {at}"  # within a step
    assert clock.run(steps=2, units=2, unit_s=60.0) == [f"about 2 minutes at 1.7 {at}"]  # after two units
    assert clock.run(steps=23, units=1, unit_s=0.5) == []  # over when it is known
    assert clock.run(steps=1023, units=1, unit_s=0.5, first=False) == []


def test_years_are_warned_of(clock: Clock) -> None:
    told, warning = clock.run(steps=200_000, units=64, unit_s=40.0)
    assert told.startswith("about 16 years at 2.5 tokens/s")
    assert warning.startswith("warning: about 16 years: set a smaller trainer.max_steps (33: a day)")
    assert "model=tiny" in warning
    assert "strategy=ddp" in warning


# -------------------------------------------------------------------------------------------- real commands


def test_a_run_says_its_length_once(train_here: Train, corpus: Path, tmp_path: Path) -> None:
    done = train_here(*QUICK, "run_id=a")
    ((steps, batch, tokens, epochs, path, _),) = START.findall(done.stderr)
    assert (steps, batch, tokens, path) == ("26", "1,024", "26,624", str(corpus))
    assert 1 < float(epochs.removeprefix("about ")) < 5
    assert len(TIME.findall(done.stderr)) == 1
    assert "warning" not in done.stderr

    # what goes on counts what is left
    done = train_here(*QUICK, "trainer.max_steps=50", "run_id=a")
    assert "26 of 50 steps are done; 24 steps x 1,024 tokens = 24,576 tokens: about " in done.stderr
    assert len(TIME.findall(done.stderr)) == 1


@pytest.mark.slow
def test_each_job_of_a_sweep_says_it_once(train_here: Train) -> None:
    done = train_here("-m", "stage=1_coarse,2_eval", *QUICK)
    assert len(TIME.findall(done.stderr)) == 2
    coarse, judge = (
        float(epochs.removeprefix("about ")) for _, _, _, epochs, *_ in START.findall(done.stderr)
    )
    assert judge < 0.6 * coarse  # an epoch is twice as long: each context is read with two responses


def test_absurd_lengths_are_warned_of(train_here: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    absurd = [*QUICK, f"trainer.max_steps={SMALL_CORPUS}"]
    monkeypatch.setattr(length, "MANY_DAYS", 0)
    with stopped_at(24):
        done = train_here(*absurd)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert not any("model=tiny" in warning for warning in warnings)  # which it has
    assert re.match(r"warning: about \d+ epochs: .* set trainer\.max_steps=\d+ \(10 epochs", warnings[0])
    assert re.match(r"warning: about .*: set a smaller trainer\.max_steps \(\d+: a day\)", warnings[1])


def test_a_plan_says_the_same_where_there_are_data(train_here: Train, tmp_path: Path) -> None:
    done = train_here("plan=true", f"trainer.max_steps={SMALL_CORPUS}")
    assert re.search(r"the corpus +│ about \d+ epochs of", done.stdout)
    assert done.stderr.startswith("warning: about ")
    done = train_here("plan=true", f"data.path={tmp_path}/nothing")
    assert "the corpus" not in done.stdout
    assert done.stderr == ""
