"""Fixtures of the tests of the server: one in a process of its own, its bot, and a bot to hold up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import KNOVER, make_run, make_stage
from serving import MAX_TOKENS, end, start
from test_batching import GatedBot

from plato2.config import DecodeConfig
from plato2.data.tokenizer import Tokenizer
from plato2.talk.bot import PlatoBot


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, name) for name in ("2_gen", "2_eval")}


@pytest.fixture(scope="session")
def bot(runs: dict[str, Path]) -> PlatoBot:
    """The bot of the server below, here."""
    return PlatoBot.load(runs["2_gen"], runs["2_eval"], "cpu", DecodeConfig(max_tokens=MAX_TOKENS))


@pytest.fixture(scope="session")
def url(runs: dict[str, Path]) -> Iterator[str]:
    options = ["--evaluation", runs["2_eval"], "--name", "tiny", "--max-tokens", MAX_TOKENS]
    running = start(runs["2_gen"], *options, "--device", "cpu")
    assert running.line == (
        f"{running.url}/v1 serves tiny on cpu; fields: docs/serve.md and {running.url}/openapi.json\n"
    )
    yield running.url
    assert end(running) == (0, "", "")


@pytest.fixture(scope="session")
def client(url: str) -> Any:
    from clients import client_of  # which skips where openai is missing

    return client_of(url)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(KNOVER)


@pytest.fixture
def gated(tokenizer: Tokenizer) -> GatedBot:
    return GatedBot(make_stage("2_gen"), tokenizer, None, DecodeConfig(max_tokens=MAX_TOKENS))
