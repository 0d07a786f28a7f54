"""PlatoBot: from run folders to replies; long, odd and empty messages; replies during training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import KNOVER, make_corpus, make_run, make_stage, small_tokenizer_texts

from plato2.config import DecodeConfig, UserError
from plato2.data.collate import GenerationBatch
from plato2.data.module import DialogueDataModule
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.evaluate.speakers import read_speaker
from plato2.talk.bot import PlatoBot
from plato2.talk.rank import coherence
from plato2.talk.replies import ValidationReplies, sample_replies

TOKENIZER = Tokenizer.load(KNOVER)
DECODE = DecodeConfig(max_tokens=10, n_candidates=6)
CONTEXT = ["hello !", "hi , how was your day ?"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in ("1_coarse", "2_gen", "2_eval")}


@pytest.fixture(scope="module")
def bot(runs: dict[str, Path]) -> PlatoBot:
    return PlatoBot.load(runs["2_gen"], runs["2_eval"], "cpu", DECODE)


def test_one_candidate_for_each_latent_most_coherent_first(bot: PlatoBot) -> None:
    reply = bot.reply(CONTEXT)
    assert reply.text == reply.candidates[0].text
    assert {candidate.latent for candidate in reply.candidates} == set(range(5))
    assert bot.evaluation is not None
    context = bot.encode(CONTEXT)
    scores = coherence(bot.evaluation, [(context, candidate.token_ids) for candidate in reply.candidates])
    assert [candidate.coherence for candidate in reply.candidates] == pytest.approx(scores, abs=1e-6)
    assert scores == sorted(scores, reverse=True)
    assert json.loads(json.dumps(reply.to_dict()))["candidates"][0].keys() == {
        "text",
        "latent",
        "log_prob",
        "coherence",
    }


def test_a_stage_1_model_gives_samples_ranked_by_log_probability(runs: dict[str, Path]) -> None:
    reply = PlatoBot.load(runs["1_coarse"], decode=DECODE).reply(CONTEXT)
    assert len(reply.candidates) == 6
    assert {(candidate.latent, candidate.coherence) for candidate in reply.candidates} == {(None, None)}
    log_probs = [candidate.log_prob for candidate in reply.candidates]
    assert log_probs == sorted(log_probs, reverse=True)


def test_one_text_is_one_turn(bot: PlatoBot) -> None:
    assert bot.reply("hi there") == bot.reply(["hi there"])
    assert bot.encode("hi there") == bot.encode(["hi there"])
    assert bot.reply_batch(["hi there", "hello !"]) == bot.reply_batch([["hi there"], ["hello !"]])
    with pytest.raises(UserError, match="takes a list of conversations"):
        bot.reply_batch("hi there")
    assert DecodeConfig(stop="you").stop == ("you",)  # type: ignore[arg-type]


def test_a_message_that_cannot_be_read_is_said(bot: PlatoBot) -> None:
    reply = bot.reply(["hi", "你好吗 !"])
    assert reply.unread == 1
    assert reply.warning is not None
    assert "cannot read 100% of this message" in reply.warning
    assert reply.to_dict()["warning"] == reply.warning
    for message in ("hi , how are you ? 😀", "hi 😀", "你"):
        assert (bot.reply(message).warning is None) == (message[0] == "h")


def test_a_small_model_stops_where_its_positions_end() -> None:
    stage = make_stage("2_gen", max_position=24)
    with torch.no_grad():
        stage.backbone.lm_bias[2] = -50.0  # never ends by itself
    bot = PlatoBot(stage, TOKENIZER)
    reply = bot.reply(["a message that is much longer than half of the positions of this model " * 2])
    assert {len(candidate.token_ids) for candidate in reply.candidates} == {12}


def test_a_batch_says_what_each_alone_would(bot: PlatoBot) -> None:
    contexts = [CONTEXT[-1:], CONTEXT, ["what is your name ?"]] + [[f"number {n}"] for n in range(15)]
    together = bot.reply_batch(contexts)
    for context, reply in zip(contexts, together, strict=True):
        alone = bot.reply(context)
        assert {c.latent: c.text for c in alone.candidates} == {c.latent: c.text for c in reply.candidates}
    assert bot.reply_batch([]) == []


def test_a_seed_a_conversation_and_settings_for_one_call(bot: PlatoBot) -> None:
    other = DecodeConfig(max_tokens=5, temperature=2.0, seed=3)
    contexts = [CONTEXT, CONTEXT, CONTEXT[:1]]
    replies = bot.reply_batch(contexts, other, seeds=[7, 8, 7])
    one, two, _ = together = [{c.latent: c.text for c in reply.candidates} for reply in replies]
    alone = [bot.reply(contexts[n], replace(other, seed=seed)) for n, seed in enumerate((7, 8, 7))]
    assert together == [{c.latent: c.text for c in reply.candidates} for reply in alone]
    assert one != two
    assert max(len(candidate.token_ids) for reply in replies for candidate in reply.candidates) <= 5
    assert bot.reply(CONTEXT) == bot.reply(CONTEXT, DECODE)  # the bot's own settings are as they were


def test_a_candidate_ends_before_a_text_to_stop_at(bot: PlatoBot) -> None:
    free = {candidate.latent: candidate for candidate in bot.reply(CONTEXT).candidates}
    letter = "a"
    assert any(letter in candidate.text for candidate in free.values())
    reply = bot.reply(CONTEXT, replace(DECODE, stop=(letter, "no such text")))
    for candidate in reply.candidates:
        whole = free[candidate.latent].text
        cut = whole.partition(letter)[0]
        assert candidate.text == TOKENIZER.decode(TOKENIZER.encode(cut)) if letter in whole else whole
        assert letter not in candidate.text
        assert candidate.has_end or letter not in whole
    assert bot.evaluation is not None
    pairs = [(bot.encode(CONTEXT), candidate.token_ids) for candidate in reply.candidates]
    scores = [candidate.coherence for candidate in reply.candidates]  # of what is said, not of what was cut
    assert scores == pytest.approx(coherence(bot.evaluation, pairs), abs=1e-6)
    with pytest.raises(UserError, match="stop: a text to stop at is empty"):
        DecodeConfig(stop=("",))


def test_a_reply_says_how_long_it_took(bot: PlatoBot) -> None:
    reply, _ = bot.reply_batch([CONTEXT, CONTEXT[:1]])
    assert reply.timing.decode_s > 0
    assert reply.timing.rank_s > 0
    assert reply.timing.contexts == 2


def test_bfloat16_says_nearly_the_same(runs: dict[str, Path]) -> None:
    half = PlatoBot.load(runs["2_gen"], runs["2_eval"], "cpu", replace(DECODE, top_k=1), precision="bfloat16")
    assert half.generation.backbone.word.weight.dtype == torch.bfloat16
    full = PlatoBot.load(runs["2_gen"], runs["2_eval"], "cpu", replace(DECODE, top_k=1))
    replies = [{c.latent: c.coherence for c in each.reply(CONTEXT[:1]).candidates} for each in (half, full)]
    assert replies[0].keys() == replies[1].keys()
    assert replies[0] == pytest.approx(replies[1], abs=0.05)
    with pytest.raises(UserError, match="--precision float16: use float32, bfloat16 or int8"):
        PlatoBot.load(runs["2_gen"], precision="float16")


def test_old_turns_are_dropped_and_a_long_one_keeps_its_end(bot: PlatoBot) -> None:
    turns = [f"this is turn number {n} of a long talk ." for n in range(10_000)]
    ids = bot.encode(turns)
    assert 110 < len(ids) <= 128
    assert ids[0] == 1
    last = TOKENIZER.encode(turns[-1])
    assert ids[-len(last) - 1 :] == [*last, 2]
    assert bot.reply(turns) == bot.reply(turns[-100:])
    long = "word " * 20_000 + "end ?"
    ids = bot.encode(["before", long])
    assert len(ids) == 128
    assert ids[1:-1] == TOKENIZER.encode(long)[-126:]
    assert bot.reply([long]).candidates


@pytest.mark.parametrize(
    "text", ["[SEP] </s> [CLS]", "\U0001f600\U0001f680", "\ud800 x", "你好", "a\x00b\tc"]
)
def test_odd_text_is_only_text(bot: PlatoBot, text: str) -> None:
    ids = bot.encode([text])
    assert ids[0] == 1
    assert ids[-1] == 2
    assert not {1, 2} & set(ids[1:-1])
    assert len(bot.reply([text]).candidates) == 5


@pytest.mark.parametrize("context", [[], [""], ["hello", "  \n\t "], ["\u200b\x07"]])
def test_an_empty_message_is_refused(bot: PlatoBot, context: list[str]) -> None:
    with pytest.raises(UserError, match="the message is empty"):
        bot.reply(context)


@pytest.mark.parametrize(
    "context",
    [None, 3, b"hi", iter(["hi"]), [{"role": "user", "content": "hi"}], ["hi", None], [b"hi"]],
    ids=["None", "number", "bytes", "generator", "messages", "None in a list", "bytes in a list"],
)
def test_what_is_no_text_is_refused(bot: PlatoBot, context: Any) -> None:
    for call in (bot.reply, bot.encode, lambda given: bot.reply_batch([given])):
        with pytest.raises(UserError, match=r"give (one text|texts)"):
            call(context)


def test_settings_of_other_types(bot: PlatoBot) -> None:
    assert DecodeConfig(stop=None).stop == ()  # type: ignore[arg-type]
    for seed in ("x", None, 1.5):
        with pytest.raises(UserError, match=f"seed={seed!r}: must be a whole number"):
            DecodeConfig(seed=seed)  # type: ignore[arg-type]
    for stop in (3, [3], [None], b"you"):
        with pytest.raises(UserError, match=r"stop=.*: give texts"):
            DecodeConfig(stop=stop)  # type: ignore[arg-type]


def test_models_that_do_not_fit_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    train_tokenizer(small_tokenizer_texts(), 60).save(other)
    evaluation = make_run(tmp_path / "other", "2_eval", tokenizer_folder=other)
    with pytest.raises(UserError, match=r"--evaluation .* trained with another tokenizer .* --generation"):
        PlatoBot.load(runs["2_gen"], evaluation)
    with pytest.raises(UserError, match=r"--generation .*: this is a 2_eval run; give a run of 2_gen or"):
        PlatoBot.load(runs["2_eval"])
    with pytest.raises(UserError, match=r"--evaluation .*: this is a 1_coarse run; give a run of 2_eval"):
        PlatoBot.load(runs["2_gen"], runs["1_coarse"])
    short = make_run(tmp_path / "short", "2_eval", max_position=64)
    with pytest.raises(UserError, match="the evaluation model has 64 positions, the generation model 256"):
        PlatoBot.load(runs["2_gen"], short)
    with pytest.raises(UserError, match="the tokenizer has 8001 tokens, the generation model 50"):
        PlatoBot(make_stage("2_gen", vocab_size=50), TOKENIZER)


@pytest.mark.parametrize("device", ["warp9", "cuda:97"])
def test_a_device_that_is_not_there_is_refused(runs: dict[str, Path], device: str) -> None:
    with pytest.raises(UserError, match=f"--device {device}: cannot be used here"):
        PlatoBot.load(runs["2_gen"], device=device)
    with pytest.raises(UserError, match="--device meta: plato2 runs on cpu and cuda"):
        PlatoBot.load(runs["2_gen"], device="meta")


def test_replies_of_a_stage_in_training_leave_no_trace() -> None:
    stage = make_stage("2_gen").train()
    stage.backbone.blocks[0].eval()  # a part someone keeps out of training stays out
    modes = {name: module.training for name, module in stage.named_modules()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    rows = sample_replies(stage, TOKENIZER, [CONTEXT, ["hi"]], ["fine .", "hello ."], n_candidates=2)
    assert torch.equal(torch.rand(4), expected)
    assert {name: module.training for name, module in stage.named_modules()} == modes
    assert [row["reference"] for row in rows] == ["fine .", "hello ."]
    assert rows[0]["context"] == CONTEXT
    assert [len(row["candidates"]) for row in rows] == [2, 2]
    with pytest.raises(UserError, match="empty"):
        sample_replies(stage, TOKENIZER, [[""]], [""])
    assert {name: module.training for name, module in stage.named_modules()} == modes


def test_validation_replies_answer_the_same_contexts_each_time(tmp_path: Path) -> None:
    pairs = [([f"question {n} ?", f"and {n} ?"], f"answer {n} .") for n in range(10)]
    data = DialogueDataModule(str(make_corpus(tmp_path, pairs)), GenerationBatch(), 8192)
    answer = ValidationReplies(data, n_contexts=2)
    stage = make_stage("1_coarse").train()
    first, again = answer(stage), answer(stage)
    assert first == again
    assert [row["context"] for row in first] == [["question 2 ?", "and 2 ?"], ["question 7 ?", "and 7 ?"]]
    assert [row["reference"] for row in first] == ["answer 2 .", "answer 7 ."]
    assert all(len(row["candidates"]) == 3 for row in first)
    assert stage.training


def test_it_is_a_speaker_like_any_other(runs: dict[str, Path]) -> None:
    text = f"plato2:{runs['2_gen']},evaluation={runs['2_eval']},top_k=3,max_tokens=8"
    speaker = read_speaker(text, "--meet", "cpu")
    assert (speaker.name, speaker.settings["top_k"], speaker.settings["max_tokens"]) == (text, 3, 8)
    first, again = (speaker.reply_batch([CONTEXT], [1])[0] for _ in range(2))
    assert first == again
    assert first.candidates[0]["coherence"] is not None
    with pytest.raises(UserError, match="--meet plato2: beam=3: no such setting"):
        read_speaker(f"plato2:{runs['2_gen']},beam=3", "--meet", "cpu")
