"""Self-chat: one model, or two, play both sides of a dialogue from a given start (section 3.2 of the paper).

1. `read_starts` reads what is said first; a start is usually one question.
2. `plan` makes a dialogue of each. Speaker A says turns 1, 3, 5, ..., the start among them, and B the others.
3. `play` finds the missing turns of many dialogues together.
4. `resumed` opens the file they are written to, where an interrupted run left off.

Every turn has a seed of its own, a function of (seed, dialogue, turn): what is said does not depend on which
dialogues are played together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from torch import nn

from plato2.bounded import TEXT_BYTES, read_file
from plato2.config import DecodeConfig, UserError
from plato2.data.tokenizer import MOST_UNREAD
from plato2.files import lock_file, locked
from plato2.formats import JSON_BYTES, Open, parse
from plato2.talk.bot import PlatoBot
from plato2.talk.rank import Candidate

SPEAKERS = ("A", "B")
UTTERANCES = 10
"""Turns of a dialogue, the start included (section 3.2)."""
DIGITS = 6
"""Of the scores that are written: beyond them a float32 depends on what else is in the batch."""
SAMPLED_WEIGHTS = 1024
"""Values of each parameter that tell one model from another."""


@dataclass(frozen=True)
class Player:
    """A model that plays."""

    name: str
    """Where it was loaded from."""
    bot: PlatoBot


@dataclass(frozen=True)
class Start:
    """What is said before the first reply."""

    place: str
    """FILE:LINE, for messages."""
    turns: tuple[str, ...]


@dataclass
class SelfChat:
    """A dialogue that is being played."""

    number: int
    """Its place in the file, from 0."""
    start: Start
    players: tuple[int, int]
    """Which player speaks as A, and which as B."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """What was said, as it is written."""
    stuck: bool = False
    """Whether nothing was found to say."""

    @property
    def texts(self) -> list[str]:
        """What was said."""
        return [turn["text"] for turn in self.turns]

    def player(self, turn: int) -> int:
        """Which player says that turn, from 0."""
        return self.players[turn % 2]


def read_starts(path: str | Path) -> list[Start]:
    """The starts in a file, by its suffix: `.jsonl`, `.tsv`, or anything else for text.

    A line of text is a start of one turn. A line of JSON is `{"turns": [...]}` with texts or `{"text": ...}`,
    as in a corpus or a saved chat; texts of one `speaker` in a row are one turn. The first column of a TSV
    file is turns joined by [SEP], as in Knover's files. Empty lines do not count.

    Raises:
        UserError: no such file, not UTF-8, a line of another form, or no start in it.
    """
    path = Path(path)
    read = {".jsonl": _json_turns, ".tsv": _tsv_turns}.get(path.suffix.lower(), lambda line: [line])
    try:
        data = read_file(path, TEXT_BYTES, "give a file with one start per line", "--starts ")
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"--starts {path}: {error.strerror}; give a file with one start per line") from None
    starts = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
            turns = [" ".join(turn.split()) for turn in read(text)] if text.strip() else []
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if turns:
            starts.append(Start(place, tuple(turns)))
    if not starts:
        raise UserError(f"--starts {path}: it is empty; write one start per line")
    return starts


def _json_turns(line: str) -> list[str]:
    wrong = ValueError('not of the form {"turns": ["hi", ...]} or {"turns": [{"text": "hi"}, ...]}')
    try:
        turns = json.loads(line)["turns"]
        if not isinstance(turns, list):  # the letters of a text are no turns
            raise wrong
        said = [
            (None, turn) if isinstance(turn, str) else (turn.get("speaker"), turn["text"]) for turn in turns
        ]
        texts: list[str] = []
        for place, (speaker, text) in enumerate(said):
            if speaker is not None and place > 0 and said[place - 1][0] == speaker:
                texts[-1] += f" {text}"
            else:
                texts.append(text)
        " ".join(texts).encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise wrong from None
    if not texts:
        raise wrong
    return texts


def _tsv_turns(line: str) -> list[str]:
    return line.split("\t")[0].split("[SEP]")


def plan(
    starts: Sequence[Start], players: Sequence[Player], utterances: int = UTTERANCES, swap: bool = False
) -> list[SelfChat]:
    """The dialogues that are to be played, in the order of their starts.

    Args:
        starts: what is said first.
        players: one, who speaks as A and as B, or two, A and B.
        utterances: turns of each dialogue, the start included.
        swap: then all of them once more with A and B exchanged.

    Raises:
        UserError: a start that leaves nothing to say, or that a model cannot read.
    """
    dialogues: list[SelfChat] = []
    sides = (0, len(players) - 1)
    for start in starts:
        if len(start.turns) >= utterances:
            raise UserError(
                f"{start.place}: a start of {len(start.turns)} turns and utterances={utterances}: nothing is "
                "left to say; ask for more utterances, or shorten the start"
            )
        if not all(player.bot.tokenizer.encode(turn) for player in players for turn in start.turns):
            raise UserError(f"{start.place}: one of its turns is empty; write something there, or remove it")
    for a, b in (sides, sides[::-1]) if swap else (sides,):
        for start in starts:
            dialogue = SelfChat(len(dialogues), start, (a, b))
            for place, text in enumerate(start.turns):
                dialogue.turns.append(_turn(place, text))
            dialogues.append(dialogue)
    return dialogues


def unread_starts(starts: Sequence[Start], players: Sequence[Player]) -> str | None:
    """Which starts a model can hardly read, in words."""
    places = [
        start.place
        for start in starts
        if any(player.bot.tokenizer.unread_share(start.turns[-1]) > MOST_UNREAD for player in players)
    ]
    if not places:
        return None
    return f"a model cannot read {len(places)} of {len(starts)} starts, the first: {places[0]}"


def _turn(
    place: int, text: str, model: str | None = None, candidate: Candidate | None = None
) -> dict[str, Any]:
    """A turn as it is written; one that was given has no model."""
    scores = (
        {"latent": None, "log_prob": None, "coherence": None}
        if candidate is None
        else candidate.to_dict(digits=DIGITS)
    )
    return {"speaker": SPEAKERS[place % 2], "model": model, "text": text} | scores


def play(
    dialogues: Sequence[SelfChat],
    players: Sequence[Player],
    decode: DecodeConfig,
    utterances: int = UTTERANCES,
    with_candidates: bool = False,
) -> Iterator[int]:
    """Plays dialogues to their end, a turn of each at a time; yields after each round how many turns it had.

    A dialogue ends early where no candidate has a word in it.

    Args:
        dialogues: from `plan`; their turns are added to them.
        players: the same as there.
        decode: how to find candidates.
        utterances: turns of each dialogue, the start included.
        with_candidates: keep all candidates of a turn, best first, beside the one that was said.
    """
    while True:
        said = 0
        for number, player in enumerate(players):
            asked = [
                dialogue
                for dialogue in dialogues
                if not dialogue.stuck
                and len(dialogue.turns) < utterances
                and dialogue.player(len(dialogue.turns)) == number
            ]
            seeds = [turn_seed(decode.seed, dialogue.number, len(dialogue.turns)) for dialogue in asked]
            replies = player.bot.reply_batch([dialogue.texts for dialogue in asked], decode, seeds)
            for dialogue, reply in zip(asked, replies, strict=True):
                listener = players[dialogue.player(len(dialogue.turns) + 1)].bot
                candidate = next((c for c in reply.candidates if listener.tokenizer.encode(c.text)), None)
                if reply.is_refusal:
                    turn = _turn(len(dialogue.turns), reply.text, player.name)
                elif candidate is not None:
                    turn = _turn(len(dialogue.turns), candidate.text, player.name, candidate)
                else:
                    dialogue.stuck = True
                    continue
                if with_candidates:
                    turn["candidates"] = [c.to_dict(digits=DIGITS) for c in reply.candidates]
                dialogue.turns.append(turn)
                said += 1
        if not said:
            return
        yield said


def turn_seed(seed: int, dialogue: int, turn: int) -> int:
    """The seed of a turn: a function of these three alone."""
    return int.from_bytes(blake2b(f"{seed}/{dialogue}/{turn}".encode(), digest_size=7).digest(), "big")


def to_dict(dialogue: SelfChat, players: Sequence[Player], decode: DecodeConfig) -> dict[str, Any]:
    """A dialogue as it is written; see docs/talk.md."""
    settings = asdict(decode)
    return {
        "id": dialogue.number,
        "start": list(dialogue.start.turns),
        "speakers": {name: players[n].name for name, n in zip(SPEAKERS, dialogue.players, strict=True)},
        "turns": dialogue.turns,
        "seed": settings.pop("seed"),
        "settings": settings,
    }


def to_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


# ---------------------------------------------------------------------------------------------- resuming


def describe(players: Sequence[Player]) -> dict[str, Any]:
    """What tells these models from others, for `resumed`."""
    found = {}
    for number, player in enumerate(players, start=1):
        bot = player.bot
        networks = {"generation": bot.generation, "evaluation": bot.evaluation, "backward": bot.backward}
        hashes = {
            name: None if network is None else weights_hash(cast(nn.Module, network))
            for name, network in networks.items()
        }
        found[f"model{number}"] = {"name": player.name, "tokenizer": bot.tokenizer.sha256[:16], **hashes}
    return found


def weights_hash(network: nn.Module) -> str:
    """Of some values of each parameter: another training differs in all of them."""
    found = sha256()
    for _, weights in sorted(network.state_dict().items()):
        found.update(weights.flatten()[:SAMPLED_WEIGHTS].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def meta_file(out: Path) -> Path:
    """Where it is written what a file of dialogues was made with."""
    return out.with_name(f"{out.name}.meta.json")


@contextmanager
def resumed(out: Path, about: Mapping[str, Any], total: int, batch: int) -> Iterator[tuple[BinaryIO, int]]:
    """The file of dialogues, open for appending, and how many are in it.

    A half-written line is cut off, and so is an incomplete batch: its dialogues are
    played together again, and the file becomes what it would have been, to the byte.

    Args:
        out: the file; what it was made with is kept beside it, in `FILE.meta.json`.
        about: what it is made with.
        total: dialogues that will be in it.
        batch: dialogues that are written together.

    Raises:
        UserError: a file that something else wrote, one made with other settings or by a run that is still
            in progress, or one that cannot be written.
    """
    meta = meta_file(out)
    try:
        with out.open("a+b") as file, locked(lock_file(out), f"--out {out}"):
            if out.stat().st_size > 0:
                _same_settings(out, about)
            else:
                part = meta.with_name(f"{meta.name}.part")
                dated = {"begun": str(datetime.now(UTC)), **about}
                part.write_text(json.dumps(dated, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                part.replace(meta)
            file.seek(0)
            size = n_done = kept = kept_size = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if n_done == total or _id(line) != n_done:
                    raise UserError(
                        f"--out {out}: line {n_done + 1} is not dialogue {n_done}, it has changed since; "
                        f"remove the file and {meta.name} to start over, or give another one"
                    )
                n_done, size = n_done + 1, size + len(line)
                if n_done % batch == 0 or n_done == total:
                    kept, kept_size = n_done, size
            file.truncate(kept_size)
            yield file, kept
    except OSError as error:
        raise UserError(
            f"--out {out}: {error.strerror or error}; fix that and give the same command again: it continues "
            "where it stopped"
        ) from None


def _same_settings(out: Path, about: Mapping[str, Any]) -> None:
    meta = meta_file(out)
    anew = f"remove it and {meta.name} to start over, or give another file"
    if not meta.exists():
        raise UserError(f"--out {out}: already exists, and self-chat did not write it; give a new file")
    try:
        data = read_file(meta, JSON_BYTES, anew)
        before = _flat(parse(dict[str, Any], data, str(meta), anew))
    except UserError:
        raise UserError(f"--out {out}: {meta.name} is damaged; {anew}") from None
    after = _flat(json.loads(json.dumps(about)))
    for key in [*after, *(before.keys() - {"begun"})]:
        if before.get(key) != after.get(key):
            raise UserError(
                f"--out {out}: was begun with {key}={before.get(key)!s:.200}, not {after.get(key)}; give the "
                f"same, or {anew}"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _id(line: bytes) -> object:
    try:
        return json.loads(line)["id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------------ ParlAI


class _PlayedTurn(Open):
    speaker: Literal["A", "B"]
    text: str


class _Speakers(Open):
    A: str
    B: str


class _Played(Open):
    """A line of the file, with what ParlAI needs."""

    speakers: _Speakers
    turns: list[_PlayedTurn]


def write_parlai(out: Path) -> Path:
    """Writes finished dialogues beside `out` as ParlAI's self-chat logs them and ACUTE-Eval reads them.

    `FILE.parlai.jsonl` has one dialogue per line, and `FILE.parlai.metadata` what they were made with: what
    `Conversations.save_conversations` in ParlAI's parlai/utils/conversations.py writes. `dialog` is a list of
    pairs, A's turn and B's, the last pair with one turn where they are odd; a speaker's id is the model's
    name with `_1` for A and `_2` for B (parlai/scripts/self_chat.py). ACUTE-Eval
    (parlai/crowdsourcing/tasks/acute_eval/fast_eval.py) takes such a file as a model's `log_path`; with
    `is_selfchat` it names the two by their place in the pair.
    """
    lines, meta = out.with_name(f"{out.stem}.parlai.jsonl"), meta_file(out)
    anew = f"remove the file and {meta.name} to start over"
    metadata = lines.with_suffix(".metadata")  # where ParlAI looks for it
    speakers: dict[str, None] = {}
    part = lines.with_name(f"{lines.name}.part")
    try:
        with out.open("rb") as file, part.open("wb") as target:
            for number, line in enumerate(file, start=1):
                record = parse(_Played, line, f"--out {out}: line {number}", anew)
                models: dict[str, str] = {"A": record.speakers.A, "B": record.speakers.B}
                ids = {name: f"{model}_{n}" for n, (name, model) in enumerate(models.items(), start=1)}
                acts: list[dict[str, Any]] = [
                    {"id": ids[turn.speaker], "episode_done": False, "text": turn.text}
                    for turn in record.turns
                ]
                speakers |= dict.fromkeys(act["id"] for act in acts)
                pairs = [acts[n : n + 2] for n in range(0, len(acts), 2)]
                episode = {"dialog": pairs, "context": [], "metadata_path": str(metadata)}
                # ASCII, as ParlAI's own: it splits lines at every character that Unicode calls a line's end
                target.write(json.dumps(episode).encode() + b"\n")
        part.replace(lines)
        made = parse(dict[str, Any], read_file(meta, JSON_BYTES, anew), str(meta), anew)
        about = {"date": made.pop("begun", None), "opt": made, "self_chat": True, "speakers": [*speakers]}
        metadata.write_text(json.dumps(about | {"version": "0.1"}) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{lines}: {error.strerror}; fix that and give the same command again") from None
    return lines
