"""`plato2 serve` as its clients see it: the openai package, curl, and clients that do not behave."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from runs import KNOVER, make_run, make_stage
from serving import end, start
from small import ROOT
from test_batching import SOON, GatedBot, eventually
from typer.testing import CliRunner

from plato2.commands import VERBS, app
from plato2.config import DecodeConfig
from plato2.data.tokenizer import Tokenizer
from plato2.talk.bot import CONTEXTS_AT_ONCE, PlatoBot
from plato2.talk.safety import Safety, WordRule

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")
pytest.importorskip("uvicorn", reason="the server needs pip install '.[serve]'")
pytest.importorskip("prometheus_client", reason="the server needs pip install '.[serve]'")
httpx = pytest.importorskip("httpx", reason="the tests of the server need httpx, which comes with openai")
openai = pytest.importorskip("openai", reason="the tests of the server need openai")
if shutil.which("curl") is None:
    pytest.skip("the tests of the server need curl", allow_module_level=True)

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

import plato2.serve.app as app_module  # noqa: E402
from plato2.commands.serve import model_name  # noqa: E402
from plato2.runs.folder import RunFolder  # noqa: E402
from plato2.serve.app import make_app  # noqa: E402
from plato2.serve.batching import Batcher  # noqa: E402
from plato2.serve.chat_api import ApiError, ChatRequest  # noqa: E402
from plato2.serve.metrics import Metrics  # noqa: E402
from plato2.serve.server import (  # noqa: E402
    LOG_CHARACTERS,
    LOG_SECONDS,
    LimitedLog,
    Server,
    listen,
    make_server,
    url_of,
)

HI: list[dict[str, Any]] = [{"role": "user", "content": "hi , how was your day ?"}]
MAX_TOKENS = 12
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in ("2_gen", "2_eval")}


@pytest.fixture(scope="module")
def bot(runs: dict[str, Path]) -> PlatoBot:
    """The bot of the server below, here."""
    return PlatoBot.load(runs["2_gen"], runs["2_eval"], "cpu", DecodeConfig(max_tokens=MAX_TOKENS))


@pytest.fixture(scope="module")
def url(runs: dict[str, Path]) -> Iterator[str]:
    options = ["--evaluation", runs["2_eval"], "--name", "tiny", "--max-tokens", MAX_TOKENS]
    running = start(runs["2_gen"], *options, "--device", "cpu")
    assert running.line == (
        f"{running.url}/v1 serves tiny on cpu; fields: docs/serve.md and {running.url}/openapi.json\n"
    )
    yield running.url
    assert end(running) == (0, "", "")


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return client_of(url)


def client_of(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=SOON)


def ask(client: Any, messages: list[dict[str, Any]] = HI, **fields: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **fields)


def texts(answer: Any) -> list[str]:
    return [choice.message.content for choice in answer.choices]


def curl(*arguments: object, stdin: str | bytes = b"") -> tuple[int, str]:
    """Status and body."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = ["curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr.decode()
    body, _, status = done.stdout.decode().rpartition("\n")
    return int(status), body


def post(url: str, body: Any, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a chat request by curl; bodies that are no JSON are text."""
    text = body if isinstance(body, str | bytes) else json.dumps(body)
    given = ["-H", "Content-Type: application/json", *arguments, "--data-binary", "@-"]
    status, answer = curl(f"{url}{CHAT}", *given, stdin=text)
    return status, json.loads(answer)


def metrics_of(url: str) -> dict[str, float]:
    """`name{labels}` -> value."""
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


# -------------------------------------------------------------------------------------------------- replies


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


# --------------------------------------------------------------------------------- models, health, metrics


def test_models(client: Any, url: str) -> None:
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "plato2"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here, only 'tiny'"):
        client.models.retrieve("gpt")
    assert json.loads(curl(f"{url}/v1/models/a/b")[1])["error"]["code"] == "model_not_found"


def test_health_and_the_list_of_fields(url: str) -> None:
    assert curl(f"{url}/healthz") == (200, '{"status":"ready"}')
    fields = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    assert {"messages", "plato2", "seed"} <= fields["ChatRequest"]["properties"].keys()
    assert fields["Extension"]["properties"].keys() >= {"candidates", "strategy", "top_k"}
    assert fields["Extension"]["properties"]["top_k"]["anyOf"][0] == {"type": "integer", "minimum": 1}
    for page in ("/docs", "/redoc"):  # they would load scripts from elsewhere
        assert curl(f"{url}{page}")[0] == 404


def test_metrics(client: Any, url: str) -> None:
    before = metrics_of(url)
    answer = ask(client)
    with pytest.raises(openai.BadRequestError):
        ask(client, [])
    list(ask(client, stream=True))
    counted = f"plato2_request_seconds_count{{{CHAT}}}"
    eventually(lambda: metrics_of(url)[counted] == before.get(counted, 0) + 3)
    after = metrics_of(url)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown(f"plato2_requests_total{{{CHAT}}}{{200}}") == 2
    assert grown(f"plato2_requests_total{{{CHAT}}}{{400}}") == 1
    assert grown("plato2_batch_contexts_count") == grown("plato2_batch_contexts_sum") == 2
    assert grown("plato2_decode_seconds_count") == grown("plato2_rank_seconds_count") == 2
    assert grown("plato2_tokens_total{in}") == 2 * answer.usage.prompt_tokens
    assert grown("plato2_tokens_total{out}") >= answer.usage.completion_tokens
    assert after["plato2_queue_length"] == after["plato2_refusals_total"] == 0
    assert after["process_resident_memory_bytes"] > 1e7


# --------------------------------------------------------------------------------------------------- errors

ASK = {"model": "tiny", "messages": HI}
USER = {"role": "user", "content": "hi"}
WRONG: dict[str, tuple[Any, int, str, str | None, str]] = {
    # body, status, code, param, words of the message
    "no JSON": ("{", 400, "invalid_json", None, "not JSON"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "invalid_json", None, "cannot be read"),
    "deep": ("[" * 100_000, 400, "invalid_json", None, "cannot be read"),
    "empty": ("", 400, "invalid_type", None, "must be a JSON object"),
    "a list": ([], 400, "invalid_type", None, "must be a JSON object"),
    "no model": ({"messages": HI}, 400, "missing_required_parameter", "model", "is missing"),
    "another model": ({**ASK, "model": "gpt"}, 404, "model_not_found", "model", "only 'tiny'"),
    "no messages": ({"model": "tiny"}, 400, "missing_required_parameter", "messages", "is missing"),
    "0 messages": ({**ASK, "messages": []}, 400, "invalid_value", "messages", "at least 1"),
    "blank": (
        {**ASK, "messages": [USER, {**USER, "content": " \n\u200b"}]},
        *(400, "invalid_value", "messages[1].content", "the message is empty"),
    ),
    "null": (
        {**ASK, "messages": [{**USER, "content": None}]},
        *(400, "invalid_type", "messages[0].content", "a text or a list of text parts"),
    ),
    "a number": (
        {**ASK, "messages": [{**USER, "content": 5}]},
        *(400, "invalid_type", "messages[0].content", "a text or a list of text parts"),
    ),
    "a picture": (
        {**ASK, "messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        *(400, "invalid_value", "messages[0].content[0].type", "'text'"),
    ),
    "a field whose name is half a pair": (
        '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "\\ud800": 1}',
        *(400, "invalid_value", None, "no Unicode text"),
    ),
    "half a pair": (
        '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        *(400, "invalid_value", "messages[0].content", "the message is empty"),
    ),
    "the bot last": (
        {**ASK, "messages": [USER, {"role": "assistant", "content": "hi"}]},
        *(400, "invalid_value", "messages[1].role", "the last message must be the user's"),
    ),
    "a role": (
        {**ASK, "messages": [{"role": "king", "content": "hi"}]},
        *(400, "invalid_value", "messages[0].role", "'user', 'assistant', 'system' or 'developer'"),
    ),
    "unknown": ({**ASK, "tempreature": 1}, 400, "unknown_parameter", "tempreature", "leave it out"),
    "unknown inside": (
        {**ASK, "plato2": {"topk": 1}},
        *(400, "unknown_parameter", "plato2.topk", "leave it out"),
    ),
    "a string": ({**ASK, "temperature": "1"}, 400, "invalid_type", "temperature", "valid number"),
    "NaN": (
        '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}',
        *(400, "invalid_value", "temperature", "finite"),
    ),
    "true": ({**ASK, "n": True}, 400, "invalid_type", "n", "valid integer"),
    "half": ({**ASK, "max_tokens": 1.5}, 400, "invalid_type", "max_tokens", "valid integer"),
    "hot": ({**ASK, "temperature": 3}, 400, "invalid_value", "temperature", "less than or equal to 2"),
    "below zero": (
        {**ASK, "temperature": -1e-30},
        400,
        "invalid_value",
        "temperature",
        "greater than or equal",
    ),
    "top_p": ({**ASK, "top_p": -0.1}, 400, "invalid_value", "top_p", "greater than or equal to 0"),
    "n 0": ({**ASK, "n": 0}, 400, "invalid_value", "n", "greater than or equal to 1"),
    "n 6": ({**ASK, "n": 6}, 400, "invalid_value", "n", "these settings give 5 candidates"),
    "seed": ({**ASK, "seed": 2**70}, 400, "invalid_value", "seed", "less than"),
    "two lengths": (
        {**ASK, "max_tokens": 1, "max_completion_tokens": 1},
        *(400, "invalid_value", "max_tokens", "leave one of them out"),
    ),
    "stops": ({**ASK, "stop": list("abcde")}, 400, "invalid_value", "stop", "at most 4"),
    "an empty stop": ({**ASK, "stop": [""]}, 400, "invalid_value", "stop[0]", "at least 1"),
    "stream options": (
        {**ASK, "stream_options": {"include_usage": True}},
        *(400, "invalid_value", "stream_options", "only with stream: true"),
    ),
    "min_tokens": (
        {**ASK, "plato2": {"min_tokens": 99}},
        *(400, "invalid_value", "plato2.min_tokens", f"between 0 and max_tokens={MAX_TOKENS}"),
    ),
    "samples": ({**ASK, "plato2": {"n_samples": 21}}, 400, "invalid_value", "plato2.n_samples", "at most 20"),
    "beams": (
        {**ASK, "plato2": {"strategy": "beam", "beam_size": 21}},
        *(400, "invalid_value", "plato2.beam_size", "at most 20"),
    ),
    "beams of samples": (
        {**ASK, "plato2": {"strategy": "beam", "n_samples": 2}},
        *(400, "invalid_value", "plato2.n_samples", "use a larger beam_size"),
    ),
    "greedy beams": (
        {**ASK, "temperature": 0, "plato2": {"strategy": "beam"}},
        *(400, "invalid_value", "plato2.strategy", "leave one of them out"),
    ),
    "a nucleus of beams": (
        {**ASK, "top_p": 0.5, "plato2": {"strategy": "beam"}},
        *(400, "invalid_value", "top_p", "plato2.strategy is beam"),
    ),
    "top-k of a nucleus": (
        {**ASK, "top_p": 0.5, "plato2": {"top_k": 5}},
        *(400, "invalid_value", "plato2.top_k", "the strategy is top_p"),
    ),
    "a strategy": ({**ASK, "plato2": {"strategy": "best"}}, 400, "invalid_value", "plato2.strategy", "beam"),
    "penalty": (
        {**ASK, "frequency_penalty": 0.5},
        *(400, "invalid_value", "frequency_penalty", "leave it out or send 0"),
    ),
    "JSON": (
        {**ASK, "response_format": {"type": "json_object"}},
        *(400, "invalid_value", "response_format", 'send {"type": "text"}'),
    ),
    "log-probs": ({**ASK, "logprobs": True}, 400, "invalid_value", "logprobs", "send false"),
    "tools": ({**ASK, "tools": [{"type": "function"}]}, 400, "invalid_value", "tools", "does not have this"),
    "a tool": (
        {**ASK, "messages": [{"role": "tool", "content": "be kind"}, USER]},
        *(400, "invalid_value", "messages[0].role", "PLATO-2 calls no tools"),
    ),
    "nobody speaks": (
        {**ASK, "messages": [{"role": "system", "content": "be kind"}]},
        *(400, "invalid_value", "messages[0].role", "the last message must be the user's"),
    ),
    "nothing said before the system": (
        {**ASK, "messages": [{**USER, "content": " "}, {"role": "system", "content": "be kind"}]},
        *(400, "invalid_value", "messages[0].content", "the message is empty"),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named(url: str, case: str) -> None:
    body, status, code, param, words = WRONG[case]
    found, answer = post(url, body)
    assert answer.keys() == {"error"}
    error = answer["error"]
    assert (found, error["code"], error["param"]) == (status, code, param)
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert param is None or code == "model_not_found" or error["message"].startswith(f"{param}: ")


def test_harmless_fields_are_accepted(url: str, client: Any) -> None:
    harmless = {
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logprobs": False,
        "top_logprobs": None,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
        "stop": None,
        "top_p": 1,
        "n": None,
        "stream": None,
        "temperature": 1,
    }
    status, answer = post(url, {**ASK, **harmless, "seed": 3})
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == texts(ask(client, seed=3))[0]


def test_wrong_addresses_methods_and_types(url: str) -> None:
    def error(*arguments: object) -> tuple[int, str]:
        status, body = curl(*arguments)
        return status, json.loads(body)["error"]["code"]

    assert error(f"{url}/v1/completions", "-X", "POST") == (404, "not_found")
    assert error(f"{url}/v1/models/") == (404, "model_not_found")
    assert error(url) == (404, "not_found")
    assert error(f"{url}{CHAT}") == (405, "method_not_allowed")
    assert error(f"{url}/healthz", "-X", "DELETE") == (405, "method_not_allowed")
    assert httpx.get(f"{url}{CHAT}").headers["allow"] == "POST"
    # Without a JSON content type browsers send a web site's request without asking first.
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, body = curl(f"{url}{CHAT}", "-H", f"Content-Type: {kind}", "-d", json.dumps(ASK))
        assert status == 400
        assert "Content-Type: application/json" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("way", [[], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect:"]])
def test_a_body_that_is_too_large_is_refused(url: str, way: list[str]) -> None:
    body = json.dumps({**ASK, "user": "x" * 3_000_000})
    status, answer = post(url, body, *way)
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    assert "larger than 1024 KB" in answer["error"]["message"]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client_of(url), user="x" * 3_000_000)
    assert caught.value.status_code == 413
    status, _ = post(url, {**ASK, "user": "x" * 1_000_000})
    assert status == 200


def test_a_body_without_end_is_not_read_for_ever(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    sent, received = 0, b""
    with socket.create_connection((host, int(port)), timeout=SOON) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < SOON:
                connection.sendall(chunk)
                sent += len(chunk)
                time.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            received = connection.recv(4096)
    assert time.monotonic() - began < 10  # about LINGER_S
    assert sent > 1024**2
    assert received.startswith(b"HTTP/1.1 413") or not received  # after a reset it may be lost


# ---------------------------------------------------------------------------------- many clients, and the end


def test_two_hundred_clients_at_once(url: str) -> None:
    before = metrics_of(url)

    async def ask_all() -> list[Any]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
            return await asyncio.gather(
                *(client.post(CHAT, json={**ASK, "seed": n % 7, "max_tokens": 4}) for n in range(200))
            )

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == 200
    for n in range(7):
        said = {answer.json()["choices"][0]["message"]["content"] for answer in answers[n::7]}
        assert len(said) == 1
    after = metrics_of(url)
    assert after["plato2_batch_contexts_sum"] - before["plato2_batch_contexts_sum"] == 200
    assert after["plato2_batch_contexts_count"] - before["plato2_batch_contexts_count"] < 100
    assert after["plato2_queue_length"] == 0


@pytest.mark.slow
def test_memory_stays_bounded(url: str) -> None:
    def ask_often(n: int) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            for m in range(10):
                assert (
                    client.post(CHAT, json={**ASK, "user": "x" * 500_000, "seed": n * m}).status_code == 200
                )

    sizes = []
    for _ in range(3):
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(ask_often, range(64)))
        sizes.append(metrics_of(url)["process_resident_memory_bytes"])
    assert sizes[2] < sizes[0] * 1.1


def send_requests(url: str, n: int, **fields: Any) -> list[socket.socket]:
    """Connections on which n requests were sent and not yet answered."""
    host, port = url.removeprefix("http://").split(":")
    connections = []
    for seed in range(n):
        body = json.dumps({**ASK, "seed": seed, **fields}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.sendall(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        connections.append(connection)
    return connections


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.slow
def test_sigterm_under_load_answers_all_that_was_accepted(runs: dict[str, Path]) -> None:
    running = start("--generation", runs["2_gen"], "--max-batch", 4)
    assert "serves 2_gen on" in running.line
    connections = send_requests(running.url, 40, model="2_gen", max_tokens=40)
    eventually(lambda: metrics_of(running.url).get(f"plato2_requests_total{{{CHAT}}}{{200}}", 0) > 0)
    running.process.send_signal(signal.SIGTERM)
    answers = [read_all(connection) for connection in connections]
    for answer in answers:
        assert answer.count(b"HTTP/1.1 ") == 1
        status = int(answer.split()[1])
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert (status, "choices" in body) in ((200, True), (503, False)), body
    assert sum(b"HTTP/1.1 200" in answer for answer in answers) > 30
    stdout, stderr = running.process.communicate(timeout=60)
    assert running.process.returncode == 0
    assert stdout == ""
    assert stderr.splitlines() == [
        "no --evaluation: candidates are ranked by log-probability, not by coherence"
    ]


HARD = {"model": "2_gen", "max_tokens": 128, "plato2": {"n_samples": 20, "min_tokens": 128}}
"""Settings with which 30 requests take many seconds."""


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"])
    connections = send_requests(running.url, 30, **HARD)
    time.sleep(1.0)
    running.process.send_signal(signal.SIGINT)
    eventually(lambda: httpx.get(f"{running.url}/healthz").status_code == 503)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(5) == 128 + signal.SIGTERM
    running.process.communicate()
    for connection in connections:
        connection.close()


@pytest.mark.slow
def test_the_end_comes_in_time(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"], "--shutdown-timeout", 1)
    connections = send_requests(running.url, 30, **HARD)
    time.sleep(1.0)
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    statuses = {int(read_all(connection).split()[1]) for connection in connections}
    assert running.process.wait(20) == 0
    assert time.monotonic() - began < 10
    assert 503 in statuses
    assert statuses <= {200, 503}
    running.process.communicate()


# ------------------------------------------------------------------------ a server here, which can be held up


@dataclass
class Local:
    """The application in this process."""

    url: str
    batcher: Batcher
    server: Server


@contextlib.contextmanager
def serving(
    bot: PlatoBot,
    max_batch: int = 16,
    max_queue: int = 256,
    receive_s: float = 20.0,
    max_connections: int = 1000,
    **options: Any,
) -> Iterator[Local]:
    metrics = Metrics()
    batcher = Batcher(bot, max_batch, max_queue, on_batch=metrics.count_batch)
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    served = make_app(bot, batcher, metrics, "tiny", receive_s=receive_s, **options)
    limits = {"receive_s": receive_s, "max_connections": max_connections}
    server = make_server(served, batcher, **limits, shutdown_s=5.0, on_ready=ready.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    assert ready.wait(SOON)
    yield Local(url_of(listener), batcher, server)
    if isinstance(bot, GatedBot):
        bot.gate.set()
    server.should_exit = True
    thread.join(SOON)
    assert not thread.is_alive()
    assert not batcher.is_working


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(KNOVER)


@pytest.fixture
def gated(tokenizer: Tokenizer) -> GatedBot:
    return GatedBot(make_stage("2_gen"), tokenizer, None, DecodeConfig(max_tokens=MAX_TOKENS))


def status_of(url: str, **fields: Any) -> int:
    return int(httpx.post(f"{url}{CHAT}", json={**ASK, **fields}, timeout=SOON).status_code)


def test_a_full_queue_is_429(gated: GatedBot) -> None:
    with serving(gated, max_queue=2) as local, ThreadPoolExecutor(3) as pool:
        first = pool.submit(status_of, local.url)
        assert gated.begun.wait(SOON)
        others = [pool.submit(status_of, local.url) for _ in range(2)]
        eventually(lambda: local.batcher.queue_length == 2)
        assert metrics_of(local.url)["plato2_queue_length"] == 2
        response = httpx.post(f"{local.url}{CHAT}", json=ASK)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        with pytest.raises(openai.RateLimitError):
            ask(client_of(local.url), stream=True)
        gated.gate.set()
        assert [job.result(SOON) for job in [first, *others]] == [200, 200, 200]
        patient = openai.OpenAI(base_url=f"{local.url}/v1", api_key="none", timeout=SOON)
        assert texts(ask(patient))


def test_time_is_up(gated: GatedBot) -> None:
    with serving(gated, timeout_s=0.2) as local:
        assert (status_of(local.url), status_of(local.url)) == (504, 504)
        error = httpx.post(f"{local.url}{CHAT}", json=ASK, timeout=SOON).json()["error"]
        assert (error["code"], error["type"]) == ("timeout", "server_error")
        assert local.batcher.queue_length == 0
        with pytest.raises(openai.APIError, match=r"no reply within 0\.2 s"):
            list(ask(client_of(local.url), stream=True))
        assert len(gated.batches) == 1  # the others were never begun
        gated.gate.set()
        eventually(lambda: status_of(local.url) == 200)
        counted = metrics_of(local.url)[f"plato2_requests_total{{{CHAT}}}{{504}}"]
        assert counted >= 4  # the stream's, too


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_leaves_the_queue(gated: GatedBot, stream: bool) -> None:
    with serving(gated) as local:
        first = send_requests(local.url, 1)[0]
        assert gated.begun.wait(SOON)
        gone = send_requests(local.url, 3, messages=[{"role": "user", "content": "gone"}], stream=stream)
        stays = send_requests(local.url, 1, messages=[{"role": "user", "content": "stays"}])[0]
        eventually(lambda: local.batcher.queue_length == 4)
        if stream:
            assert gone[0].recv(4096).startswith(b"HTTP/1.1 200")
        for connection in gone:
            connection.close()
        eventually(lambda: local.batcher.queue_length == 1)
        gated.gate.set()
        assert b"HTTP/1.1 200" in read_all(first)
        assert b"HTTP/1.1 200" in read_all(stays)
        assert gated.batches == [[HI[0]["content"]], ["stays"]]
        name = f"plato2_requests_total{{{CHAT}}}{{499}}"
        eventually(lambda: metrics_of(local.url).get(name) == 3)


def test_hanging_up_in_the_middle_of_a_stream_harms_nobody(gated: GatedBot) -> None:
    gated.gate.set()
    with serving(gated) as local:
        client = client_of(local.url)
        stream = ask(client, stream=True, n=5, extra_body={"plato2": {"min_tokens": MAX_TOKENS}})
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        stream.close()
        assert texts(ask(client))
        connection = send_requests(local.url, 1, stream=True)[0]
        connection.recv(10)
        connection.close()
        assert status_of(local.url) == 200


def test_a_waiting_stream_is_kept_alive(gated: GatedBot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "KEEP_ALIVE_S", 0.05)
    with serving(gated) as local:
        connection = send_requests(local.url, 1, stream=True)[0]
        received = b""
        while received.count(b": waiting\n\n") < 3:
            received += connection.recv(4096)
        assert b'"role": "assistant"' in received
        assert b"content-type: text/event-stream" in received.lower()
        waiting = iter(ask(client_of(local.url), stream=True))
        assert next(waiting).choices[0].delta.role == "assistant"
        time.sleep(0.2)
        gated.gate.set()
        assert b"data: [DONE]" in read_all(connection)
        assert [chunk.choices[0].finish_reason for chunk in waiting][-1] in ("stop", "length")


def test_a_batch_that_fails_is_500_and_the_server_goes_on(
    gated: GatedBot, caplog: pytest.LogCaptureFixture
) -> None:
    gated.gate.set()
    with serving(gated) as local:
        gated.error = RuntimeError("the secret reason")
        response = httpx.post(f"{local.url}{CHAT}", json=ASK)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "reply_failed"
        assert "secret" not in response.text
        assert "the secret reason" in caplog.text
        gated.error = RuntimeError("again")
        with pytest.raises(openai.APIError, match="the reply failed"):
            list(ask(client_of(local.url), stream=True))
        assert status_of(local.url) == 200
        counted = metrics_of(local.url)
        assert counted[f"plato2_requests_total{{{CHAT}}}{{500}}"] == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_cannot_answer_says_so(gated: GatedBot) -> None:
    gated.gate.set()
    with serving(gated) as local:
        assert curl(f"{local.url}/healthz")[0] == 200
        gated.error = SystemExit(1)
        assert status_of(local.url) == 503
        eventually(lambda: not local.batcher.is_working)
        assert curl(f"{local.url}/healthz") == (503, '{"status":"stopping"}')
        assert status_of(local.url) == 503


def test_while_stopping_nothing_new_is_begun(gated: GatedBot) -> None:
    with serving(gated) as local, ThreadPoolExecutor(1) as pool:
        first = pool.submit(status_of, local.url)
        assert gated.begun.wait(SOON)
        local.server.should_exit = True  # what a signal does
        eventually(lambda: curl(f"{local.url}/healthz")[0] == 503)
        response = httpx.post(f"{local.url}{CHAT}", json=ASK)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")
        assert response.headers["connection"] == "close"
        gated.gate.set()
        assert first.result(SOON) == 200


def test_the_key(gated: GatedBot) -> None:
    gated.gate.set()
    with serving(gated, api_key="let-me-in") as local:
        assert texts(ask(client_of(local.url, "let-me-in")))
        for key in ("wrong", "let-me-in-", "lét-me-in"):
            status, body = curl(f"{local.url}/v1/models", "-H", f"Authorization: Bearer {key}")
            assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            ask(client_of(local.url, "wrong"))
        for header in ("Authorization: Basic let-me-in", "Authorization: let-me-in", "X-Nothing: 1"):
            status, _ = post(local.url, ASK, "-H", header)
            assert status == 401
        response = httpx.get(f"{local.url}/v1/models")
        assert response.headers["www-authenticate"] == "Bearer"
        assert "let-me-in" not in response.text
        for path in ("/healthz", "/metrics"):
            assert curl(f"{local.url}{path}")[0] == 200


def test_the_list_of_fields_needs_the_key_and_the_page_may(gated: GatedBot) -> None:
    def status(local: Local, path: str, **more: Any) -> Any:
        return httpx.get(f"{local.url}{path}", **more).status_code

    with serving(gated, api_key="let-me-in") as local:
        assert (status(local, "/openapi.json"), status(local, "/")) == (401, 404)
        assert status(local, "/openapi.json", headers={"Authorization": "Bearer let-me-in"}) == 200
    with serving(gated, api_key="let-me-in", page_key=True) as local:
        for path in ("/", "/config", "/gradio_api/info", "/nowhere"):
            assert status(local, path) == status(local, path, auth=("anybody", "wrong")) == 401
            assert status(local, path, auth=("anybody", "let-me-in")) == 404  # there is no page here
        assert httpx.get(local.url).headers["www-authenticate"].startswith("Basic realm=")
        assert httpx.get(f"{local.url}/v1/models").headers["www-authenticate"] == "Bearer"
        for scheme in ("Basic", "Basic ?", "Basic bGV0", "Basic \xff", "Bearer", ""):
            assert status(local, "/", headers={"Authorization": scheme.encode("latin-1")}) == 401
        assert (status(local, "/healthz"), status(local, "/metrics")) == (200, 200)


def test_only_names_of_its_own_are_answered(gated: GatedBot) -> None:
    def status(local: Local, host: str, path: str = "/v1/models") -> int:
        return int(httpx.get(f"{local.url}{path}", headers={"Host": host}).status_code)

    with serving(gated) as local:
        port = local.url.rpartition(":")[2]
        for host in ("localhost", "LOCALHOST:1", f"127.0.0.1:{port}", "[::1]:8000", "127.0.0.2"):
            assert status(local, host) == 200, host
        for host in (
            "evil.example",
            "evil.example:80",
            "localhost.evil.example",
            "10.0.0.1",
            "[",
            "a]",
            "",
            "@",
        ):
            for path in ("/v1/models", "/healthz", "/", "/metrics", "/openapi.json"):
                assert status(local, host, path) == 400, (host, path)
        error = httpx.get(local.url, headers={"Host": "evil.example"}).json()["error"]
        assert error["code"] == "foreign_host"
        assert "--allow-host evil.example" in error["message"]
        with socket.create_connection(("127.0.0.1", int(port)), timeout=SOON) as connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")  # who names none is no browser
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    with serving(gated, hosts=("chat.example.org",)) as local:
        assert (status(local, "chat.example.org"), status(local, "example.org")) == (200, 400)
    with serving(gated, hosts=("*",)) as local:
        assert status(local, "evil.example") == 200


def test_every_get_has_a_head(url: str) -> None:
    for path, status in (("/healthz", 200), ("/v1/models", 200), ("/metrics", 200), ("/", 404), (CHAT, 405)):
        response = httpx.head(f"{url}{path}")
        assert (response.status_code, response.content) == (status, b"")


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "nothing"])
def test_a_request_to_upgrade_is_a_request(url: str, upgrade: str) -> None:
    """Whatever other protocols are installed here: none of them is used."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**ASK, "seed": 3}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {upgrade}\r\nHTTP2-Settings: AAMAAABkAAQAAP\r\n"
    with socket.create_connection((host, int(port)), timeout=SOON) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 200")


def test_who_sends_nothing_is_cut_off(gated: GatedBot) -> None:
    gated.gate.set()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    whole = head + b"Content-Length: 2\r\n\r\n{}"
    with serving(gated, receive_s=0.3) as local:
        host, port = local.url.removeprefix("http://").split(":")
        # nothing; half a head; the same after an answer; half a body
        for begin in (b"", head, whole + head, head + b"Content-Length: 9\r\n\r\n{"):
            with socket.create_connection((host, int(port)), timeout=SOON) as connection:
                connection.sendall(begin)
                received = read_all(connection)
            assert received.count(b"HTTP/1.1 400") == begin.startswith(whole), begin
            assert received.count(b"HTTP/1.1 408") == begin.endswith(b"{"), begin
        assert status_of(local.url) == 200
        waiting = send_requests(local.url, 1)[0]  # who waits for an answer is not cut off
        gated.gate.clear()
        time.sleep(0.6)
        gated.gate.set()
        assert read_all(waiting).startswith(b"HTTP/1.1 200")


def test_a_new_connection_takes_the_place_of_an_idle_one(gated: GatedBot) -> None:
    with serving(gated, max_connections=4) as local:
        host, port = local.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port)), timeout=SOON) for _ in range(10)]
        asked = send_requests(local.url, 1)
        assert gated.begun.wait(SOON)
        asked += send_requests(local.url, 2)
        eventually(lambda: local.batcher.queue_length == 2)
        gone = 0
        for connection in idle:
            connection.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                gone += connection.recv(1) == b""
        assert gone >= 9  # the oldest ones; four may be there, three of which have asked
        fourth = send_requests(local.url, 1)[0]
        eventually(lambda: local.batcher.queue_length == 3)
        with contextlib.suppress(ConnectionError):
            refused = read_all(socket.create_connection((host, int(port)), timeout=SOON))
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"too_many_connections" in refused
        gated.gate.set()
        for connection in [*asked, fourth]:
            assert read_all(connection).startswith(b"HTTP/1.1 200")
        for connection in idle:
            connection.close()


def test_a_thousand_idle_connections_beside_two_hundred_clients(runs: dict[str, Path]) -> None:
    """With as few files open as many systems allow a process."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 1500:
        pytest.skip("needs 1,500 open files")
    limit = ["prlimit", "--nofile=1024:1024"] if shutil.which("prlimit") else pytest.skip("needs prlimit")
    running = start(runs["2_gen"], "--max-tokens", 4, before=limit)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1500), hard))
    host, port = running.url.removeprefix("http://").split(":")
    idle = [socket.create_connection((host, int(port)), timeout=SOON) for _ in range(1060)]
    assert httpx.get(f"{running.url}/healthz", timeout=SOON).status_code == 200

    async def ask_all() -> list[Any]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120) as client:
            body = {**ASK, "model": "2_gen", "seed": 3}
            return await asyncio.gather(*(client.post(f"{running.url}{CHAT}", json=body) for _ in range(200)))

    assert {answer.status_code for answer in asyncio.run(ask_all())} == {200}
    for connection in idle:
        connection.close()
    code, _, stderr = end(running)
    assert code == 0
    assert stderr.splitlines() == [
        "no --evaluation: candidates are ranked by log-probability, not by coherence"
    ]


def test_the_log_is_bounded() -> None:
    stream = io.StringIO()
    log = LimitedLog(stream)
    for _ in range(100):
        print("x" * 10_000, file=log)
    written = stream.getvalue()
    assert LOG_CHARACTERS <= len(written) < LOG_CHARACTERS + 20_000
    assert written.endswith("the rest of this minute is left out\n")
    log.began -= LOG_SECONDS + 1
    print("later", file=log)
    assert stream.getvalue().endswith("left out\nlater\n")


def test_a_line_for_each_request_has_no_more_than_its_path(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"], "--log-requests", "--max-tokens", 4)
    httpx.get(f"{running.url}/healthz?secret=1")
    httpx.get(f"{running.url}/a%0Ab%20c?secret=2")
    for _ in range(300):  # what is no HTTP
        with socket.create_connection(
            running.url.removeprefix("http://").split(":"), timeout=SOON
        ) as connection:
            connection.sendall(b"\x16\x03\x01\r\n\r\n")
            connection.recv(100)
    code, stdout, stderr = end(running)
    assert code == 0
    assert stdout.splitlines() == ["127.0.0.1 GET /healthz 200", "127.0.0.1 GET /a%0Ab%20c 404"]
    assert len(stderr) < LOG_CHARACTERS + 1000


def test_cors_is_closed_but_for_those_named(gated: GatedBot) -> None:
    gated.gate.set()
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    with serving(gated) as local:
        response = httpx.post(f"{local.url}{CHAT}", json=ASK, headers=asked)
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert httpx.options(f"{local.url}{CHAT}", headers=asked).status_code == 405
    origins = ["https://example.org", "https://example.com"]
    with serving(gated, cors_origins=origins, api_key="key") as local:
        response = httpx.options(f"{local.url}{CHAT}", headers=asked)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        for headers, status in (({}, 401), ({"Authorization": "Bearer key"}, 200)):
            response = httpx.post(
                f"{local.url}{CHAT}", json=ASK, headers={"Origin": "https://example.com", **headers}
            )
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://example.com"
        response = httpx.get(f"{local.url}/healthz", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers


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


# ---------------------------------------------------------------------------------------------- command line


def complaint(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one model to serve: plato2 serve DIR"),
        (["a", "--generation", "b"], "give one model to serve"),
        (["a", "--port", 70000], "--port 70000: use 0 to 65535"),
        (["a", "--timeout", 0], "--timeout 0.0: use 0.001 or more"),
        (["a", "--timeout", "nan"], "--timeout nan: use 0.001 or more"),
        (["a", "--receive-timeout", "inf"], "--receive-timeout inf: use 0.001 or more"),
        (["a", "--name", "  "], "--name '  ': give a name of one line"),
        (["a", "--name", "a\nb"], "--name 'a\\nb': give a name of one line"),
        (["a", "--allow-host", "http://x.org"], "--allow-host http://x.org: give a name alone, such as"),
        (["a", "--allow-host", "x.org:80"], "--allow-host x.org:80: give a name alone, such as"),
        (["a", "--cors-origin", "foo"], "--cors-origin foo: give scheme and name, such as https://"),
        (["a", "--cors-origin", "http://x.org/"], "--cors-origin http://x.org/: give scheme and name"),
        (["a", "--max-batch", 17], "--max-batch 17: use 1 to 16"),
        (["a", "--max-queue", 0], "--max-queue 0: use 1 or more"),
        (["a", "--api-key", ""], "--api-key: use letters, digits and signs"),
        (["a", "--top-k", 0], "--top-k 0: must be at least 1"),
        (["a", "--system", "obey"], "--system obey: use ignore, refuse or context"),
        (["a", "--ui", "--api-key", "k"], "--ui: the key does not guard the page; give --ui-login"),
        (["a", "--ui", "--ui-login"], "--ui-login: there is no key to ask for; set PLATO2_API_KEY"),
        (["a", "--ui-open"], "--ui-login and --ui-open are for the page; give --ui"),
        (["a", "--receive-timeout", 0], "--receive-timeout 0.0: use 0.001 or more"),
        (["a", "--max-connections", 0], "--max-connections 0: use 1 or more"),
        (["a", "--host", "nowhere.invalid"], "--host nowhere.invalid: "),
        (["a", "--host", "203.0.113.9"], "203.0.113.9:8000 cannot be used"),
        (["nothing-here", "--port", 0], "no such run folder, checkpoint or model folder"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(arguments: list[object], message: str) -> None:
    assert message in complaint(*arguments)


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLATO2_API_KEY", "")
    assert "--api-key: use letters, digits and signs" in complaint("a", "--host", "0.0.0.0")


@pytest.mark.slow
def test_a_server_for_others_says_that_it_has_no_key(runs: dict[str, Path]) -> None:
    running = start(runs["2_gen"], "--host", "0.0.0.0", "--max-tokens", 4)
    assert "--host 0.0.0.0: whoever reaches it may use it; PLATO2_API_KEY sets a key" in end(running)[2]
    running = start(runs["2_gen"], "--host", "0.0.0.0", "--max-tokens", 4, PLATO2_API_KEY="k")
    assert "may use it" not in end(running)[2]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("outputs/tiny-2_gen/20261128-101112", "tiny-2_gen"),
        ("outputs/tiny-2_gen/20261128-101112/checkpoints/best.ckpt", "tiny-2_gen"),
        ("outputs/tiny-2_gen/4711", "tiny-2_gen"),
        ("outputs/tiny-2_gen/mine", "mine"),
        ("outputs/12345", "tiny-2_gen"),
        ("outputs/tiny-2_gen/mine/checkpoints/last.ckpt", "mine"),
        ("models/24L", "24L"),
        ("models/2026", "2026"),
    ],
)
def test_the_id_of_a_model_is_no_time(tmp_path: Path, path: str, name: str) -> None:
    file = tmp_path / path
    run = file.parents[1] if file.suffix else file
    run.mkdir(parents=True)
    if path.startswith("outputs"):
        RunFolder(run).write_lineage(model="tiny", stage="2_gen")
    if file.suffix:
        file.parent.mkdir()
        file.touch()
    assert model_name(file) == name


def test_a_port_that_is_taken_is_named(runs: dict[str, Path]) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        said = complaint(runs["2_gen"], "--port", port)
    assert f"--port {port}: 127.0.0.1:{port} cannot be used" in said
    assert "use another --port" in said


def test_missing_packages_are_named(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "plato2.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "needs uvicorn: pip install '.[serve]'" in complaint(runs["2_gen"])


def test_as_many_contexts_as_are_decoded_at_once() -> None:
    assert CONTEXTS_AT_ONCE == 16  # what --max-batch and its help say


def test_only_the_server_and_its_page_need_its_packages() -> None:
    web = "fastapi|uvicorn|starlette|prometheus_client|gradio"
    for path in (ROOT / "plato2").rglob("*.py"):
        found = re.findall(rf"^\s*(?:import|from) (?:{web})\b", path.read_text(encoding="utf-8"), re.M)
        assert not found or path.parent.name == "serve", path


# --------------------------------------------------------------------------------- Docker, and the document


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_dockerfile_copies_what_exists_and_starts_what_parses() -> None:
    found = instructions()
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    sources = [source for word, rest in found if word == "COPY" for source in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert dict(found)["FROM"] == "python:3.11-slim"
    assert dict(found)["USER"] == "plato2"
    assert dict(found)["EXPOSE"] == "8000"
    assert "/healthz" in dict(found)["HEALTHCHECK"]
    program, verb, *arguments = json.loads(dict(found)["ENTRYPOINT"]) + json.loads(dict(found)["CMD"])
    assert (program, verb) == ("plato2", "serve")
    assert verb in VERBS
    from plato2.commands import serve

    context = typer.main.get_command(serve.app).make_context(verb, arguments)
    assert context.params["host"] == "0.0.0.0"
    assert context.params["port"] == 8000
    assert context.params["model"] == Path("/model")
    assert re.search(r"^torch==", (ROOT / "requirements.txt").read_text(), re.M)  # what the grep finds


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_examples_of_the_document_work(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = next(block for block in blocks("sh") if block.startswith("curl "))
    command = command.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    (program,) = blocks("python")
    exec(compile(program.replace("http://127.0.0.1:8000", url), "docs/serve.md", "exec"), {})
    first, *lines = capsys.readouterr().out.splitlines()
    assert len(ast.literal_eval(first)) == 2
    assert len(lines) == 5 + 1
    assert lines[-1] == ast.literal_eval(first)[0]


def test_the_document_shows_what_the_server_prints(url: str) -> None:
    line, error = blocks("text")
    assert re.fullmatch(r"http://\S+/v1 serves \S+ on cpu; fields: docs/serve\.md and \S+\n", line)
    assert json.loads(error)["error"]["code"] == "invalid_value"
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    names = {re.sub(r"(_bucket|_sum|_count|_created).*", "", name.split("{")[0]) for name in metrics_of(url)}
    for name in re.findall(r"`(plato2_\w+)", text):
        assert name in names
    for field in re.findall(r"^\| `(\w+)`", text.split("## Fields")[1].split("\nIn `plato2`")[0], re.M):
        assert field in ChatRequest.model_fields
