"""A model behind a chat API of OpenAI's form as a speaker: `plato2 serve`, vLLM, llama.cpp, OpenAI, ..."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field

from plato2.config import UserError, install
from plato2.evaluate.pretrained import chat_messages
from plato2.formats import JSON_BYTES, Open, parse
from plato2.talk.speaker import Said

API_KEY = "OPENAI_API_KEY"
"""The environment variable of the key, for addresses that want one."""
TRIES = 6
LONGEST_WAIT_S = 60.0
"""Between two tries, whatever the server asks for."""
REQUESTS_AT_ONCE = 16
SETTINGS = ("temperature", "top_p", "max_tokens")
"""Fields of a request that are sent where they are given."""
AGAIN = "the same command continues from here"


class _Message(Open):
    content: str | None = None
    refusal: str | None = None


class _Choice(Open):
    message: _Message
    finish_reason: str | None = None


class _Answer(Open):
    """The body of an answer."""

    choices: Annotated[list[_Choice], Field(min_length=1)]


class OpenAIChat:
    """A chat API; the other side of the dialogue is its user.

    A request that fails for a while (no connection, a time-out, 408, 429, 5xx) is sent again.

    Args:
        url: what comes before `/chat/completions`, such as `http://127.0.0.1:8000/v1`.
        model: its name there.
        settings: of `SETTINGS`, those to be sent; the others are the server's.
        timeout_s: for the whole of one answer.
        wait_s: before the second try; then twice as long each time, unless the server says how long.
        name: what its turns are marked with.

    Raises:
        UserError: httpx is not installed, or an address that cannot be one.
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
        if "@" in parts.netloc:
            raise UserError(f"the address holds a password; set {API_KEY} instead, which is not recorded")
        try:
            import httpx  # noqa: F401
        except ImportError:
            raise UserError(f"needs httpx: {install('eval')}") from None
        self.url, self.model = url.rstrip("/"), model
        self.settings = dict(settings or {})
        self.name = name or f"openai:{url}#{model}"
        self._timeout_s, self._wait_s = timeout_s, wait_s
        self._has_answered = False

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return bool(text.strip())

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`; what is behind the address cannot be told."""
        return {"url": self.url, "model": self.model}

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """As `Speaker.reply_batch`, as far as the server holds to the seed.

        Raises:
            UserError: no answer after several tries, or one that is an error.
        """
        return asyncio.run(self._ask_all(histories, seeds))

    async def _ask_all(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        import httpx

        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        free = asyncio.Semaphore(REQUESTS_AT_ONCE)
        async with httpx.AsyncClient(headers=headers, timeout=self._timeout_s) as client:

            async def ask(history: Sequence[str], seed: int) -> Said:
                async with free:
                    return await self._ask(client, history, seed)

            return list(await asyncio.gather(*map(ask, histories, seeds)))

    async def _ask(self, client: Any, history: Sequence[str], seed: int) -> Said:
        """One reply."""
        body = {
            "model": self.model,
            "messages": chat_messages(history),
            "seed": seed % (1 << 31),
            **self.settings,
        }
        wait_s = self._wait_s
        for number in range(1, TRIES + 1):
            data, reason, asked_s = await self._try(client, body)
            if data is not None:
                break
            if number == TRIES:
                raise UserError(f"{self.url}: no answer after {TRIES} tries, the last: {reason}; {AGAIN}")
            await asyncio.sleep(min(wait_s if asked_s is None else asked_s, LONGEST_WAIT_S))
            wait_s *= 2
        self._has_answered = True
        cure = "is this the address of OpenAI's chat API? It usually ends in /v1"
        choice = parse(_Answer, data or b"", f"{self.url}: the answer", cure).choices[0]
        text, refusal = (
            " ".join((t or "").split()) for t in (choice.message.content, choice.message.refusal)
        )
        if refusal or choice.finish_reason == "content_filter":
            return Said(refusal=refusal or text)
        return Said([{"text": text, "latent": None, "log_prob": None, "coherence": None}] if text else [])

    async def _try(self, client: Any, body: Mapping[str, Any]) -> tuple[bytes | None, str, float | None]:
        """An answer; or None, why there is none, and the seconds that the server asks to wait.

        Raises:
            UserError: an error that would come again.
        """
        import httpx

        try:
            async with asyncio.timeout(self._timeout_s):
                async with client.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                    data = b""
                    async for part in response.aiter_bytes():
                        data += part
                        if len(data) > JSON_BYTES:
                            raise UserError(f"{self.url}: an answer of more than {JSON_BYTES:,} bytes")
        except (TimeoutError, httpx.TimeoutException):
            return None, f"nothing within {self._timeout_s:g} seconds", None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if isinstance(error, httpx.ConnectError | httpx.InvalidURL) and not self._has_answered:
                raise UserError(f"{self.url}: cannot be reached ({reason}); is the server running?") from None
            return None, reason, None
        if response.status_code == 200:
            return data, "", None
        said = " ".join(data[:300].decode("utf-8", "replace").split())
        reason = f"status {response.status_code}: {said}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            return None, reason, retry_after(response.headers.get("retry-after"))
        key = f"; set {API_KEY}" if response.status_code in (401, 403) else ""
        raise UserError(f"{self.url}: {reason}{key}")


def retry_after(value: str | None) -> float | None:
    """The seconds of a Retry-After header, which has a number or a date; None where it has neither."""
    try:
        return max(0.0, float(value or ""))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
