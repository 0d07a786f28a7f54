"""A model behind a chat API of OpenAI's form as a speaker: `plato2 serve`, vLLM, llama.cpp, OpenAI, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from plato2.config import UserError
from plato2.evaluate.endpoint import Choice, Endpoint, EndpointConfig
from plato2.talk.speaker import Said

REQUESTS_AT_ONCE = 16
SETTINGS = ("temperature", "top_p", "max_tokens")
"""Fields of a request that are sent where they are given."""


class OpenAIChat:
    """A chat API; the other side of the dialogue is its user.

    Args:
        url: what comes before `/chat/completions`, such as `http://127.0.0.1:8000/v1`.
        model: its name there.
        settings: of `SETTINGS`, those to be sent; the others are the server's.
        timeout_s: for the whole of one answer.
        wait_s: as for `Endpoint`.
        name: what its turns are marked with.

    Raises:
        UserError: an address that cannot be one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        settings: Mapping[str, float] | None = None,
        timeout_s: float = 60.0,
        wait_s: float = 1.0,
        name: str = "",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc or not model:
            raise UserError("must be openai:URL#MODEL, as openai:http://127.0.0.1:8000/v1#tiny")
        self.settings = dict(settings or {})
        self.name = name or f"openai:{url}#{model}"
        config = EndpointConfig(url, model, timeout_s=timeout_s, parallel=REQUESTS_AT_ONCE)
        self._endpoint = Endpoint(config, wait_s)

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return bool(text.strip())

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`; what is behind the address cannot be told."""
        return {"url": self._endpoint.config.url, "model": self._endpoint.config.model}

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """As `Speaker.reply_batch`, as far as the server holds to the seed.

        Raises:
            UserError: as `Endpoint.ask`.
        """
        requests = [
            {"messages": chat_messages(history), "seed": seed % (1 << 31), **self.settings}
            for history, seed in zip(histories, seeds, strict=True)
        ]
        return [_said(answer) for answer in self._endpoint.ask(requests)]


def chat_messages(turns: Sequence[str]) -> list[dict[str, str]]:
    """Turns as messages; the user said the last one, the assistant the one before, and so on."""
    roles = ("user", "assistant")
    return [{"role": roles[(len(turns) - 1 - n) % 2], "content": text} for n, text in enumerate(turns)]


def _said(answer: Choice) -> Said:
    """What is a reply, and what a refusal; neither where the model said nothing."""
    text, refusal = (" ".join((t or "").split()) for t in (answer.message.content, answer.message.refusal))
    if refusal or answer.finish_reason == "content_filter":
        return Said(refusal=refusal or text)
    return Said([{"text": text, "latent": None, "log_prob": None, "coherence": None}] if text else [])
