"""The engine of self-chat: who says what, files of starts, resuming, ParlAI's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import KNOVER, make_run, make_stage, small_tokenizer_texts
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import DecodeConfig, UserError
from plato2.data.tokenizer import Tokenizer, train_tokenizer
from plato2.talk import self_chat
from plato2.talk.bot import PlatoBot, Reply
from plato2.talk.rank import Candidate
from plato2.talk.safety import Safety, WordRule
from plato2.talk.self_chat import (
    SelfChat,
    Start,
    describe,
    plan,
    play,
    read_starts,
    resumed,
    to_dict,
    to_line,
    write_parlai,
)
from plato2.talk.speaker import PlatoSpeaker

TOKENIZER = Tokenizer.load(KNOVER)
DECODE = DecodeConfig(max_tokens=6)
SAID = [{"text": "hi", "speaker": "a"}, {"text": "so", "speaker": "a"}, {"text": "ho", "speaker": "b"}]
IN_A_ROW = json.dumps({"turns": SAID})
"""Two messages of one person are one turn."""
QUESTIONS = ["what is love ?", "how old are you ?", "is the sky blue ?", "what is love ?", "hello !"]


def player(name: str, **model: Any) -> PlatoSpeaker:
    networks = [make_stage(stage, vocab_size=TOKENIZER.vocab_size, **model) for stage in ("2_gen", "2_eval")]
    return PlatoSpeaker(name, PlatoBot(networks[0], TOKENIZER, networks[1], DECODE), DECODE)


@pytest.fixture(scope="module")
def one() -> PlatoSpeaker:
    return player("one")


@pytest.fixture(scope="module")
def two() -> PlatoSpeaker:
    """A model with another tokenizer, fewer positions and no evaluation model."""
    tokenizer = train_tokenizer(small_tokenizer_texts(), 100)
    network = make_stage("2_gen", vocab_size=tokenizer.vocab_size, n_layer=2, max_position=64)
    return PlatoSpeaker("two", PlatoBot(network, tokenizer, None, DECODE), DECODE)


def starts(*texts: str) -> list[Start]:
    return [Start(f"starts.txt:{n}", (text,)) for n, text in enumerate(texts, start=1)]


def played(
    given: Sequence[Start],
    players: Sequence[PlatoSpeaker],
    utterances: int = 6,
    batch: int = 16,
    **options: Any,
) -> list[SelfChat]:
    dialogues = plan(given, players, utterances, options.pop("swap", False))
    for first in range(0, len(dialogues), batch):
        list(play(dialogues[first : first + batch], players, DECODE.seed, **options))
    return dialogues


def test_the_verb_warns_of_what_cannot_be_read_and_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "starts.txt").write_text("hi there\n你好\n", encoding="utf-8")
    (tmp_path / "disk").mkdir()
    (tmp_path / "chats.jsonl").symlink_to(tmp_path / "disk" / "chats")
    given = ["--generation", str(make_run(tmp_path / "run", "2_gen")), "--max-tokens", "4"]
    given += ["--starts", f"{tmp_path}/starts.txt", "--out", f"{tmp_path}/chats.jsonl", "--utterances", "2"]
    done = CliRunner().invoke(app, ["self-chat", *given])
    assert done.exit_code == 0
    assert f"warning: a model cannot read 1 of 2 starts, the first: {tmp_path}/starts.txt:2" in done.stderr
    assert (tmp_path / "disk" / "chats").read_bytes().count(b"\n") == 2
    assert (tmp_path / "chats.jsonl").is_symlink()


# ------------------------------------------------------------------------------------------- who says what


def test_a_dialogue_is_its_start_and_what_the_bot_answers(one: PlatoSpeaker) -> None:
    (dialogue,) = played(starts("what is love ?"), [one])
    assert dialogue.texts[0] == "what is love ?"
    assert [turn["speaker"] for turn in dialogue.turns] == ["A", "B", "A", "B", "A", "B"]
    assert [turn["model"] for turn in dialogue.turns] == [None, *["one"] * 5]
    for n in range(1, 6):
        seed = self_chat.turn_seed(DECODE.seed, 0, n)
        (reply,) = one.bot.reply_batch([dialogue.texts[:n]], DECODE, [seed])
        assert dialogue.texts[n] == reply.text
        assert dialogue.turns[n]["latent"] == reply.candidates[0].latent
        assert dialogue.turns[n]["coherence"] == pytest.approx(reply.candidates[0].coherence, abs=1e-5)


def test_what_is_said_does_not_depend_on_what_is_played_together(one: PlatoSpeaker) -> None:
    together = [dialogue.texts for dialogue in played(starts(*QUESTIONS), [one])]
    assert [dialogue.texts for dialogue in played(starts(*QUESTIONS), [one], batch=2)] == together
    assert [dialogue.texts for dialogue in played(starts(*QUESTIONS), [one], batch=1)] == together
    assert together[0] != together[3]  # the same start twice: each has its own seed


def test_another_seed_is_another_dialogue(one: PlatoSpeaker) -> None:
    dialogues = plan(starts("hello !"), [one], 4)
    list(play(dialogues, [one], 3))
    assert dialogues[0].texts != played(starts("hello !"), [one], 4)[0].texts


def test_two_models_speak_by_turns_and_once_more_exchanged(one: PlatoSpeaker, two: PlatoSpeaker) -> None:
    dialogues = played(starts("hello !", "who are you ?"), [one, two], 5, swap=True)
    assert [dialogue.number for dialogue in dialogues] == [0, 1, 2, 3]
    models = [[turn["model"] for turn in dialogue.turns] for dialogue in dialogues]
    assert models == [[None, "two", "one", "two", "one"]] * 2 + [[None, "one", "two", "one", "two"]] * 2
    assert [to_dict(dialogue, [one, two], 11)["speakers"] for dialogue in dialogues[1:3]] == [
        {"A": "one", "B": "two"},
        {"A": "two", "B": "one"},
    ]
    coherences = [turn["coherence"] for turn in dialogues[0].turns]
    assert [coherence is None for coherence in coherences] == [True, True, False, True, False]


def test_a_start_of_several_turns_is_answered_by_whose_turn_it_is(
    one: PlatoSpeaker, two: PlatoSpeaker
) -> None:
    given = [Start("s:1", ("hi", "hello")), Start("s:2", ("hi",)), Start("s:3", ("hi", "hello", "you ?"))]
    dialogues = played(given, [one, two], 4)
    assert [len(dialogue.turns) for dialogue in dialogues] == [4, 4, 4]
    models = [[turn["model"] for turn in dialogue.turns] for dialogue in dialogues]
    assert models == [[None, None, "one", "two"], [None, "two", "one", "two"], [None, None, None, "two"]]


def test_all_candidates_if_asked_for(one: PlatoSpeaker) -> None:
    (dialogue,) = played(starts("hello !"), [one], 3, with_candidates=True)
    assert "candidates" not in dialogue.turns[0]
    for turn in dialogue.turns[1:]:
        assert len(turn["candidates"]) == 5
        assert turn["candidates"][0]["text"] == turn["text"]
        assert turn["candidates"][0].keys() == {"text", "latent", "log_prob", "coherence"}


def test_progress_is_the_turns_that_were_said(one: PlatoSpeaker, two: PlatoSpeaker) -> None:
    dialogues = plan(starts(*QUESTIONS), [one, two], 6, swap=True)
    assert sum(play(dialogues, [one, two])) == 2 * 5 * 5
    assert list(play(dialogues, [one, two])) == []


def test_nothing_to_say_ends_a_dialogue(one: PlatoSpeaker, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = [Candidate("", (), 0, -1.0, 0.9), Candidate("\u200b", (9,), 2, -1.5, 0.7)]
    said = Candidate("yes .", (5,), 1, -2.0, 0.5)

    def reply_batch(bot: PlatoBot, contexts: list[list[str]], *_: object) -> list[Reply]:
        return [
            Reply("", [*empty, said] if len(context) < 3 else empty) for context in contexts
        ]  # with a word in them only at first

    monkeypatch.setattr(PlatoBot, "reply_batch", reply_batch)
    (dialogue,) = played(starts("hello !"), [one], 6)
    assert dialogue.texts == ["hello !", "yes .", "yes ."]
    assert dialogue.turns[1]["latent"] == 1


def test_a_refusal_is_a_turn_too(one: PlatoSpeaker) -> None:
    bot = PlatoBot(one.bot.generation, TOKENIZER, None, DECODE, safety=Safety([WordRule(["love"])]))
    (dialogue,) = played(starts("what is love ?"), [PlatoSpeaker("one", bot, DECODE)], 3)
    assert dialogue.turns[1]["text"] == "I would rather not talk about that."
    assert dialogue.turns[1]["latent"] is None
    assert dialogue.turns[2]["latent"] is not None


def test_a_start_longer_than_the_context_is_read_from_its_end(one: PlatoSpeaker) -> None:
    tail = " ".join(["cats"] * 130)
    texts = [dialogue.texts[1:] for dialogue in played(starts("dogs " * 9_000 + tail), [one], 3)]
    assert texts == [dialogue.texts[1:] for dialogue in played(starts("birds " * 200 + tail), [one], 3)]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (("hi", "\u200b"), "s.txt:7: one of its turns is empty"),
        (("hi", "", "you ?"), "s.txt:7: one of its turns is empty"),
        (("hi", "ho", "he", "ha"), "s.txt:7: a start of 4 turns and utterances=4: nothing is left to say"),
    ],
)
def test_starts_that_cannot_be_played(one: PlatoSpeaker, turns: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan([Start("s.txt:7", turns)], [one], 4)


# ------------------------------------------------------------------------------------------ files of starts


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("s.txt", "what is love ?\n\n  how  old ?\t\r\n \n", [("what is love ?",), ("how old ?",)]),
        ("s.txt", '\ufeffhi\n{"turns": 1}', [("hi",), ('{"turns": 1}',)]),
        ("s", "你好\u2028吗\nhi\nhi", [("你好 吗",), ("hi",), ("hi",)]),
        ("s.jsonl", '{"turns": ["hi", {"text": "ho", "speaker": "a"}]}\n\n', [("hi", "ho")]),
        ("s.jsonl", IN_A_ROW, [("hi so", "ho")]),
        ("s.jsonl", IN_A_ROW.replace("speaker", "x"), [("hi", "so", "ho")]),
        ("s.tsv", "hi [SEP] ho\tyes\nwho ?\n", [("hi", "ho"), ("who ?",)]),
    ],
)
def test_starts_in_each_format(tmp_path: Path, name: str, text: str, expected: list[tuple[str, ...]]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    found = read_starts(tmp_path / name)
    assert [start.turns for start in found] == expected
    assert found[0].place == f"{tmp_path / name}:1"


@settings(max_examples=50)
@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), min_size=1))
def test_starts_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, given: list[list[str]]
) -> None:
    file = tmp_path_factory.mktemp("starts") / "s.jsonl"
    lines = [json.dumps({"turns": turns}, ensure_ascii=False) for turns in given]
    file.write_bytes("\n".join(lines).encode())
    expected = [tuple(" ".join(turn.split()) for turn in turns) for turns in given]
    assert [start.turns for start in read_starts(file)] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.txt", b"", "--starts .*s.txt: it is empty; write one start per line"),
        ("s.txt", b"\n \r\n\xef\xbb\xbf\n", "one of its turns is empty"),
        ("s.txt", b"hi\nh\xff\n", "s.txt:2: byte 2 is not UTF-8; save the file as UTF-8"),
        ("s.jsonl", b'"hi"', 's.jsonl:1: not of the form {"turns"'),
        ("s.jsonl", b'{"turns": "hi"}', 's.jsonl:1: not of the form {"turns"'),
        ("s.jsonl", b'{"turns": []}', "not of the form"),
        ("s.jsonl", b'{"turns": [1]}', "not of the form"),
        ("s.jsonl", b'{"turns": ["\\ud83d"]}', "not of the form"),
        ("s.jsonl", b"hi", "not of the form"),
        ("s.jsonl", b"[" * 100_000, "not of the form"),
    ],
)
def test_files_that_are_no_starts(
    tmp_path: Path, one: PlatoSpeaker, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        plan(read_starts(tmp_path / name), [one])


def test_no_file_of_starts(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=f"--starts {path}: .*; give a file with one start per line"):
            read_starts(path)
        with pytest.raises(UserError, match=f"--contexts {path}: .*; give a file with one context per line"):
            read_starts(path, "--contexts")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"--contexts .*empty\.txt: it is empty; write one context per line"):
        read_starts(tmp_path / "empty.txt", "--contexts")


# ------------------------------------------------------------------------------------------------ resuming


ABOUT = {"model1": {"name": "one", "generation": "abc"}, "settings": {"temperature": 1.0, "stop": []}}


def line(number: int) -> bytes:
    return to_line({"id": number, "turns": [f"dialogue {number} é"]})


def write(out: Path, content: bytes, about: dict[str, Any] = ABOUT) -> None:
    with resumed(out, about, 10, 4) as (file, n_kept):
        assert n_kept == 0
        file.write(content)


WHOLE = b"".join(line(n) for n in range(10))


@settings(max_examples=80, deadline=None)
@given(n_bytes=st.integers(0, len(WHOLE)), batch=st.integers(1, 12))
def test_a_file_that_was_cut_anywhere_is_filled_up(
    tmp_path_factory: pytest.TempPathFactory, n_bytes: int, batch: int
) -> None:
    out = tmp_path_factory.mktemp("out") / "chats.jsonl"
    write(out, WHOLE[:n_bytes])
    n_whole = WHOLE[:n_bytes].count(b"\n")
    with resumed(out, ABOUT, 10, batch) as (file, n_kept):
        assert n_kept == (10 if n_whole == 10 else n_whole - n_whole % batch)
        file.write(b"".join(line(n) for n in range(n_kept, 10)))
    assert out.read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"settings": {"temperature": 0.7, "stop": []}},
            "with settings.temperature=1.0, not 0.7; give the same",
        ),
        ({"settings": {"temperature": 1.0, "stop": ["x"]}}, r"with settings.stop=\[\], not \['x'\]"),
        ({"model1": {"name": "one", "generation": "abd"}}, "with model1.generation=abc, not abd"),
        ({"model2": {"name": "two"}}, "with model2.name=None, not two"),
        ({"model1": {"name": "one"}}, "with model1.generation=abc, not None"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    out = tmp_path / "chats.jsonl"
    write(out, WHOLE[:70])
    with pytest.raises(UserError, match=message), resumed(out, ABOUT | change, 10, 4):
        pass
    assert out.read_bytes() == WHOLE[:70]


def test_files_that_self_chat_did_not_write_are_left_alone(tmp_path: Path) -> None:
    out, meta = tmp_path / "chats.jsonl", tmp_path / "chats.jsonl.meta.json"

    def refused(message: str) -> None:
        content = out.read_bytes()
        with pytest.raises(UserError, match=message), resumed(out, ABOUT, 10, 4):
            pass
        assert out.read_bytes() == content

    out.write_text("my notes\n", encoding="utf-8")
    refused("already exists, and plato2 did not write it; give a new file")
    out.write_bytes(b"")
    write(out, line(0) + b"my notes\n" + line(2))
    refused("line 2 is not dialogue 1, it has changed since; remove the file and chats.jsonl.meta.json")
    out.write_bytes(WHOLE + line(10))
    refused("line 11 is not dialogue 10")
    meta.write_text("{", encoding="utf-8")
    refused("chats.jsonl.meta.json is damaged")


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    out = tmp_path / "chats.jsonl"
    with (
        resumed(out, ABOUT, 10, 4),
        pytest.raises(UserError, match=r"chats\.jsonl is being written by another process \(process "),
    ):
        write(out, b"")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file" / "chats.jsonl"
    blocked.parent.write_text("no folder", encoding="utf-8")
    with pytest.raises(UserError, match=f"--out {blocked}: Not a directory; fix that"):
        write(blocked, b"")
    full = OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left on device"), resumed(tmp_path / "x", ABOUT, 10, 4):
        raise full


def test_models_are_told_apart_by_their_weights(one: PlatoSpeaker, tmp_path: Path) -> None:
    found = describe([one])
    assert found["model1"].keys() == {"name", "tokenizer", "generation", "evaluation", "backward"}
    assert found["model1"]["backward"] is None
    assert describe([player("one")]) == found
    other = PlatoBot.load(make_run(tmp_path / "run", "1_coarse"))
    changed = describe([PlatoSpeaker("one", other, DECODE)])["model1"]
    assert changed["tokenizer"] == found["model1"]["tokenizer"]
    assert changed["generation"] != found["model1"]["generation"]


# ------------------------------------------------------------------------------------------------ ParlAI


def test_parlai_reads_it(one: PlatoSpeaker, two: PlatoSpeaker, tmp_path: Path) -> None:
    out = tmp_path / "chats.jsonl"
    players = [one, two]
    dialogues = played(starts("hello \x85 \u2028 🙂 !", "who are you ?"), players, 5, swap=True)
    about = describe(players)
    with resumed(out, about, 4, 4) as (file, _):
        file.write(b"".join(to_line(to_dict(dialogue, players, 11)) for dialogue in dialogues))
    written = write_parlai(out)
    assert written == tmp_path / "chats.parlai.jsonl"
    episodes = [json.loads(text) for text in written.read_text(encoding="ascii").splitlines()]
    for episode, dialogue in zip(episodes, dialogues, strict=True):
        assert episode.keys() == {"dialog", "context", "metadata_path"}
        assert episode["context"] == []
        assert [len(pair) for pair in episode["dialog"]] == [2, 2, 1]
        acts = [act for pair in episode["dialog"] for act in pair]
        assert [act["text"] for act in acts] == dialogue.texts
        assert all(act.keys() == {"id", "episode_done", "text"} for act in acts)
    assert [act["id"] for act in episodes[0]["dialog"][0]] == ["one_1", "two_2"]
    assert [act["id"] for act in episodes[2]["dialog"][0]] == ["two_1", "one_2"]
    metadata = json.loads((tmp_path / "chats.parlai.metadata").read_text(encoding="ascii"))
    assert metadata.keys() == {"date", "opt", "self_chat", "speakers", "version"}
    assert metadata["opt"] == about
    assert metadata["speakers"] == ["one_1", "two_2", "two_1", "one_2"]
    assert episodes[0]["metadata_path"] == str(tmp_path / "chats.parlai.metadata")


def test_it_has_the_form_of_parlais_own_logs(one: PlatoSpeaker, tmp_path: Path) -> None:
    """Two models' logs as ParlAI's repository has them."""
    log = Path(__file__).parents[3] / "shared" / "data" / "parlai_acute" / "model1.blended_skill_talk.jsonl"
    if not log.exists():
        pytest.skip(f"no {log.name} here")
    theirs = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    out = tmp_path / "chats.jsonl"
    (dialogue,) = played(starts("hello !"), [one], 10)
    with resumed(out, describe([one]), 1, 1) as (file, _):
        file.write(to_line(to_dict(dialogue, [one], 11)))
    ours = json.loads(write_parlai(out).read_text(encoding="utf-8"))
    assert ours.keys() == theirs.keys()
    assert [len(pair) for pair in ours["dialog"]] == [len(pair) for pair in theirs["dialog"]]
    for our_act, their_act in zip(ours["dialog"][0], theirs["dialog"][0], strict=True):
        assert our_act.keys() == their_act.keys() - {"beam_texts"}
        assert our_act["id"].rpartition("_")[2] == their_act["id"].rpartition("_")[2]
