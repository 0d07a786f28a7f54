"""Self-chat: one system, or two, play both sides of a dialogue from a given start (section 3.2 of the paper).

1. `read_starts` reads what is said first; a start is usually one question.
2. `plan` makes a dialogue of each. Speaker A says turns 1, 3, 5, ..., the start among them, and B the others.
3. `play` finds the missing turns of many dialogues together.
4. `resumed` opens the file they are written to, where an interrupted run left off.

A static reply is a dialogue that ends after one turn; its start is the context. Every turn has a seed of its
own, a function of (seed, dialogue, turn): what is said does not depend on what is played together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, Literal

from plato2.bounded import TEXT_BYTES, read_file, read_unpacked
from plato2.config import UserError, dotted
from plato2.data.tokenizer import MOST_UNREAD
from plato2.files import lock_file, locked
from plato2.formats import JSON_BYTES, Open, parse
from plato2.talk.speaker import PlatoSpeaker, Speaker

SPEAKERS = ("A", "B")
UTTERANCES = 10
"""Turns of a dialogue, the start included (section 3.2)."""
STARTS = "starts_en.txt"
"""Starts that ship with plato2, in plato2/lists."""


@dataclass(frozen=True)
class Start:
    """What is said before the first reply."""

    place: str
    """FILE:LINE, for messages."""
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    """What humans reply to it."""


@dataclass
class SelfChat:
    """A dialogue that is being played."""

    number: int
    """Its place in the file, from 0."""
    start: Start
    sides: tuple[int, int]
    """Which of the speakers is A, and which is B."""
    utterances: int
    """Turns it will have, the start included."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """What was said, as it is written."""
    stuck: bool = False
    """Whether nothing was found to say."""

    @property
    def texts(self) -> list[str]:
        """What was said."""
        return [turn["text"] for turn in self.turns]

    @property
    def missing(self) -> int:
        """Turns that are still to be said."""
        return 0 if self.stuck else self.utterances - len(self.turns)

    def side(self, turn: int) -> int:
        """Which of the speakers says that turn, from 0."""
        return self.sides[turn % 2]


def read_starts(path: str | Path | None = None, option: str = "--starts") -> list[Start]:
    """The starts in a file, or the contexts of static replies, by its suffix: `.jsonl`, `.tsv`, or text.

    A line of text is a start of one turn. A line of JSON is `{"turns": [...]}` with texts or `{"text": ...}`,
    as in a corpus or a saved chat; texts of one `speaker` in a row are one turn; `references` may hold human
    replies. A line `{"dialogue": [{"text": ..., "responses": [...]}]}`, as in DailyDialog's multi-reference
    test set, is a start for each turn that has responses. The first column of a TSV file is turns joined by
    [SEP], the second a reference, as in Knover's files. Empty lines do not count. `.gz` is unpacked.

    Args:
        path: the file; None = the 200 starts that ship with plato2.
        option: what the user gave it by, for messages.

    Raises:
        UserError: no such file, not UTF-8, a line of another form, or no start in it.
    """
    path = Path(str(files("plato2") / "lists" / STARTS)) if path is None else Path(path)
    data = _read(path, option)
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    read = {".jsonl": _json_starts, ".tsv": _tsv_starts}.get(suffix, lambda line: [([line], [])])
    starts = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        place = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
            found = read(text) if text.strip() else []
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if number == 1 and suffix == ".tsv" and found[:1] == [(["src"], ["tgt"])]:
            continue  # Knover's names of the columns
        for turns, references in found:
            starts.append(Start(place, tuple(map(_one_line, turns)), tuple(map(_one_line, references))))
    if not starts:
        raise UserError(f"{option} {path}: it is empty; write {_one_of(option)} per line")
    return starts


def _one_of(option: str) -> str:
    """`one start` of `--starts`."""
    return f"one {option.removeprefix('--').removesuffix('s')}"


def _read(path: Path, option: str) -> bytes:
    """The file's text, unpacked."""
    cure = f"give a file with {_one_of(option)} per line"
    try:
        return read_unpacked(path, TEXT_BYTES, cure, f"{option} ")
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; {cure}") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _json_starts(line: str) -> list[tuple[list[str], list[str]]]:
    wrong = ValueError('not of the form {"turns": ["hi", ...]} or {"turns": [{"text": "hi"}, ...]}')
    try:
        record = json.loads(line)
        if "dialogue" in record:
            if found := _after_each_turn(record["dialogue"]):
                return found
            raise wrong
        turns, references = record["turns"], record.get("references") or []
        if not isinstance(turns, list) or not isinstance(
            references, list
        ):  # the letters of a text are no turns
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
        " ".join([*texts, *references]).encode()  # half of a surrogate pair is no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise wrong from None
    if not texts:
        raise wrong
    return [(texts, references)]


def _after_each_turn(dialogue: list[dict[str, Any]]) -> list[tuple[list[str], list[str]]]:
    """The contexts of a dialogue that has responses to its turns."""
    texts = [turn["text"] for turn in dialogue]
    found = [(texts[: n + 1], turn.get("responses") or []) for n, turn in enumerate(dialogue)]
    " ".join([text for _, references in found for text in [*texts, *references]]).encode()
    return [(turns, references) for turns, references in found if references]


def _tsv_starts(line: str) -> list[tuple[list[str], list[str]]]:
    context, *columns = line.rstrip("\r\n").split("\t")
    return [(context.split("[SEP]"), [text for text in columns[:1] if text.strip()])]


def plan(
    starts: Sequence[Start],
    speakers: Sequence[Speaker],
    utterances: int | None = UTTERANCES,
    swap: bool = False,
) -> list[SelfChat]:
    """The dialogues that are to be played, in the order of their starts.

    Args:
        starts: what is said first.
        speakers: one, who speaks as A and as B, or two, A and B.
        utterances: turns of each dialogue, the start included; None = one reply to each start.
        swap: then all of them once more with A and B exchanged.

    Raises:
        UserError: a start that leaves nothing to say, or that a model cannot read.
    """
    dialogues: list[SelfChat] = []
    sides = (0, len(speakers) - 1)
    for start in starts:
        if utterances is not None and len(start.turns) >= utterances:
            raise UserError(
                f"{start.place}: a start of {len(start.turns)} turns and utterances={utterances}: nothing is "
                "left to say; ask for more utterances, or shorten the start"
            )
        if not all(speaker.reads(turn) for speaker in speakers for turn in start.turns):
            raise UserError(f"{start.place}: one of its turns is empty; write something there, or remove it")
    for a, b in (sides, sides[::-1]) if swap else (sides,):
        for start in starts:
            dialogue = SelfChat(len(dialogues), start, (a, b), utterances or len(start.turns) + 1)
            for place, text in enumerate(start.turns):
                dialogue.turns.append(_turn(place, text))
            dialogues.append(dialogue)
    return dialogues


def unread_starts(starts: Sequence[Start], speakers: Sequence[Speaker]) -> str | None:
    """Which starts a model can hardly read, in words."""
    tokenizers = [speaker.bot.tokenizer for speaker in speakers if isinstance(speaker, PlatoSpeaker)]
    places = [
        start.place
        for start in starts
        if any(tokenizer.unread_share(start.turns[-1]) > MOST_UNREAD for tokenizer in tokenizers)
    ]
    if not places:
        return None
    return f"a model cannot read {len(places)} of {len(starts)} starts, the first: {places[0]}"


def _turn(
    place: int, text: str, model: str | None = None, candidate: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A turn as it is written; one that was given has no model."""
    scores = candidate or {"latent": None, "log_prob": None, "coherence": None}
    return {"speaker": SPEAKERS[place % 2], "model": model, "text": text, **scores}


def play(
    dialogues: Sequence[SelfChat],
    speakers: Sequence[Speaker],
    seed: int = 11,
    with_candidates: bool = False,
) -> Iterator[int]:
    """Plays dialogues to their end, a turn of each at a time; yields after each round how many turns it had.

    A dialogue ends early where no candidate has a word in it.

    Args:
        dialogues: from `plan`; their turns are added to them.
        speakers: the same as there.
        seed: of all turns; each has its own, made of it.
        with_candidates: keep all candidates of a turn, best first, beside the one that was said.
    """
    while True:
        n_said = 0
        for number, speaker in enumerate(speakers):
            asked = [d for d in dialogues if d.missing and d.side(len(d.turns)) == number]
            seeds = [turn_seed(seed, dialogue.number, len(dialogue.turns)) for dialogue in asked]
            replies = speaker.reply_batch([dialogue.texts for dialogue in asked], seeds) if asked else []
            for dialogue, said in zip(asked, replies, strict=True):
                place = len(dialogue.turns)
                listener = speakers[dialogue.side(place + 1)]
                candidate = next((c for c in said.candidates if listener.reads(c["text"])), None)
                if said.refusal is not None:
                    turn = _turn(place, said.refusal, speaker.name)
                elif candidate is not None:
                    turn = _turn(place, candidate["text"], speaker.name, candidate)
                else:
                    dialogue.stuck = True
                    continue
                if with_candidates:
                    turn["candidates"] = list(said.candidates)
                dialogue.turns.append(turn)
                n_said += 1
        if not n_said:
            return
        yield n_said


def turn_seed(seed: int, dialogue: int, turn: int) -> int:
    """The seed of a turn: a function of these three alone."""
    return int.from_bytes(blake2b(f"{seed}/{dialogue}/{turn}".encode(), digest_size=7).digest(), "big")


def to_dict(dialogue: SelfChat, speakers: Sequence[Speaker], seed: int) -> dict[str, Any]:
    """A dialogue as it is written; see docs/talk.md."""
    sides = [speakers[n] for n in dialogue.sides]
    found = {
        "id": dialogue.number,
        "start": list(dialogue.start.turns),
        "speakers": {name: speaker.name for name, speaker in zip(SPEAKERS, sides, strict=True)},
        "turns": dialogue.turns,
        "seed": seed,
        "settings": settings_of(sides),
    }
    if dialogue.start.references and dialogue.utterances == len(dialogue.start.turns) + 1:
        found["references"] = list(dialogue.start.references)
    return found


def to_line(record: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def settings_of(speakers: Sequence[Speaker]) -> dict[str, Any]:
    """How they find candidates: settings, or those of A and those of B where they differ."""
    a, b = dict(speakers[0].settings), dict(speakers[-1].settings)
    return a if a == b else {"A": a, "B": b}


# ---------------------------------------------------------------------------------------------- resuming


def describe(speakers: Sequence[Speaker]) -> dict[str, Any]:
    """What tells these speakers from others, for `resumed`."""
    return {
        f"model{number}": {"name": speaker.name, **speaker.describe()}
        for number, speaker in enumerate(speakers, start=1)
    }


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
        if not out.parent.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
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
        raise UserError(f"--out {out}: already exists, and plato2 did not write it; give a new file")
    try:
        data = read_file(meta, JSON_BYTES, anew)
        before = dotted(parse(dict[str, Any], data, str(meta), anew))
    except UserError:
        raise UserError(f"--out {out}: {meta.name} is damaged; {anew}") from None
    after = dotted(json.loads(json.dumps(about)))
    for key in [*after, *(before.keys() - {"begun"})]:
        if before.get(key) != after.get(key):
            raise UserError(
                f"--out {out}: was begun with {key}={before.get(key)!s:.200}, not {after.get(key)}; give the "
                f"same, or {anew}"
            )


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
