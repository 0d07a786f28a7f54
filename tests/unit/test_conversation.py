"""A conversation as the terminal and the page keep it: each step makes a new one, both files say the same."""

from __future__ import annotations

import json
from pathlib import Path

from plato2.config import DecodeConfig
from plato2.talk.bot import Reply
from plato2.talk.conversation import Conversation, now
from plato2.talk.rank import Candidate
from plato2.talk.safety import Flag

DECODE = DecodeConfig(seed=3)


def answered(conversation: Conversation, message: str, *texts: str) -> Conversation:
    candidates = [Candidate(text, (7,), z, -1.0, 0.5) for z, text in enumerate(texts)]
    return conversation.answered(message, Reply(texts[0], candidates), DECODE, now())


def test_a_step_makes_a_new_conversation() -> None:
    nothing = Conversation()
    first = answered(nothing, "hi", "hello", "hey")
    second = answered(first, "you ?", "fine")
    other = first.choose(2)
    assert (nothing.turns, nothing.last) == ([], None)
    assert first.turns == ["hi", "hello"]
    assert second.turns == ["hi", "hello", "you ?", "fine"]
    assert answered(other, "you ?", "fine").turns == ["hi", "hey", "you ?", "fine"]
    assert second.undo() == first
    assert first.undo() == nothing == nothing.undo()
    assert {candidate.token_ids for candidate in second.exchanges[0].reply.candidates} == {()}


def test_what_is_exported_and_what_is_saved_say_the_same(tmp_path: Path) -> None:
    refused = Reply("no .", [], (Flag("input", "rule", "block"),))
    conversation = answered(Conversation(), "hi", "hello", "hey").choose(2)
    conversation = conversation.answered("bad", refused, DECODE, now())
    lines = [json.loads(line) for line in conversation.export(lambda c: c.text == "hello").splitlines()]
    file = tmp_path / "chats.jsonl"
    assert [conversation.save(file, {}, DecodeConfig()) for _ in range(2)] == [False, True]
    saved, again = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    assert saved["turns"] == again["turns"]
    assert [turn["text"] for turn in saved["turns"]] == [line["text"] for line in lines] == conversation.turns
    assert [line.get("chosen") for line in lines] == [None, 2, None, None]
    assert [turn.get("rank") for turn in saved["turns"]] == [None, 2, None, None]
    assert [candidate["text"] for candidate in lines[1]["candidates"]] == [None, "hey"]
    assert [turn.get("settings") for turn in saved["turns"][1::2]] == [{"seed": 3}] * 2
