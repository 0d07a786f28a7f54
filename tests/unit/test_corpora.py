"""Each reader on real or real-looking files, and on damaged ones."""

import gzip
import json
import sys
from pathlib import Path
from zipfile import ZipFile

import pyarrow as pa
import pytest

from plato2.commands.tokenizer import messages
from plato2.config import UserError
from plato2.data.samples import Turn
from plato2.prepare.corpora import (
    ReadReport,
    corpus_names,
    merge_speakers,
    parse_time,
    read_corpus,
    read_dialogues,
    read_json,
)
from plato2.prepare.corpora.jsonl import parse_turns

SHARED = Path(__file__).parents[3] / "shared" / "data"


def read(corpus, *files, report=None, **options):
    return list(read_corpus(corpus, [str(file) for file in files], report or ReadReport(), options))


def texts(dialogues):
    return [[turn.text for turn in dialogue.turns] for dialogue in dialogues]


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs ../shared/data (real corpora)")
    return SHARED


def test_chitchat_has_the_expected_counts():
    n_dialogues = n_long = n_turns = n_pairs = 0
    for dialogue in read_corpus("chitchat", [], ReadReport()):
        n = len(dialogue.turns)
        n_dialogues += 1
        n_long += n >= 2
        n_turns += n
        n_pairs += max(0, n - 1)
        assert all(a.speaker != b.speaker for a, b in zip(dialogue.turns, dialogue.turns[1:], strict=False))
        assert all(turn.time is not None for turn in dialogue.turns)
    assert (n_dialogues, n_long, n_turns, n_pairs) == (7168, 4018, 138737, 131569)


def test_chitchat_that_is_damaged(tmp_path):
    (tmp_path / "dataset.json").write_text('{"a": {"messages": []}, "b": {"mess')
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        read("chitchat", tmp_path / "dataset.json")


LINES = [
    {"turns": ["hi", "hello"]},
    {
        "turns": [
            {"text": "a", "speaker": 1, "time": "2020-02-01T10:00:00Z"},
            {"text": "b", "speaker": 1, "knowledge": "fact"},
            {"text": "c", "speaker": 2, "time": 1580551300},
        ],
        "persona": {"2": ["I am two."]},
        "id": 7,
    },
    {"turns": ["x", "y"], "persona": ["I am anyone."]},
]


@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl(tmp_path, compressed):
    body = "\ufeff" + "\n\n".join(json.dumps(line) for line in LINES)
    path = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    path.write_bytes(gzip.compress(body.encode()) if compressed else body.encode())
    first, second, third = read("jsonl", tmp_path / "*.jsonl*")
    assert [turn.text for turn in first.turns] == ["hi", "hello"]
    assert [turn.text for turn in second.turns] == ["a b", "c"]
    assert (second.id, second.turns[0].knowledge, second.turns[0].time) == ("7", ["fact"], 1580551200.0)
    assert second.persona == {"2": ["I am two."]}
    assert third.persona == {None: ["I am anyone."]}


CHATS = [
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]}
        ]
    },
    {"id": "x", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
]


@pytest.mark.parametrize("form", ["lines", "list", "indented"])
def test_the_forms_of_openai_and_sharegpt(tmp_path, form):
    body = (
        "\n".join(map(json.dumps, CHATS))
        if form == "lines"
        else json.dumps(CHATS, indent=2 * (form[0] == "i"))
    )
    (tmp_path / "a.json").write_text(body)
    first, second, third = read("jsonl", tmp_path / "a.json")
    assert first.persona == {None: ["Be kind."]}
    assert texts([first, second, third]) == [["hi"], ["hi you"], ["hi", "hello"]]
    assert [turn.speaker for turn in third.turns] == ["human", "gpt"]
    assert third.id == "x"


def test_a_call_of_a_tool_is_no_turn(tmp_path):
    call = {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(call))
    report = ReadReport()
    assert read("jsonl", tmp_path / "a.jsonl", report=report) == []
    assert (
        "turn 0: content must be a text, or a list with parts of type text; it is a call of a tool"
        in (report.examples[0])
    )


def test_parts_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    text = [{"type": "text", "text": "what is"}, image, {"text": "this ?"}]
    chats = [[text, "a cat ."], [[image], "a cat ."], [None, "a cat ."]]
    lines = [
        {"messages": [{"role": r, "content": c} for r, c in zip("ab", chat, strict=True)]} for chat in chats
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = ReadReport()
    assert texts(read("jsonl", tmp_path / "a.jsonl", report=report)) == [["what is this ?", "a cat ."]]
    assert [example.rpartition("it is ")[2] for example in report.examples] == ["no text", "null"]


def test_the_form_that_is_not_empty_is_read(tmp_path: Path) -> None:
    line = {"turns": [], "messages": [{"role": "a", "content": "hi"}, {"role": "b", "content": "yes"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + '\n{"turns": []}\n')
    assert texts(read("jsonl", tmp_path / "a.jsonl")) == [["hi", "yes"], []]


def packed(body: bytes) -> bytes:
    """Zstandard in two frames, the second without its length, as `zstd` writes a pipe."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(body)
    return pa.compress(body, "zstd", asbytes=True) + sink.getvalue().to_pybytes()


def test_zst(tmp_path):
    body = "".join(json.dumps(line) + "\n" for line in LINES).encode() * 500
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed(body))
    assert len(read("jsonl", path)) == 2 * 500 * len(LINES)
    path.write_bytes(packed(body)[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read to its end"):
        read("jsonl", path)


def test_endings_in_capitals(tmp_path: Path) -> None:
    body = b'{"turns": ["a", "b"]}\n'
    (tmp_path / "A.JSONL.ZST").write_bytes(packed(body))
    assert texts(read("jsonl", tmp_path / "A.JSONL.ZST")) == [["a", "b"]] * 2
    for n in (1, 2):
        with ZipFile(tmp_path / "TWO.ZIP", "a") as archive:
            archive.writestr(f"{n}.jsonl", body)
        if n == 1:
            assert texts(read("jsonl", tmp_path / "TWO.ZIP")) == [["a", "b"]]
    with pytest.raises(UserError, match=r"TWO\.ZIP holds 2 files, not one"):
        read("jsonl", tmp_path / "TWO.ZIP")
    (tmp_path / "A.JSONL").write_bytes(b'["a", "b"]\n["c", "d"]\n')
    found = list(
        read_dialogues([str(tmp_path / "A.JSONL")], ReadReport(), lambda value, _: parse_turns(value))
    )
    assert texts(found) == [["a", "b"], ["c", "d"]]
    assert list(messages([str(tmp_path / "A.JSONL.ZST")], ReadReport())) == ["a", "b"] * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(('{"turns": ["a", "b"]}\n' * 3).encode(encoding))
    if encoding == "utf-16-be":
        (tmp_path / name).write_bytes(b"\xfe\xff" + (tmp_path / name).read_bytes())
    with pytest.raises(UserError, match=r"is in UTF-16, not UTF-8; save it as UTF-8"):
        read(name.partition(".")[2], tmp_path / name)
    with pytest.raises(UserError, match="is in UTF-16"):
        list(read_json(str(tmp_path / name), lambda depth, _: depth == 0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv", "a.json"])
@pytest.mark.parametrize("form", ["LE", "BE"])
def test_utf_16_without_a_mark_is_named(tmp_path: Path, name: str, form: str) -> None:
    text = '{"turns": ["你好", "是的 你呢"]}\n' * 3
    (tmp_path / name).write_bytes(text.encode(f"utf-16-{form}"))
    cure = (
        rf"is in UTF-16 \(without a byte-order mark\), not UTF-8; save it as UTF-8 \(iconv -f UTF-16{form} "
    )
    with pytest.raises(UserError, match=cure):
        read("tsv" if name == "a.tsv" else "jsonl", tmp_path / name)
    with pytest.raises(UserError, match=cure):
        list(read_json(str(tmp_path / name), lambda depth, _: depth == 0))
    (tmp_path / name).write_bytes(b'["a\0b", "c"]\n')  # one that is odd, in UTF-8
    read("tsv" if name == "a.tsv" else "jsonl", tmp_path / name)


def test_labels_that_pandas_wrote(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("label\tsrc\ttgt\n1.0\thi\thello\n0.0\thi\tno\nyes\thi\tno\n")
    report = ReadReport()
    assert texts(read("tsv", path, report=report)) == [["hi", "hello"]]
    assert report.skipped == {"label is not 1": 2}


BROKEN = {
    b'{"turns": ["a", ': "not valid JSON",
    b'{"turns": ["\xff"]}': "not valid UTF-8",
    b'["a", "b"]': "not of the form",
    b'{"turns": "a"}': "not of the form",
    b'{"turns": [1]}': "turn 0 is neither",
    b'{"turns": [{"text": "a", "time": "soon"}]}': "soon",
    b'{"turns": [{"text": "a", "time": 1580551200000}]}': "not in seconds",
    b'{"turns": [{"text": "a", "time": NaN}]}': "not in seconds",
    b'{"turns": ["a"], "persona": {"x": 1}}': "persona of x",
    b'{"turns": ' + b"[" * 100_000: "recursion",
}


def test_broken_lines_are_counted_with_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b'{"turns": ["a", "b"]}', *BROKEN, b'{"turns": ["c", "d"]}']))
    report = ReadReport()
    assert texts(read("jsonl", path, report=report)) == [["a", "b"], ["c", "d"]]
    assert report.n_broken == len(BROKEN)
    assert len(report.examples) == 5
    assert report.examples[0].startswith(f"{path}:2: not valid JSON")


@pytest.mark.parametrize(("line", "why"), BROKEN.items(), ids=list(BROKEN.values()))
def test_strict_stops_at_a_broken_line(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"turns": ["a", "b"]}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{why}"):
        read("jsonl", path, report=ReadReport(strict=True))


def test_truncated_gzip_is_an_error_not_an_end(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"turns": ["a", "b"]}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="cannot be read to its end"):
        read("jsonl", path)


def test_files_that_do_not_exist(tmp_path):
    for name in ("a.jsonl", "*.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            read("jsonl", tmp_path / name)
    with pytest.raises(UserError, match="files is empty"):
        read("jsonl")


def test_tsv_with_and_without_header(tmp_path):
    plain, headed = tmp_path / "plain.tsv", tmp_path / "headed.tsv"
    plain.write_text("hi [SEP] hello\thow are you ?\nonly one column\n")
    headed.write_text("label\tsrc\ttgt\tknowledge\n1\thi\thello\tf1 [SEP] f2\n0\thi\twrong\t\n1\tyo\thm\t\n")
    report = ReadReport()
    dialogues = read("tsv", plain, headed, report=report)
    assert texts(dialogues) == [["hi", "hello", "how are you ?"], ["hi", "hello"], ["yo", "hm"]]
    assert [dialogue.first_response for dialogue in dialogues] == [2, 1, 1]
    assert dialogues[1].turns[-1].knowledge == ["f1", "f2"]
    assert report.skipped == {"label is not 1": 1}
    assert report.examples == [f"{plain}:2: 1 column(s) instead of 2"]


@pytest.mark.parametrize("header", ["Src\tTgt\tLabel", "context\tresponse\tlabel", "SRC\tResponse\t LABEL "])
def test_a_header_of_tsv_in_any_case_and_by_other_names(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.tsv").write_text(f"{header}\nhi\thello\t1\nhi\twrong\t0\n")
    report = ReadReport()
    assert texts(read("tsv", tmp_path / "a.tsv", report=report)) == [["hi", "hello"]]
    assert report.skipped == {"label is not 1": 1}
    assert report.notes == []


def test_columns_of_tsv_that_are_not_read_are_said_once(tmp_path: Path) -> None:
    for name in ("a.tsv", "b.tsv"):
        (tmp_path / name).write_text("src\ttgt\tscore\nhi\thello\t0\nyo\thm\t1\n")
    report = ReadReport()
    assert len(read("tsv", tmp_path / "*.tsv", report=report)) == 4
    assert report.sentence() == (
        "columns that are not read: score (those that are: src, context, tgt, response, knowledge, label)"
    )


def test_a_third_column_of_tsv_needs_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("hi\thello\t0\n")
    with pytest.raises(UserError, match=r"a\.tsv:1: 3 columns, and no header .*src<TAB>tgt<TAB>label above"):
        read("tsv", path)
    path.write_text("hi\thello\t\nyo\thm\t0\n")  # a tab at the end is no column
    report = ReadReport()
    assert texts(read("tsv", path, report=report)) == [["hi", "hello"]]
    assert report.examples == [f"{path}:2: 3 column(s) instead of 2"]
    path.write_text("src\tanswer\nhi\thello\n")
    with pytest.raises(UserError, match=r"no column tgt .*; name it tgt or response"):
        read("tsv", path)


def test_knovers_own_file(shared):
    dialogues = read("tsv", shared / "dailydialog" / "dailydialog_test_60.tsv")
    assert len(dialogues) == 60
    assert dialogues[0].turns[0].text == "Hi , Becky , what's up ?"
    assert all(dialogue.first_response == len(dialogue.turns) - 1 for dialogue in dialogues)


def test_real_chinese_lines(shared):
    assert len(read("jsonl", shared / "chatterbot" / "chinese.jsonl")) == 467


@pytest.fixture(scope="module")
def hf():
    return pytest.importorskip("datasets")


def test_datasets_of_texts(hf, tmp_path):
    data = hf.Dataset.from_dict({"act": [1, 2], "dialog": [["hi", "hello"], ["a", "b", "c"]]})
    data.save_to_disk(tmp_path / "disk")
    data.to_parquet(tmp_path / "a.parquet")
    for file in (tmp_path / "disk", tmp_path / "a.parquet"):
        assert texts(read("hf_datasets", file)) == [["hi", "hello"], ["a", "b", "c"]]


@pytest.mark.parametrize(("speaker", "text"), [("role", "content"), ("from", "value"), ("speaker", "text")])
def test_datasets_of_messages(hf, tmp_path, speaker, text):
    chat = [
        {speaker: s, text: t} for s, t in [("system", "be kind"), ("user", "a"), ("user", "b"), ("bot", "c")]
    ]
    hf.Dataset.from_dict({"chat": [chat]}).save_to_disk(tmp_path / "disk")
    (dialogue,) = read("hf_datasets", tmp_path / "disk", column="chat")
    assert [(turn.speaker, turn.text) for turn in dialogue.turns] == [("user", "a b"), ("bot", "c")]
    assert dialogue.persona == {None: ["be kind"]}


def test_datasets_with_several_splits_or_columns_ask_for_one(hf, tmp_path):
    part = hf.Dataset.from_dict({"words": [["a", "b"]]})
    hf.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "disk")
    with pytest.raises(UserError, match="holds the splits train, test: name one"):
        read("hf_datasets", tmp_path / "disk")
    with pytest.raises(UserError, match=r"columns words: name the one with the turns in reader\.column"):
        read("hf_datasets", tmp_path / "disk" / "train")
    with pytest.raises(UserError, match=r"reader\.column='x'"):
        read("hf_datasets", tmp_path / "disk" / "train", column="x")
    assert texts(read("hf_datasets", tmp_path / "disk" / "train", column="words")) == [["a", "b"]]


def test_datasets_that_are_damaged(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(UserError, match=r"a\.parquet is not a readable Parquet or Arrow file"):
        read("hf_datasets", tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="was not written by datasets' save_to_disk"):
        read("hf_datasets", tmp_path / "folder")


def test_a_reader_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_corpora").mkdir()
    (tmp_path / "my_corpora" / "echo.py").write_text(
        "from plato2.data.samples import Dialogue, Turn\n"
        "def read(files, report, times=2):\n"
        "    yield Dialogue([Turn('echo')] * times)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert texts(read("my_corpora.echo", times=3)) == [["echo"] * 3]
    with pytest.raises(UserError, match=r"reader\.tims: .*no such option .times"):
        read("my_corpora.echo", tims=3)
    with pytest.raises(UserError, match="cannot be imported"):
        read("my_corpora.other")
    del sys.modules["my_corpora.echo"]


def test_unknown_corpus_lists_the_known_ones():
    assert {"chitchat", "hf_datasets", "jsonl", "tsv"} <= set(corpus_names())
    with pytest.raises(UserError, match=f"there are {', '.join(corpus_names())}, or a module"):
        read("chitchet")


def test_turns_without_speaker_are_not_merged():
    assert len(merge_speakers([Turn("a"), Turn("b")])) == 2


def test_times():
    assert parse_time("1970-01-02") == parse_time(86400) == 86400.0
    assert parse_time("1970-01-01T01:00:00+01:00") == 0.0
    assert parse_time(None) is None


def test_the_reader_and_the_lines_of_the_documentation_work(tmp_path, monkeypatch):
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = document.split("```")
    (code,) = [block.removeprefix("python") for block in blocks[1::2] if block.startswith("python\n")]
    (tmp_path / "my_reader_package").mkdir()
    (tmp_path / "my_reader_package" / "reader.py").write_text(code)
    (tmp_path / "a.txt").write_text("hi | hello\nalone\n")
    monkeypatch.syspath_prepend(tmp_path)
    report = ReadReport()
    assert texts(read("my_reader_package.reader", tmp_path / "a.txt", report=report)) == [["hi", "hello"]]
    assert report.examples == [f"{tmp_path / 'a.txt'}:2: only one turn"]
    lines = [" ".join(block.split()) for block in blocks[1::2] if block.startswith('\n{"turns"')]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [len(dialogue.turns) for dialogue in read("jsonl", tmp_path / "a.jsonl")] == [3, 2]


@pytest.mark.parametrize("path", ["./chats.jsonl", "chats.jsonl"])
def test_a_reader_that_was_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"turns": ["hi", "yes"]}\n')
    with pytest.raises(UserError, match=rf"is a path: name the reader before it, such as jsonl {path}"):
        read_corpus(path, [], ReadReport())
