"""What may be asked of the server: its addresses, and a mistake in a request is named."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import pytest
from clients import ASK, CHAT, HI, USER, ask, client_of, curl, httpx, metrics_of, openai, post, texts
from serving import MAX_TOKENS
from test_batching import SOON, eventually


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
        *(400, "invalid_value", None, "not valid Unicode"),
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
        *(400, "invalid_value", "messages[0].role", "PLATO-2 cannot call tools"),
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
