"""benchmarks/: fair sides, and one JSON object with every ratio."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from decoders import write_decoder
from small import ROOT, write_dialogues
from synthetic import write_corpus
from typer.testing import CliRunner

from benchmarks import generate, prepare, pretrained, serve, train
from benchmarks.processes import measure
from benchmarks.sides import Side, alternate, padded_batch, padded_unit, ratio, real_tokens, records
from plato2.config import ModelConfig, UserError
from plato2.data.collate import GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.prepare.dialogues import prepare as dialogue_prepare
from plato2.prepare.options import PrepareOptions
from plato2.stages import CoarseGeneration
from plato2.talk.decode import decode


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_corpus(folder, n_train=600)
    return folder


def unit(corpus: Path, latent_slot: bool = False) -> dict[str, torch.Tensor]:
    module = DialogueDataModule(
        str(corpus), GenerationBatch(latent_slot), 512, unit_tokens=512, row_length=128
    )
    module.setup()
    return next(iter(module.train_dataloader()))["units"][0]


def test_padded_unit_has_the_same_samples_and_losses(corpus: Path) -> None:
    packed = unit(corpus)
    samples = records(packed)
    padded = padded_unit(samples)
    stage = CoarseGeneration(ModelConfig(n_layer=1, n_head=2, hidden_size=16, dropout=0.0)).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            stage.losses(packed)["nll"], stage.losses(padded)["nll"], atol=1e-5, rtol=0
        )
    assert real_tokens(packed) == real_tokens(padded) == sum(len(sample.token_ids) for sample in samples)


def test_huggingface_gets_the_same_tokens_and_targets(corpus: Path) -> None:
    packed = unit(corpus)
    batch = padded_batch(records(packed))
    assert int(batch["attention_mask"].sum()) == real_tokens(packed)
    shifted = batch["labels"][:, 1:]  # what GPT-2's loss compares with
    assert torch.equal(shifted[shifted != -100], packed["target_ids"])
    assert torch.equal(batch["input_ids"][:, 1:][shifted != -100], packed["target_ids"])


def test_stage_2_counts_the_tokens_of_its_samples_not_their_front_slots(corpus: Path) -> None:
    fine = unit(corpus, latent_slot=True)
    n_slots = int((fine["segment_ids"] > 0).sum())
    n_front, n_last = len(fine["sample_index"]), len(fine["sample_index"])
    assert real_tokens(fine) == n_slots - n_front + n_last


def test_ratio_is_the_median_of_rounds() -> None:
    slow, fast = Side(lambda number: 1), Side(lambda number: 1)
    alternate([slow, fast], 2, 3, deadline=float("inf"))
    assert len(slow.tokens) == len(fast.tokens) == 3  # the two before them do not count
    slow.seconds, fast.seconds = [2.0, 30.0, 4.0], [1.0, 1.0, 1.0]
    assert ratio(slow, fast) == 4.0


def test_the_deadline_leaves_one_round() -> None:
    side = Side(lambda number: 1)
    alternate([side], 0, 5, deadline=0.0)
    assert len(side.tokens) == 1


def test_quick_json_names_every_ratio(corpus: Path) -> None:
    pytest.importorskip("transformers")
    result = CliRunner().invoke(train.app, ["--quick", "--json", "--data", str(corpus)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(train.TARGETS) <= found["ratios"].keys()
    assert found["met"].keys() == train.TARGETS.keys()
    fp32 = found["parts"]["small_fp32_over_huggingface"]
    assert found["ratios"]["small_fp32_over_huggingface"] == pytest.approx(
        fp32["huggingface"]["cpu_s_per_1000_tokens"] / fp32["plato2"]["cpu_s_per_1000_tokens"], rel=0.05
    )
    assert found["parts"]["loader_samples_per_cpu_s"] > 0
    assert found["machine"]["torch"] == torch.__version__


def test_without_transformers_the_error_says_what_to_install(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = CliRunner().invoke(train.app, ["--quick", "--data", str(corpus)])
    assert result.exit_code == 2
    assert "pip install transformers" in result.output


def test_generate_names_every_ratio_and_they_follow_from_their_parts() -> None:
    pytest.importorskip("transformers")
    result = CliRunner().invoke(generate.app, ["--quick", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ratios"].keys() == generate.TARGETS.keys()
    fp32 = found["parts"]["fp32"]
    assert found["ratios"]["fp32_over_huggingface"] == min(fp32["over"].values())
    for attention in ("eager", "sdpa"):  # one round: the median is the ratio
        assert fp32["over"][f"huggingface_{attention}"] == pytest.approx(
            fp32[f"huggingface_{attention}_s"] / fp32["plato2_s"], rel=0.05
        )
    bound = fp32["bounds"]["weights_s"] + fp32["bounds"]["arithmetic_s"]
    assert found["ratios"]["fp32_time_over_bounds"] == pytest.approx(fp32["plato2_s"] / bound, rel=0.05)
    share = found["parts"]["ranking_share_of_decoding"]
    assert found["ratios"]["ranking_share_of_decoding"] == pytest.approx(
        share["rank_s"] / share["decode_s"], rel=0.05
    )
    assert found["met"]["ranking_share_of_decoding"] == (found["ratios"]["ranking_share_of_decoding"] <= 0.25)


def test_the_sides_of_generate_do_the_same_work() -> None:
    pytest.importorskip("transformers")
    bench = generate.Bench(generate.QUICK, lambda text: None)
    k, n = bench.plan.model.n_latent, bench.plan.new_tokens
    ours = decode(bench.generation, [bench.context], bench.fixed)[0]
    assert [len(hypothesis.token_ids) for hypothesis in ours] == [n] * k
    theirs = bench.huggingface("eager", "fp32")()
    assert theirs.shape == (k, bench.plan.context + n)
    copied = bench.in_precision(bench.generation, "bf16")
    assert copied.backbone.word.weight.dtype == torch.bfloat16
    torch.testing.assert_close(
        copied.backbone.word.weight.float(), bench.generation.backbone.word.weight, atol=1e-3, rtol=0
    )


@pytest.mark.slow
def test_serve_asks_a_real_server_and_counts_every_answer() -> None:
    pytest.importorskip("fastapi")
    result = CliRunner().invoke(serve.app, ["--quick", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ratios"].keys() >= serve.TARGETS.keys()
    for name, load in serve.QUICK.items():
        for side, n in (("alone", load.alone), ("together", load.together)):
            part = found["parts"][name][side]
            assert part["statuses"] == {"200": n}
            assert 0 < part["median_s"] <= part["p99_s"]
    assert found["ratios"]["failed_requests"] == 0
    assert found["met"]["failed_requests"]


@pytest.mark.slow
def test_pretrained_measures_where_the_latent_stands_and_how_rows_are_read(
    corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="needs the extra int8")
    folder = str(write_decoder(tmp_path / "decoder", max_position_embeddings=256))
    dialogues, data = write_dialogues(tmp_path / "dialogues.jsonl"), str(tmp_path / "data")
    dialogue_prepare(
        PrepareOptions(corpus="jsonl", files=[str(dialogues)], out=data, tokenizer=f"hf:{folder}")
    )
    options = ["--context", "32", "--new-tokens", "2", "--rounds", "1", "--json"]
    with pytest.raises(UserError, match="was prepared with another tokenizer"):
        pretrained.training_sides(Path(folder), str(corpus), 256)
    result = CliRunner().invoke(pretrained.app, [folder, "--data", data, *options])
    assert result.exit_code == 0, result.output
    ratios = json.loads(result.stdout)["ratios"]
    assert {name for name in ratios if name.startswith("training")} == {
        f"training, rows of {slots}: dense mask over by sample" for slots in pretrained.ROWS
    }
    assert all(value > 0 for value in ratios.values())


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    with pytest.raises(UserError, match="no such run folder"), serve.serving(tmp_path / "nothing", "float32"):
        pass


@pytest.mark.slow
def test_measuring_a_command_counts_processes_that_nobody_waited_for() -> None:
    burn = "import time\nx = bytearray(80_000_000)\nwhile time.process_time() < 1.0: pass"
    inner = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {burn!r}])"
    found = measure([sys.executable, "-c", inner])
    assert found.exit_code == 0
    assert 1.0 <= found.cpu_s < 2.0
    assert 80e6 < found.peak_anonymous_bytes <= found.peak_bytes < 200e6


def test_a_command_that_is_interrupted_leaves_nothing_behind() -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        measure(["sleep", "60"], interrupt)
    assert time.monotonic() - began < 10


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """(what benchmarks.prepare found, the folder where it worked)."""
    pytest.importorskip("duckdb")
    folder = tmp_path_factory.mktemp("prepare")
    options = ["--comments", "2000", "--no-spark", "--pieces", "500", "--folder", str(folder)]
    result = CliRunner().invoke(prepare.app, ["--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), folder


@pytest.mark.slow
def test_prepare_runs_the_real_command_and_finds_one_digest(prepared: tuple[dict, Path]) -> None:
    (found, folder), n = prepared, 2_000
    assert found["met"].keys() == {f"{name}_at_{n}" for name in prepare.TARGETS} | {"failed_sides"}
    assert found["ratios"][f"digests_at_{n}"] == 1
    assert found["ratios"]["failed_sides"] == 0
    parts = found["parts"]
    sides, (plain,) = parts["sides"], parts["plain_passes"]
    assert [side["side"] for side in sides] == [side.name for side in prepare.LOCAL]
    for side in sides:
        assert side["comments"] == n
        assert side["samples"]["train"] > 0 < side["samples"]["valid"]
        assert side["cpu_us_a_comment"] == pytest.approx(1e6 * side["cpu_s"] / n, rel=0.01)
        assert sum(side["stages_cpu_s"].values()) == pytest.approx(side["cpu_s"], abs=0.1)
        assert {"start", "nodes", "shards"} <= side["stages_cpu_s"].keys()
        assert 50 < side["peak_anonymous_mb"] <= side["peak_mb"] < 2000
        assert side["peak_work_bytes"] > 0 < side["result_bytes"]
    assert found["ratios"][f"cpu_over_plain_pass_at_{n}"] == pytest.approx(
        sides[0]["cpu_s"] / plain["cpu_s"], rel=0.2
    )
    assert parts["tokenizer"]["cpu_s"] >= 0  # all within one look
    assert parts["all_of_reddit"]["core_hours"] == pytest.approx(
        sides[0]["cpu_us_a_comment"] * prepare.REDDIT_COMMENTS / 3.6e9, rel=0.01
    )
    left = {path.relative_to(folder).as_posix() for path in folder.glob("*/*")}
    assert left == {f"{n}-comments/dumps"}


@pytest.mark.slow
def test_prepare_shows_what_missed_failed_and_was_left_out(
    prepared: tuple[dict, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(json.dumps(prepared[0]))
    found["parts"]["sides"].append(
        {"comments": 2000, "side": "spark local[2]", "engine": "spark", "failed": "no [room]"}
    )
    found["parts"]["left_out"] = {"spark": "there is no Java"}
    found["met"]["failed_sides"] = False
    monkeypatch.setattr(prepare, "bench_prepare", lambda *arguments: found)
    shown = CliRunner().invoke(prepare.app, []).stdout
    assert "spark local[2] failed: no [room]" in shown
    assert "spark was left out: there is no Java" in shown
    assert "MISSED" in shown
    assert found["parts"]["sides"][0]["digest"][:8] in shown


def test_a_side_that_fails_keeps_its_last_line_and_its_folders_go(tmp_path: Path) -> None:
    dump = tmp_path / "RC_2011-01.zst"
    dump.write_bytes(b"nothing")
    bench = prepare.Bench(tmp_path, lambda text: None, tokenizer=str(tmp_path / "none"))
    bench.run(prepare.LOCAL[0], 2_000, [dump])
    assert "none" in bench.sides[0]["failed"]
    assert "cpu_s" not in bench.sides[0]
    assert bench.worst(2_000, "cpu_us_a_comment") is None
    assert list(tmp_path.iterdir()) == [dump]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--comments", "5"], "--comments 5: must be at least 1,000"),
        (["--engine", "flink"], "--engine 'flink': must be one of local, spark"),
        (
            ["--engine", "spark", "--no-spark"],
            "no engine is left to measure: --no-spark is for --engine local",
        ),
        (["--folder", "/dev/null/dumps"], "--folder /dev/null/dumps: Not a directory"),
    ],
)
def test_a_wrong_option_of_prepare_is_one_line(options: list[str], said: str) -> None:
    result = CliRunner().invoke(prepare.app, [*options])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [f"error: {said}"]


@pytest.mark.parametrize("module", [train, generate, serve, prepare])
def test_help_has_examples(module: ModuleType) -> None:
    shown = CliRunner().invoke(module.app, ["--help"])
    assert shown.exit_code == 0
    assert f"python -m {module.__name__}" in shown.stdout.split("Examples")[1]


@pytest.mark.slow
def test_a_benchmark_is_a_command_of_its_own() -> None:
    command = [sys.executable, "-m", "benchmarks.prepare", "--comments", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "error: --comments 5: must be at least 1,000\n"
