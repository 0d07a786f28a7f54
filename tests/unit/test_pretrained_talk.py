"""Runs made of a pretrained decoder talk: on one base in memory, in int8, exported, alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import HI, client_of, texts
from decoders import FAMILIES, mostly_slow, write_decoder
from runs import checkpoint_of
from serving import end, start
from small import write_dialogues
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import DecodeConfig, ModelConfig, UserError
from plato2.data.decoder_tokenizer import DecoderTokenizer
from plato2.model.decoder_folder import from_folder
from plato2.runs.folder import RunFolder
from plato2.stages import known_stages
from plato2.talk.bot import PlatoBot
from plato2.weights.base import with_base
from plato2.weights.folder import load_evaluation, load_generation

MOSTLY_SLOW = mostly_slow("llama")
DECODE = DecodeConfig(max_tokens=8, top_k=5)
TURNS = ["bon kan", "dus pel tin"]
Runs = tuple[Path, Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATO2_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runs]:
    """A run of stage 2.1 and one of 2.2 on a random decoder, written once."""
    base = tmp_path_factory.mktemp("runs")

    @cache
    def written(family: str, adapter: str, latent_at: str) -> Runs:
        decoder = base / family
        if not decoder.exists():
            write_decoder(decoder, family)
        folder = base / f"{family}-{adapter}-{latent_at}"
        return tuple(  # type: ignore[return-value]
            write_run(folder / stage, decoder, stage, adapter=adapter, latent_at=latent_at)
            for stage in ("2_gen", "2_eval")
        )

    return lambda family, adapter="lora", latent_at="front": written(family, adapter, latent_at)


def write_run(folder: Path, decoder: Path, name: str, **values: Any) -> Path:
    """A run as train.py writes it, whose additions to the decoder are random and large enough to matter."""
    given = {"max_position": 64, "dropout": 0.0, "n_latent": 5, "adapter_rank": 4} | values
    config = from_folder(ModelConfig(path=str(decoder), **given), DecoderTokenizer.from_model)
    stage = known_stages()[name](with_base(config))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for weight_name, weight in stage.named_parameters():
            if weight_name in stage.state_dict() and (
                config.has_adapter or ("decoder" not in weight_name and "lm_head" not in weight_name)
            ):
                weight.normal_(0.0, 0.3, generator=generator)
    run, tokenizer = RunFolder(folder), DecoderTokenizer.from_model(decoder)
    run.checkpoints.mkdir(parents=True)
    tokenizer.save(run.tokenizer)
    torch.save(checkpoint_of(stage, tokenizer), run.last)
    use = asdict(stage.use)
    run.write_lineage(
        stage=name, use=use, monitor=list(stage.monitor), model="pretrained", run_id="a", status="finished"
    )
    torch.save(checkpoint_of(stage, tokenizer), run.best)
    return folder


def plato2(*arguments: object, stdin: str = "") -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result.stdout


def said(bot: PlatoBot) -> list[tuple[Any, ...]]:
    """What the bot answers, and how it ranks it."""
    found = bot.reply(TURNS, DECODE).candidates
    return [
        (c.text, c.latent, pytest.approx(c.log_prob, abs=1e-4), pytest.approx(c.coherence, abs=1e-4))
        for c in found
    ]


def refused(*arguments: object) -> str:
    """What a command says that ends with one line for the user."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


# ------------------------------------------------------------------------------------- one base in memory


@pytest.mark.parametrize("family", MOSTLY_SLOW)
def test_both_adapters_talk_on_one_base(runs: Callable[..., Runs], family: str) -> None:
    """The bot says what two separate models say, and holds the decoder's own weights once."""
    generation, evaluation = runs(family)
    bot = PlatoBot.load(generation, evaluation, "cpu")
    apart = PlatoBot(load_generation(generation), bot.tokenizer, load_evaluation(evaluation))
    for _ in range(2):  # also after the other adapter was at work
        assert said(bot) == said(apart)
    assert bot.evaluation is not None
    assert apart.evaluation is not None
    first, second = bot.generation.backbone, bot.evaluation.backbone
    assert first.decoder is second.decoder
    assert first.lm_head is second.lm_head

    def n_bytes(*networks: Any) -> int:
        kept = {weight.data_ptr(): weight.nbytes for one in networks for weight in one.parameters()}
        return sum(kept.values())

    base = sum(w.nbytes for n, w in apart.generation.backbone.decoder.named_parameters() if ".lora_" not in n)
    base += 0 if first.lm_head is None else first.lm_head.weight.nbytes
    assert n_bytes(apart.generation, apart.evaluation) - n_bytes(bot.generation, bot.evaluation) == base


def test_models_with_other_bases_do_not_share(runs: Callable[..., Runs], tmp_path: Path) -> None:
    whole, adapter = runs("llama", "none"), runs("llama")
    other = write_run(
        tmp_path / "run",
        write_decoder(tmp_path / "other", "llama", num_hidden_layers=1),
        "2_eval",
        adapter="lora",
    )
    for generation, evaluation in (
        (adapter[0], whole[1]),
        (whole[0], adapter[1]),
        (whole[0], whole[1]),
        (adapter[0], other),
    ):
        bot = PlatoBot.load(generation, evaluation, "cpu")
        assert bot.evaluation is not None
        assert bot.evaluation.backbone.decoder is not bot.generation.backbone.decoder
        assert said(bot) == said(
            PlatoBot(load_generation(generation), bot.tokenizer, load_evaluation(evaluation))
        )


def test_adapters_talk_whatever_their_base_was_kept_in_while_they_were_trained(
    runs: Callable[..., Runs], tmp_path: Path
) -> None:
    """`model.base_dtype` is of training: the base is one, in the precision that talking is asked for."""
    generation, evaluation = runs("llama")
    model = torch.load(RunFolder(generation).best, weights_only=True)["hyper_parameters"]["model"]
    half = [
        write_run(tmp_path / name, Path(model["path"]), name, adapter="lora", base_dtype="bfloat16")
        for name in ("2_gen", "2_eval")
    ]
    stored = torch.load(RunFolder(half[0]).best, weights_only=True)["hyper_parameters"]["model"]
    assert (model["base_dtype"], stored["base_dtype"]) == ("float32", "bfloat16")
    known = said(PlatoBot.load(generation, evaluation, "cpu"))
    for pair in ((half[0], evaluation), (generation, half[1])):
        bot = PlatoBot.load(*pair, "cpu")
        assert said(bot) == known
        assert bot.evaluation is not None
        assert bot.evaluation.backbone.decoder is bot.generation.backbone.decoder
        assert {weight.dtype for weight in bot.generation.parameters()} == {torch.float32}
    given = ["--generation", half[0], "--evaluation", evaluation, "--max-tokens", 8, "--top-k", 5]
    candidates = json.loads(plato2("reply", *given, "--json", *TURNS))["candidates"]
    assert sorted(found["text"] for found in candidates) == sorted(text for text, *_ in known)
    assert plato2("chat", *given, "--precision", "bfloat16", stdin="bon kan\n").strip()
    plato2("export", "adapter", *given[:4], "--out", tmp_path / "out")
    assert said(PlatoBot.load(tmp_path / "out", device="cpu")) == known


# -------------------------------------------------------------------------------------------------- int8


@pytest.mark.parametrize("family", MOSTLY_SLOW)
@pytest.mark.parametrize("adapter", ["lora", pytest.param("none", marks=pytest.mark.slow)])
def test_in_int8_the_blocks_take_a_quarter_and_the_bot_talks(
    runs: Callable[..., Runs], family: str, adapter: str
) -> None:
    generation, evaluation = runs(family, adapter)
    bot = PlatoBot.load(generation, evaluation, "cpu", precision="int8")
    candidates = bot.reply(TURNS, DECODE).candidates
    assert sorted(c.latent for c in candidates) == [0, 1, 2, 3, 4]
    whole = PlatoBot.load(generation, evaluation, "cpu")
    assert bot.evaluation is not None
    assert whole.evaluation is not None
    from plato2.talk.rank import coherence

    pairs = [(bot.encode(TURNS), c.token_ids) for c in candidates]
    change = torch.tensor(coherence(bot.evaluation, pairs)) - torch.tensor(coherence(whole.evaluation, pairs))
    assert 0 < change.abs().max() < 0.25  # probabilities; bfloat16 alone changes them by as much
    for network in (bot.generation, bot.evaluation):
        matrices = {
            name: weight
            for name, weight in network.backbone.blocks.named_parameters()
            if weight.ndim == 2 and ".lora_" not in name
        }
        assert len(matrices) >= 8
        assert {weight.qdata.dtype for weight in matrices.values()} == {torch.int8}
        others = {
            w.dtype
            for n, w in network.named_parameters()
            if n.removeprefix("backbone.decoder.") and w.ndim == 1
        }
        assert others == {torch.bfloat16}
    shares = bot.generation.backbone.decoder is bot.evaluation.backbone.decoder
    assert shares == (adapter == "lora")


def test_int8_is_for_a_cpu_and_its_words_name_the_extra(
    runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    generation, _ = runs("llama")
    monkeypatch.setattr("plato2.talk.bot.pick_device", lambda device: torch.device("cuda"))
    with pytest.raises(UserError, match=r"--precision int8: is for a CPU, not cuda; use bfloat16"):
        PlatoBot.load(generation, precision="int8")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"precision=int8: needs torchao; pip install '\.\[int8\]'"):
        PlatoBot.load(generation, device="cpu", precision="int8")


# ------------------------------------------------------------------------------------------------- exports


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "adapter"), [*((family, "lora") for family in FAMILIES), ("llama", "none"), ("gpt2", "none")]
)
def test_an_exported_folder_says_the_same_without_the_decoder(
    runs: Callable[..., Runs], family: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are merged; plato2 reads the folder, and so does transformers by its plain loader."""
    generation, evaluation = runs(family, adapter)
    out = tmp_path / "out"
    plato2("export", "hf", "--generation", generation, "--evaluation", evaluation, "--out", out)
    config = json.loads((out / "config.json").read_text())
    for part in ("generation", "evaluation"):
        model = config[part]["arguments"]["model"]
        assert (model["path"], model["adapter"], model["base_sha256"]) == ("", "none", "")
    assert not [
        name for name in names_in(out / "model.safetensors") if "lora" in name or "base_layer" in name
    ]
    expected = said(PlatoBot.load(generation, evaluation, "cpu"))
    assert said(PlatoBot.load(out, device="cpu")) == expected
    import transformers

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    found = model.reply(TURNS, max_tokens=8, top_k=5)
    assert [(c.text, c.latent, c.log_prob, c.coherence) for c in found] == expected
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    assert [c.text for c in again.reply(TURNS, max_tokens=8, top_k=5)] == [text for text, *_ in expected]


@pytest.mark.slow
@torch.no_grad()
def test_a_latent_after_the_context_is_exported_too(
    runs: Callable[..., Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies, and the logits of `forward`, are those of the run."""
    import transformers

    generation, evaluation = runs("llama", latent_at="response")
    out = tmp_path / "out"
    plato2("export", "hf", "--generation", generation, "--evaluation", evaluation, "--out", out)
    bot = PlatoBot.load(generation, evaluation, "cpu")
    assert said(PlatoBot.load(out, device="cpu")) == said(bot)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True).eval()
    context, hypothesis = bot.encode(TURNS), bot.reply(TURNS, replace(DECODE, top_k=1)).candidates[0]
    ids = torch.tensor([[*context, 1, *hypothesis.token_ids]])
    types = torch.tensor([[0] * len(context) + [1] * (1 + len(hypothesis.token_ids))])
    logits = model(ids, types, latent_ids=torch.tensor([hypothesis.latent])).logits[0]
    logits[:, [0, bot.tokenizer.mask_id]] = float("-inf")
    logits[len(context), 2] = float("-inf")  # not at once
    told = logits[len(context) : -1].argmax(-1).tolist()
    assert told == list(hypothesis.token_ids)
    to_knover = ("export", "knover", "--generation", generation, "--out", tmp_path / "knover")
    assert "Knover has no format; use plato2 export hf" in refused(*to_knover)


@pytest.mark.parametrize("family", MOSTLY_SLOW)
@torch.no_grad()
def test_exported_adapters_are_pefts_and_talk(runs: Callable[..., Runs], family: str, tmp_path: Path) -> None:
    """peft computes what the backbone does; plato2 reads the folder, in which the decoder is linked."""
    import peft
    import transformers

    generation, evaluation = runs(family)
    out = tmp_path / "out"
    plato2("export", "adapter", "--generation", generation, "--evaluation", evaluation, "--out", out)
    base = (out / "base").resolve()
    assert str(base) not in (out / "config.json").read_text()
    assert not [name for name in names_in(out / "model.safetensors") if "decoder" in name]
    expected = said(PlatoBot.load(generation, evaluation, "cpu"))
    bot = PlatoBot.load(out, device="cpu")
    assert said(bot) == expected
    assert bot.evaluation is not None
    assert bot.generation.backbone.decoder is bot.evaluation.backbone.decoder
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tuned = peft.PeftModel.from_pretrained(plain, out / "generation").eval()
    network = load_generation(generation)
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    x = network.backbone.decoder.get_input_embeddings()(ids)
    mask = torch.full((1, 1, 5, 5), float("-inf")).triu(1)
    h = network.backbone.encode(x, mask, pos_ids=torch.arange(5)[None])
    logits = tuned(inputs_embeds=x).logits[0]
    torch.testing.assert_close(
        network.backbone._products(h[0]), cap(logits, plain)[:, :300], atol=1e-4, rtol=1e-4
    )
    merged = tmp_path / "merged"
    plato2("export", "hf", "--generation", out, "--out", merged)
    assert said(PlatoBot.load(merged, device="cpu")) == expected


def cap(logits: torch.Tensor, model: Any) -> torch.Tensor:
    """Logits before Gemma's soft cap."""
    most = getattr(model.config, "final_logit_softcapping", None)
    return logits if most is None else most * torch.atanh(logits / most)


def names_in(file: Path) -> list[str]:
    """What a safetensors file holds."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def test_adapters_without_their_decoder_are_refused_in_one_line(
    runs: Callable[..., Runs], tmp_path: Path
) -> None:
    generation, _ = runs("llama")
    out = tmp_path / "out"
    plato2("export", "adapter", "--generation", generation, "--out", out)
    assert "evaluation" not in json.loads((out / "config.json").read_text())
    (out / "base").unlink()
    with pytest.raises(UserError, match=r"adapter of .*/out/base, which is not there; put it back") as found:
        PlatoBot.load(out, device="cpu")
    assert "\n" not in str(found.value)
    (out / "base").symlink_to(
        write_decoder(tmp_path / "other", "llama", hidden_act="gelu", initializer_range=0.3)
    )
    weights = tmp_path / "other" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: w + 0.01 for name, w in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"adapter of other weights .* than those in .*/out/base"):
        PlatoBot.load(out, device="cpu")
    (out / "base").unlink()
    (out / "generation" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: missing; get the folder again"):
        PlatoBot.load(out, device="cpu")
    export, no = ("export", "adapter", "--generation"), ("--out", tmp_path / "no")
    whole, _ = runs("llama", "none")
    assert "was trained as a whole, without adapter; use plato2 export hf" in refused(*export, whole, *no)
    other = write_run(tmp_path / "run", tmp_path / "other", "2_eval", adapter="lora")
    told = refused(*export, generation, "--evaluation", other, *no)
    assert "an adapter of other weights (sha256 " in told
    assert "give models of one curriculum" in told
    assert not (tmp_path / "no").exists()


# --------------------------------------------------------------------------------------------------- verbs


@pytest.mark.slow
def test_every_verb_takes_such_runs(runs: Callable[..., Runs], tmp_path: Path) -> None:
    """Chatting, scoring, evaluating, serving and reporting, as a person calls them."""
    family, adapter = "gemma3_text", "lora"
    generation, evaluation = runs(family, adapter, "response")
    both = ("--generation", generation, "--evaluation", evaluation)
    decoder = generation.parents[1] / family
    coarse = write_run(tmp_path / "runs" / "pretrained-1_coarse" / "a", decoder, "1_coarse", adapter=adapter)
    (tmp_path / "starts.txt").write_text("bon kan\ndus pel\n")
    (tmp_path / "lines.tsv").write_text("bon kan\tdus pel\ndus\tkan bon\n")
    sets = [{"context": ["bon kan"], "candidates": ["dus", "bon", "kan"], "labels": [1, 0, 0]}]
    (tmp_path / "sets.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sets * 4))
    limits = ("--max-context", 32, "--max-response", 32, "--valid-dialogues", 40, "--test-fraction", 0)
    conversations, data = write_dialogues(tmp_path / "d.jsonl", 150), tmp_path / "data"
    plato2("prepare", "jsonl", conversations, "--out", data, "--tokenizer", f"hf:{decoder}", *limits)

    scored = [json.loads(line) for line in plato2("score", tmp_path / "lines.tsv", *both).splitlines()]
    assert [len(line["nll_by_latent"]) for line in scored] == [5, 5]
    assert all(sum(line["posterior"]) == pytest.approx(1) and 0 < line["coherence"] < 1 for line in scored)
    assert "bot" in plato2("chat", *both, "--max-tokens", 6, stdin="bon kan\n/quit\n")
    contexts = ("--contexts", tmp_path / "starts.txt", "--out", tmp_path / "replies.jsonl")
    plato2("reply", *contexts, *both, "--max-tokens", 6)
    assert "distinct" in plato2("evaluate", "replies", tmp_path / "replies.jsonl")
    some = ("--data", data, "--contexts", 6, "--coarse", coarse, "--max-tokens", 6)
    assert "mutual information" in plato2("evaluate", "latents", *some, *both)
    found = plato2("evaluate", "selection", tmp_path / "sets.jsonl", *both)
    assert "against coherence" in found or "MAP of coherence" in found  # whichever an untrained one is
    talk = ("--starts", tmp_path / "starts.txt", "--utterances", 2, "--max-tokens", 6)
    plato2("self-chat", *both, *talk, "--out", tmp_path / "talk.jsonl", "--precision", "int8")
    plato2("report", tmp_path / "runs", "--out", tmp_path / "report.html")
    running = start(generation, "--evaluation", evaluation, "--device", "cpu", "--max-tokens", 6)
    try:
        answer = client_of(running.url).chat.completions.create(model=generation.name, messages=HI)
        assert texts(answer)[0]
    finally:
        end(running)
