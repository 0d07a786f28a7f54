"""The corpora whose turns come with knowledge: each form, each fault, and the real files where they are."""

import gzip
import json
import zipfile
from itertools import groupby
from pathlib import Path

import pytest

from plato2.config import UserError
from plato2.data.samples import encode_context, encode_response
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.clean import CleanRules
from plato2.prepare.corpora import ReadReport, read_corpus
from plato2.prepare.dialogues import prepare
from plato2.prepare.options import PrepareOptions

SHARED = Path(__file__).parents[3] / "shared" / "data"


def read(corpus, *files, report=None, **options):
    return list(read_corpus(corpus, [str(file) for file in files], report or ReadReport(), options))


def write(path: Path, content: object) -> Path:
    """JSON as the corpora are released; the ending says how it is compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ".jsonl" in path.suffixes and isinstance(content, list)
    body = "\n".join(map(json.dumps, content)) if lines else json.dumps(content, indent=1)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(path.stem, body)
    else:
        path.write_bytes(gzip.compress(body.encode()) if path.suffix == ".gz" else body.encode())
    return path


def spoken(dialogue):
    return [(turn.speaker, turn.text, turn.knowledge) for turn in dialogue.turns]


@pytest.fixture
def shared() -> Path:
    if not SHARED.exists():
        pytest.skip("needs ../shared/data (real corpora)")
    return SHARED


# -- what all of them share -------------------------------------------------------------------------------

TOPICAL = {"t_1": {"content": [{"agent": "agent_1", "message": "hi", "knowledge_source": ["FS1"]}]}}
DOG = {"wikiDocumentIdx": 3, "whoSawDoc": ["user1"], "history": [{"uid": "user1", "text": "hi", "docIdx": 0}]}
KDCONV = [{"name": "x", "messages": [{"message": "hi"}]}]
SGD = [{"dialogue_id": "1", "turns": [{"speaker": "USER", "utterance": "hi", "frames": []}]}]
MULTIWOZ = {"SNG1.json": {"goal": {}, "log": [{"text": "hi", "metadata": {}}]}}
CROSSWOZ = {"1": {"messages": [{"role": "usr", "content": "hi"}]}}
SMALLEST = {
    "topical_chat": TOPICAL,
    "cmu_dog": DOG,
    "kdconv": KDCONV,
    "sgd": SGD,
    "multiwoz": MULTIWOZ,
    "crosswoz": CROSSWOZ,
}
ALL = pytest.mark.parametrize(("corpus", "content"), SMALLEST.items(), ids=list(SMALLEST))


@ALL
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zip"])
def test_plain_and_compressed_files(tmp_path, corpus, content, name):
    path = write(tmp_path / name, content)
    (dialogue,) = read(corpus, path)
    assert dialogue.turns[0].text == "hi"
    assert dialogue.id
    assert read(corpus, path) == [dialogue]


@ALL
def test_damaged_files_name_themselves_and_the_cure(tmp_path, corpus, content):
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps(content)[:-3])
    with pytest.raises(UserError, match=r"cut\.json is damaged: not valid JSON.*get the file again"):
        read(corpus, cut)
    for name in ("a.json.gz", "a.json.zip"):
        path = write(tmp_path / name, content)
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(UserError, match=rf"{name} cannot be read to its end .*; get the file again"):
            read(corpus, path)
    (tmp_path / "empty.json").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.json is empty; get the file again"):
        read(corpus, tmp_path / "empty.json")
    with pytest.raises(UserError, match="no such file"):
        read(corpus, tmp_path / "none.json")


@ALL
def test_records_of_another_form_are_counted_and_the_others_read(tmp_path, corpus, content):
    good = next(iter(content.values())) if isinstance(content, dict) and corpus != "cmu_dog" else content
    good = good[0] if isinstance(good, list) else good
    path = tmp_path / ("a.jsonl" if corpus == "cmu_dog" else "a.json")
    write(path, [{"x": 1}, good, 7] if corpus == "cmu_dog" else {"x": {"x": 1}, "good": good, "y": 7})
    report = ReadReport()
    assert len(read(corpus, path, report=report)) == 1
    assert report.n_broken == 2
    assert all("not a" in example and " of the form " in example for example in report.examples)
    with pytest.raises(UserError, match="of the form"):
        read(corpus, path, report=ReadReport(strict=True))


@ALL
def test_broken_bytes_cost_one_record(tmp_path, corpus, content):
    path = write(tmp_path / "a.json", content)
    path.write_bytes(path.read_bytes().replace(b'"hi"', b'"\xff"'))
    report = ReadReport()
    assert read(corpus, path, report=report) == []
    assert report.n_broken == 1
    assert report.examples[0].endswith(": not valid UTF-8")


def test_a_zip_of_several_files_is_not_half_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../data.json", json.dumps(MULTIWOZ))
        archive.writestr("ontology.json", "{}")
    with pytest.raises(UserError, match=r"a\.zip holds 2 files, not one: unpack it"):
        read("multiwoz", tmp_path / "a.zip")


def test_nothing_of_a_zip_is_unpacked(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.writestr("../evil.json", json.dumps(CROSSWOZ))
    assert len(read("crosswoz", "a.zip")) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip", "in"]


def test_lines_that_are_broken(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps(SGD[0]) + "\n{\n" + "[" * 100_000 + "\n" + json.dumps(SGD[0])
    )
    report = ReadReport()
    assert len(read("sgd", tmp_path / "a.jsonl", report=report)) == 2
    assert [example.split(":", 2)[1] for example in report.examples] == ["2", "3"]
    assert "not valid JSON" in report.examples[0]
    assert "recursion" in report.examples[1]


FAULTS = [
    ("topical_chat", {"t": {"content": [{"message": 1}]}}, "t: message 0 is not of the form"),
    ("topical_chat", {"t": {"content": [{"message": "a", "agent": "x"}]}}, "agent 'x' is neither"),
    (
        "topical_chat",
        {"t": {"content": [{"message": "a", "agent": "agent_1", "knowledge_source": "FS1"}]}},
        "knowledge_source is not a list",
    ),
    ("cmu_dog", {"history": [{"uid": "user1"}]}, "a: message 0 is not of the form"),
    ("cmu_dog", {"history": [{"text": "a"}]}, "message 0: uid None is not a text"),
    ("cmu_dog", {"history": [{"text": "a", "uid": "u", "utcTimestamp": "soon"}]}, "soon"),
    ("cmu_dog", {"history": [], "whoSawDoc": "user1"}, "whoSawDoc is not a list"),
    ("kdconv", [{"messages": ["a"]}], "a-1: message 0 is not of the form"),
    ("kdconv", [{"messages": [{"message": "a", "attrs": "b"}]}], "attrs is not a list"),
    ("kdconv", [{"messages": [{"message": "a", "attrs": [{"name": "b"}]}]}], "an attr is not of the form"),
    ("sgd", [{"turns": [{"utterance": 1}]}], "a-1: turn 0 is not of the form"),
    ("sgd", [{"turns": [{"utterance": "a", "speaker": "BOT"}]}], "'BOT' is neither USER nor SYSTEM"),
    ("sgd", [{"turns": [{"utterance": "a", "speaker": "SYSTEM", "frames": ["b"]}]}], "a frame is not"),
    (
        "sgd",
        [{"turns": [{"utterance": "a", "speaker": "SYSTEM", "frames": [{"service_results": "b"}]}]}],
        "service_results is not a list",
    ),
    ("multiwoz", {"M": {"log": [{"metadata": {}}]}}, "M: turn 0 is not of the form"),
    (
        "multiwoz",
        {"M": {"log": [{"text": "a"}, {"text": "b", "metadata": [1]}]}},
        "metadata is not an object",
    ),
    (
        "multiwoz",
        {"M": {"log": [{"text": "a"}, {"text": "b", "metadata": {"taxi": {"book": {"booked": ["c"]}}}}]}},
        "booked of taxi is not a list of objects",
    ),
    ("crosswoz", {"1": {"messages": [{"role": "usr"}]}}, "1: message 0 is not of the form"),
    ("crosswoz", {"1": {"messages": [{"role": "a", "content": "b"}]}}, "role 'a' is neither usr nor sys"),
    (
        "crosswoz",
        {"1": {"messages": [{"role": "sys", "content": "b", "sys_state": [1]}]}},
        "sys_state is not an object",
    ),
    (
        "crosswoz",
        {"1": {"messages": [{"role": "sys", "content": "b", "sys_state": {"酒店": {}}}]}},
        "sys_state of 酒店 has no list of selectedResults",
    ),
]


@pytest.mark.parametrize(("corpus", "content", "why"), FAULTS)
def test_faults_are_told_in_clear_words(tmp_path, corpus, content, why):
    report = ReadReport()
    assert read(corpus, write(tmp_path / "a.json", content), report=report) == []
    assert report.n_broken == 1
    assert why in report.examples[0]


# -- Topical-Chat -----------------------------------------------------------------------------------------

CHAT = {
    "t_1": {
        "config": "B",
        "content": [
            {"agent": "agent_1", "message": "a", "knowledge_source": ["FS1", "Personal Knowledge"]},
            {"agent": "agent_2", "message": "b", "knowledge_source": ["AS2", "FS1"]},
            {"agent": "agent_2", "message": "c", "knowledge_source": ["FS1", "FS3"]},
            {"agent": "agent_1", "message": "d", "knowledge_source": ["Personal Knowledge"]},
        ],
    }
}
SETS = {
    "t_1": {
        "agent_1": {
            "FS1": {"entity": "E", "shortened_wiki_lead_section": "Short.", "fun_facts": ["F1", "F2"]}
        },
        "agent_2": {"FS1": {"entity": "E", "summarized_wiki_lead_section": "Summary.", "fun_facts": ["F1"]}},
        "article": {"url": "u", "headline": "h", "AS1": "One.", "AS2": "Two."},
    }
}


def test_topical_chat_with_the_reading_sets_of_each_agent(tmp_path):
    chat, sets = write(tmp_path / "chat.json", CHAT), write(tmp_path / "sets.json.gz", SETS)
    (dialogue,) = read("topical_chat", chat, reading_sets=str(sets))
    assert spoken(dialogue) == [
        ("agent_1", "a", ["Short.", "F1", "F2"]),
        ("agent_2", "b c", ["Two.", "Summary.", "F1"]),
        ("agent_1", "d", []),
    ]
    assert dialogue.id == "t_1"
    (bare,) = read("topical_chat", chat)
    assert not any(turn.knowledge for turn in bare.turns)


def test_topical_chat_with_reading_sets_that_were_not_built(tmp_path):
    chat = write(tmp_path / "chat.json", CHAT)
    own = {"FS1": {"entity": "E", "shortened_wiki_lead_section": 7, "fun_facts": ["t3_abc"]}}
    sets = str(write(tmp_path / "sets.json", {"t_1": {"article_url": "u", "agent_1": own, "agent_2": {}}}))
    with pytest.raises(UserError, match=r"sets\.json:\d+: 7 stands in place of a text; .*build\.py"):
        read("topical_chat", chat, reading_sets=sets)
    wiki = write(
        tmp_path / "wiki.json",
        {"shortened_wiki_lead_section": {"Short.": 7}, "summarized_wiki_lead_section": {"Summary.": 8}},
    )
    (dialogue,) = read("topical_chat", chat, reading_sets=sets, wiki=str(wiki))
    assert [turn.knowledge for turn in dialogue.turns] == [["Short."], [], []]
    with pytest.raises(UserError, match=r"reader\.wiki fills in reading sets"):
        read("topical_chat", chat, wiki=str(wiki))
    with pytest.raises(UserError, match=r"wiki=.*chat\.json is not Topical-Chat's src/wiki/wiki\.json"):
        read("topical_chat", chat, reading_sets=sets, wiki=str(chat))
    other = write(tmp_path / "other.json", {"shortened_wiki_lead_section": {"Short.": 6}})
    with pytest.raises(UserError, match="wiki section 7 is not in the file"):
        read("topical_chat", chat, reading_sets=sets, wiki=str(other))


def test_topical_chat_with_the_wrong_reading_sets(tmp_path):
    chat = write(tmp_path / "chat.json", CHAT)
    with pytest.raises(UserError, match=r"chat\.json:\d+: not of the form"):
        read("topical_chat", chat, reading_sets=str(chat))
    with pytest.raises(UserError, match=r"^reader\.reading_sets=.*none\.json': no such file"):
        read("topical_chat", chat, reading_sets=str(tmp_path / "none.json"))
    sets, report = write(tmp_path / "sets.json", {"t_2": SETS["t_1"]}), ReadReport()
    assert read("topical_chat", chat, report=report, reading_sets=str(sets)) == []
    assert "t_1: not in reading_sets=" in report.examples[0]


@pytest.mark.parametrize(("split", "n_turns"), [("valid_freq", 11681), ("test_freq", 11760)])
def test_the_real_topical_chat(shared, split, n_turns):
    dialogues = read("topical_chat", shared / "topical_chat" / f"{split}.json.gz")
    assert (len(dialogues), sum(len(dialogue.turns) for dialogue in dialogues)) == (539, n_turns)


def test_the_real_reading_sets_are_numbers(shared):
    folder = shared / "topical_chat"
    sets = folder / "reading_sets_valid_freq.json.gz"
    with pytest.raises(UserError, match="81356 stands in place of a text"):
        read("topical_chat", folder / "valid_freq.json.gz", reading_sets=str(sets))
    with gzip.open(sets) as stream:
        content = json.load(stream)
    assert content["t_a2b769a0-c082-4c26-8d8d-e2c5b8a79d93"]["agent_1"]["FS1"]["fun_facts"][0] == "t3_42gqyk"


# -- CMU_DoG ----------------------------------------------------------------------------------------------

FILM = {
    "wikiDocumentIdx": 3,
    "0": {
        "movieName": "Jaws",
        "year": "1975",
        "director": "Steven Spielberg ",
        "genre": "Thriller",
        "cast": ["Roy Scheider as Brody", "Robert Shaw as Quint"],
        "rating": ["Metacritic: 87/100"],
        "critical_response": [" one of the most effective thrillers "],
        "introduction": "Jaws is a film. It has a shark.",
    },
    "1": "A shark comes. Brody closes the beach! It stays open.",
    "2": "Two",
    "3": "Three",
}
TALK = {
    "date": "2018-03-01T00:11:05.970Z",
    "wikiDocumentIdx": 3,
    "whoSawDoc": ["user1"],
    "history": [
        {"uid": "user1", "text": "hi", "docIdx": 0, "utcTimestamp": "1970-01-01T00:00:09.5Z"},
        {"uid": "user2", "text": "hello", "docIdx": 0},
        {"uid": "user1", "text": "a shark", "docIdx": 1},
        {"uid": "user1", "text": "came", "docIdx": 1},
        {"uid": "user1", "text": "twice", "docIdx": 2},
    ],
}
SCENE = ["A shark comes.", "Brody closes the beach!", "It stays open."]


@pytest.mark.parametrize("released", [True, False])
def test_cmu_dog_as_released_and_as_lines(tmp_path, released):
    if released:
        write(tmp_path / "talks" / "1f.json", TALK)
        write(tmp_path / "wiki" / "Jaws.json", FILM)
        files, wiki = tmp_path / "talks", tmp_path / "wiki"
    else:
        files = write(tmp_path / "talks.jsonl.gz", [TALK | {"_file": "1f"}])
        wiki = write(tmp_path / "wiki.json.gz", {"Jaws": FILM})
    (dialogue,) = read("cmu_dog", files, wikidata=str(wiki))
    assert spoken(dialogue)[1:] == [("user2", "hello", []), ("user1", "a shark came twice", [*SCENE, "Two"])]
    assert dialogue.turns[0].knowledge == [
        "Jaws is a film.",
        "It has a shark.",
        "critics: one of the most effective thrillers",
        "rating: Metacritic: 87/100",
        "cast: Roy Scheider as Brody, Robert Shaw as Quint",
        "genre: Thriller",
        "director: Steven Spielberg",
        "year: 1975",
        "film: Jaws",
    ]
    assert (dialogue.id, dialogue.turns[0].time, dialogue.turns[1].time) == ("1f", 9.5, None)
    (bare,) = read("cmu_dog", files)
    assert not any(turn.knowledge for turn in bare.turns)


def test_cmu_dog_without_the_article(tmp_path):
    report = ReadReport()
    talks = [TALK | {"wikiDocumentIdx": 9}, TALK | {"history": [{"uid": "user1", "text": "a", "docIdx": 4}]}]
    wiki = write(tmp_path / "wiki.json", {"Jaws": FILM})
    path = write(tmp_path / "talks.jsonl", talks)
    assert read("cmu_dog", path, report=report, wikidata=str(wiki)) == []
    assert "wikiDocumentIdx 9 is not in wikidata" in report.examples[0]
    assert "message 0: the article has no section 4" in report.examples[1]
    with pytest.raises(UserError, match=r"wikidata=.*talks\.jsonl is not an article of CMU_DoG"):
        read("cmu_dog", path, wikidata=str(path))


def test_the_real_cmu_dog(shared):
    path, wiki = (
        shared / "cmu_dog" / name for name in ("conversations_valid_test.jsonl.gz", "wikidata.json.gz")
    )
    with gzip.open(path, "rt") as stream:
        talks = [json.loads(line)["history"] for line in stream]
    assert (len(talks), sum(map(len, talks))) == (848, 26405)
    n_turns = sum(1 for talk in talks for _ in groupby(message["uid"] for message in talk))
    dialogues = read("cmu_dog", path, wikidata=str(wiki))
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    assert (len(dialogues), len(turns), n_turns) == (848, 19011, 19011)
    assert sum(bool(turn.knowledge) for turn in turns) == 14089


# -- KdConv -----------------------------------------------------------------------------------------------


def test_kdconv(tmp_path):
    year = {"name": "恋恋笔记本", "attrname": "上映时间", "attrvalue": "2004年"}
    text = {"name": "恋恋笔记本", "attrname": "Information", "attrvalue": "一部爱情片。"}
    messages = [
        {"message": "知道吗?"},
        {"message": "知道。", "attrs": [year, text, year]},
        {"message": "嗯。", "attrs": []},
    ]
    path = write(tmp_path / "film_dev.json", [{"name": "恋恋笔记本", "messages": messages}])
    (dialogue,) = read("kdconv", path)
    assert spoken(dialogue) == [
        ("a", "知道吗?", []),
        ("b", "知道。", ["恋恋笔记本 上映时间 2004年", "恋恋笔记本 一部爱情片。"]),
        ("a", "嗯。", []),
    ]
    assert dialogue.id == "film_dev-1"


KDCONV_TURNS = {
    "film_dev": (3858, 2526),
    "film_test": (4010, 2859),
    "music_dev": (2772, 1751),
    "music_test": (2914, 1906),
    "travel_dev": (2691, 1702),
    "travel_test": (2813, 1787),
}


@pytest.mark.parametrize(("name", "expected"), KDCONV_TURNS.items(), ids=list(KDCONV_TURNS))
def test_the_real_kdconv(shared, name, expected):
    dialogues = read("kdconv", shared / "kdconv" / f"{name}.json.gz")
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    assert (len(dialogues), (len(turns), sum(bool(turn.knowledge) for turn in turns))) == (150, expected)


# -- Schema-Guided Dialogue and MultiWOZ 2.2 --------------------------------------------------------------


def service(*results, method="FindSong"):
    return {"service": "Music_3", "service_call": {"method": method}, "service_results": list(results)}


def songs(n):
    return [{"track": f"T{i}", "release_year": str(i), "note": ""} for i in range(n)]


GUIDED = {
    "dialogue_id": "1_00000",
    "services": ["Music_3"],
    "turns": [
        {"speaker": "USER", "utterance": "play", "frames": [service(*songs(1))]},
        {"speaker": "SYSTEM", "utterance": "T0 ?", "frames": [service(*songs(5)), {"service": "Media_1"}]},
        {"speaker": "USER", "utterance": "yes", "frames": []},
        {"speaker": "SYSTEM", "utterance": "no", "frames": [service(method="Play")]},
        {"speaker": "SYSTEM", "utterance": "sorry"},
    ],
}


@pytest.mark.parametrize("name", ["dialogues_001.json", "dialogues_001.jsonl"])
def test_sgd(tmp_path, name):
    path = write(tmp_path / "train" / name, [GUIDED])
    write(tmp_path / "train" / "schema.json", [{"service_name": "Music_3"}])
    folder = path if name.endswith("l") else path.parent
    (dialogue,) = read("sgd", folder)
    assert spoken(dialogue) == [
        ("USER", "play", []),
        ("SYSTEM", "T0 ?", [f"FindSong: track T{i}, release year {i}" for i in (2, 1, 0)]),
        ("USER", "yes", []),
        ("SYSTEM", "no sorry", ["Play: no result"]),
    ]
    assert dialogue.id == "1_00000"
    (one,) = read("sgd", folder, max_results="1")  # the command line gives text
    assert one.turns[1].knowledge == ["FindSong: track T0, release year 0"]
    (none,) = read("sgd", folder, knowledge="none")
    assert not any(turn.knowledge for turn in none.turns)


def test_sgd_options_and_schema(tmp_path):
    path = write(tmp_path / "schema.json", [{"service_name": "Music_3"}])
    report = ReadReport()
    assert read("sgd", path, report=report) == []
    assert "a schema.json is none" in report.examples[0]
    for corpus in ("sgd", "multiwoz", "crosswoz"):
        with pytest.raises(UserError, match=r"reader\.knowledge='all': must be one of results, none"):
            read(corpus, path, knowledge="all")
    for wrong in ("0", "many", -1):
        with pytest.raises(UserError, match=r"reader\.max_results=.*: must be a whole number of at least 1"):
            read("sgd", path, max_results=wrong)
    with pytest.raises(UserError, match=r"dialogues_\*\.json': no such file"):
        read("sgd", tmp_path)


def test_the_real_sgd(shared):
    dialogues = read("sgd", shared / "sgd" / "test_sample.jsonl.gz")
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    assert (len(dialogues), len(turns)) == (240, 4190)
    grounded = [turn for turn in turns if turn.knowledge]
    assert {turn.speaker for turn in grounded} == {"SYSTEM"}
    assert (len(grounded), sum(turn.knowledge[0].endswith(": no result") for turn in grounded)) == (655, 10)


def test_multiwoz_22_is_read_as_sgd(tmp_path):
    turns = [
        {
            "turn_id": "0",
            "speaker": "USER",
            "utterance": "a train please",
            "frames": [
                {
                    "actions": [],
                    "service": "train",
                    "slots": [{"slot": "train-day", "copy_from": "hotel-bookday", "value": ["monday"]}],
                    "state": {"active_intent": "find_train", "requested_slots": [], "slot_values": {}},
                }
            ],
        },
        {"turn_id": "1", "speaker": "SYSTEM", "utterance": "from where ?", "frames": []},
    ]
    write(
        tmp_path / "train" / "dialogues_001.json",
        [{"dialogue_id": "PMUL4398.json", "services": ["train"], "turns": turns}],
    )
    (dialogue,) = read("multiwoz", tmp_path / "train")
    assert spoken(dialogue) == [("USER", "a train please", []), ("SYSTEM", "from where ?", [])]
    assert dialogue.id == "PMUL4398.json"


# -- MultiWOZ 2.0 and 2.1 ---------------------------------------------------------------------------------


def state(booked=(), **taxi):
    return {
        "hotel": {"book": {"booked": list(booked), "stay": "2"}, "semi": {"area": "north"}},
        "taxi": {"book": {"booked": [taxi] if taxi else []}, "semi": {"leaveAt": ""}},
    }


BOOKED = [{"name": "acorn house", "reference": "7GAWK763"}]
LOG = [
    {"text": "a hotel", "metadata": {}, "dialog_act": {"Hotel-Inform": [["none", "none"]]}, "span_info": []},
    {"text": "booked", "metadata": state(BOOKED)},
    {"text": "and a taxi", "metadata": {}},
    {"text": "done", "metadata": state(BOOKED, type="red ford", phone="07123")},
    {"text": "bye", "metadata": {}},
]


def test_multiwoz_21(tmp_path):
    ids = ("SNG01.json", "MUL02.json", "MUL03.json")
    data = write(tmp_path / "data.json", {name: {"goal": {}, "log": LOG} for name in ids})
    first, _, _ = read("multiwoz", data)
    assert spoken(first) == [
        ("USER", "a hotel", []),
        ("SYSTEM", "booked", ["hotel booked: name acorn house, reference 7GAWK763"]),
        ("USER", "and a taxi", []),
        ("SYSTEM", "done", ["taxi booked: type red ford, phone 07123"]),
        ("USER", "bye", []),
    ]
    assert not any(turn.knowledge for turn in read("multiwoz", data, knowledge="none")[0].turns)
    (tmp_path / "testListFile.txt").write_text("MUL02.json\n")
    (tmp_path / "valListFile.txt").write_text("mul03\n")
    report, test = ReadReport(), str(tmp_path / "testListFile.txt")
    (kept,) = read("multiwoz", data, report=report, leave_out=str(tmp_path / "*ListFile.txt"))
    (tested,) = read("multiwoz", data, report=report, only=test)
    assert (kept.id, tested.id) == ("SNG01.json", "MUL02.json")
    assert report.skipped == {"in the list of leave_out": 2, "not in the list of only": 2}


# -- CrossWOZ ---------------------------------------------------------------------------------------------


def test_crosswoz(tmp_path):
    states = {
        "餐馆": {"名称": "", "推荐菜": ["生蚝", "烤鸭"], "评分": "4分以上", "selectedResults": ["甲", "乙"]},
        "酒店": {"名称": "丙", "selectedResults": []},
        "地铁": {"出发地": "", "selectedResults": ["(起点) 丁 "]},
    }
    messages = [
        {"role": "usr", "content": "推荐一个餐馆。", "dialog_act": [], "user_state": []},
        {"role": "sys", "content": "甲。", "dialog_act": [], "sys_state": states, "sys_state_init": {}},
        {"role": "sys", "content": "或乙。", "dialog_act": []},
    ]
    path = write(tmp_path / "test.json.zip", {"2303": {"goal": [], "messages": messages}})
    (dialogue,) = read("crosswoz", path)
    assert spoken(dialogue) == [
        ("usr", "推荐一个餐馆。", []),
        ("sys", "甲。 或乙。", ["餐馆: 甲 / 乙, 推荐菜 生蚝 / 烤鸭, 评分 4分以上", "地铁: (起点) 丁"]),
    ]
    assert dialogue.id == "2303"
    assert not any(turn.knowledge for turn in read("crosswoz", path, knowledge="none")[0].turns)


def test_the_real_crosswoz(shared):
    dialogues = read("crosswoz", shared / "crosswoz" / "test.json.zip")
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    assert (len(dialogues), len(turns)) == (500, 8476)
    assert {turn.speaker for turn in turns if turn.knowledge} == {"sys"}
    assert sum(bool(turn.knowledge) for turn in turns) == 3721


# -- to the shards ----------------------------------------------------------------------------------------


def test_knowledge_opens_the_context(tmp_path):
    film = FILM | {"1": "The shark eats a boat."}
    wiki = write(tmp_path / "wiki.json", {"Jaws": film})
    history = [
        {"uid": "user2", "text": "what happens next ?", "docIdx": 1},
        {"uid": "user1", "text": "the boat is lost .", "docIdx": 1},
        {"uid": "user2", "text": "oh no , not again !", "docIdx": 1},
    ]
    path = write(tmp_path / "talks.jsonl", [TALK | {"history": history}] * 10)
    options = PrepareOptions(
        corpus="cmu_dog",
        files=[str(path)],
        reader={"wikidata": str(wiki)},
        out=str(tmp_path / "out"),
        vocab_pieces=60,
        background="context",
        clean=CleanRules.off(),
        valid_dialogues=2,
    )
    folder = prepare(options, show_progress=False)
    index, tokenizer = read_index(folder), Tokenizer.load(folder / "tokenizer")
    samples = set()
    for shard in index.splits["train"].shards:
        data = read_shard(folder, shard)
        for i in range(len(data.context_len)):
            samples.add(tuple(data.token_ids[data.offsets[i] : data.offsets[i + 1]].tolist()))
    asked, answer, last = (tokenizer.encode(message["text"]) for message in history)
    fact = tokenizer.encode("The shark eats a boat.")
    assert samples == {
        (*encode_context([fact, asked]), *encode_response(answer)),
        (*encode_context([asked, answer]), *encode_response(last)),  # of one who did not see the article
    }
