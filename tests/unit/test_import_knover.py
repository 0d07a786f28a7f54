"""`plato2 import knover`: every form of a release gives the same model; what is damaged gives one line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from knover import CONFIG, KNOVER, apart, from_knover, load
from runs import small_tokenizer_texts
from small import ROOT
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import DecodeConfig, ModelConfig, UserError
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.stages import stage_class
from plato2.talk.bot import PlatoBot
from plato2.weights.folder import load_stage, read_saved, saved_tokenizer
from plato2.weights.knover import find_sources, import_knover
from plato2.weights.model_folder import Lazy, Part, weight_files, write_model_folder
from plato2.weights.names import is_transposed, knover_names, paddlenlp_names, released_shapes
from plato2.weights.paddle import write_parameter

FIXTURES = {"Plato": "plato_weights.npz", "NSP": "nsp_weights.npz"}
STAGES = {"Plato": "2_gen", "NSP": "2_eval"}
OTHER = ModelConfig(n_layer=3, n_head=6, hidden_size=48, n_latent=7, max_position=96)
ONE_BLOCK = ModelConfig(n_layer=1, n_head=1, hidden_size=64)


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A folder as Knover writes it: one file a parameter."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        write_parameter(folder / name, array)
    return folder


def write_release(folder: Path) -> Path:
    """Knover's tiny models as it releases large ones, with its configuration beside them."""
    for name, file in FIXTURES.items():
        write_arrays(folder / name, load(file))
    shutil.copy(KNOVER / "config.json", folder)
    return folder


def parameter_shapes(stage: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters of a stage with Knover's heads."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in stage_class(stage)(config).state_dict().items()}


def random_arrays(stage: str, config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Knover's arrays of a model with random weights."""
    rng, names = np.random.default_rng(seed), knover_names(config.n_layer)
    return {
        names[part]: rng.standard_normal(shape[::-1] if is_transposed(part) else shape, dtype=np.float32)
        for part, shape in released_shapes(parameter_shapes(stage, config)).items()
    }


def pdparams(file: Path, parts: Mapping[str, Mapping[str, np.ndarray]], n_layer: int) -> Path:
    """PaddleNLP's dict of both models, under its names; its model classes have no training-only heads."""
    content = {}
    for part, arrays in parts.items():
        ours_by_theirs = {theirs: ours for ours, theirs in knover_names(n_layer).items()}
        names = paddlenlp_names(n_layer, part)
        content |= {
            names[ours_by_theirs[name]]: array
            for name, array in arrays.items()
            if ours_by_theirs[name] in names
        }
    file.write_bytes(pickle.dumps(content, 4))
    return file


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "tiny")


def assert_same_weights(folder: Path, name: str, absent: tuple[str, ...] = ()) -> None:
    """The imported part has the fixture's values, bit for bit."""
    saved, wanted = read_saved(folder, (STAGES[name],)), from_knover(load(FIXTURES[name]))
    found = apart(saved.weights)
    assert found.keys() == wanted.keys() - set(absent)
    assert saved.absent == absent
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())


# ------------------------------------------------------------------------------------------ what is taken


def as_folder(release: Path, tmp_path: Path) -> Path:
    return release


def as_nested_folder(release: Path, tmp_path: Path) -> Path:
    shutil.copytree(release, tmp_path / "unpacked" / "24L")
    return tmp_path / "unpacked"


def as_tar(release: Path, tmp_path: Path) -> Path:
    with tarfile.open(tmp_path / "24L.tar", "w") as archive:
        archive.add(release, "24L")
    return tmp_path / "24L.tar"


def as_tar_gz(release: Path, tmp_path: Path) -> Path:
    with tarfile.open(tmp_path / "24L.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(release, "./24L")
    return tmp_path / "24L.tar.gz"


@pytest.mark.parametrize("form", [as_folder, as_nested_folder, as_tar, as_tar_gz])
def test_a_release_of_both_is_imported_bit_for_bit(
    release: Path, tmp_path: Path, form: Callable[[Path, Path], Path]
) -> None:
    found = import_knover(form(release, tmp_path), tmp_path / "out")
    assert found.stages == {"generation": "2_gen", "evaluation": "2_eval"}
    assert (found.heads_from, found.left_alone) == ("config.json", [])
    assert vars(found.models["generation"]) == vars(CONFIG) | {"dropout": 0.1}
    for name in FIXTURES:
        assert_same_weights(tmp_path / "out", name)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "24L.tar", "24L.tar.gz", "unpacked"}


@pytest.mark.parametrize("name", FIXTURES)
def test_one_of_the_two_is_enough(release: Path, tmp_path: Path, name: str) -> None:
    import_knover(release / name, tmp_path / "out")
    assert_same_weights(tmp_path / "out", name)
    with pytest.raises(UserError, match="this folder holds"):
        read_saved(tmp_path / "out", tuple(set(STAGES.values()) - {STAGES[name]}))


def test_paddlenlps_file_gives_the_same_models(release: Path, tmp_path: Path) -> None:
    parts = {"generation": load(FIXTURES["Plato"]), "evaluation": load(FIXTURES["NSP"])}
    file = pdparams(tmp_path / "24L.pdparams", parts, CONFIG.n_layer)
    found = import_knover(file, tmp_path / "out", n_head=4)
    heads = [
        *(f"bag_of_words.{rest}" for rest in ("bias", *TRANSFORM)),
        "recognition.bias",
        "recognition.transform.bias",
        "recognition.transform.weight",
    ]
    assert list(found.absent["generation"]) == sorted(heads)
    assert_same_weights(tmp_path / "out", "Plato", tuple(sorted(heads)))
    assert_same_weights(tmp_path / "out", "NSP", LM_HEAD)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


TRANSFORM = tuple(f"transform.{part}.{kind}" for part in ("linear", "norm") for kind in ("bias", "weight"))
LM_HEAD = ("backbone.lm_bias", *(f"backbone.lm_{name}" for name in TRANSFORM))


def test_stage_1_is_told_by_its_lack_of_latents(tmp_path: Path) -> None:
    write_arrays(tmp_path / "Plato", random_arrays("1_coarse", ONE_BLOCK))
    assert import_knover(tmp_path / "Plato", tmp_path / "out").stages == {"generation": "1_coarse"}


def test_float16_stays_float16_and_its_norms_float32(release: Path, tmp_path: Path) -> None:
    """As Knover's convert_checkpoint leaves a model."""
    arrays = {
        name: array if "layer_norm" in name else array.astype(np.float16)
        for name, array in load(FIXTURES["Plato"]).items()
    }
    import_knover(write_arrays(tmp_path / "Plato", arrays), tmp_path / "out", n_head=4)
    wanted = from_knover(arrays)
    saved = read_saved(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.weights.values()} == {torch.float16, torch.float32}
    for name, tensor in apart(saved.weights).items():
        assert tensor.dtype == (torch.float32 if "norm." in name else torch.float16)
        assert torch.equal(tensor, wanted[name])
    assert PlatoBot.load(tmp_path / "out", device="cpu").reply(["hi"]).text


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_precision_can_be_chosen(release: Path, tmp_path: Path, dtype: str) -> None:
    import_knover(release / "NSP", tmp_path / "out", dtype=dtype)
    wanted = from_knover(load(FIXTURES["NSP"]))
    for name, tensor in apart(read_saved(tmp_path / "out").weights).items():
        assert torch.equal(tensor, wanted[name].to(getattr(torch, dtype)))


@pytest.mark.parametrize("place", ["Plato", "24L", ".", ".."])
@pytest.mark.parametrize("given", ["Plato", "24L"])
def test_another_geometry_follows_from_the_shapes_and_a_configuration_near(
    tmp_path: Path, place: str, given: str
) -> None:
    top = tmp_path / "a"
    write_arrays(top / "24L" / "Plato", random_arrays("2_gen", OTHER))
    config = {"num_attention_heads": 6, "hidden_size": 48, "num_hidden_layers": 3}
    folder = {"Plato": top / "24L" / "Plato", "24L": top / "24L", ".": top, "..": tmp_path}[place]
    (folder / "other.json").write_text(json.dumps(config | {"num_attention_heads": 16, "hidden_size": 1024}))
    (folder / "own.json").write_text(json.dumps(config))
    path = {"Plato": top / "24L" / "Plato", "24L": top / "24L"}[given]
    if (place, given) == ("..", "Plato"):  # three above
        with pytest.raises(UserError, match="give --n-head"):
            import_knover(path, tmp_path / "out")
        return
    found = import_knover(path, tmp_path / "out")
    assert found.models["generation"] == OTHER
    assert found.heads_from == "own.json"


def test_heads_can_be_given_and_are_otherwise_of_64(tmp_path: Path) -> None:
    write_arrays(tmp_path / "other" / "Plato", random_arrays("2_gen", OTHER))
    assert import_knover(tmp_path / "other", tmp_path / "a", n_head=6).models["generation"] == OTHER
    write_arrays(tmp_path / "one" / "Plato", random_arrays("2_gen", ONE_BLOCK))
    found = import_knover(tmp_path / "one", tmp_path / "b")
    assert (found.models["generation"], found.heads_from) == (ONE_BLOCK, "hidden_size / 64")


def test_roles_are_part_of_the_geometry(tmp_path: Path) -> None:
    config = ModelConfig(n_layer=1, n_head=1, hidden_size=64, n_role=4)
    write_arrays(tmp_path / "Plato", random_arrays("1_coarse", config))
    assert import_knover(tmp_path / "Plato", tmp_path / "out").models["generation"] == config


def test_heads_that_only_training_needs_may_be_absent(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release, tmp_path / "tiny")
    for file in (tmp_path / "tiny").glob("*/*"):
        heads = (
            ("recognition_", "bow_", "mask_lm_") if file.parent.name == "NSP" else ("recognition_", "bow_")
        )
        if file.name.startswith(heads):
            file.unlink()
    found = import_knover(tmp_path / "tiny", tmp_path / "out")
    assert len(found.absent["generation"]) == 8
    assert found.absent["evaluation"] == LM_HEAD
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"`{name}`" in card for names in found.absent.values() for name in names)
    whole, lacking = (
        PlatoBot.load(folder, device="cpu", decode=DecodeConfig(max_tokens=8)).reply(["hi , how are you ?"])
        for folder in (import_knover(release, tmp_path / "whole").out, tmp_path / "out")
    )
    assert lacking == whole
    stage: Any = load_stage(tmp_path / "out", ("2_gen",))
    assert stage.bag_of_words.transform.norm.weight.tolist() == [1.0] * 32
    assert 0.01 < float(stage.recognition.transform.weight.detach().std()) < 0.03


def test_training_state_is_ignored_by_name_and_never_opened(release: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "marker",))

    shutil.copytree(release, tmp_path / "tiny")
    moments = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")
    state = [
        *(f"word_embedding_{moment}" for moment in moments),
        "__lr_scheduler__",
        "__model__",
        "learning_rate_0",
        "loss_scaling_0",
        "num_good_steps_0",
        "num_bad_steps_0",
        "@LR_DECAY_COUNTER@",
    ]
    for name in state:
        (tmp_path / "tiny" / "Plato" / name).write_bytes(pickle.dumps(Evil()))
        (tmp_path / "tiny" / "Plato" / name).chmod(0)
    (tmp_path / "tiny" / "NSP" / "notes.txt").write_text("mine")
    sources, left_alone = find_sources(tmp_path / "tiny")
    assert {len(source.shapes) for source in sources} == {51, 46}
    assert left_alone == ["NSP/notes.txt"]
    for name in state:
        (tmp_path / "tiny" / "Plato" / name).chmod(0o600)
    import_knover(tmp_path / "tiny", tmp_path / "out")
    assert not (tmp_path / "marker").exists()
    assert_same_weights(tmp_path / "out", "Plato")


def test_names_are_one_table_in_both_directions() -> None:
    for names in (knover_names(24), paddlenlp_names(24, "generation"), paddlenlp_names(24, "evaluation")):
        assert len(set(names.values())) == len(names)
    for name, file in FIXTURES.items():
        theirs = knover_names(CONFIG.n_layer)
        ours = parameter_shapes(STAGES[name], CONFIG)
        assert {theirs[own] for own in released_shapes(ours)} == load(file).keys()
    generation, evaluation = (set(paddlenlp_names(2, part)) for part in ("generation", "evaluation"))
    assert not {own for own in generation | evaluation if own not in knover_names(2)}


# --------------------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def imported(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_knover(release, tmp_path_factory.mktemp("imported") / "tiny").out


def test_the_folder_has_what_it_should_and_no_paths_of_this_machine(release: Path, imported: Path) -> None:
    files = {path.relative_to(imported).as_posix(): path for path in imported.rglob("*") if path.is_file()}
    tokenizer = {f"tokenizer/{name}" for name in ("spm.model", "vocab.txt")}
    assert files.keys() - {"tokenizer/text.json"} == {
        "config.json",
        "config.json.sha256",
        "model.safetensors",
        "model.safetensors.sha256",
        "README.md",
        *tokenizer,
    }
    assert saved_tokenizer(imported).sha256 == Tokenizer.load(KNOVER).sha256
    for name in ("config.json", "README.md"):
        text = files[name].read_text()
        assert not re.search(r"(?<![\w:/])/\w+/\w+", text), text
        assert str(Path.home()) not in text
    card = files["README.md"].read_text()
    config = json.loads(files["config.json"].read_text())
    for said in (
        "`tiny`",
        config["source_sha256"],
        "license: apache-2.0",
        "plato2 import knover",
        "config.json",
    ):
        assert said in card
    assert files["model.safetensors"].stat().st_mode == files["config.json"].stat().st_mode


def test_the_hash_is_that_of_the_file(release: Path, tmp_path: Path) -> None:
    file = as_tar(release, tmp_path)
    found = import_knover(file, tmp_path / "out")
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    again = import_knover(file, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert again.sha256 == found.sha256


def test_large_weights_lie_in_several_files(imported: Path, tmp_path: Path) -> None:
    saved = read_saved(imported, ("2_gen",))
    parameters = {
        name: Lazy(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in saved.weights.items()
    }
    parts = {"generation": Part(saved.stage, saved.use, saved.arguments, parameters)}
    write_model_folder(tmp_path / "out", parts, saved_tokenizer(imported), "card", shard_bytes=100_000)
    files = weight_files(tmp_path / "out")
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(lazy.n_bytes for lazy in parameters.values())
    assert index["weight_map"].keys() == {f"generation.{name}" for name in parameters}
    again = read_saved(tmp_path / "out")
    assert again.weights.keys() == saved.weights.keys()
    assert all(torch.equal(tensor, saved.weights[name]) for name, tensor in again.weights.items())
    largest = max(lazy.n_bytes for lazy in parameters.values())
    assert all(file.stat().st_size < max(100_000, largest) + 10_000 for file in files)


def test_the_command_says_what_it_found(release: Path, tmp_path: Path) -> None:
    arguments = ["import", "knover", str(release), "--out", str(tmp_path / "a"), "--lower-case"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["models"]["generation"]["n_latent"] == 5
    assert summary["heads_from"] == "config.json"
    assert saved_tokenizer(tmp_path / "a").encode("HI") == saved_tokenizer(tmp_path / "a").encode("hi")
    done = CliRunner().invoke(app, ["import", "knover", str(release), "--out", str(tmp_path / "b")])
    assert done.exit_code == 0
    assert f"Next: plato2 chat --generation {tmp_path / 'b'} --evaluation {tmp_path / 'b'}" in done.stdout


# ----------------------------------------------------------------------------------------- what is refused

Damage = Callable[[Path], Path]
"""Makes a bad source in an empty folder; returns PATH."""


def a_block(folder: Path, **changed: np.ndarray | None) -> Path:
    arrays = random_arrays("2_gen", ONE_BLOCK) | {k.replace("__", "."): a for k, a in changed.items()}
    return write_arrays(
        folder / "Plato", {name: array for name, array in arrays.items() if array is not None}
    )


def edited(name: str, edit: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> Path:
        file = a_block(folder) / name
        file.write_bytes(edit(file.read_bytes()))
        return folder

    return damage


def changed(**arrays: np.ndarray | None) -> Damage:
    return lambda folder: a_block(folder, **arrays).parent


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def a_gap(folder: Path) -> Path:
    for file in a_block(folder).glob("encoder_layer_0_*"):
        shutil.copy(file, file.with_name(file.name.replace("layer_0", "layer_2")))
    return folder


def a_layer_far_away(folder: Path) -> Path:
    shutil.copy(
        a_block(folder) / "encoder_layer_0_ffn_fc_0.b_0",
        folder / "Plato" / "encoder_layer_999999999_ffn_fc_0.b_0",
    )
    (folder / "Plato" / "encoder_layer_0_ffn_fc_0.b_0").unlink()
    return folder


def two_geometries(folder: Path) -> Path:
    write_arrays(folder / "NSP", random_arrays("2_eval", ModelConfig(n_layer=1, n_head=2, hidden_size=128)))
    return a_block(folder).parent


def twice_the_same(folder: Path) -> Path:
    write_arrays(folder / "NSP", random_arrays("2_gen", ONE_BLOCK))
    return a_block(folder).parent


def several(folder: Path) -> Path:
    for name in ("24L", "32L"):
        (folder / name / "Plato").mkdir(parents=True)
    return folder


def a_file(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return damage


def hidden_48(folder: Path) -> Path:
    return write_arrays(folder / "Plato", random_arrays("2_gen", OTHER)).parent


def wrong_heads(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 7}))
    return hidden_48(folder)


def fewer_words(folder: Path) -> Path:
    arrays = random_arrays("2_gen", ModelConfig(n_layer=1, n_head=1, hidden_size=64, vocab_size=301))
    return write_arrays(folder / "Plato", arrays).parent


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Damage:
    def damage(folder: Path) -> Path:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        with tarfile.open(folder / "24L.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("24L/Plato/word_embedding"))
            archive.addfile(info)
        return folder / "24L.tar"

    return damage


def cut(mode: str, share: float | int) -> Damage:
    """A tar of which only a share, or all but some bytes, is there."""

    def damage(folder: Path) -> Path:
        path, stream = folder / f"24L.tar{mode.replace(':', '.').strip('w')}", io.BytesIO()
        with tarfile.open(fileobj=stream, mode=mode) as archive:
            archive.add(a_block(folder), "24L/Plato")
        shutil.rmtree(folder / "Plato")
        whole = stream.getvalue()
        path.write_bytes(whole[: int(len(whole) * share)] if isinstance(share, float) else whole[:share])
        return path

    return damage


def wrong_byte(folder: Path) -> Path:
    path = cut("w:gz", 1.0)(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def tar_cut_at_a_member(folder: Path) -> Path:
    """All of its members are whole; only what says that it ends is not there."""
    path = cut("w", 1.0)(folder)
    with tarfile.open(path) as archive:
        archive.getmembers()
        end = archive.offset
    path.write_bytes(path.read_bytes()[:end])
    return path


def a_file_in_a_file(folder: Path) -> Path:
    with tarfile.open(folder / "24L.tar", "w") as archive:
        for name in ("a", "a/b"):
            archive.addfile(tarfile.TarInfo(name))
    return folder / "24L.tar"


def a_number_beyond_the_machines(kind: bytes, data: bytes, date: int) -> Damage:
    """Of a member's date, or of the length of a record about the member after it."""

    def damage(folder: Path) -> Path:
        with tarfile.open(folder / "24L.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            info = tarfile.TarInfo("24L/Plato/word_embedding")
            info.type, info.size, info.mtime = kind, len(data), date
            archive.addfile(info, io.BytesIO(data))
            archive.addfile(tarfile.TarInfo("24L/Plato/pos_embedding"))
        return folder / "24L.tar"

    return damage


BAD: dict[str, tuple[Damage, str]] = {
    "cut in its header": (
        edited("word_embedding", lambda b: b[:19]),
        "word_embedding: truncated in its head",
    ),
    "cut in its values": (edited("word_embedding", lambda b: b[:-9]), "word_embedding: truncated: .* bytes"),
    "version": (edited("pos_embedding", lambda b: b"\1" + b[1:]), r"pos_embedding: .*\(version 1, not 0\)"),
    "text": (edited("pos_embedding", lambda b: b"a text, not a number" * 9), "pos_embedding: not a Paddle"),
    "dtype": (
        edited("sent_embedding", lambda b: b.replace(b"\x08\x05\x10", b"\x08\x03\x10", 1)),
        r"sent_embedding: dtype 3 \(int64\)",
    ),
    "shape": (
        changed(encoder_layer_0_ffn_fc_0__w_0=zeros(64, 64)),
        r"Plato: encoder_layer_0_ffn_fc_0.w_0 is \[64, 64\]; .* would be \[64, 256\]",
    ),
    "word table of one dimension": (
        changed(word_embedding=zeros(64)),
        r"Plato: word_embedding is \[64\]: fits",
    ),
    "empty word table": (changed(word_embedding=zeros(0, 64)), r"Plato: word_embedding is \[0, 64\]: fits"),
    "latents of no dimension": (changed(latent_embedding=zeros()), r"Plato: latent_embedding is \[\]: fits"),
    "roles of one dimension": (changed(role_embedding=zeros(64)), r"Plato: role_embedding is \[64\]: fits"),
    "latents of another size": (
        changed(latent_embedding=zeros(32, 5)),
        r"recognition_bias is \[20\]; .* \[5\]",
    ),
    "positions of another size": (
        changed(pos_embedding=zeros(9, 8)),
        r"pos_embedding is \[9, 8\]; .*\[9, 64\]",
    ),
    "missing word table": (changed(word_embedding=None), "(no Plato|Plato: word_embedding is missing)"),
    "missing": (changed(post_encoder_layer_norm_bias=None), "Plato: post_encoder_layer_norm_bias missing"),
    "missing language model": (changed(mask_lm_trans_fc__w_0=None), "Plato: mask_lm_trans_fc.w_0 missing"),
    "foreign": (changed(next_sent_fc__w_0=zeros(64, 2)), "Plato: .*(missing|does not belong)"),
    "a gap": (a_gap, "Plato: encoder_layer_1_.* and 15 more missing"),
    "a layer far away": (a_layer_far_away, "Plato: encoder_layer_0_ffn_fc_0.b_0 missing"),
    "two geometries": (two_geometries, "two geometries: n_head=1 in the generation model and 2 in the eval"),
    "twice the same": (twice_the_same, "Plato and NSP hold the same kind of model"),
    "several": (several, r"several models \(24L, 32L\)"),
    "empty": (lambda folder: folder, "no Plato or NSP folder"),
    "empty Plato": (lambda folder: (folder / "Plato").mkdir() or folder, "Plato: no blocks in it"),
    "nothing": (lambda folder: folder / "24L", "24L: no such file or folder"),
    "a text file": (a_file("README.md", b"hello\n" * 999), "README.md: neither a folder, a tar nor"),
    "an empty file": (a_file("24L.tar", b""), "24L.tar: neither a folder, a tar nor"),
    "a gzipped text": (a_file("24L.tar.gz", gzip.compress(b"hello" * 999)), "24L.tar.gz: neither a folder"),
    "a text as .pdparams": (a_file("24L.pdparams", b"hello"), "24L.pdparams: not a readable .pdparams file"),
    "an alien .pdparams": (
        a_file("a.pdparams", pickle.dumps({"bert.w": zeros(2)})),
        "a.pdparams: no PLATO-2 of Paddle",
    ),
    "hidden size 48": (hidden_48, "hidden size 48 is not a multiple of 64; give --n-head"),
    "wrong heads": (wrong_heads, r"7 attention heads \(config.json\) cannot share hidden size 48"),
    "another vocabulary": (fewer_words, "a model of 301 tokens; Knover's English tokenizer.* has 8001; give"),
    "an absolute member": (member("/etc/passwd"), "'/etc/passwd' is an absolute path: refused"),
    "a member with ..": (member("24L/../../x"), r"'24L/../../x' is a path with \.\.: refused"),
    "a symlink": (member("24L/NSP", tarfile.SYMTYPE, "/etc"), "'24L/NSP' is a link: refused"),
    "a hard link": (member("24L/x", tarfile.LNKTYPE, "24L/Plato/word_embedding"), "is a link: refused"),
    "a device": (member("24L/null", tarfile.CHRTYPE), "'24L/null' is a device: refused"),
    "a disk": (member("24L/sda", tarfile.BLKTYPE), "'24L/sda' is a device: refused"),
    "a fifo": (member("24L/pipe", tarfile.FIFOTYPE), "'24L/pipe' is a device: refused"),
    "a file in a file": (a_file_in_a_file, "24L.tar: cannot be unpacked"),
    "a tar cut in the middle": (cut("w", 0.5), r"24L.tar: not a complete tar \(.*\); download it again"),
    "a tar cut in a header": (tar_cut_at_a_member, "24L.tar: not a complete tar"),
    "a tar.gz cut in the middle": (cut("w:gz", 0.5), "24L.tar.gz: not a complete tar"),
    "a tar.gz cut near its start": (cut("w:gz", 60), "24L.tar.gz: (not a complete tar|neither)"),
    "a tar.gz cut in its header": (cut("w:gz", 5), "24L.tar.gz: (not a complete tar|neither)"),
    "a tar.gz with a wrong byte": (wrong_byte, "24L.tar.gz: not a complete tar"),
    "a tar.gz cut at its end": (cut("w:gz", -9), "24L.tar.gz: not a complete tar"),
    "a tar.bz2 cut in the middle": (cut("w:bz2", 0.5), "24L.tar.bz2: (not a complete tar|neither)"),
    "a tar.xz cut in the middle": (cut("w:xz", 0.5), "24L.tar.xz: (not a complete tar|neither)"),
    "a record without end": (
        a_number_beyond_the_machines(tarfile.XHDTYPE, b"9" * 30 + b" mtime=1\n", 0),
        "24L.tar: not a complete tar",
    ),
    "a date without end": (
        a_number_beyond_the_machines(tarfile.REGTYPE, b"", 2**80),
        "24L.tar: not a complete tar",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_bad_is_one_line_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    damage, message = BAD[what]
    (tmp_path / "source").mkdir()
    path = damage(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as found:
        import_knover(path, tmp_path / "models" / "out")
    assert "\n" not in str(found.value)
    assert str(tmp_path) in str(found.value)  # the file is named
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("n_head", [0, -4, 5])
def test_a_number_of_heads_that_cannot_be_is_refused(release: Path, tmp_path: Path, n_head: int) -> None:
    with pytest.raises(
        UserError, match=rf"{n_head} attention heads \(--n-head\) cannot share hidden size 32"
    ):
        import_knover(release, tmp_path / "out", n_head=n_head)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_never_written_to(release: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(UserError, match="already exists and is not empty"):
            import_knover(release, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_empty_folder_may_be_there_even_as_dot(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    import_knover(release, Path())
    assert_same_weights(tmp_path / "out", "Plato")


def test_a_tokenizer_that_does_not_fit_is_refused(release: Path, tmp_path: Path) -> None:
    train_tokenizer(small_tokenizer_texts(), n_pieces=40).save(tmp_path / "small")
    with pytest.raises(UserError, match=r"a model of 8001 tokens; the tokenizer in .*small has 41; give"):
        import_knover(release, tmp_path / "out", tokenizer=tmp_path / "small")
    with pytest.raises(UserError, match="no tokenizer at"):
        import_knover(release, tmp_path / "out", tokenizer=tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_tokenizer_beside_the_weights_is_taken(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(small_tokenizer_texts(), n_pieces=40)
    config = ModelConfig(n_layer=1, n_head=1, hidden_size=64, vocab_size=tokenizer.vocab_size)
    write_arrays(tmp_path / "tiny" / "NSP", random_arrays("2_eval", config))
    tokenizer.save(tmp_path / "tiny")
    found = import_knover(tmp_path / "tiny" / "NSP", tmp_path / "out")
    assert found.tokenizer_from == "tiny"
    assert saved_tokenizer(tmp_path / "out").sha256 == tokenizer.sha256


def test_an_evil_pdparams_runs_and_writes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "marker",))

    (tmp_path / "24L.pdparams").write_bytes(pickle.dumps({"latent_weight": Evil()}))
    command = ["import", "knover", str(tmp_path / "24L.pdparams"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert re.search(r"^error: .*24L.pdparams: the pickle wants to call pathlib", done.stderr)
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["24L.pdparams"]


def test_a_full_disk_leaves_nothing(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plato2.weights.model_folder.save_tensors", fail)
    with pytest.raises(UserError, match=r"--out .*out: could not be written \(.*No space left"):
        import_knover(release, tmp_path / "models" / "out")
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize(("names", "n_layer"), [(("Plato",), 24), (("Plato", "NSP"), 12)])
def test_the_peak_of_memory_is_below_the_size_of_the_weights(
    tmp_path: Path, names: tuple[str, ...], n_layer: int
) -> None:
    """314M parameters in one or two models; required are at most 1.3 times."""
    config = ModelConfig(n_layer=n_layer, n_head=16, hidden_size=1024)
    for name in names:
        write_arrays(tmp_path / "24L" / name, random_arrays(STAGES[name], config))
    n_bytes = sum(file.stat().st_size for file in (tmp_path / "24L").rglob("*") if file.is_file())
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "plato2", "import", "knover", str(tmp_path / "24L"), "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    print(f"peak {peak / 1e9:.2f} GB, weights {n_bytes / 1e9:.2f} GB")
    assert peak < 1.3 * n_bytes
