"""The systems that PLATO-2 is compared with, each a `Speaker` that `self-chat` and `reply --contexts` play.

`read_speaker("blender:FOLDER", ...)` makes one of what was typed: KIND:WHERE, then settings as `,name=value`;
before it may stand `NAME=`. PLATO-2 itself is one of the kinds, for whoever takes any system.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from plato2.config import DecodeConfig, UserError, did_you_mean, expand_path
from plato2.evaluate.dialogues import read_dialogues
from plato2.talk.speaker import Said, Speaker

_NAMED = re.compile(r"(\w[\w.-]*)=(?=\w+:)")
Maker = Callable[[str, dict[str, str], str, str], Speaker]


def read_speaker(text: str, option: str, device: str = "auto") -> Speaker:
    """A speaker from what was typed.

    Args:
        text: `plato2:RUN[,evaluation=RUN][,backward=RUN]`, `dialogpt:FOLDER[,reverse=FOLDER]`,
            `blender:FOLDER`, `hf:FOLDER`, `openai:URL#MODEL` or `log:FILE`; settings may follow, as in
            `hf:FOLDER,temperature=0.7`. `NAME=` before it is what its turns are marked with, else all of it.
        option: what it was given by, for messages.
        device: as for PLATO-2.

    Raises:
        UserError: an unknown kind or setting, or whatever the speaker finds wrong.
    """
    kind, where, given, name = split_speaker(text, option)
    try:
        return MAKERS[kind](where, given, device, name)
    except UserError as error:
        raise UserError(f"{option} {kind}: {error}") from None


def split_speaker(text: str, option: str) -> tuple[str, str, dict[str, str], str]:
    """The kind, the place, the settings and the name (else all of it) in what was typed.

    Raises:
        UserError: an unknown kind, or no place.
    """
    named = _NAMED.match(text)
    kind, _, rest = text[named.end() if named else 0 :].partition(":")
    if kind not in MAKERS:
        raise UserError(
            f"{option} {text}: must be KIND:WHERE, and {kind} is no kind; {did_you_mean(kind, MAKERS)}"
        )
    where, *pairs = re.split(r",(?=\w+=)", rest)
    if not (where := where.strip()):
        place = WHERE.get(kind, "FOLDER")
        raise UserError(
            f"{option} {text!r}: no {place} after the colon; give {kind}:{place}, without a blank in between"
        )
    return kind, where, dict(pair.split("=", 1) for pair in pairs), named[1] if named else text


def speaker_names(texts: Sequence[str], option: str) -> list[str]:
    """What the speakers will be called: NAME of NAME=KIND:WHERE, else all of it.

    Raises:
        UserError: two of the same name.
    """
    names = [named[1] if (named := _NAMED.match(text)) else text for text in texts]
    for text, name in zip(texts, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{option} {text}: {name} twice; give each a name of its own, NAME=KIND:WHERE")
    return names


def settings_from(given: Mapping[str, str], known: Sequence[str], default: DecodeConfig) -> DecodeConfig:
    """Settings of decoding, with those that were typed.

    Raises:
        UserError: an unknown one, or an impossible value.
    """
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in known:
            raise UserError(f"{name}={text}: no such setting; {did_you_mean(name, known)}")
        kind = type(getattr(default, name))
        try:
            values[name] = kind(text)
        except ValueError:
            raise UserError(f"{name}={text}: must be a{' whole' * (kind is int)} number") from None
    return replace(default, **values)


def _plato2(run: str, given: dict[str, str], device: str, name: str) -> Speaker:
    from plato2.talk.bot import PlatoBot
    from plato2.talk.speaker import PlatoSpeaker

    evaluation, backward = (
        expand_path(given.pop(key), key) if key in given else None for key in ("evaluation", "backward")
    )
    decode = settings_from(given, PLATO2, DecodeConfig())
    bot = PlatoBot.load(expand_path(run, "plato2"), evaluation, device, decode, backward)
    return PlatoSpeaker(name, bot, decode)


def _dialogpt(folder: str, given: dict[str, str], device: str, name: str) -> Speaker:
    from plato2.evaluate.pretrained import DIALOGPT, DIALOGPT_SAMPLES, SAMPLING, DialoGPT
    from plato2.talk.bot import pick_device

    reverse = expand_path(given.pop("reverse"), "reverse") if "reverse" in given else None
    default = replace(DIALOGPT, n_samples=DIALOGPT_SAMPLES if reverse else 1)
    decode = settings_from(given, SAMPLING, default)
    return DialoGPT(expand_path(folder, "dialogpt"), reverse, decode, pick_device(device), name)


def _blender(folder: str, given: dict[str, str], device: str, name: str) -> Speaker:
    from plato2.evaluate.pretrained import BEAM_SEARCH, BLENDER, Blender
    from plato2.talk.bot import pick_device

    decode = settings_from(given, BEAM_SEARCH, BLENDER)
    return Blender(expand_path(folder, "blender"), decode, pick_device(device), name)


def _chat_model(folder: str, given: dict[str, str], device: str, name: str) -> Speaker:
    from plato2.evaluate.pretrained import CHAT, SAMPLING, ChatModel
    from plato2.talk.bot import pick_device

    decode = settings_from(given, SAMPLING, CHAT)
    return ChatModel(expand_path(folder, "hf"), decode, pick_device(device), name)


def _openai(where: str, given: dict[str, str], device: str, name: str) -> Speaker:
    from plato2.evaluate.openai_chat import SETTINGS, OpenAIChat

    url, _, model = where.partition("#")
    decode = settings_from(given, SETTINGS, DecodeConfig())
    return OpenAIChat(url, model, {key: getattr(decode, key) for key in SETTINGS if key in given}, name=name)


def _log(file: str, given: dict[str, str], device: str, name: str) -> Speaker:
    settings_from(given, (), DecodeConfig())
    return Log(expand_path(file, "log"), name)


PLATO2 = (
    "strategy", "top_k", "top_p", "temperature", "min_tokens", "max_tokens", "n_samples", "n_candidates",
    "beam_size", "no_repeat_ngram",
)  # fmt: skip
"""Settings of `plato2`, fields of `DecodeConfig`."""
WHERE = {"plato2": "RUN", "openai": "URL#MODEL", "log": "FILE"}
"""What stands after the colon, where it is no folder."""
MAKERS: dict[str, Maker] = {
    "plato2": _plato2,
    "dialogpt": _dialogpt,
    "blender": _blender,
    "hf": _chat_model,
    "openai": _openai,
    "log": _log,
}
"""What may stand before the colon."""


class Log:
    """A transcript that is played again: what a system said there after the same turns.

    Turns of people are not said again, so a chat with a person ends after one reply. Where the log has
    several replies to the same turns, the seed picks one.

    Args:
        file: what `evaluate.dialogues` reads: ours, ParlAI's logs, transcripts such as Meena's.
        name: what its turns are marked with.

    Raises:
        UserError: a file that cannot be read.
    """

    def __init__(self, file: str | Path, name: str = "") -> None:
        self.name, self.settings = name or f"log:{file}", dict[str, Any]()
        self._replies: dict[tuple[str, ...], list[str]] = {}
        for dialogue in read_dialogues(file):
            texts = dialogue.texts()
            for number, turn in enumerate(dialogue.turns):
                if number > 0 and turn.model is not None:
                    self._replies.setdefault(tuple(texts[:number]), []).append(turn.text)

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """As `Speaker.reply_batch`; nothing to turns that are not in the log."""
        found = []
        for history, seed in zip(histories, seeds, strict=True):
            replies = self._replies.get(tuple(" ".join(turn.split()) for turn in history), [])
            texts = [replies[seed % len(replies)]] if replies else []
            found.append(
                Said([{"text": t, "latent": None, "log_prob": None, "coherence": None} for t in texts])
            )
        return found

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return bool(text.strip())

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`."""
        said = repr(sorted(self._replies.items()))
        return {"log": sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]}
