"""Exported models: Knover's files byte for byte, and a folder that transformers loads without plato2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from knover import CONFIG, load
from runs import checkpoint_of, make_run, make_stage, small_tokenizer_texts
from small import ROOT, Train, environment, write_dialogues
from test_import_knover import FIXTURES, LM_HEAD, write_release
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import DecodeConfig, UserError
from plato2.data.samples import encode_context
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.model.backbone import put_front
from plato2.prepare.dialogues import PrepareOptions, prepare
from plato2.runs.saved import read_metrics
from plato2.stages import known_stages
from plato2.talk.bot import PlatoBot
from plato2.talk.rank import coherence
from plato2.weights.export import export_to_huggingface, export_to_knover
from plato2.weights.folder import load_evaluation, load_generation, load_stage, read_saved
from plato2.weights.knover import import_knover
from plato2.weights.model_folder import new_folder, write_model_folder
from plato2.weights.paddle import open_parameter

SHARED = ROOT.parent / "shared" / "knover" / "fixtures" / "ckpt"
TURNS = ["hello , i am new in town .", "welcome ! what do you like to do ?"]
RESPONSES = ["i like to read .", "yes ."]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "tiny")


@pytest.fixture(scope="module")
def imported(release: Path) -> Path:
    return import_knover(release, release.parent / "imported").out


@pytest.fixture(scope="module")
def exported(imported: Path) -> Path:
    assert export_to_huggingface(imported.parent / "hf", imported, None) == ["generation", "evaluation"]
    return imported.parent / "hf"


# -------------------------------------------------------------------------------------------------- Knover


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.glob("*/*")
        if file.is_file()
    }


def test_what_was_imported_is_exported_byte_for_byte(release: Path, imported: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "disk")  # a link is followed
    assert export_to_knover(tmp_path / "out", imported, None) == {"Plato": 51, "NSP": 46}
    assert files_of(tmp_path / "disk") == files_of(release)
    assert len(files_of(release)) == 97
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert (tmp_path / "out").is_symlink()


def test_the_files_are_those_knover_wrote(imported: Path, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("Knover's own files are not beside this repository (shared/knover/fixtures/ckpt)")
    export_to_knover(tmp_path / "again", import_knover(SHARED, tmp_path / "in", n_head=4).out, None)
    export_to_knover(tmp_path / "out", imported, None)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again") == files_of(SHARED)


@pytest.mark.parametrize("stored", [None, "float16", "bfloat16"])
def test_float16_keeps_norms_float32_as_knovers_converter_does(
    release: Path, imported: Path, tmp_path: Path, stored: str | None
) -> None:
    source = import_knover(release, tmp_path / "in", dtype=stored).out if stored else imported
    export_to_knover(tmp_path / "out", source, None, "float16")
    for name, content in FIXTURES.items():
        for key, array in load(content).items():
            parameter = open_parameter(tmp_path / "out" / name / key)
            assert parameter.dtype == (np.float32 if "layer_norm" in key else np.float16), key
            if stored is None:
                assert np.array_equal(parameter.read(), array.astype(parameter.dtype))


@pytest.mark.parametrize("name", ["1_coarse", "2_gen", "2_eval"])
def test_a_run_of_ours_goes_to_knover_and_back(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", name)
    is_evaluation = name == "2_eval"
    export_to_knover(tmp_path / "out", None if is_evaluation else run, run if is_evaluation else None)
    again = read_saved(import_knover(tmp_path / "out", tmp_path / "in", n_head=2).out)
    stage = read_saved(run)
    assert again.stage == name
    assert again.weights.keys() == stage.weights.keys()
    assert all(torch.equal(tensor, stage.weights[key]) for key, tensor in again.weights.items())


def test_heads_that_knover_does_not_have_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "2_gen")
    stage: Any = known_stages()["2_gen"](make_stage("2_gen").model_config, recognition_head="linear")
    torch.save(checkpoint_of(stage, Tokenizer.load(run / "tokenizer")), run / "checkpoints" / "last.ckpt")
    with pytest.raises(
        UserError, match=r"generation model has .*classifier\.weight, which Knover does not.*plato2 export hf"
    ):
        export_to_knover(tmp_path / "models" / "out", run, None)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    dual = make_run(tmp_path / "dual", "2_eval", head="dual")
    with pytest.raises(
        UserError, match=r"evaluation model has coherence\.\w+.*, which Knover does not.*plato2 export hf"
    ):
        export_to_knover(tmp_path / "models" / "out", None, dual)


def test_what_an_evaluation_model_is_worth_goes_along(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "2_eval")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(checkpoint | {"figures": {"p1": 0.25}}, run / "checkpoints" / "last.ckpt")
    export_to_huggingface(tmp_path / "hf", None, run)
    assert load_evaluation(tmp_path / "hf").figures == {"p1": 0.25}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["knover", "--out", "{tmp}/out"], "there is nothing to export"),
        (["knover", "--generation", "{run}", "--out", "{run}"], "already exists and is not empty"),
        (["hf", "--generation", "{run}", "--out", "{run}"], "already exists and is not empty"),
        (["hf", "--evaluation", "{run}", "--out", "{tmp}/out"], "give a run of 2_eval"),
        (
            ["knover", "--generation", "{run}", "--dtype", "bfloat16", "--out", "{tmp}/out"],
            "--dtype bfloat16",
        ),
        (["hf", "--generation", "{run}", "--dtype", "int8", "--out", "{tmp}/out"], "--dtype int8: choose"),
        (["hf", "--generation", "{tmp}/nowhere", "--out", "{tmp}/out"], "no such run folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    run = make_run(tmp_path / "run", "2_gen")
    done = CliRunner().invoke(app, ["export", *(a.format(tmp=tmp_path, run=run) for a in arguments)])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- transformers

REMOTE = """
import json, sys, warnings
import torch
from transformers import AutoModel

base, rows = sys.argv[1], {key: torch.tensor(value) for key, value in json.loads(sys.argv[2]).items()}


def load(name):
    return AutoModel.from_pretrained(f"{base}/{name}", trust_remote_code=True)


def look(model):
    found = {"dtype": str(model.dtype), "logits": []}
    for z in range(model.generation.model_config.n_latent):
        latents = torch.full((len(rows["input_ids"]),), z)
        with torch.no_grad():
            out = model(**rows, latent_ids=latents)
        found["logits"].append(out.logits.float())
    found["coherence"] = model.coherence(TURNS, RESPONSES)
    replies = model.reply(TURNS, max_tokens=12)
    found["replies"] = [[c.text, c.latent, c.log_prob, c.coherence] for c in replies]
    words, layer = model.get_input_embeddings(), model.get_output_embeddings()
    backbone = model.generation.backbone
    with torch.no_grad():
        by_hand = layer(backbone.lm_transform(out.last_hidden_state.flatten(0, 1))).view_as(out.logits)
    found["tied"] = layer.weight is words.weight is backbone.word.weight and torch.equal(by_hand, out.logits)
    return found


def initial(module):
    return all(float(p.abs().max()) <= (1 if "norm" in n else 0.04) for n, p in module.state_dict().items())


model, bare = load("whole"), load("bare")
found = {"whole": look(model), "half": look(load("half")), "bare": look(bare)}
with torch.no_grad():
    found["coarse"] = load("coarse")(**rows).logits
found["judge"] = load("judge").coherence(TURNS, RESPONSES)
found["dual"] = load("dual").coherence(TURNS, RESPONSES)
found["pmi"] = load("pmi").coherence(TURNS, RESPONSES)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.reply("\u4f60\u597d", max_tokens=2)
end = max((text for text, *_ in found["whole"]["replies"]), key=len)[3:6]  # three letters, no list of them
found["stopped"] = end, [c.text for c in model.reply(TURNS, max_tokens=12, stop=end)]
found["refused"] = []
for nothing in ([], "", ["hi", " "]):
    try:
        model.reply(nothing)
    except Exception as error:
        found["refused"].append(f"{type(error).__name__}: {error}")
found["one_text"] = [
    model.encode_context("hi there") == model.encode_context(["hi there"]),
    model.coherence("hi there", "yes .") == model.coherence(["hi there"], ["yes ."]),
]
found["warnings"] = [str(warning.message) for warning in caught]
model.save_pretrained(f"{base}/saved")
found["saved"] = look(load("saved"))
fresh = AutoModel.from_config(model.config, trust_remote_code=True)
backbone = bare.evaluation.backbone
found["initial"] = [initial(fresh), initial(backbone.lm_transform), not backbone.lm_bias.any()]
found["modules"] = sorted({name.split(".")[0] for name in sys.modules})
found["path"] = sys.path
torch.save(found, f"{base}/found.pt")
"""
ROWS: dict[str, list[list[int]]] = {
    "input_ids": [[1, 20, 400, 2, 9, 8, 2, 1, 77, 12, 31], [1, 7, 2, 1, 55, 0, 0, 0, 0, 0, 0]],
    "token_type_ids": [[0] * 7 + [1] * 4, [0] * 3 + [1] * 2 + [0] * 6],
    "attention_mask": [[1] * 11, [1] * 5 + [0] * 6],
}


def away_from_here(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing of this repository or of a hub is found."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    return kept | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf_home"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def remote(release: Path, imported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What transformers made of exported folders in a process of its own."""
    pytest.importorskip("transformers")
    tmp_path = tmp_path_factory.mktemp("remote")
    export_to_huggingface(tmp_path / "whole", imported, None)
    export_to_huggingface(tmp_path / "half", imported, None, "bfloat16")
    export_to_huggingface(tmp_path / "coarse", make_run(tmp_path / "runs" / "1_coarse", "1_coarse"), None)
    export_to_huggingface(tmp_path / "judge", None, import_knover(release / "NSP", tmp_path / "in").out)
    for head in ("dual", "pmi"):
        export_to_huggingface(tmp_path / head, None, make_run(tmp_path / "runs" / head, "2_eval", head=head))
    shutil.copytree(release, tmp_path / "knover")
    for file in (tmp_path / "knover").glob("*/*"):
        if file.name.startswith(("recognition_", "bow_")) or file.match("NSP/mask_lm_*"):
            file.unlink()
    import_knover(tmp_path / "knover", tmp_path / "no_heads")
    with pytest.MonkeyPatch.context() as patch:
        in_shards = partial(write_model_folder, shard_bytes=200_000)
        patch.setattr("plato2.weights.export.write_model_folder", in_shards)
        export_to_huggingface(tmp_path / "bare", tmp_path / "no_heads", None)
    given = f"TURNS, RESPONSES = {TURNS!r}, {RESPONSES!r}\n"
    script = tmp_path / "elsewhere" / "use.py"
    script.parent.mkdir()
    script.write_text(given + REMOTE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), json.dumps(ROWS)],
        cwd=script.parent,
        env=away_from_here(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "not initialized" not in done.stderr
    found: dict[str, Any] = torch.load(tmp_path / "found.pt", weights_only=True)
    return found | {"base": tmp_path}


def stage_logits(folder: Path, z: int) -> torch.Tensor:
    """(B, T, V) of a stage for a latent."""
    stage: Any = load_stage(folder, ("2_gen",))
    tokens, types, real = (torch.tensor(rows) for rows in ROWS.values())
    front = torch.tensor([[0]] * len(tokens))
    unit = {
        "token_ids": torch.cat([front, tokens], 1),
        "type_ids": torch.cat([front, types], 1),
        "pos_ids": torch.cat([front, torch.arange(tokens.shape[1]).expand_as(tokens)], 1),
        "segment_ids": torch.cat([front + 1, real], 1),
    }
    one_hot = torch.eye(stage.model_config.n_latent)[z].expand(len(tokens), -1)
    with torch.no_grad():
        slots = torch.arange(len(tokens)) * unit["token_ids"].shape[1]
        x = put_front(stage.backbone.embed_unit(unit), slots, stage.recognition.latent(one_hot))
        h = stage.backbone.encode(x, stage.backbone.mask(unit["segment_ids"], unit["type_ids"]))
        logits: torch.Tensor = stage.backbone.lm_logits(h[:, 1:].flatten(0, 1))
    return logits.view(*tokens.shape, -1)


@pytest.mark.parametrize("which", ["whole", "bare", "saved"])
def test_transformers_gives_the_logits_of_the_stage_for_each_latent(
    remote: dict[str, Any], imported: Path, which: str
) -> None:
    real = torch.tensor(ROWS["attention_mask"]).bool()
    assert len(remote[which]["logits"]) == CONFIG.n_latent
    for z, logits in enumerate(remote[which]["logits"]):
        torch.testing.assert_close(logits[real], stage_logits(imported, z)[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("which", ["whole", "bare", "saved"])
def test_transformers_gives_the_same_coherence_and_replies(
    remote: dict[str, Any], imported: Path, which: str
) -> None:
    bot = PlatoBot.load(imported, device="cpu", decode=DecodeConfig(max_tokens=12))
    pairs = [(bot.encode(TURNS), bot.tokenizer.encode(response)) for response in RESPONSES]
    assert remote[which]["coherence"] == pytest.approx(coherence(load_evaluation(imported), pairs), abs=1e-6)
    wanted = [[c.text, c.latent, c.log_prob, c.coherence] for c in bot.reply(TURNS).candidates]
    assert [row[:2] for row in remote[which]["replies"]] == [row[:2] for row in wanted]
    for row, expected in zip(remote[which]["replies"], wanted, strict=True):
        assert row[2:] == pytest.approx(expected[2:], abs=1e-5)


def test_transformers_takes_one_text_as_one_turn_and_says_what_it_cannot_read(remote: dict[str, Any]) -> None:
    assert remote["one_text"] == [True, True]


def test_transformers_stops_and_refuses_as_the_bot_does(remote: dict[str, Any], imported: Path) -> None:
    bot = PlatoBot.load(imported, device="cpu", decode=DecodeConfig(max_tokens=12))
    end, stopped = remote["stopped"]
    assert len(end) == 3
    assert any(end in c.text for c in bot.reply(TURNS).candidates)
    wanted = bot.reply(TURNS, DecodeConfig(max_tokens=12, stop=(end,))).candidates
    assert stopped == [c.text for c in wanted]
    assert not any(end in text for text in stopped)
    with pytest.raises(UserError) as refused:
        bot.reply([])
    assert remote["refused"] == [f"UserError: {refused.value}"] * 3
    assert "the model cannot read 100% of this message" in remote["warnings"]


@pytest.mark.parametrize("head", ["dual", "pmi"])
def test_transformers_ranks_with_our_heads_too(remote: dict[str, Any], head: str) -> None:
    run = remote["base"] / "runs" / head
    tokenizer, network = Tokenizer.load(run / "tokenizer"), load_evaluation(run)
    context = encode_context(tokenizer.encode_batch(TURNS))
    assert context is not None
    expected = coherence(network, [(context, words) for words in tokenizer.encode_batch(RESPONSES)])
    assert remote[head] == pytest.approx(expected, abs=1e-6)
    assert coherence(load_evaluation(remote["base"] / head), [([1, 7, 2], [9])]) == coherence(
        network, [([1, 7, 2], [9])]
    )


def test_transformers_needs_nothing_of_this_repository(remote: dict[str, Any]) -> None:
    assert not {"plato2", "hydra", "omegaconf", "pytorch_lightning", "torchmetrics"} & set(remote["modules"])
    assert str(ROOT) not in remote["path"]
    assert {"torch", "transformers", "sentencepiece"} <= set(remote["modules"])


def test_writing_the_folder_needs_no_transformers(imported: Path, exported: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; from plato2.commands import app;"
        "app(['export', 'hf', '--generation', sys.argv[1], '--out', sys.argv[2]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(imported), str(tmp_path / "hf")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    written = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir() if file.is_file()}
    assert written == {file.name: file.read_bytes() for file in exported.iterdir() if file.is_file()}


def test_the_word_table_is_tied_to_the_output_layer(remote: dict[str, Any]) -> None:
    assert remote["whole"]["tied"]
    assert remote["saved"]["tied"]


def test_a_bfloat16_export_is_loaded_as_bfloat16(remote: dict[str, Any], imported: Path) -> None:
    assert (remote["whole"]["dtype"], remote["half"]["dtype"]) == ("torch.float32", "torch.bfloat16")
    real = torch.tensor(ROWS["attention_mask"]).bool()
    wanted = stage_logits(imported, 0)[real]
    error = (remote["half"]["logits"][0][real] - wanted).abs().max()
    assert float(error) < 0.1 * float(wanted.std())
    assert len(remote["half"]["replies"]) == CONFIG.n_latent


def test_what_a_folder_lacks_has_initial_values(remote: dict[str, Any]) -> None:
    """Also all of a model that is made of the configuration alone."""
    assert (remote["base"] / "bare" / "model.safetensors.index.json").is_file()
    config = json.loads((remote["base"] / "bare" / "config.json").read_text())
    assert config["evaluation"]["absent"] == list(LM_HEAD)
    assert remote["initial"] == [True, True, True]


def test_one_model_alone_and_one_of_stage_1_are_loaded_too(remote: dict[str, Any], imported: Path) -> None:
    assert remote["judge"] == pytest.approx(remote["whole"]["coherence"], abs=1e-6)
    network = load_generation(remote["base"] / "coarse").backbone
    tokens, types, real = (torch.tensor(rows) for rows in ROWS.values())
    with torch.no_grad():
        x = network.embed(tokens, types, torch.arange(tokens.shape[1]).expand_as(tokens))
        logits = network.lm_logits(network.encode(x, network.mask(real, types)).flatten(0, 1))
    wanted = logits.view(*tokens.shape, -1)[real.bool()]
    torch.testing.assert_close(remote["coarse"][real.bool()], wanted, atol=1e-5, rtol=0)


def test_a_folder_saved_by_transformers_is_a_model_folder_too(remote: dict[str, Any], imported: Path) -> None:
    decode = DecodeConfig(max_tokens=8)
    ours, theirs = (
        PlatoBot.load(p, device="cpu", decode=decode).reply(TURNS)
        for p in (imported, remote["base"] / "saved")
    )
    assert ours == theirs
    for file in (remote["base"] / "saved").glob("*.json"):
        assert str(remote["base"]) not in file.read_text()


def test_the_exported_folder_holds_no_paths_and_no_optimizer_state(exported: Path, tmp_path: Path) -> None:
    for file in exported.rglob("*"):
        if file.suffix in (".json", ".md", ".py"):
            text = file.read_text()
            for path in (str(ROOT), str(exported.parent), str(Path.home()), "/tmp/"):
                assert path not in text, file
            assert not re.search(r"from plato2|import plato2", text), file
    run = make_run(tmp_path / "run", "2_gen")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["optimizer_states"] = [{"state": {0: {"exp_avg": torch.zeros(1 << 20)}}}]
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    export_to_huggingface(tmp_path / "hf", run, None)
    size = sum(tensor.numel() * 4 for tensor in checkpoint["state_dict"].values())
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size < size + 20_000


def test_models_of_two_curricula_are_refused(imported: Path, tmp_path: Path) -> None:
    train_tokenizer(small_tokenizer_texts(), n_pieces=40).save(tmp_path / "small")
    run = make_run(tmp_path / "run", "2_eval", tokenizer_folder=tmp_path / "small")
    with pytest.raises(UserError, match="trained with different tokenizers"):
        export_to_huggingface(tmp_path / "hf", imported, run)
    assert not (tmp_path / "hf").exists()


def test_an_evaluation_model_can_be_exported_alone(release: Path, tmp_path: Path) -> None:
    imported = import_knover(release / "NSP", tmp_path / "in").out
    assert export_to_huggingface(tmp_path / "hf", None, imported) == ["evaluation"]
    assert read_saved(tmp_path / "hf").stage == "2_eval"


def test_plato2_load_imports_nothing_heavy(exported: Path, imported: Path) -> None:
    code = (
        "import sys, plato2\n"
        "for folder in sys.argv[1:]:\n"
        "    bot = plato2.load(folder, device='cpu')\n"
        "    assert bot.evaluation is not None and bot.reply(['hi']).text\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(imported), str(exported)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    heavy = {"pytorch_lightning", "lightning", "hydra", "omegaconf", "torchmetrics", "transformers"}
    assert not heavy & set(done.stdout.split())


# ------------------------------------------------------------------------------------------- all the verbs


@pytest.fixture(scope="module")
def models(imported: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in each form a model has."""
    folder = tmp_path_factory.mktemp("run")
    found = {"imported": imported, "exported": exported}
    for name in ("2_gen", "2_eval"):
        run, stage = make_run(folder / name, name), load_stage(imported, (name,))
        torch.save(
            checkpoint_of(stage, Tokenizer.load(imported / "tokenizer")), run / "checkpoints" / "last.ckpt"
        )
        found |= {f"run {name}": run, f"file {name}": run / "checkpoints" / "last.ckpt"}
    return found


def options(models: dict[str, Path], form: str) -> list[str]:
    generation = models.get(form) or models[f"{form} 2_gen"]
    evaluation = models.get(form) or models[f"{form} 2_eval"]
    return ["--generation", str(generation), "--evaluation", str(evaluation)]


def plato2(*arguments: object, stdin: str = "") -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout


@pytest.mark.parametrize("form", ["run", "file", "imported", "exported"])
def test_every_verb_takes_every_form_of_a_model(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    given, first = options(models, form), options(models, "imported")
    asked = ["--max-tokens", 6, "--json", *TURNS]
    theirs, ours = (json.loads(plato2("reply", *models_given, *asked)) for models_given in (given, first))
    assert theirs.pop("timing").keys() == ours.pop("timing").keys()
    assert theirs == ours
    assert "bot  " in plato2("chat", *given, "--max-tokens", 6, stdin="hello\n/quit\n")
    (tmp_path / "pairs.tsv").write_text("hi [SEP] hello ! how are you ?\tfine .\n")
    assert plato2("score", tmp_path / "pairs.tsv", *given) == plato2("score", tmp_path / "pairs.tsv", *first)
    plato2("export", "knover", *given, "--out", tmp_path / "knover")
    plato2("export", "hf", *given, "--out", tmp_path / "hf")
    assert files_of(tmp_path / "knover")["Plato/word_embedding"]
    assert read_saved(tmp_path / "hf", ("2_eval",)).stage == "2_eval"


# -------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def knover_corpus(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations as ids of the imported tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    options = PrepareOptions(
        corpus="jsonl",
        files=[str(write_dialogues(folder / "dialogues.jsonl", n_dialogues=60))],
        out=str(folder / "shards"),
        tokenizer=str(imported / "tokenizer"),
        valid_dialogues=10,
    )
    prepare(options)
    return folder / "shards"


MODEL = [
    "model.n_layer=2",
    "model.n_head=4",
    "model.hidden_size=32",
    "model.n_latent=5",
    "model.vocab_size=8001",
    "model.max_position=256",
    "data.row_length=256",
    "data.unit_tokens=1024",
    "run_id=r",
]


def train_from(
    folder: Path, train_here: Train, corpus: Path, stage: str, steps: int, *overrides: str
) -> None:
    train_here(
        f"stage={stage}",
        f"init_from={folder}",
        f"data.path={corpus}",
        *MODEL,
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        "trainer.log_every_n_steps=1",
        "optim.warmup_steps=1",
        *overrides,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2_gen", "2_eval"])
def test_training_goes_on_from_an_imported_folder(
    imported: Path, knover_corpus: Path, train_here: Train, tmp_path: Path, stage: str
) -> None:
    train_from(imported, train_here, knover_corpus, stage, 12, "optim.lr=3e-3")
    run = tmp_path / "outputs" / f"tiny-{stage}" / "r"
    losses = [value for _, name, value in read_metrics(run / "metrics.csv") if name == "train/loss"]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05


@pytest.mark.parametrize("form", ["imported", "exported"])
@pytest.mark.parametrize("stage", ["2_gen", "2_eval"])
def test_of_a_folder_of_both_each_stage_takes_its_own_model(
    models: dict[str, Path], knover_corpus: Path, train_here: Train, tmp_path: Path, stage: str, form: str
) -> None:
    train_from(models[form], train_here, knover_corpus, stage, 1, "optim.lr=1e-12")
    found = read_saved(tmp_path / "outputs" / f"tiny-{stage}" / "r")
    wanted = read_saved(models[form], (stage,))
    assert found.weights.keys() == wanted.weights.keys()
    for name, tensor in wanted.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, atol=1e-6, rtol=0)


def test_training_refuses_a_folder_that_does_not_fit(
    release: Path, imported: Path, knover_corpus: Path, train_here: Train, corpus: Path, tmp_path: Path
) -> None:
    only = import_knover(release / "NSP", tmp_path / "nsp").out
    given = ["stage=2_gen", f"data.path={knover_corpus}", *MODEL]
    done = train_here(*given, f"init_from={only}", expect=2)
    assert "this folder holds 2_eval" in done.stderr
    done = train_here("stage=2_gen", f"data.path={corpus}", f"init_from={imported}", expect=2)
    assert "trained with tokenizer" in done.stderr


def test_two_exports_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    """Real processes, each in the middle of writing while the other one is: one delivers, whole."""
    out, context = tmp_path / "out", get_context("fork")

    def export(name: str, told: Connection) -> None:
        try:
            with new_folder(out) as folder:
                (folder / "file").write_text(name)
                told.send("writing")
                told.recv()
        except UserError as error:
            told.send(str(error))
            raise SystemExit(2) from error

    processes = []
    for name in ("one", "two"):
        heard, told = context.Pipe()
        process = context.Process(target=export, args=(name, told))
        process.start()
        processes.append((process, heard, heard.recv()))
    (first, heard, said), (second, _, refused) = processes
    assert said == "writing"
    assert f"--out {out}" in refused
    heard.send("go on")
    first.join()
    second.join()
    assert (first.exitcode, second.exitcode) == (0, 2)
    assert (out / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["out"]


@pytest.mark.slow
def test_two_export_commands_at_once(tmp_path: Path) -> None:
    """One delivers its own model whole, the other one says why it does not."""
    out, started = tmp_path / "out", {}
    for stage in ("1_coarse", "2_gen"):
        model = make_run(tmp_path / stage, stage)
        command = [
            sys.executable,
            "-m",
            "plato2",
            "export",
            "hf",
            "--generation",
            str(model),
            "--out",
            str(out),
        ]
        started[stage] = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
        )
    told = {stage: process.communicate(timeout=200)[1] for stage, process in started.items()}
    codes = {process.returncode: stage for stage, process in started.items()}
    assert set(codes) == {0, 2}, told
    assert f"error: --out {out}" in told[codes[2]]
    assert read_saved(out, role="generation").use.has_latents == (codes[0] == "2_gen")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "."))] == ["out"]
