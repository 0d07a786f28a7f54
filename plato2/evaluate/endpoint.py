"""Chat models behind addresses of OpenAI's form, such as `plato2 serve`, vLLM, llama.cpp, OpenAI; a file that
keeps every answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field

from plato2.bounded import read_file
from plato2.config import UserError, check_options, option
from plato2.files import lock_file, locked, sync
from plato2.formats import JSON_BYTES, Closed, Open, parse

ANSWERS_BYTES = 1 << 30
ANSWER_CHARACTERS = 100_000
"""More than that of an answer is cut off: no verdict needs it, and the file stays readable."""
API_KEY = "OPENAI_API_KEY"
"""The environment variable of the key, for addresses that want one."""
LONGEST_WAIT_S = 60.0
"""Between two tries, whatever the server asks for."""
AGAIN = "the same command continues from here"
NO_API = "is this the address? What came is not an answer of OpenAI's chat API; it usually ends in /v1"

Message = Mapping[str, str]


@dataclass
class EndpointConfig:
    """Which model answers, and how.

    Raises:
        UserError: a value that cannot be.
    """

    url: str = option(help="An OpenAI-compatible API, as http://127.0.0.1:8000/v1.")
    model: str = option(help="The model's name there.")
    temperature: float = option(0.0, help="Of its answers.", ge=0, le=10)
    max_tokens: int = option(512, help="Tokens of an answer.", ge=1)
    timeout_s: float = option(60.0, help="Seconds to wait for an answer.", ge=0.01)
    retries: int = option(5, help="Retries after a time-out, 429, 5xx or nonsense.", ge=0)
    key_variable: str = option(
        API_KEY, help="The environment variable that holds the API's key; local servers need none."
    )
    parallel: int = option(8, help="Questions asked at once.", ge=1)

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self)
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url={self.url}: give the address of an API, as http://127.0.0.1:8000/v1")
        if "@" in self.url.split("/")[2]:
            raise UserError(
                f"the address holds a password; set {self.key_variable} instead, which is not recorded"
            )
        self.url = self.url.rstrip("/")
        if not (self.model.strip() and self.model.isprintable()):
            raise UserError(f"model={self.model!r}: give the name by which the API knows the model")
        is_name = re.fullmatch(r"[A-Za-z_]\w*", self.key_variable, re.ASCII)
        if not is_name:  # perhaps the key itself, which must not be recorded
            raise UserError(
                f"key_variable={self.key_variable[:4]}...: not the name of an environment variable; give the "
                f"name of the one that holds the key, such as {API_KEY}"
            )

    def headers(self) -> dict[str, str]:
        """Those of every request.

        Raises:
            UserError: the key cannot be sent.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"{self.key_variable}: the key in it has characters that no key has; set it again"
            )
        return {"Authorization": f"Bearer {key}"} if key else {}


class Reply(Open):
    """What the model said."""

    content: str | None = None
    refusal: str | None = None


class Choice(Open):
    """The answer to a question."""

    message: Reply
    finish_reason: str | None = None


class _Body(Open):
    choices: Annotated[list[Choice], Field(min_length=1)]


class _Again(Exception):
    """A try that failed, and another may not. Its text is what is said if this was the last one.

    Args:
        text: of a `UserError`.
        wait_s: the seconds to wait; None = as long as the client likes.
    """

    def __init__(self, text: str, wait_s: float | None = None) -> None:
        super().__init__(text)
        self.wait_s = wait_s


class Endpoint:
    """Asks the model.

    What fails for a while (no connection, a time-out, 408, 429, 5xx, what is not an answer) is asked again.

    Args:
        config: which model, and how; the caller's requests say how it decodes.
        wait_s: before the second try; then twice as long each time, unless the server says how long.
        again: what to do when all tries have failed, for the message.
    """

    def __init__(self, config: EndpointConfig, wait_s: float = 1.0, again: str = AGAIN) -> None:
        self.config = config
        self._wait_s, self._again = wait_s, again
        self._has_answered = False

    def ask(
        self, requests: Sequence[Mapping[str, Any]], keep: Callable[[int, Choice], None] | None = None
    ) -> list[Choice]:
        """The answers, asked for several at a time.

        Args:
            requests: bodies of requests, without the model.
            keep: gets the number of a request and its answer, as soon as it is there.

        Raises:
            UserError: no answer after all tries, or one that is an error.
        """
        return asyncio.run(self._ask_all(requests, keep))

    async def _ask_all(
        self, requests: Sequence[Mapping[str, Any]], keep: Callable[[int, Choice], None] | None
    ) -> list[Choice]:
        import httpx

        headers = self.config.headers()
        free = asyncio.Semaphore(self.config.parallel)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=headers, timeout=self.config.timeout_s, limits=limits) as client:

            async def ask(number: int, request: Mapping[str, Any]) -> Choice:
                async with free:
                    answer = await self._ask(client, {"model": self.config.model, **request})
                    if keep is not None:
                        keep(number, answer)
                    return answer

            tasks = [asyncio.create_task(ask(*numbered)) for numbered in enumerate(requests)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:  # the others end before their client does, where one fails
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, body: Mapping[str, Any]) -> Choice:
        """One answer."""
        wait_s = self._wait_s
        for left in reversed(range(self.config.retries + 1)):
            try:
                answer = await self._try(client, body)
                self._has_answered = True
                return answer
            except _Again as failed:
                if not left:
                    raise UserError(str(failed)) from None
                await asyncio.sleep(min(wait_s if failed.wait_s is None else failed.wait_s, LONGEST_WAIT_S))
            wait_s *= 2
        raise AssertionError("the last try returns or raises")

    async def _try(self, client: Any, body: Mapping[str, Any]) -> Choice:
        """One answer.

        Raises:
            _Again: an error that may be over soon.
            UserError: one that would come again.
        """
        import httpx

        url, timeout_s = self.config.url, self.config.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
                    data = b""
                    async for part in response.aiter_bytes():
                        data += part
                        if len(data) > JSON_BYTES:
                            raise UserError(f"{url}: an answer of more than {JSON_BYTES:,} bytes")
        except (TimeoutError, httpx.TimeoutException):
            raise self._failed(f"nothing within {timeout_s:g} seconds") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if isinstance(error, httpx.ConnectError | httpx.InvalidURL) and not self._has_answered:
                raise UserError(f"{url}: cannot be reached ({reason}); is the server running?") from None
            raise self._failed(reason) from None
        if response.status_code == 200:
            try:
                return parse(_Body, data, f"{url}: the answer", NO_API).choices[0]
            except UserError as error:
                raise _Again(str(error), wait_s=0.0) from None
        said = " ".join(data[:300].decode("utf-8", "replace").split())
        reason = f"status {response.status_code}: {said}"
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise self._failed(reason, retry_after(response.headers.get("retry-after")))
        key = f"; set {self.config.key_variable}" if response.status_code in (401, 403) else ""
        raise UserError(f"{url}: {reason}{key}")

    def _failed(self, reason: str, wait_s: float | None = None) -> _Again:
        tries = "1 try" if self.config.retries == 0 else f"{self.config.retries + 1} tries"
        told = f"{self.config.url}: no answer after {tries}, the last: {reason}; {self._again}"
        return _Again(told, wait_s)


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


class _Kept(Closed):
    key: str
    answer: str


class Answers:
    """All answers so far, by question; each is on the disk before it counts.

    Args:
        endpoint: who is asked what is not in the file.
        file: open for appending.
        known: what is in it.
    """

    def __init__(self, endpoint: Endpoint, file: BinaryIO, known: dict[str, str]) -> None:
        self.endpoint, self.file, self.known = endpoint, file, known

    def key(self, messages: Sequence[Message]) -> str:
        """Of a question to this model with these settings."""
        config = self.endpoint.config
        asked = [config.model, config.temperature, config.max_tokens, [dict(m) for m in messages]]
        return sha256(json.dumps(asked).encode()).hexdigest()

    def missing(self, questions: Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
        """Those that have no answer yet, each once."""
        by_key = {self.key(messages): messages for messages in questions}
        return [messages for key, messages in by_key.items() if key not in self.known]

    def ask(self, questions: Sequence[Sequence[Message]], advance: Callable[[], object]) -> None:
        """Asks what has no answer yet; calls `advance` after each. A refusal is an answer, too.

        Raises:
            UserError: as `Endpoint.ask`; what was answered is kept.
        """
        config, missing = self.endpoint.config, self.missing(questions)

        def keep(number: int, answer: Choice) -> None:
            key, said = self.key(missing[number]), answer.message
            text = (said.content or said.refusal or "")[:ANSWER_CHARACTERS]
            self.file.write(json.dumps({"key": key, "answer": text}).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
            self.known[key] = text
            advance()

        settings = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        self.endpoint.ask([{"messages": messages, **settings} for messages in missing], keep)

    def __getitem__(self, messages: Sequence[Message]) -> str:
        """The answer."""
        return self.known[self.key(messages)]


@contextmanager
def kept_answers(path: Path, endpoint: Endpoint) -> Iterator[Answers]:
    """The file of answers; a half-written last line is cut off.

    Raises:
        UserError: another process writes it, or it is something else.
    """
    cure = "give the file of an earlier run, or a new one"
    try:
        with locked(lock_file(path), f"--answers {path}"), path.open("a+b") as file:
            data = read_file(path, ANSWERS_BYTES, cure, "--answers ")
            whole = data[: data.rfind(b"\n") + 1]
            lines = whole.splitlines()
            read = [
                parse(_Kept, line, f"--answers {path}:{number}", cure)
                for number, line in enumerate(lines, start=1)
            ]
            if data and not whole:
                raise UserError(f"--answers {path}: not a file of answers; {cure}")
            file.truncate(len(whole))
            sync(path)
            yield Answers(endpoint, file, {one.key: one.answer for one in read})
    except OSError as error:
        raise UserError(f"--answers {path}: {error.strerror or error}; name another file") from None
