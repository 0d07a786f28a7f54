"""Run folders and checkpoints: what is there is loaded exactly, what is not gets a clear error."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import KNOVER, checkpoint_of, make_run, make_stage, small_tokenizer_texts

from plato2.config import UserError
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.files import write_sha256
from plato2.runs.folder import RunFolder, failure_recorded
from plato2.stages import FineGeneration, known_stages
from plato2.talk.bot import PlatoBot
from plato2.weights.export import export_to_huggingface
from plato2.weights.folder import load_generation, load_stage, saved_tokenizer
from plato2.weights.model_folder import weight_files

STAGES = known_stages()


@pytest.mark.parametrize("name", list(STAGES))
def test_a_run_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", name)
    stage, original = load_stage(run), make_stage(name)
    assert type(stage) is STAGES[name]
    assert not stage.training
    assert stage.hparams == original.hparams
    weights = stage.state_dict()
    assert weights.keys() == original.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in original.state_dict().items())
    assert not any(tensor.is_meta for tensor in stage.parameters())
    assert all(parameter.requires_grad for parameter in stage.parameters())
    assert saved_tokenizer(run).sha256 == Tokenizer.load(KNOVER).sha256


def test_a_loaded_stage_can_be_validated(tmp_path: Path) -> None:
    """The sums over a validation are real tensors that start from zero."""
    stage: Any = load_stage(make_run(tmp_path / "run", "2_gen"))
    stage.validation_means.update({"nll": torch.tensor([2.0, 4.0])})
    assert {term: float(mean) for term, mean in stage.validation_means.compute().items()} == {"nll": 3.0}
    stage.validation_means.reset()
    assert stage.validation_means.compute() == {}
    assert stage.latent_usage.mass.tolist() == [0.0] * 5
    stage.to("cpu")


def test_best_is_preferred_and_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "2_gen")
    tokenizer = Tokenizer.load(KNOVER)
    best = make_stage("2_gen")
    with torch.no_grad():
        best.backbone.lm_bias.fill_(0.5)
    torch.save(checkpoint_of(best, tokenizer), run / "checkpoints" / "best.ckpt")
    assert load_stage(run).backbone.lm_bias[0].item() == 0.5
    assert load_stage(run / "checkpoints" / "last.ckpt").backbone.lm_bias[0].item() == 0.0
    assert saved_tokenizer(run / "checkpoints" / "last.ckpt").sha256 == tokenizer.sha256


def test_a_half_precision_checkpoint_is_loaded_in_float32(tmp_path: Path) -> None:
    stage = make_stage("1_coarse")
    torch.save(checkpoint_of(stage.bfloat16(), Tokenizer.load(KNOVER)), tmp_path / "half.ckpt")
    assert {parameter.dtype for parameter in load_stage(tmp_path / "half.ckpt").parameters()} == {
        torch.float32
    }


def test_paths_that_do_not_exist_suggest_near_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny-2_gen" / "20260102-030405", "2_gen")
    with pytest.raises(UserError, match=r"20260102-030406: no such .*; did you mean .*/20260102-030405\?"):
        load_stage(run.with_name("20260102-030406"))
    with pytest.raises(UserError, match=r"no such .*; did you mean .*/tiny-2_gen\?"):
        load_stage(tmp_path / "tiny-2gen" / "20260102-030405")
    with pytest.raises(UserError, match="has nothing of that name"):
        load_stage(tmp_path / "zzz")
    with pytest.raises(UserError, match="no such run"):
        load_stage(run / "lineage.json" / "deeper")
    with pytest.raises(UserError, match=r"^smolm2: no such .*; did you mean smollm2"):
        load_stage("smolm2")
    with pytest.raises(UserError, match=f"no checkpoint in it; did you mean {run}"):
        load_stage(run.parent)
    with pytest.raises(UserError, match="no checkpoint in it; give the folder of a run"):
        load_stage(KNOVER)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"not a checkpoint\n",
    "truncated": lambda whole: whole[:-2000],
    "noise": lambda whole: bytes(range(256)) * 99,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    file = make_run(tmp_path / "run", "2_gen") / "checkpoints" / "last.ckpt"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(UserError, match=r"last\.ckpt: not a"):
        load_stage(tmp_path / "run")


class Trap:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    torch.save({"stage": "2_gen", "state_dict": {}, "hyper_parameters": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_stage(tmp_path / "trap.ckpt")


def test_other_content_is_refused(tmp_path: Path) -> None:
    stage, tokenizer = make_stage("2_gen"), Tokenizer.load(KNOVER)
    good = checkpoint_of(stage, tokenizer)

    def refused(content: dict[str, Any], message: str) -> None:
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(UserError, match=message):
            load_stage(tmp_path / "x.ckpt")

    refused({"state_dict": {}}, "not a plato2 checkpoint")
    refused(good | {"stage": "9_none"}, "stage '9_none' is not known; there are 1_coarse")
    refused(good | {"hyper_parameters": good["hyper_parameters"] | {"new": 1}}, "another version of plato2")
    smaller = {"model": good["hyper_parameters"]["model"] | {"hidden_size": 8}}
    refused(good | {"hyper_parameters": good["hyper_parameters"] | smaller}, "weights do not fit")
    lost = {key: value for key, value in good["state_dict"].items() if "lm_bias" not in key}
    refused(good | {"state_dict": lost}, "weights do not fit")


def test_the_wrong_stage_is_refused_by_option(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "2_eval")
    with pytest.raises(UserError, match=r"--generation .*run: this is a 2_eval run; give a run of 2_gen"):
        load_stage(run, (FineGeneration.name,), "--generation")


def test_the_tokenizer_must_be_the_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "2_gen")
    train_tokenizer(small_tokenizer_texts(), 60).save(run / "tokenizer")
    with pytest.raises(UserError, match=r"not the tokenizer last\.ckpt was trained with"):
        saved_tokenizer(run)
    (run / "tokenizer" / "spm.model").unlink()
    with pytest.raises(UserError, match=r"spm\.model is missing"):
        saved_tokenizer(run)


def test_what_a_newer_plato2_wrote_is_refused_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    export_to_huggingface(folder, make_run(tmp_path / "run", "2_gen"), None)
    for file in folder.glob("*.sha256"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    config["generation"]["arguments"]["model"]["n_expert"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"config\.json: generation\.arguments\.model\.n_expert: unknown .* newer"
    ):
        load_stage(folder)


def test_an_error_is_recorded_and_a_stop_is_not(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    for begun, error, status in (
        ("running", UserError("nan"), "failed"),
        ("running", RuntimeError("a logger's"), "failed"),
        ("running", SystemExit(143), "running"),
        ("finished", UserError("sweep_metric"), "finished"),
    ):
        run.write_lineage(status=begun)
        with pytest.raises(type(error)), failure_recorded(run):
            raise error
        assert run.lineage()["status"] == status


def test_flipped_bits_of_a_model_folder_are_never_loaded(tmp_path: Path) -> None:
    export_to_huggingface(tmp_path / "model", make_run(tmp_path / "run", "2_gen"), None)
    (file,) = weight_files(tmp_path / "model")
    whole, rng = file.read_bytes(), random.Random(3)
    for place in (len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20))):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        for load in (load_stage, load_generation):
            with pytest.raises(UserError, match=f"{file}: damaged: its bytes are not those that were saved"):
                load(tmp_path / "model")


def test_a_flipped_bit_of_an_index_of_weights(tmp_path: Path) -> None:
    export_to_huggingface(tmp_path / "model", make_run(tmp_path / "run", "2_gen"), None)
    part = (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-1-of-1.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": part.name}}))
    write_sha256(index)
    load_generation(tmp_path / "model")
    index.write_bytes(index.read_bytes().replace(b'"a"', b'"c"'))
    with pytest.raises(UserError, match=f"{index}: damaged: its bytes are not those that were saved"):
        load_generation(tmp_path / "model")


def test_a_run_without_its_tokenizer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "2_gen")
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(UserError, match=r"^[^\n]*run/tokenizer[^\n]*$"):
        PlatoBot.load(run)


def test_a_flipped_key_of_a_model_folder_is_damage(tmp_path: Path) -> None:
    """And not what another version of plato2 may have written."""
    export_to_huggingface(tmp_path / "model", make_run(tmp_path / "run", "2_gen"), None)
    file = tmp_path / "model" / "config.json"
    for name in (b'"stage"', b'"arguments"', b'"n_layer"', b'"format"'):
        whole = file.read_bytes()
        assert name in whole
        file.write_bytes(whole.replace(name, name.replace(b"a", b"q").replace(b"n", b"m"), 1))
        with pytest.raises(UserError, match=f"{file}: damaged: its bytes are not those that were saved"):
            load_stage(tmp_path / "model")
        file.write_bytes(whole)
