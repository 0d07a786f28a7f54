"""What the server replies is what the bot says, with the request's settings, stream and filter."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from clients import ASK, CHAT, HI, USER, ask, client_of, httpx, metrics_of, openai, post, serving, texts
from runs import make_stage
from serving import MAX_TOKENS
from test_batching import SOON

from plato2.config import DecodeConfig
from plato2.data.tokenizer import Tokenizer
from plato2.serve.chat_api import ApiError, ChatRequest
from plato2.talk.bot import PlatoBot
from plato2.talk.safety import Safety, WordRule


def test_a_message_that_cannot_be_read_is_said(client: Any) -> None:
    assert "warning" not in ask(client).plato2
    answer = ask(client, [{"role": "user", "content": "你好吗"}])
    assert answer.plato2["warning"].startswith("the model cannot read 100% of this message")


def test_a_reply_is_what_the_bot_says(client: Any, bot: PlatoBot) -> None:
    answer = ask(client, seed=3)
    reply = bot.reply([HI[0]["content"]], replace(bot.decode_config, seed=3))
    best = reply.candidates[0]
    assert texts(answer) == [reply.text]
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == ("stop" if best.has_end else "length")
    n_in, n_out = len(bot.encode([HI[0]["content"]])), len(best.token_ids) + best.has_end
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (n_in, n_out, n_in + n_out)
    assert answer.plato2.keys() == {"seed", "context_tokens", "context_truncated", "timing", "flags"}
    assert answer.plato2["context_tokens"] == n_in
    assert answer.plato2["timing"].keys() == {"decode_s", "rank_s", "contexts"}
    assert abs(answer.created - time.time()) < 600
    assert ask(client, seed=3).id != answer.id


def test_turns_are_read_in_order_and_parts_are_joined(client: Any, bot: PlatoBot) -> None:
    messages = [
        {"role": "assistant", "content": "hello !"},
        {"role": "user", "content": [{"type": "text", "text": "hi ,"}, {"type": "text", "text": "you !"}]},
        {"role": "assistant", "content": "", "refusal": None, "annotations": []},
        {"role": "user", "content": "what is your name ?", "name": "someone"},
    ]
    turns = ["hello !", "hi , you !", "", "what is your name ?"]
    reply = bot.reply(turns, replace(bot.decode_config, seed=3))
    assert texts(ask(client, messages, seed=3)) == [reply.text]
    first = ask(client, seed=3)  # what an answer has can be sent back
    again = [*HI, first.choices[0].message, {"role": "user", "content": "why ?"}]
    turns = [HI[0]["content"], first.choices[0].message.content, "why ?"]
    assert texts(ask(client, again, seed=3)) == [bot.reply(turns, replace(bot.decode_config, seed=3)).text]


def test_messages_in_a_row_are_one_turn(client: Any, bot: PlatoBot) -> None:
    """As `plato2 prepare` reads them."""
    said = [
        ("user", "hi"),
        ("user", "you !"),
        ("assistant", "hello"),
        ("assistant", "there"),
        ("user", "why"),
        ("user", "?"),
    ]
    messages = [{"role": role, "content": text} for role, text in said]
    reply = bot.reply(["hi you !", "hello there", "why ?"], replace(bot.decode_config, seed=3))
    assert texts(ask(client, messages, seed=3)) == [reply.text]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_messages(url: str, tokenizer: Tokenizer, role: str) -> None:
    def answer(at: str, turns: list[dict[str, Any]], **fields: Any) -> Any:
        return httpx.post(f"{at}{CHAT}", json={**ASK, "messages": turns, "seed": 3, **fields}, timeout=SOON)

    def text(response: Any) -> str:
        return str(response.json()["choices"][0]["message"]["content"])

    prompt = {"role": role, "content": "be kind ."}
    plain = answer(url, [USER])
    assert "x-plato2-warning" not in plain.headers
    for turns in ([prompt, USER], [prompt, prompt, USER], [{**prompt, "content": ""}, USER]):
        found = answer(url, turns)
        assert text(found) == text(plain)
        assert found.headers["x-plato2-warning"].startswith("messages[0]: PLATO-2 has no system prompt")
    assert "x-plato2-warning" in answer(url, [prompt, USER], stream=True).headers
    behind = answer(url, [USER, prompt])
    assert text(behind) == text(plain)
    assert behind.headers["x-plato2-warning"].startswith("messages[1]: PLATO-2 has no system prompt")
    between = [USER, prompt, {"role": "user", "content": "you"}]
    assert text(answer(url, between)) == text(answer(url, [USER, between[2]]))
    bot = PlatoBot(make_stage("2_gen"), tokenizer, None, DecodeConfig(max_tokens=MAX_TOKENS))
    with serving(bot, system="refuse") as local:
        error = answer(local.url, [USER, prompt, USER]).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "messages[1].role")
        assert "PLATO-2 has no system prompt" in error["message"]
    with serving(bot, system="context") as local:
        found = answer(local.url, [prompt, USER])
        error = answer(local.url, [USER, prompt]).json()["error"]  # a turn, and so nobody's to answer
        assert (error["param"], error["code"]) == ("messages[1].role", "invalid_value")
        reply = bot.reply(["be kind .", "hi"], replace(bot.decode_config, seed=3))
        assert text(found) == reply.text
        assert "x-plato2-warning" not in found.headers


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_has_the_same_words(client: Any, n: int) -> None:
    plain = ask(client, seed=3, n=n, extra_body={"plato2": {"candidates": True}})
    stream = ask(
        client,
        seed=3,
        n=n,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"plato2": {"candidates": True}},
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    *parts, usage = chunks
    assert usage.choices == []
    assert usage.usage == plain.usage
    assert all(chunk.usage is None for chunk in parts)
    for index, choice in enumerate(plain.choices):
        own = [chunk.choices[0] for chunk in parts if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert all(len((part.delta.content or "").split()) <= 1 for part in own)
    extension = {**parts[-1].plato2, "timing": None}
    assert extension == {**plain.plato2, "timing": None}


def test_choices_are_the_best_candidates(client: Any, bot: PlatoBot) -> None:
    answer = ask(client, n=5, seed=4, extra_body={"plato2": {"candidates": True}})
    reply = bot.reply([HI[0]["content"]], replace(bot.decode_config, seed=4))
    assert texts(answer) == [candidate.text for candidate in reply.candidates]
    candidates = answer.plato2["candidates"]
    assert [set(found) for found in candidates] == [
        {"text", "latent", "log_prob", "coherence", "score", "has_end"}
    ] * 5
    assert [found["latent"] for found in candidates] == [found.latent for found in reply.candidates]
    scores = [found["score"] for found in candidates]
    assert scores == sorted(scores, reverse=True) == pytest.approx([c.score for c in reply.candidates])


def test_a_seed_gives_the_same_reply_whoever_else_asks(client: Any) -> None:
    alone = [texts(ask(client, seed=seed, n=5)) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda seed: ask(client, seed=seed, n=5), range(16)))
    assert [texts(answer) for answer in answers] == alone
    assert len({tuple(found) for found in alone}) > 8
    assert max(answer.plato2["timing"]["contexts"] for answer in answers) > 1


def test_without_a_seed_each_reply_is_new_and_names_its_seed(client: Any) -> None:
    answers = [ask(client, n=5) for _ in range(3)]
    assert len({answer.plato2["seed"] for answer in answers}) == 3
    assert texts(ask(client, n=5, seed=answers[0].plato2["seed"])) == texts(answers[0])


def test_settings_of_a_request(client: Any, bot: PlatoBot) -> None:
    def said(**decode: Any) -> list[str]:
        reply = bot.reply([HI[0]["content"]], replace(bot.decode_config, **decode))
        return [candidate.text for candidate in reply.candidates]

    greedy = said(top_k=1)
    assert texts(ask(client, n=5, temperature=0, seed=1)) == greedy
    assert texts(ask(client, n=5, temperature=0, top_p=0.5)) == greedy
    for cold in ({"temperature": 1e-30}, {"temperature": 0.009}, {"top_p": 0}, {"top_p": 1e-30}):
        assert texts(ask(client, n=5, seed=1, **cold)) == greedy
    nucleus = said(strategy="top_p", top_p=0.3, temperature=0.7, seed=2)
    assert texts(ask(client, n=5, top_p=0.3, temperature=0.7, seed=2)) == nucleus
    own = {"strategy": "beam", "beam_size": 2, "length_penalty": 0.5}
    beams = said(strategy="beam", beam_size=2, length_penalty=0.5)
    assert texts(ask(client, n=10, extra_body={"plato2": own})) == beams
    own = {"top_k": 5, "n_samples": 2, "min_tokens": 4, "no_repeat_ngram": 1}
    assert texts(ask(client, n=10, seed=6, extra_body={"plato2": own})) == said(seed=6, **own)


def test_a_reply_ends_where_it_is_told_to(client: Any) -> None:
    cut = ask(client, n=5, seed=1, max_tokens=1)
    assert {choice.finish_reason for choice in cut.choices} == {"length"}
    assert cut.usage.completion_tokens == 5
    assert texts(ask(client, n=5, seed=1, max_completion_tokens=1)) == texts(cut)
    long = {"plato2": {"min_tokens": 8}}
    whole = texts(ask(client, seed=1, extra_body=long))[0]
    word = whole.split()[1]
    for stop in (word, ["never said", word]):
        stopped = ask(client, n=5, seed=1, stop=stop, extra_body=long)
        assert all(word not in text for text in texts(stopped))
        assert whole.partition(word)[0].strip() in texts(stopped)
        assert "stop" in {choice.finish_reason for choice in stopped.choices}


ODD = {
    "special tokens": "[SEP] </s> [CLS] <s> [MASK] hi [SEP] you",
    "emoji": "\U0001f600\U0001f680 hi \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "scripts": "你好 , как дела ? مرحبا नमस्ते สวัสดี",
    "control": "a\x00b\tc\u0007 d\r\n\u2028e \u202eabc",
    "100 KB": "word " * 20_000 + "end ?",
    "one word of 100 KB": "x" * 100_000,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_text_is_only_text(url: str, bot: PlatoBot, name: str) -> None:
    status, answer = post(
        url, {"model": "tiny", "seed": 5, "messages": [{"role": "user", "content": ODD[name]}]}
    )
    assert status == 200
    ids = bot.encode([ODD[name]])
    assert ids.count(2) == 1
    reply = bot.reply([ODD[name]], replace(bot.decode_config, seed=5))
    assert answer["choices"][0]["message"]["content"] == reply.text
    assert answer["plato2"]["context_tokens"] == len(ids)
    assert answer["plato2"]["context_truncated"] == (len(ids) == bot.max_context)


def test_ten_thousand_turns(url: str, bot: PlatoBot) -> None:
    turns = [f"turn number {n} ." for n in range(10_000)]
    roles = ("assistant", "user")
    messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    status, answer = post(url, {"model": "tiny", "seed": 5, "messages": messages})
    assert status == 200
    reply = bot.reply(turns, replace(bot.decode_config, seed=5))
    assert answer["choices"][0]["message"]["content"] == reply.text
    assert answer["plato2"]["context_truncated"] is True


def test_the_safety_filter(tokenizer: Tokenizer) -> None:
    stages = make_stage("2_gen"), tokenizer, make_stage("2_eval")
    decode = DecodeConfig(max_tokens=MAX_TOKENS)
    first, *_ = PlatoBot(*stages, decode).reply(["hi"], replace(decode, seed=3)).candidates
    words = ["bad", first.text.split()[0]]
    bot = PlatoBot(*stages, decode, safety=Safety([WordRule(words, "words")]))
    with serving(bot) as local:
        client = client_of(local.url)
        refused = ask(client, [{"role": "user", "content": "bad words"}], n=2)
        assert texts(refused) == [Safety([]).refusal] * 2
        assert {choice.finish_reason for choice in refused.choices} == {"content_filter"}
        assert refused.usage.completion_tokens == 0
        assert refused.plato2["flags"] == [{"side": "input", "rule": "words: bad", "action": "block"}]
        answer = ask(client, [USER], n=5, seed=3, extra_body={"plato2": {"candidates": True}})
        reasons = [choice.finish_reason for choice in answer.choices]
        held = [found for found in answer.plato2["candidates"] if found.get("flag")]
        assert held
        assert all(found["text"] is None for found in held)
        assert reasons.count("content_filter") == len(held)
        assert reasons[-len(held) :] == ["content_filter"] * len(held)
        assert not any(words[1] in text for text in texts(answer))
        assert answer.plato2["flags"][0]["side"] == "output"
        assert metrics_of(local.url)["plato2_refusals_total"] == 1
    bot = PlatoBot(*stages, decode, safety=Safety([WordRule(words, "words")], "warn", "warn"))
    with serving(bot) as local:
        answer = ask(client_of(local.url), [USER], seed=3, extra_body={"plato2": {"candidates": True}})
        assert texts(answer) == [first.text]
        assert answer.plato2["candidates"][0]["text"] == first.text
        assert answer.plato2["candidates"][0]["flag"].startswith("words: ")


def test_a_stage_1_model_has_samples(tokenizer: Tokenizer) -> None:
    decode = DecodeConfig(max_tokens=5, n_candidates=7, strategy="top_p", top_p=0.8, min_tokens=3)
    bot = PlatoBot(make_stage("1_coarse"), tokenizer, None, decode)
    with serving(bot, seed=5) as local:
        client = client_of(local.url)
        answer = ask(client, n=7, extra_body={"plato2": {"candidates": True}})
        assert answer.plato2["seed"] == 5  # the server's
        assert {found["latent"] for found in answer.plato2["candidates"]} == {None}
        reply = bot.reply([HI[0]["content"]], replace(decode, seed=5))
        assert texts(answer) == [candidate.text for candidate in reply.candidates]
        with pytest.raises(openai.BadRequestError, match="these settings give 7 candidates"):
            ask(client, n=8)


def test_settings_are_the_servers_unless_the_request_says_otherwise() -> None:
    default = DecodeConfig(strategy="beam", beam_size=30, min_tokens=5, temperature=0.9, n_samples=1)

    def decode(**fields: Any) -> DecodeConfig:
        return ChatRequest.model_validate({**ASK, **fields}).decode_config(default, 7)

    assert decode() == replace(default, seed=7)
    assert decode(seed=-3, top_p=1) == replace(default, seed=-3)
    assert decode(max_tokens=2) == replace(default, seed=7, max_tokens=2, min_tokens=2)
    assert decode(temperature=0).strategy == "top_k"
    assert decode(top_p=0.5) == replace(default, seed=7, strategy="top_p", top_p=0.5)
    assert decode(plato2={"beam_size": 30}).beam_size == 30
    with pytest.raises(ApiError, match="at most 30"):
        decode(plato2={"beam_size": 31})
    samples = replace(default, strategy="top_k", n_samples=4)
    beams = ChatRequest.model_validate({**ASK, "plato2": {"strategy": "beam"}}).decode_config(samples, 7)
    assert (beams.strategy, beams.n_samples) == ("beam", 1)
