"""Low-rank training of a pretrained decoder: what is trained, what is stored, and on which base it stands."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import mostly_slow, rounded, write_decoder, written_once
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plato2.batch import Unit
from plato2.config import DecodeConfig, ModelConfig, UserError
from plato2.data.decoder_tokenizer import DecoderTokenizer
from plato2.data.units import pack
from plato2.files import file_sha256
from plato2.model import masks
from plato2.model.cpu import ROWS_STEP
from plato2.model.decoder_folder import from_folder
from plato2.model.networks import EvaluationNetwork, GenerationNetwork
from plato2.model.pretrained import build_backbone, is_of_base
from plato2.runs.folder import RunFolder, fingerprint, go_on
from plato2.runs.plan import decoder_products, step_flops
from plato2.runs.start import warm_start, with_base_of
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration, Stage
from plato2.stages.optim import adamw
from plato2.talk.decode import decode
from plato2.talk.rank import coherence
from plato2.talk.score import Record, score
from plato2.weights.base import base_sha256, check_base, fill_base, with_base
from plato2.weights.folder import Saved, _fill

PAIRS = [
    ([1, 9, 30, 200, 2, 41, 8, 2], [1, 77, 12, 13, 2]),
    ([1, 60, 2], [1, 44, 200, 9, 150, 31, 8, 2]),
]
MOSTLY_SLOW = mostly_slow("llama", "gpt2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLATO2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random decoder of a family, written once."""
    return written_once(tmp_path_factory.mktemp("decoders"))


def read(folder: Path, **values: Any) -> ModelConfig:
    given = {"max_position": 64, "dropout": 0.0, "n_latent": 5, "adapter": "lora", "adapter_rank": 4}
    config = ModelConfig(path=str(folder), **(given | values))
    return with_base(from_folder(config, DecoderTokenizer.from_model))


def unit_of(stage: Stage) -> Unit:
    has_latent = isinstance(stage, FineGeneration)
    unit, _ = pack(PAIRS, drop_last=True, latent_slot=stage.model_config.mask_id if has_latent else None)
    more = {"sample_key": torch.arange(len(PAIRS)), "coherence_labels": torch.arange(len(PAIRS)) % 2}
    return {**unit, **more}  # type: ignore[typeddict-item]


def total(stage: Stage, unit: Unit) -> Tensor:
    terms = stage.losses(unit)
    return torch.stack([terms[term].sum() for term in stage.loss_terms]).sum()


def trained(stage: Stage, steps: int = 3) -> Stage:
    optimizer = adamw(stage, stage.optim_config)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(steps):
        total(stage, unit_of(stage)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return stage.eval()


@pytest.mark.parametrize("family", MOSTLY_SLOW)
def test_step_0_is_the_base_itself_and_only_what_is_added_learns(
    folder: Callable[[str], Path], family: str
) -> None:
    stages = [FineGeneration(read(folder(family), adapter=adapter)) for adapter in ("lora", "none")]
    assert all(module.training for stage in stages for module in stage.modules())
    unit = unit_of(stages[0])
    low_rank, whole = (stage.losses(unit) for stage in stages)
    assert all(torch.equal(low_rank[term], whole[term]) for term in whole)  # B = 0, and the same heads
    stage = stages[0]
    before = {name: weight.clone() for name, weight in stage.named_parameters()}
    trained(stage)
    for name, weight in stage.named_parameters():
        assert torch.equal(weight, before[name]) == is_of_base(name), name
    kept = stage.state_dict()
    assert {name for name, _ in stage.named_parameters() if not is_of_base(name)} == set(kept)
    linear = [name for name, module in stages[1].backbone.blocks.named_modules() if is_linear(module)]
    assert len([name for name in kept if ".lora_A." in name]) == len(linear)
    assert [name for name in kept if name.startswith("backbone.added")]


def is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


@pytest.mark.parametrize("family", MOSTLY_SLOW)
def test_a_checkpoint_and_its_base_are_enough(
    folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    stage = trained(CoarseGeneration(read(folder(family))))
    unit = unit_of(stage)
    with torch.device("meta"):
        network = GenerationNetwork(stage.model_config, has_latents=False)
    _fill(network, saved(stage, tmp_path), only_shared=True)
    with torch.no_grad():
        assert torch.equal(log_probs(network.eval().backbone, unit), log_probs(stage.backbone, unit))
    again = CoarseGeneration(stage.model_config, seed=3)
    again.load_state_dict(dict(stage.state_dict()))  # strictly
    assert torch.equal(total(again.eval(), unit), total(stage, unit))
    lacking = {name: weight for name, weight in stage.state_dict().items() if ".lora_B." not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_B"):
        again.load_state_dict(lacking)


def saved(stage: Stage, folder: Path) -> Saved:
    arguments = {"model": vars(stage.model_config), "seed": 1}
    weights = {name: weight.clone() for name, weight in stage.state_dict().items()}
    return Saved(folder, stage.name, stage.use, arguments, weights, folder, None)


@torch.no_grad()
def log_probs(backbone: Any, unit: Unit) -> Tensor:
    mask = backbone.mask(unit["segment_ids"], unit["type_ids"])
    x = backbone.embed_unit(unit)
    h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])
    logits: Tensor = backbone.lm_logits(h)
    return logits


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_two_adapters_on_one_base_are_what_each_is_alone(folder: Callable[[str], Path], family: str) -> None:
    """In turns, with one copy of the base's weights in memory."""
    config = read(folder(family))
    first, second = trained(CoarseGeneration(config)), trained(CoherenceEstimation(config), 5)
    unit, rated = unit_of(first), pack(PAIRS, drop_last=False)[0]
    generation = GenerationNetwork(config, has_latents=False).eval()
    generation.load_state_dict(first.state_dict())
    evaluation = EvaluationNetwork(config).eval()
    evaluation.backbone = build_backbone(config, generation.backbone, "evaluation").eval()
    renamed = {name.replace(".default.", ".evaluation."): w for name, w in second.state_dict().items()}
    evaluation.load_state_dict(renamed)
    assert set(evaluation.state_dict()) == set(renamed)
    for _ in range(2):
        assert torch.equal(log_probs(generation.backbone, unit), log_probs(first.backbone, unit))
        heard = [
            network.coherence(
                network.backbone.encode(
                    network.backbone.embed_unit(rated),
                    network.backbone.mask(rated["segment_ids"]),
                    read=rated["sample_index"],
                    pos_ids=rated["pos_ids"],
                )
            )
            for network in (evaluation, second)
        ]
        assert torch.equal(*heard)
    assert evaluation.backbone.decoder is generation.backbone.decoder
    other = read(folder(family), adapter="none")
    with pytest.raises(ValueError, match="not adapters of one base"):
        build_backbone(config, build_backbone(other), "evaluation")


def test_the_hash_is_that_of_sha256sum_and_read_once(
    folder: Callable[[str], Path], tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = write_decoder(tmp_path / "d")
    weights = decoder / "model.safetensors"
    monkeypatch.setattr("plato2.weights.base.SETTLED_S", -1.0)
    assert base_sha256(decoder) == file_sha256(weights)
    (kept,) = own_cache.rglob("*.json")
    kept.write_text(kept.read_text().replace(file_sha256(weights), "f" * 64))
    assert base_sha256(decoder) == "f" * 64  # not read again
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert base_sha256(decoder) == file_sha256(weights) != "f" * 64
    kept.write_text("{")
    assert base_sha256(decoder) == file_sha256(weights)
    monkeypatch.setenv("PLATO2_CACHE", str(weights))  # no folder can be made there
    assert base_sha256(decoder) == file_sha256(weights)


def test_of_several_files_the_hash_is_that_of_their_lines(tmp_path: Path) -> None:
    import hashlib
    import subprocess

    import transformers

    decoder = write_decoder(tmp_path / "d")
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    (decoder / "model.safetensors").unlink()
    model.save_pretrained(decoder, max_shard_size="20KB")
    names = sorted(file.name for file in decoder.glob("*.safetensors"))
    assert len(names) > 1
    lines = subprocess.run(["sha256sum", *names], cwd=decoder, capture_output=True, check=True).stdout
    assert base_sha256(decoder) == hashlib.sha256(lines).hexdigest()
    (decoder / names[1]).unlink()
    with pytest.raises(UserError, match=rf"{names[1]}: missing; get the folder again"):
        base_sha256(decoder)


def test_an_adapter_stays_with_its_base(tmp_path: Path) -> None:
    decoder = write_decoder(tmp_path / "d")
    config = read(decoder)
    stage = CoarseGeneration(config)
    with torch.device("meta"):
        network = GenerationNetwork(config, has_latents=False)
    weights = decoder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"an adapter of other weights \(sha256 [0-9a-f]{12}\) than those in"):
        _fill(network, saved(stage, tmp_path), only_shared=True)
    decoder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"an adapter of .*/d, which is not there; put it back"):
        check_base(config, tmp_path)


def checkpoint(stage: Stage, file: Path) -> Path:
    """What a checkpoint has that weights are read from."""
    hyper = {"model": asdict(stage.model_config), "optim": {}, "seed": 1}
    about = {"stage": stage.name, "use": asdict(stage.use), "hyper_parameters": hyper}
    torch.save({"state_dict": stage.state_dict(), **about}, file)
    return file


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_an_adapter_goes_on_from_a_run_that_trained_everything(
    folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Its base is then that run's checkpoint, and that of the adapters after it, too."""
    config = read(folder(family))
    whole = trained(CoarseGeneration(read(folder(family), adapter="none")))
    first = checkpoint(whole, tmp_path / "whole.ckpt")
    unit = unit_of(whole)
    stage = CoarseGeneration(begun := with_base_of(config, first))
    assert begun.base_sha256 == file_sha256(first)
    fill_base(stage.backbone, begun)
    assert f"on all that {first} has trained" in warm_start(stage, first, ("1_coarse",), "")
    assert torch.equal(total(stage.eval(), unit), total(whole, unit))
    second = checkpoint(trained(stage), tmp_path / "adapter.ckpt")
    after = CoarseGeneration(begun := with_base_of(config, second))
    fill_base(after.backbone, begun)
    warm_start(after, second, ("1_coarse",), "")
    assert torch.equal(total(after.eval(), unit), total(stage, unit))
    with torch.device("meta"):
        network = GenerationNetwork(begun, has_latents=False)
    _fill(network, saved(after, tmp_path), only_shared=True)
    assert torch.equal(log_probs(network.eval().backbone, unit), log_probs(after.backbone, unit))
    checkpoint(stage, first)
    with pytest.raises(UserError, match=r"adapter.ckpt: an adapter of other weights"):
        with_base_of(config, second)
    first.unlink()
    with pytest.raises(UserError, match=r"an adapter of .*whole.ckpt, which is not there"):
        with_base_of(config, second)


def test_what_an_adapter_cannot_go_on_from(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint(CoarseGeneration(read(folder("llama"))), tmp_path / "a.ckpt")

    def refused(config: ModelConfig) -> str:
        with pytest.raises(UserError) as told:
            warm_start(CoarseGeneration(config), path, ("1_coarse",), "")
        return str(told.value)

    assert "model.adapter=none: init_from=" in refused(read(folder("llama"), adapter="none"))
    assert "was trained with model.adapter_rank=4; give that" in refused(
        read(folder("llama"), adapter_rank=2)
    )
    assert "was trained with model.adapter_alpha=32.0" in refused(read(folder("llama"), adapter_alpha=1.0))
    other = write_decoder(tmp_path / "other", initializer_range=0.1)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert "an adapter of other weights (sha256" in refused(read(other))
    whole = checkpoint(CoarseGeneration(read(folder("llama"), adapter="none")), tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=r"no run of the decoder in model.path="):
        warm_start(CoarseGeneration(read(folder("gpt2"))), whole, ("1_coarse",), "")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"adapter_rank": 0}, "model.adapter_rank=0: must be at least 1"),
        ({"adapter_alpha": 0.0}, "model.adapter_alpha=0.0: must be a number above 0"),
        ({"adapter_alpha": float("nan")}, "model.adapter_alpha=nan: must be a number above 0"),
        ({"base_dtype": "int8"}, "model.base_dtype=int8: use one of float32, bfloat16"),
        (
            {"base_dtype": "bfloat16", "adapter": "none"},
            "model.base_dtype=bfloat16: is for frozen weights; leave it out, or give model.adapter=lora",
        ),
        ({"adapter": "dora"}, "model.adapter=dora: use one of none, lora"),
        ({"path": ""}, "model.adapter=lora: is for a pretrained decoder; leave it out, or give model=pretr"),
    ],
)
def test_values_that_no_adapter_has(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        ModelConfig(**({"path": "x", "adapter": "lora"} | values))


@pytest.mark.parametrize(("adapter", "extra"), [("lora", "lora"), ("none", "huggingface")])
def test_without_transformers_the_extra_is_named(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, adapter: str, extra: str
) -> None:
    """That of low-rank training has it, too."""
    decoder = folder("llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=rf"model.path: needs transformers; pip install '\.\[{extra}\]'"):
        read(decoder, adapter=adapter)


def test_without_peft_the_extra_is_named(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    config = read(folder("llama"))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"model.adapter=lora: needs peft; pip install '\.\[lora\]'"):
        build_backbone(config)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_flops_are_what_pytorch_counts(folder: Callable[[str], Path], adapter: str) -> None:
    """Three products for a weight that learns, two for one that is frozen."""
    backbone = build_backbone(read(folder("qwen3"), adapter=adapter, max_position=64))
    rows, length, targets = 3, 40, ROWS_STEP
    ids = torch.full((rows, length), 9)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no fused kernel
        x = backbone.embed(ids, ids * 0, ids)
        mask = masks.additive(masks.same_sample(ids), x.dtype)
        h = backbone.encode(x, mask, pos_ids=torch.arange(length).expand(rows, -1))
        logits = backbone.lm_logits(h.flatten(0, 1).repeat(2, 1)[:targets])
        logits[:, 3:9].sum().backward()
    found = decoder_products(backbone)
    planned = step_flops(backbone.config, rows * length, rows, targets, 1, found)
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_a_run_does_not_resume_on_another_base(tmp_path: Path) -> None:
    config = {"model": {"path": "d", "adapter": "lora", "base_sha256": "a" * 64}}
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_lineage(status="running", config=config)
    with pytest.raises(UserError, match=r"model.path=d: the weights there \(sha256 b{12}\) are not th"):
        go_on(run, {"model": config["model"] | {"base_sha256": "b" * 64}})
    moved = {"model": config["model"] | {"path": "/new/d"}}
    assert go_on(run, moved) == (
        None,
        f"run {run.path} has no checkpoint yet: starting it from the beginning",
    )
    assert fingerprint(moved) == fingerprint(config)
    whole = {"path": "d", "adapter": "none"}  # a run from before the hash: its folder tells the decoder
    run.write_lineage(config={"model": whole})
    here = {"model": {**whole, "base_sha256": "a" * 64}}
    assert go_on(run, here)
    with pytest.raises(UserError, match=r"model.path=/new/d: .* was started with model.path=d; give the old"):
        go_on(run, {"model": here["model"] | {"path": "/new/d"}})


# ------------------------------------------------------------------------------------- the base in bfloat16


def step(stage: Stage, unit: Unit) -> dict[str, Tensor]:
    """Losses and gradients as bf16-mixed computes them."""
    with torch.autocast("cpu", torch.bfloat16):
        terms = stage.losses(unit)
    torch.stack([terms[term].sum() for term in stage.loss_terms]).sum().backward()
    grads = {name: weight.grad for name, weight in stage.named_parameters() if weight.grad is not None}
    return {**{term: value.detach() for term, value in terms.items()}, **grads}


@pytest.mark.parametrize("family", mostly_slow("llama", "gpt2"))
def test_with_a_base_in_bfloat16_bf16_mixed_computes_the_same(
    folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """Bit for bit, where the folder's weights are bfloat16: autocast rounds them to that anyway.

    Not of Gemma 3, which multiplies word embeddings by a number in their own precision: one more rounding.
    """
    decoder = rounded(folder(family), tmp_path / "d")
    kept, whole = (
        FineGeneration(read(decoder, base_dtype=dtype, adapter_rank=4)) for dtype in ("bfloat16", "float32")
    )
    dtypes = {name: weight.dtype for name, weight in kept.named_parameters()}
    for name, weight in kept.named_parameters():
        is_half = is_of_base(name) and weight.ndim == 2
        assert dtypes[name] == (torch.bfloat16 if is_half else torch.float32), name
    size = sum(weight.nbytes for name, weight in whole.named_parameters() if is_of_base(name))
    own = sum(weight.nbytes for name, weight in kept.named_parameters() if is_of_base(name))
    assert own < 0.53 * size
    unit = unit_of(whole)
    for _ in range(2):
        found, known = step(kept, unit), step(whole, unit)
        assert found.keys() == known.keys()
        for name, value in known.items():
            if family == "gemma3_text":
                assert (found[name] - value).norm() <= 0.05 * value.norm(), name
            else:
                assert torch.equal(found[name], value), name
        for stage in (kept, whole):
            for weight in stage.parameters():
                # gently: after a leap every posterior is sure of one latent, and rounding is all that is left
                weight.data -= 1e-3 * (weight.grad if weight.grad is not None else 0)
                weight.grad = None
        own = dict(whole.named_parameters())  # the second step, too, is compared by itself
        for name, weight in kept.named_parameters():
            if not is_of_base(name):
                weight.data.copy_(own[name].data)
    assert kept.state_dict().keys() == whole.state_dict().keys()


def test_a_decoder_in_float32_is_rounded_once(folder: Callable[[str], Path]) -> None:
    """Vectors stay as they are; what a checkpoint holds and what talks does not know of it."""
    kept, whole = (CoarseGeneration(read(folder("llama"), base_dtype=d)) for d in ("bfloat16", "float32"))
    known = dict(whole.named_parameters())
    for name, weight in kept.named_parameters():
        own = known[name].bfloat16() if is_of_base(name) and weight.ndim == 2 else known[name]
        assert torch.equal(weight, own), name
    unit = unit_of(whole)
    found, expected = step(kept, unit), step(whole, unit)
    torch.testing.assert_close(found["nll"], expected["nll"], rtol=0.05, atol=0.05)
    assert not torch.equal(found["nll"], expected["nll"])  # word embeddings are rounded


@pytest.mark.parametrize("spoilt", ["shapes", "half", "missing"])
def test_a_base_in_bfloat16_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, spoilt: str) -> None:
    decoder = write_decoder(tmp_path)
    config, weights = decoder / "config.json", decoder / "model.safetensors"
    if spoilt == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        changed = {"hidden_size": 40, "head_dim": 10} if spoilt == "shapes" else {"num_hidden_layers": 3}
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    told = "get the folder again" if spoilt == "missing" else "cannot be read"
    with pytest.raises(UserError, match=rf"model\.path=.*{told}") as found:
        CoarseGeneration(read(decoder, base_dtype="bfloat16"))
    assert "\n" not in str(found.value)


def test_while_it_trains_such_a_model_talks(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Validations show replies, scores and choices, outside of the Trainer's autocast."""
    decoder = rounded(folder("llama"), tmp_path / "d")
    kept, whole = (FineGeneration(read(decoder, base_dtype=d)).eval() for d in ("bfloat16", "float32"))
    (context, _), *_ = PAIRS
    scored, known = (score(stage, [Record(c, r) for c, r in PAIRS]) for stage in (kept, whole))
    for found, expected in zip(scored, known, strict=True):
        assert found["nll_by_latent"] == pytest.approx(expected["nll_by_latent"], rel=0.03)
    (candidates,) = decode(kept, [context], DecodeConfig(max_tokens=5))
    assert len(candidates) == 5
    for latent, candidate in enumerate(candidates):
        end = [] if candidate.has_end else [2]  # a response that was cut off is scored with an end
        (again,) = score(whole, [Record(context, [1, *candidate.token_ids, *end])])
        own, n = again["nll_by_latent"][latent], len(candidate.token_ids)
        assert -candidate.log_prob * n < own * 1.03
        assert end or -candidate.log_prob * n == pytest.approx(own, rel=0.03)
    judges = (CoherenceEstimation(read(decoder, base_dtype=d)).eval() for d in ("bfloat16", "float32"))
    pairs = [(context, response[1:-1]) for _, response in PAIRS]
    found, expected = (coherence(judge, pairs) for judge in judges)
    assert found == pytest.approx(expected, abs=0.02)
