"""A chat model behind an OpenAI-compatible address, and a file that keeps every answer it gave."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from plato2.bounded import read_file
from plato2.config import UserError, check_options, install, option
from plato2.files import lock_file, locked, sync
from plato2.formats import Closed, parse

if TYPE_CHECKING:
    from openai import OpenAI

ANSWERS_BYTES = 1 << 30
ANSWER_CHARACTERS = 100_000
"""More than that of an answer is cut off: no verdict needs it, and the file stays readable."""

Message = Mapping[str, str]


@dataclass
class EndpointConfig:
    """Which model answers, and how.

    Raises:
        UserError: a value that cannot be.
    """

    url: str = option(help="An OpenAI-compatible API, as http://127.0.0.1:8000/v1.")
    model: str = option(help="The model's name there.")
    temperature: float = option(0.0, help="Of its answers.", ge=0)
    max_tokens: int = option(512, help="Tokens of an answer.", ge=1)
    timeout_s: float = option(60.0, help="Seconds to wait for an answer.", ge=0.1)
    retries: int = option(5, help="Retries after a time-out, 429, 5xx or nonsense.", ge=0)
    key_variable: str = option(
        "OPENAI_API_KEY", help="The environment variable that holds the API's key; local servers need none."
    )
    parallel: int = option(8, help="Questions asked at once.", ge=1)

    def __post_init__(self) -> None:
        """Checks the values."""
        check_options(self)
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"url={self.url}: give the address of an API, as http://127.0.0.1:8000/v1")


class _Answer(Closed):
    key: str
    answer: str


class Endpoint:
    """Asks the model; safe to call from several threads.

    Args:
        config: which model, and how.

    Raises:
        UserError: the package `openai` is not installed.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.client: OpenAI = _client(config)

    def answer(self, messages: Sequence[Message]) -> str:
        """The text of the answer; a refusal is its text, too.

        Raises:
            UserError: no answer after all retries; says what the endpoint said.
        """
        import openai

        told = f"--url {self.config.url}, model {self.config.model}"
        reason = ""
        for _ in range(self.config.retries + 1):
            try:
                found = self.client.chat.completions.create(
                    model=self.config.model,
                    messages=list(messages),  # type: ignore[arg-type]
                    temperature=self.config.temperature,
                    max_tokens=self.config.max_tokens,
                )
                said = found.choices[0].message
                return (said.content or said.refusal or "")[:ANSWER_CHARACTERS]
            except openai.APITimeoutError:
                raise UserError(
                    f"{told}: no answer within {self.config.timeout_s:g} s, "
                    f"{self.config.retries + 1} times; give a longer --timeout-s, or a faster server"
                ) from None
            except openai.APIStatusError as error:
                raise UserError(f"{told}: status {error.status_code}: {_one_line(error.message)}") from None
            except openai.APIConnectionError as error:
                cause = error.__cause__ or error
                raise UserError(f"{told}: cannot be reached ({_one_line(str(cause))})") from None
            except (ValueError, AttributeError, LookupError, TypeError, openai.OpenAIError) as error:
                reason = _one_line(str(error))  # not JSON, or JSON of something else
        raise UserError(
            f"{told}: what it sends is not an answer of OpenAI's chat API ({reason}); check the address, it "
            "usually ends in /v1"
        )


class Answers:
    """All answers so far, by question; each is on the disk before the next is asked for.

    Args:
        endpoint: who is asked what is not in the file.
        file: open for appending.
        known: what is in it.
    """

    def __init__(self, endpoint: Endpoint, file: BinaryIO, known: dict[str, str]) -> None:
        self.endpoint, self.file, self.known = endpoint, file, known
        self.lock = threading.Lock()

    def key(self, messages: Sequence[Message]) -> str:
        """Of a question to this model with these config."""
        config = self.endpoint.config
        asked = [config.model, config.temperature, config.max_tokens, [dict(m) for m in messages]]
        return sha256(json.dumps(asked).encode()).hexdigest()

    def missing(self, questions: Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
        """Those that have no answer yet, each once."""
        by_key = {self.key(messages): messages for messages in questions}
        return [messages for key, messages in by_key.items() if key not in self.known]

    def ask(self, questions: Sequence[Sequence[Message]]) -> Iterator[None]:
        """Asks what has no answer yet, several at a time; yields after each.

        Raises:
            UserError: as `Endpoint.answer`; what was answered is kept.
        """
        with ThreadPoolExecutor(self.endpoint.config.parallel) as pool:
            waiting = [pool.submit(self._ask, messages) for messages in self.missing(questions)]
            try:
                for done in as_completed(waiting):
                    done.result()
                    yield
            finally:
                for future in waiting:
                    future.cancel()

    def __getitem__(self, messages: Sequence[Message]) -> str:
        """The answer."""
        return self.known[self.key(messages)]

    def _ask(self, messages: Sequence[Message]) -> None:
        key, text = self.key(messages), self.endpoint.answer(messages)
        line = json.dumps({"key": key, "answer": text}).encode() + b"\n"  # ASCII: also half a surrogate pair
        with self.lock:
            self.file.write(line)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.known[key] = text


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
                parse(_Answer, line, f"--answers {path}:{number}", cure)
                for number, line in enumerate(lines, start=1)
            ]
            if data and not whole:
                raise UserError(f"--answers {path}: not a file of answers; {cure}")
            file.truncate(len(whole))
            sync(path)
            yield Answers(endpoint, file, {one.key: one.answer for one in read})
    except OSError as error:
        raise UserError(f"--answers {path}: {error.strerror or error}; name another file") from None


def _client(config: EndpointConfig) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError:
        raise UserError(f"a judge is asked through the package openai: {install('eval')}") from None
    return OpenAI(
        base_url=config.url,
        api_key=os.environ.get(config.key_variable) or "none",
        timeout=config.timeout_s,
        max_retries=config.retries,
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
