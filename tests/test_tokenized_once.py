"""The server cuts what is said into tokens once: for its limits, its warnings, its count and the reply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from runs import KNOVER, make_stage
from serving import Counted

from plato2.config import DecodeConfig
from plato2.data.tokenizer import Tokenizer
from plato2.talk.bot import PlatoBot

pytest.importorskip("fastapi", reason="the server needs pip install '.[serve]'")
pytest.importorskip("prometheus_client", reason="the server needs pip install '.[serve]'")
pytest.importorskip("httpx", reason="the tests of the server need httpx, which comes with openai")

from fastapi.testclient import TestClient

from plato2.serve.app import make_app
from plato2.serve.batching import Batcher
from plato2.serve.metrics import Metrics


@pytest.fixture
def bot() -> PlatoBot:
    return PlatoBot(make_stage("2_gen"), Tokenizer.load(KNOVER), None, DecodeConfig(max_tokens=4))


@pytest.fixture
def client(bot: PlatoBot) -> Iterator[TestClient]:
    batcher, metrics = Batcher(bot), Metrics()
    yield TestClient(make_app(bot, batcher, metrics, "tiny"), "http://localhost")
    batcher.close(10)


# None of it is ASCII: an ASCII word's pieces are kept, and would not be counted again.
@pytest.mark.parametrize(
    ("said", "turns"),
    [
        ([("user", "hi 你好"), ("assistant", "no 好"), ("user", "你好吗")], ["hi 你好", "no 好", "你好吗"]),
        ([("user", "hi 你好"), ("user", "你好吗")], ["hi 你好 你好吗"]),
        ([("user", "好 " * 1000)], [("好 " * 1000).strip()]),
    ],
    ids=["turns", "two messages of one turn", "a long message"],
)
def test_each_turn_of_a_request_is_cut_once(
    client: TestClient, bot: PlatoBot, said: list[tuple[str, str]], turns: list[str]
) -> None:
    counted = Counted(bot.tokenizer)
    messages = [{"role": role, "content": text} for role, text in said]
    answer = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert answer.status_code == 200
    found = answer.json()["plato2"]
    assert "cannot read" in found["warning"]
    assert found["context_truncated"] == (len(messages) == 1)
    assert counted.cut == turns
