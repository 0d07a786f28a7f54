"""The readers of chat corpora: every form and fault of each, and the real files where they are."""

import gzip
import itertools
import json
import lzma
import re
from pathlib import Path

import pytest

from plato2.config import UserError
from plato2.data.shards import read_index
from plato2.prepare.clean import CleanRules
from plato2.prepare.corpora import ReadReport, read_corpus, read_json
from plato2.prepare.corpora.lccc import join_characters
from plato2.prepare.dialogues import PrepareOptions, prepare
from plato2.talk.self_chat import meta_file, to_line, write_parlai

SHARED = Path(__file__).parents[3] / "shared" / "data"
CHAT = ("dailydialog", "convai2", "parlai", "lccc", "weibo")


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs ../shared/data (real corpora)")
    return SHARED


def read(corpus, *files, report=None, **options):
    return list(read_corpus(corpus, [str(file) for file in files], report or ReadReport(), options))


def texts(dialogues):
    return [[turn.text for turn in dialogue.turns] for dialogue in dialogues]


def spoken(dialogue):
    return [(turn.speaker, turn.text) for turn in dialogue.turns]


def counts(dialogues):
    return len(dialogues), sum(len(dialogue.turns) for dialogue in dialogues)


def alternate(dialogues):
    pairs = (pair for dialogue in dialogues for pair in itertools.pairwise(dialogue.turns))
    return all(a.speaker is not None and a.speaker != b.speaker for a, b in pairs)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def words(path):
    """The text of a file, compressed or not, without the reader."""
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()


# ---------------------------------------------------------------------------------------------- dailydialog


def test_dailydialog(tmp_path):
    lines = [
        "hi , Ann . __eou__ hello ! __eou__ how are you ? __eou__",
        "no blanks__eou__around it__eou__",
        "twice __eou__ __eou__ in a row__eou____eou__",
        "the last one __eou__ has no end",
        "XDailyDialog __eou__ has labels __eou__\t1\t2 1\t0 4",
    ]
    dialogues = read("dailydialog", write(tmp_path / "a.txt", "\n\n".join(lines)))
    assert spoken(dialogues[0]) == [("A", "hi , Ann ."), ("B", "hello !"), ("A", "how are you ?")]
    assert texts(dialogues[1:]) == [
        ["no blanks", "around it"],
        ["twice", "in a row"],
        ["the last one", "has no end"],
        ["XDailyDialog", "has labels"],
    ]
    assert alternate(dialogues)


def test_dailydialog_that_is_broken(tmp_path):
    path = write(tmp_path / "a.txt", "a __eou__ b __eou__\n1\t2\t3\n __eou__ __eou__\n")
    report = ReadReport()
    assert texts(read("dailydialog", path, report=report)) == [["a", "b"]]
    assert report.examples == [
        f"{path}:2: no __eou__, which ends each turn",
        f"{path}:3: no text, only __eou__",
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dailydialog/test.utts.txt", (1000, 7740)),
        ("dailydialog/valid.utts.txt", (1000, 8069)),
        ("xdailydialog/en_dev_human.txt.gz", (995, 8025)),
        ("xdailydialog/en_test_human.txt.gz", (996, 7716)),
        ("xdailydialog/zh_dev_human.txt.gz", (995, 8025)),
    ],
)
def test_the_real_dailydialog(shared, name, expected):
    report = ReadReport(strict=True)
    dialogues = read("dailydialog", shared / name, report=report)
    text = words(shared / name)
    assert counts(dialogues) == (text.count("\n"), text.count("__eou__")) == expected
    assert alternate(dialogues)
    if name.startswith("xdailydialog"):  # there is one act for each turn
        n_acts = [len(line.split("\t")[2].split()) for line in text.splitlines()]
        assert [len(dialogue.turns) for dialogue in dialogues] == n_acts


# -------------------------------------------------------------------------------------------------- convai2

CONVAI2 = """\
1 your persona: i like to ski.
2 your persona: i am tall.
3 partner's persona: i have two cats.
4 hi , how are you ?\tgreat ! i was skiing .\t\ta candidate|another
5 lucky you .\tdo you ski ?
1 __SILENCE__\thello !
2 hi .\twho are you ?
3 __SILENCE__\tare you there ?
4 yes .
1 no persona\tat all
"""


def test_convai2(tmp_path):
    first, second, third = read("convai2", write(tmp_path / "a.txt", CONVAI2))
    assert first.persona == {"self": ["i like to ski.", "i am tall."], "partner": ["i have two cats."]}
    assert spoken(first) == [
        ("partner", "hi , how are you ?"),
        ("self", "great ! i was skiing ."),
        ("partner", "lucky you ."),
        ("self", "do you ski ?"),
    ]
    assert spoken(second) == [
        ("self", "hello !"),
        ("partner", "hi ."),
        ("self", "who are you ? are you there ?"),
        ("partner", "yes ."),
    ]
    assert (third.persona, texts([third])) == ({}, [["no persona", "at all"]])


def test_convai2_files_do_not_run_into_each_other(tmp_path):
    files = [write(tmp_path / f"{name}.txt", "1 a\tb\n2 c\td\n") for name in "xy"]
    assert texts(read("convai2", *files)) == [["a", "b", "c", "d"]] * 2


CONVAI2_FAULTS = {
    "1 a\tb\nc\td\n3 e\tf\n": (1, r"the dialogue that begins here: line 2 does not begin with a number"),
    "1 a\tb\n3 c\td\n": (1, "line 2 has the number 3 instead of 2: lines are missing"),
    "7 a\tb\n8 c\td\n": (1, "line 1 has the number 7 instead of 1: lines are missing"),
    "1 your persona: i ski.\n2 __SILENCE__\t\n": (1, "has no turn"),
    "1 a\tb\n2 \udcff\tc\n3 d\te\n": (2, "not valid UTF-8"),
}


@pytest.mark.parametrize(
    ("text", "fault"), CONVAI2_FAULTS.items(), ids=[why for _, why in CONVAI2_FAULTS.values()]
)
def test_a_damaged_dialogue_of_convai2_is_left_out(tmp_path, text, fault):
    path = tmp_path / "a.txt"
    whole = "1 x\ty\n"
    path.write_bytes((text + whole).encode("utf-8", "surrogateescape"))
    report = ReadReport()
    assert texts(read("convai2", path, report=report)) == [["x", "y"]]
    line, why = fault
    assert re.search(rf"a\.txt:{line}: .*{why}", report.examples[0])
    with pytest.raises(UserError, match=why):
        read("convai2", path, report=ReadReport(strict=True))


# --------------------------------------------------------------------------------------------------- parlai

EPISODES = r"""text:your persona: i ski.\nyour persona: i am tall.\nMusic\nSo ?\nhi , who ?	labels:a skier !|i
text:nice\nand tall\t, too	labels:a __PIPE__ b	reward:0	episode_done:True
text:Chess	chosen_topic:Chess	labels:i play .	checked_sentence:Chess is old.
text:do you ?	labels:i do .	checked_sentence:no_passages_used	episode_done:True
text:__SILENCE__	labels:i begin .
text:partner's persona: i am p.\nok	eval_labels:fine .
"""


def test_parlai_text(tmp_path):
    report = ReadReport()
    bst, wizard, last = read("parlai", write(tmp_path / "a.txt", EPISODES), report=report)
    assert bst.persona == {"self": ["i ski.", "i am tall."]}
    assert spoken(bst) == [
        ("partner", "hi , who ?"),
        ("self", "a skier !"),
        ("partner", "nice and tall\t, too"),
        ("self", "a | b"),
    ]
    assert [turn.knowledge for turn in bst.turns] == [[], ["Music", "So ?"], [], []]
    assert report.skipped == {"labels after the first one": 1}
    assert spoken(wizard) == [("self", "i play ."), ("partner", "do you ?"), ("self", "i do .")]
    assert [turn.knowledge for turn in wizard.turns] == [["Chess", "Chess is old."], [], []]
    assert (spoken(last), last.persona) == (
        [("self", "i begin ."), ("partner", "ok"), ("self", "fine .")],
        {"partner": ["i am p."]},
    )


@pytest.mark.parametrize("off", ["false", "off", False])
def test_parlai_without_context(tmp_path, off):
    bst, *_ = read("parlai", write(tmp_path / "a.txt", EPISODES), context=off)
    assert bst.turns[0].text == "Music So ? hi , who ?"
    assert not any(turn.knowledge for turn in bst.turns)
    with pytest.raises(UserError, match=r"reader\.context=maybe: must be true or false"):
        read("parlai", tmp_path / "a.txt", context="maybe")


def act(name, text, **keys):
    return {"id": name, "text": text, "episode_done": False, **keys}


LOGS = [
    {
        "dialog": [[act("m_1", "hi !"), act("m_2", "hello .")], [act("m_1", "bye")]],
        "context": [
            act("context", "your persona: i ski.\nMusic"),
            act("context", "your persona: i am two.\npartner's persona: i am one."),
        ],
    },
    {
        "dialog": [
            [act("x", "your persona: i am y.\nMusic\nhi"), act("y", "hello")],
            [act("y", "yes"), act("x", "no")],
        ]
    },
    {
        "dialog": [
            [act("same", "a"), act("same", "b")],
            [act("same", "c"), act("same", "")],
            [act("same", "d")],
        ]
    },
]


def test_parlai_logs(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(log) + "\n" for log in LOGS))
    first, second, third = read("parlai", path)
    assert spoken(first) == [("m_1", "hi !"), ("m_2", "hello ."), ("m_1", "bye")]
    assert first.persona == {"m_1": ["i ski.", "i am one."], "m_2": ["i am two."]}
    assert [turn.knowledge for turn in first.turns] == [["Music"], [], []]
    assert spoken(second) == [("x", "hi"), ("y", "hello yes"), ("x", "no")]
    assert (second.persona, second.turns[1].knowledge) == ({"y": ["i am y."]}, ["Music"])
    assert spoken(third) == [("same_1", "a"), ("same_2", "b"), ("same_1", "c d")]


PARLAI_FAULTS = {
    "hello\tthere\tepisode_done:True": "line 1 has a column that is not of the form key:value",
    "id:x\tepisode_done:True": "line 1 has neither text: nor labels:",
    "text:a\tlabels:b\nid:x\tepisode_done:True": "the episode that begins here: line 2 has neither",
    "text:__SILENCE__\tlabels:\tepisode_done:True": "nothing is said",
    '{"dialog": [[{"id"': "not valid JSON",
    '{"turns": []}': 'not of the form {"dialog"',
    '{"dialog": [{"id": "x", "text": "flat"}]}': 'not of the form {"dialog"',
    '{"dialog": [], "context": 1}': 'not of the form {"dialog"',
    '{"dialog": [[{"id": "x"}]]}': "entry 0 of context and dialog has no text",
    '{"dialog": []}': "nothing is said",
}


@pytest.mark.parametrize(("lines", "why"), PARLAI_FAULTS.items(), ids=list(PARLAI_FAULTS.values()))
def test_a_damaged_episode_of_parlai_is_left_out(tmp_path, lines, why):
    path = write(tmp_path / "a.txt", f"{lines}\ntext:x\tlabels:y\tepisode_done:True\n")
    report = ReadReport()
    assert texts(read("parlai", path, report=report)) == [["x", "y"]]
    assert report.n_broken == 1
    assert report.examples[0].startswith(f"{path}:1: ")
    assert why in report.examples[0]


def test_a_line_of_parlai_that_is_no_text_does_not_join_two_episodes(tmp_path):
    lines = ["text:{}1\tlabels:b", "text:{}2\tlabels:d\tepisode_done:True"]
    body = [line.format(name).encode() for name in "xyz" for line in lines]
    for lost, expected in [(0, "yz"), (1, "z"), (2, "xz"), (3, "x"), (4, "xy"), (5, "xy")]:
        path = tmp_path / "a.txt"
        path.write_bytes(b"\n".join([*body[:lost], b"text:\xff", *body[lost + 1 :]]))
        report = ReadReport()
        kept = read("parlai", path, report=report)
        assert "".join(dialogue.turns[0].text[0] for dialogue in kept) == expected
        assert report.n_broken == 2


def test_what_self_chat_writes_is_read(tmp_path):
    out = tmp_path / "chats.jsonl"
    turns = [{"speaker": "AB"[i % 2], "model": None, "text": f"turn {i}"} for i in range(5)]
    speakers = {"A": "model", "B": "model"}
    out.write_bytes(to_line({"id": 0, "start": ["turn 0"], "speakers": speakers, "turns": turns}))
    meta_file(out).write_text('{"begun": "today"}')
    (log,) = read("parlai", write_parlai(out))
    (own,) = read("jsonl", out)
    assert spoken(own) == [(turn["speaker"], turn["text"]) for turn in turns]
    assert spoken(log) == [(f"model_{i % 2 + 1}", f"turn {i}") for i in range(5)]


@pytest.mark.parametrize("model", [1, 2])
def test_the_real_logs_of_parlai(shared, model):
    path = shared / "parlai_acute" / f"model{model}.blended_skill_talk.jsonl"
    dialogues = read("parlai", path, report=ReadReport(strict=True))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    said = [[entry["text"] for pair in record["dialog"] for entry in pair] for record in records]
    assert texts(dialogues) == [[text.strip() for text in dialogue] for dialogue in said]
    assert counts(dialogues) == (5, 50)
    assert alternate(dialogues)
    for dialogue, record in zip(dialogues, records, strict=True):
        shown = [entry["text"].split("\n") for entry in record["context"]]
        assert [len(sentences) for sentences in dialogue.persona.values()] == [2, 2]
        assert all(
            f"your persona: {dialogue.persona[turn.speaker][0]}" in lines
            for turn, lines in zip(dialogue.turns, shown, strict=False)
        )
        assert dialogue.turns[1].knowledge == [line.strip() for line in shown[1][2:]]


# ------------------------------------------------------------------------------------------ lccc and weibo

JOINED = {
    "我 也 要 去 健 身": "我也要去健身",
    "火锅 我 在 重庆 吃 了 。": "火锅我在重庆吃了。",
    "我 爱 iPhone 手 机 . . .": "我爱iPhone手机...",
    "看 了 Game of Thrones 吗 ?": "看了Game of Thrones吗?",
    "p a r t y": "party",
    "2 1 万": "21万",
    "What is this ?": "What is this ?",
    "한국어 는 띄어 쓴다": "한국어 는 띄어 쓴다",
    "  好\t的 ": "好的",
    "": "",
}


@pytest.mark.parametrize(("segmented", "joined"), JOINED.items())
def test_blanks_that_a_script_does_not_have(segmented, joined):
    assert join_characters(segmented) == joined


DIALOGUES = [["生 快", "姐 也 要 快 哈", "OK 啊"], ["对 啊", "可 怕"]]
FORMS = {
    "list.json": json.dumps(DIALOGUES),
    "unicode.json": json.dumps(DIALOGUES, ensure_ascii=False),
    "indented.json": "\ufeff\n" + json.dumps(DIALOGUES, indent=4, ensure_ascii=False),
    "one_split.json": json.dumps({"train": DIALOGUES}),
    "lines.jsonl": "\n\n".join(json.dumps(dialogue) for dialogue in DIALOGUES),
    "lines.json": "\ufeff" + "\n".join(json.dumps(dialogue) for dialogue in DIALOGUES),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("compress", [None, gzip, lzma])
def test_forms_of_lccc(tmp_path, name, compress):
    path = tmp_path / (name + {None: "", gzip: ".gz", lzma: ".xz"}[compress])
    body = FORMS[name].encode()
    path.write_bytes(body if compress is None else compress.compress(body))
    first, second = read("lccc", path)
    assert spoken(first) == [("A", "生快"), ("B", "姐也要快哈"), ("A", "OK啊")]
    assert texts([second]) == [["对啊", "可怕"]]
    assert texts(read("lccc", path, keep_blanks="true")) == DIALOGUES


def test_splits_of_lccc(tmp_path):
    splits = {"valid": [["一", "二"]], "train": [["三", "四"], ["五", "六"]], "test": []}
    path = write(tmp_path / "a.json", json.dumps(splits))
    assert texts(read("lccc", path, split="train")) == [["三", "四"], ["五", "六"]]
    assert texts(read("lccc", path, split="all")) == [["一", "二"], ["三", "四"], ["五", "六"]]
    assert read("lccc", path, split="test") == []
    reader = read_corpus("lccc", [str(path)], ReadReport())
    with pytest.raises(UserError, match=r"the splits valid, train, test: name one in reader\.split, or all"):
        next(reader)
    with pytest.raises(UserError, match=r"reader\.split='dev': .* holds the splits valid, train, test"):
        read("lccc", path, split="dev")


BAD_DIALOGUES = {
    '{"a": "b"}': "not a dialogue of the form",
    '["a", 1]': "not a dialogue of the form",
    '["a", " "]': "text 1 of the dialogue is empty",
    "[]": "a dialogue without texts",
    '["a", "\udcff"]': "not valid UTF-8",
}


@pytest.mark.parametrize("form", ["json", "jsonl"])
@pytest.mark.parametrize(("bad", "why"), BAD_DIALOGUES.items(), ids=list(BAD_DIALOGUES.values()))
def test_a_broken_dialogue_of_lccc_is_counted(tmp_path, form, bad, why):
    path = tmp_path / f"a.{form}"
    body = f'["a", "b"]\n{bad}\n["c", "d"]\n' if form == "jsonl" else f'[["a", "b"],\n{bad},\n["c", "d"]]'
    path.write_bytes(body.encode("utf-8", "surrogateescape"))
    report = ReadReport()
    assert texts(read("lccc", path, report=report)) == [["a", "b"], ["c", "d"]]
    assert report.n_broken == 1
    assert report.examples[0].startswith(f"{path}:2: ")
    assert why in report.examples[0]


def test_a_broken_line_of_lccc_is_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '["a", "b"]\n["c", "d\n["e", "f"]\n')
    report = ReadReport()
    assert texts(read("lccc", path, report=report)) == [["a", "b"], ["e", "f"]]
    assert "a.jsonl:2: not valid JSON" in report.examples[0]


@pytest.mark.parametrize(
    "damage", ['["c", "d"', '["c", "d"]', '["c" "d"]]', '["c", "d"]}', "nul]", "[" * 5000]
)
def test_a_json_file_without_its_end_is_an_error(tmp_path, damage):
    path = write(tmp_path / "a.json", f'[["a", "b"],\n{damage}')
    with pytest.raises(UserError, match=r"a\.json is damaged: not valid JSON at line 2 "):
        read("lccc", path)


@pytest.mark.parametrize("compress", [gzip, lzma])
@pytest.mark.parametrize("corpus", CHAT)
def test_a_compressed_file_without_its_end_is_an_error(tmp_path, corpus, compress):
    path = tmp_path / ("a.txt.gz" if compress is gzip else "a.txt.xz")
    lines = {
        "dailydialog": "a __eou__ b __eou__\n",
        "convai2": "1 a\tb\n",
        "parlai": "text:a\tlabels:b\tepisode_done:True\n",
        "lccc": '["a", "b"]\n',
        "weibo": "a\tb\n",
    }
    whole = compress.compress(lines[corpus].encode() * 1000)
    path.write_bytes(whole)
    assert len(read(corpus, path)) == 1000
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="cannot be read to its end"):
        read(corpus, path)


def test_long_json_is_read_in_parts(tmp_path, monkeypatch):
    """Values, numbers and multi-byte characters across the borders of what is read at a time."""
    values = [["火" * n, "é" * n] for n in range(40)] + [12345, {"a": [1, 2.5e3, None]}]
    path = write(tmp_path / "a.json", json.dumps(values, ensure_ascii=False, indent=1))
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr("plato2.prepare.json_values._JSON_CHUNK", size)
        found = list(read_json(str(path), lambda depth, _: depth == 0))
        assert [value for _, _, value in found] == values
        assert [line for line, _, _ in found] == [*range(2, 2 + 4 * 40, 4), 162, 163]


def test_a_value_that_never_ends_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("plato2.prepare.json_values._JSON_CHUNK", 100)
    monkeypatch.setattr("plato2.prepare.json_values._JSON_VALUE", 1000)
    path = write(tmp_path / "a.json", '[["a", "b"], ["c", ' + '"d", ' * 1000 + '"e"]]')
    with pytest.raises(UserError, match="is damaged"):
        read("lccc", path)


def test_the_real_dialogues_of_lccc(shared):
    path = shared / "cdial_gpt_toy" / "toy_data.json.gz"
    expected = {"train": (1000, 3887), "valid": (200, 817), "test": (200, 400)}
    whole = json.loads(words(path))
    for split, (n_dialogues, n_turns) in expected.items():
        dialogues = read("lccc", path, report=ReadReport(strict=True), split=split)
        assert counts(dialogues) == (n_dialogues, n_turns)
        assert texts(dialogues) == [["".join(text.split()) for text in texts] for texts in whole[split]]
        assert alternate(dialogues)
    assert counts(read("lccc", path, split="all")) == (1400, 5104)


def test_weibo(tmp_path):
    path = write(tmp_path / "a.txt", "我 也 要\t我 一 直\nalone\na\tb\tc\n\t空\n好\t \nhi there\tOK 啊\n")
    report = ReadReport()
    first, second = read("weibo", path, report=report)
    assert spoken(first) == [("A", "我也要"), ("B", "我一直")]
    assert texts([second]) == [["hi there", "OK啊"]]
    assert [example.split(": ", 1)[1] for example in report.examples] == [
        "1 column(s) instead of 2: a post, a tab and a reply",
        "3 column(s) instead of 2: a post, a tab and a reply",
        "the post is empty",
        "the reply is empty",
    ]
    assert texts(read("weibo", path, keep_blanks=True))[0] == ["我 也 要", "我 一 直"]


def test_weibo_in_two_files(tmp_path):
    posts = write(tmp_path / "post", "一\n二\n\n四\n五\n六\n")
    replies = write(tmp_path / "response", "1\n\n3\n4\n5\n")
    report = ReadReport()
    assert texts(read("weibo", posts, replies=str(replies), report=report)) == [
        ["一", "1"],
        ["四", "4"],
        ["五", "5"],
    ]
    assert report.examples == [
        f"{posts}:2: there is no reply in that line of the other file",
        f"{replies}:3: there is no post in that line of the other file",
        f"{posts}:6: there is no reply in that line of the other file",
    ]
    with pytest.raises(UserError, match="one file of posts and one of replies"):
        read("weibo", posts, posts, replies=str(replies))


@pytest.mark.parametrize(("name", "n"), [("toy_train", 10000), ("toy_valid", 2000)])
def test_the_real_pairs_of_weibo(shared, name, n):
    path = shared / "cdial_gpt_toy" / f"{name}.txt.gz"
    dialogues = read("weibo", path, report=ReadReport(strict=True))
    text = words(path)
    assert len(dialogues) == len(text.splitlines()) == text.count("\t") == n
    assert texts(dialogues) == [
        ["".join(part.split()) for part in line.split("\t")] for line in text.split("\n") if line
    ]


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("corpus", CHAT)
def test_files_that_are_missing_or_empty(tmp_path, corpus):
    with pytest.raises(UserError, match="no such file"):
        read(corpus, tmp_path / "a.txt")
    with pytest.raises(UserError, match="files is empty"):
        read(corpus)
    assert read(corpus, write(tmp_path / "a.txt", "\n")) == []


@pytest.mark.parametrize(
    ("corpus", "name", "reader", "n_pairs"),
    [
        ("dailydialog", "dailydialog/test.utts.txt", {}, 7740 - 1000),
        ("lccc", "cdial_gpt_toy/toy_data.json.gz", {"split": "train"}, 3887 - 1000),
    ],
)
def test_prepared(shared, tmp_path, corpus, name, reader, n_pairs):
    """Every pair of a real corpus becomes a sample, but those over the limits."""
    options = PrepareOptions(
        corpus=corpus,
        files=[str(shared / name)],
        reader=reader,
        out=str(tmp_path / "out"),
        vocab_pieces=2500 if corpus == "lccc" else 500,  # each Chinese character is a piece
        clean=CleanRules.off(),
        cut_turn=True,
        strict=True,
    )
    index = read_index(prepare(options, show_progress=False))
    assert index.extra["facts"]["counts"]["pairs"] == n_pairs
    assert sum(split.samples for split in index.splits.values()) == n_pairs
    assert (tmp_path / "out" / "card.md").exists()


def test_a_conversation_of_another_form_in_chitchat(tmp_path):
    message = [{"text": "a", "sender": "x", "timestamp": "2020-02-01"}]
    body = {"good": {"messages": [message]}, "bad": {"messages": [[{"text": "a"}]]}, "worse": [1]}
    path = write(tmp_path / "dataset.json", json.dumps(body, indent=0))
    report = ReadReport()
    assert [dialogue.id for dialogue in read("chitchat", path, report=report)] == ["good"]
    assert report.n_broken == 2
    assert "not a conversation of this corpus (KeyError('sender'))" in report.examples[0]


def test_read_twice_it_is_the_same(shared):
    for corpus, name in [
        ("dailydialog", "dailydialog/valid.utts.txt"),
        ("weibo", "cdial_gpt_toy/toy_valid.txt.gz"),
    ]:
        assert read(corpus, shared / name) == read(corpus, shared / name)
