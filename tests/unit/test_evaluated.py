"""What is evaluated and what was found: the two file formats of `plato2 evaluate`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.evaluate.dialogues import Dialogue, Turn, read_dialogues, systems
from plato2.evaluate.results import (
    Figure,
    Measure,
    Result,
    inputs,
    picture,
    print_table,
    read_result,
    result_table,
    save_picture,
    write_result,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data, ../shared/data")


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_self_chat(tmp_path: Path) -> None:
    turns = [
        {"speaker": "A", "model": None, "text": "hi"},
        {"speaker": "B", "model": "m", "text": "hello ", "candidates": [{"text": "hello"}, {"text": "no"}]},
        {"speaker": "A", "model": "n", "text": "how  are you", "latent": 3},
    ]
    (dialogue,) = read_dialogues(write(tmp_path / "a.jsonl", {"id": 7, "start": ["hi"], "turns": turns}))
    assert dialogue.id == "7"
    assert dialogue.texts() == ["hi", "hello", "how are you"]
    assert dialogue.n_given == 1
    assert dialogue.turns[1].candidates == ("hello", "no")
    assert systems([dialogue]) == ["m", "n"]
    assert dialogue.said_by("n") == [2]
    assert dialogue.said_by("n", "B") == []


def test_a_static_reply_has_references(tmp_path: Path) -> None:
    turns = [
        {"speaker": "A", "text": "hi"},
        {"speaker": "B", "text": "hello"},
        {"speaker": "A", "model": "m", "text": "how are you"},
    ]
    record = {"turns": turns, "references": ["and you ?", "fine"]}
    (dialogue,) = read_dialogues(write(tmp_path / "a.jsonl", record))
    assert (dialogue.id, dialogue.n_given, dialogue.references) == ("0", 2, ("and you ?", "fine"))


def test_texts_of_one_speaker_in_a_row_are_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Meena Conversation 1\nHuman: Hi!\nHuman: You?\nMeena: I am\nhere.\n\n")
    (dialogue,) = read_dialogues(path)
    assert dialogue.turns == (Turn("Hi! You?", "Human"), Turn("I am here.", "Meena", "Meena"))


def test_people_are_a_system_where_there_is_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Conversation 1\nHuman 1: Hi!\nHuman 2: You?\n")
    (dialogue,) = read_dialogues(path)
    assert systems([dialogue]) == ["human"]
    assert (dialogue.n_given, dialogue.said_by("human")) == (0, [0, 1])


def test_what_is_drawn_again_for_intervals(tmp_path: Path) -> None:
    """Self-chats and replies by their start; a chat with a person, or between people, by itself."""
    start, reply = {"speaker": "A", "text": "Hi!"}, {"speaker": "B", "model": "m", "text": "hello"}
    person = {"speaker": "A", "text": "how are you"}
    again = {"speaker": "A", "model": "m", "text": "bye"}
    path = write(tmp_path / "a.jsonl", *({"turns": turns} for turns in ([start, reply, again],) * 2))
    assert [dialogue.case for dialogue in read_dialogues(path)] == ["Hi!", "Hi!"]
    path = write(tmp_path / "b.jsonl", *({"turns": [start, reply, person, reply]} for _ in range(2)))
    assert [dialogue.start for dialogue in read_dialogues(path)] == ["Hi!", "Hi!"]
    assert len({dialogue.case for dialogue in read_dialogues(path)}) == 2
    path = write(tmp_path / "c.jsonl", *({"turns": [start, {**person, "speaker": "B"}]} for _ in range(2)))
    assert len({dialogue.case for dialogue in read_dialogues(path)}) == 2


@needs_data
def test_the_released_transcripts() -> None:
    for name, system, n in (
        ("human", "human", 95),
        ("meena", "Meena", 93),
        ("mitsuku", "Mitsuku", 100),
        ("xiaoice", "XiaoIce", 114),
    ):
        dialogues = read_dialogues(SHARED / "meena" / f"{name}.txt")
        assert (systems(dialogues), len(dialogues)) == ([system], n), name


@needs_data
def test_parlais_logs() -> None:
    dialogues = read_dialogues(SHARED / "parlai_acute" / "model1.blended_skill_talk.jsonl")
    assert systems(dialogues) == ["TransformerGenerator_1", "TransformerGenerator_2"]


def test_compressed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"turns": [{"model": "m", "text": "hi"}]}\n'))
    assert read_dialogues(path) == [
        Dialogue("0", (Turn("hi", "", "m"),), 0, place=f"{path}:1"),
    ]
    path.write_bytes(path.read_bytes() * 2)  # two that were joined, as by cat
    assert len(read_dialogues(path)) == 2
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be unpacked"):
        read_dialogues(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no dialogue in it"),
        (b"\n\n", "no dialogue in it"),
        (b"{", "a.jsonl:1: not valid JSON"),
        (b'{"turns": []}', "a.jsonl:1: turns="),
        (b'{"turns": [{"text": 3}]}', "a.jsonl:1: turns.0.text=3"),
        (b'{"turns": [{"text": "a"}], "references": "b"}', "a.jsonl:1: references='b'"),
        (b"\xff", "byte 1 is not UTF-8"),
        (
            b'{"id": 1, "turns": [{"text": "a"}]}\n{"id": "1", "turns": [{"text": "b"}]}',
            "a.jsonl:2: the id 1 again",
        ),
        (b"[" * 100_000, "a.jsonl:1: not valid JSON"),
        (b'{"turns": [{"text": "\\ud800"}]}', "a.jsonl:1: not valid JSON"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_dialogues(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_dialogues(tmp_path / "a.jsonl")


RESULT = Result(
    kind="replies",
    settings={"seed": 3},
    measures={
        "words": Measure(label="words per reply", digits=1),
        "p1": Measure(label="P@1", better="high", chance=0.1),
        "none": Measure(label="measured of nobody"),
    },
    systems={
        "a": {"words": Figure(value=7.04, n=3), "p1": Figure(value=0.5, low=0.4, high=0.6)},
        "outputs/a/very/long/folder/of/a/run/b": {"words": Figure(value=None, note="no words")},
    },
)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("x")
    result = RESULT.model_copy(update={"inputs": inputs(data, tmp_path)})
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result
    assert [part.sha256 is None for part in result.inputs] == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "plato2 evaluation 2"}, "r.json: format='plato2 evaluation 2'"),
        ({"novel": 1}, "novel: unknown to plato2"),
        ({"systems": {"a": {"p1": {"value": "x"}}}}, "r.json: systems.a.p1.value='x'"),
    ],
)
def test_another_result_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "r.json").write_text(json.dumps(RESULT.model_dump() | change))
    with pytest.raises(UserError) as caught:
        read_result(tmp_path / "r.json")
    assert message in str(caught.value)


def test_a_table() -> None:
    console = Console(width=100, record=True)
    console.print(result_table(RESULT))
    shown = console.export_text()
    assert "0.500 (0.400 to 0.600)" in shown
    assert "(no words)" in shown
    assert "0.100" in shown
    assert "measured of nobody" not in shown


@pytest.mark.parametrize("n_systems", [3, 9])
def test_a_table_too_wide_for_the_terminal_is_printed_as_several(n_systems: int) -> None:
    """No number is cut or broken, and every part says which measures it has."""
    systems = {
        f"system-{number}": {
            "p1": Figure(value=number / 10, low=number / 10 - 0.004, high=number / 10 + 0.004)
        }
        for number in range(n_systems)
    }
    console = Console(width=80, record=True)
    print_table(result_table(RESULT.model_copy(update={"systems": systems}), "a title", ["p1"]), console)
    shown = console.export_text()
    numbers = [f"{number / 10 + off:.3f}" for number in range(n_systems) for off in (0, -0.004, 0.004)]
    assert all(text in shown for text in [*systems, *numbers])
    assert shown.count("P@1") == shown.count("measure") == (1 if n_systems == 3 else 3)
    assert shown.count("a title") == 1
    assert max(map(len, shown.splitlines())) <= 80


def test_a_picture(tmp_path: Path) -> None:
    drawing = picture(RESULT)
    assert [axes.get_title(loc="left") for axes in drawing.axes[:2]] == ["words per reply", "P@1 →"]
    save_picture(tmp_path / "a.svg", picture(RESULT))
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    with pytest.raises(UserError, match=r"--picture a\.txt: give a file that ends in \.png"):
        save_picture(Path("a.txt"), picture(RESULT))


def test_an_interval_of_rounding_alone_is_drawn_as_one_value() -> None:
    """The axis says 14.9, not some 1e-11 above 14.92."""
    figure = Figure(value=14.92, low=14.92 - 4e-12, high=14.92 + 4e-12, n=6)
    drawing = picture(
        Result(kind="latents", measures={"a": Measure(label="a")}, systems={"one": {"a": figure}})
    )
    left, right = drawing.axes[0].get_xlim()
    assert left < 14.5 < 15.5 < right


@pytest.mark.parametrize("verb", ["replies", "dialogues", "selection", "audit", "human report none"])
def test_a_place_where_no_result_can_be_is_told_before_anything_is_read(tmp_path: Path, verb: str) -> None:
    (tmp_path / "r.svg").mkdir()
    (tmp_path / "file").touch()
    for option, path, message in (
        ("--out", "file/r.json", f"{tmp_path / 'file'} is not a folder; name another file"),
        ("--picture", "r.svg", "a folder; give a file"),
        ("--picture", "r.txt", "give a file that ends in .png, .svg, .pdf"),
    ):
        given = str(tmp_path / path)
        done = CliRunner().invoke(app, ["evaluate", *verb.split(), "none", option, given])
        assert (done.exit_code, f"{option} {given}: {message}" in done.stderr) == (2, True), done.stderr
