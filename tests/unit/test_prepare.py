"""Preparing a corpus: what ends up in the shards, that it is the same twice, and that nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.card import escape
from plato2.prepare.clean import CleanRules
from plato2.prepare.dialogues import prepare, summary
from plato2.prepare.options import PrepareOptions
from plato2.prepare.shuffle import DiskShuffle
from plato2.prepare.statistics import unigram_nll

ROOT = Path(__file__).parents[2]
KNOVER = ROOT / "tests" / "fixtures" / "knover"
WORDS = ["sun", "rain", "book", "tea", "river", "music", "train", "garden", "window", "bread", "letter"]
DAY = 86400.0


def dialogue(number: int, n_turns: int = 5, **keys) -> dict:
    """A dialogue whose every turn can be told from all others."""
    word = [WORDS[(number + i) % len(WORDS)] for i in range(n_turns)]
    turns = [{"text": f"number {number} turn {i} says {word[i]}"} for i in range(n_turns)]
    turns[0]["time"] = DAY * (1000 - number)  # later in the file = earlier in time
    return {"turns": turns, **keys}


def write(path: Path, dialogues: list) -> Path:
    path.write_text("\n".join(d if isinstance(d, str) else json.dumps(d) for d in dialogues) + "\n")
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write(tmp_path / "talk.jsonl", [dialogue(i) for i in range(40)])


def options(path: Path, out: Path, **changes) -> PrepareOptions:
    values = {"corpus": "jsonl", "files": [str(path)], "out": str(out), "tokenizer": str(KNOVER)}
    values |= {"clean": CleanRules.off(), "valid_fraction": 0.1, "test_fraction": 0.0}
    return PrepareOptions(**values | changes)


def run(path: Path, out: Path, **changes) -> Path:
    return prepare(options(path, out, **changes), show_progress=False)


def samples(folder: Path, split: str) -> list[tuple[str, str]]:
    """(context, response) texts in stored order, read back from the shards."""
    index, tokenizer = read_index(folder), Tokenizer.load(folder / "tokenizer")
    found = []
    for shard in index.splits[split].shards:
        data = read_shard(folder, shard)
        for i, n in enumerate(data.context_len):
            ids = data.token_ids[data.offsets[i] : data.offsets[i + 1]].tolist()
            found.append((tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:])))
    return found


def hashes(folder: Path) -> list[str]:
    return [shard.sha256 for split in read_index(folder).splits.values() for shard in split.shards]


def test_every_pair_once_with_its_whole_context(corpus, tmp_path):
    folder = run(corpus, tmp_path / "out")
    expected = set()
    for i in range(40):
        turns = [turn["text"] for turn in dialogue(i)["turns"]]
        for n in range(1, 5):
            expected.add(
                ("[CLS] " + "".join(f" {t}[SEP]" for t in turns[:n]).strip(), f"[CLS] {turns[n]}[SEP]")
            )
    found = samples(folder, "train") + samples(folder, "valid")
    assert len(found) == len(expected) == 160
    assert set(found) == expected


def test_validation_is_the_latest_dialogues(corpus, tmp_path):
    folder = run(corpus, tmp_path / "timed")
    assert {response.split()[2] for _, response in samples(folder, "valid")} == {"0", "1", "2", "3"}
    for line in (records := [json.loads(line) for line in corpus.read_text().splitlines()]):
        del line["turns"][0]["time"]
    untimed = write(tmp_path / "untimed.jsonl", records)
    folder = run(untimed, tmp_path / "untimed", valid_dialogues=2)
    assert {response.split()[2] for _, response in samples(folder, "valid")} == {"38", "39"}


def test_the_same_corpus_options_and_seed_give_the_same_bytes(corpus, tmp_path):
    first = run(corpus, tmp_path / "a", tokenizer=None, vocab_pieces=60, shard_samples=16)
    second = run(corpus, tmp_path / "b", tokenizer=None, vocab_pieces=60, shard_samples=16)
    other = run(corpus, tmp_path / "c", tokenizer=None, vocab_pieces=60, shard_samples=16, seed=12)
    assert hashes(first) == hashes(second) != hashes(other)
    assert len(hashes(first)) == 144 // 16 + 1
    assert sorted(samples(first, "train")) == sorted(samples(other, "train"))


def test_the_first_dialogues_only(corpus, tmp_path):
    folder = run(corpus, tmp_path / "out", max_dialogues=10)
    found = samples(folder, "train") + samples(folder, "valid")
    assert {response.split()[2] for _, response in found} == {str(number) for number in range(10)}


def test_samples_are_shuffled(corpus, tmp_path):
    numbers = [int(response.split()[2]) for _, response in samples(run(corpus, tmp_path / "out"), "train")]
    assert abs(np.corrcoef(numbers, range(len(numbers)))[0, 1]) < 0.3


def test_the_tokenizer_is_trained_on_training_dialogues_alone(tmp_path):
    late = {"turns": [{"text": "żółć", "time": DAY * 9000}, {"text": "źdźbło"}]}
    path = write(tmp_path / "a.jsonl", [dialogue(i) for i in range(30)] + [late])
    changes = {"tokenizer": None, "vocab_pieces": 60, "character_coverage": 1.0, "valid_dialogues": 1}
    tokenizer = Tokenizer.load(run(path, tmp_path / "out", **changes) / "tokenizer")
    assert "[PAD]" in tokenizer.decode(tokenizer.encode("łł"))


@pytest.mark.parametrize(
    ("policy", "responses"), [("split", "1 4 5"), ("subtree", "1"), ("response", "1 3 4 5")]
)
def test_policies(tmp_path, policy, responses):
    broken = dialogue(7, 6)
    broken["turns"][2]["text"] = "look at www.example.com"
    path = write(tmp_path / "a.jsonl", [dialogue(i) for i in range(5)] + [broken])
    rules = CleanRules(max_repeats=None, max_overlap=None, min_letters=None)
    folder = run(path, tmp_path / "out", policy=policy, clean=rules)
    found = [(c, r) for c, r in samples(folder, "train") if "number 7" in r]
    assert sorted(response.split()[4] for _, response in found) == responses.split()
    assert any("www" in context for context, _ in found) == (policy == "response")
    assert read_index(folder).extra["facts"]["rules"]["4. a web address"] == 1


def test_a_message_repeated_too_often_is_no_response(tmp_path):
    dialogues = [dialogue(i, 2) for i in range(12)]
    for item in dialogues[6:]:  # the earlier ones
        item["turns"][1]["text"] = "me too friend"
    path = write(tmp_path / "a.jsonl", dialogues)
    off = CleanRules.off()
    for repeats, n_samples in ((5, 6), (6, 12)):
        rules = CleanRules(**vars(off) | {"max_repeats": repeats})
        folder = run(path, tmp_path / f"{repeats}", clean=rules)
        assert sum(s.samples for s in read_index(folder).splits.values()) == n_samples


def test_long_turns(tmp_path):
    long = {"turns": ["word " * 200, "short answer", "word " * 200]}
    path = write(tmp_path / "a.jsonl", [long, *({"turns": ["a b", f"c {i}"]} for i in range(9))])
    lost = run(path, tmp_path / "lost")
    assert read_index(lost).extra["facts"]["counts"]["pairs_long_context_turn"] == 1
    cut = run(path, tmp_path / "cut", cut_turn=True)
    context, _ = next(s for s in samples(cut, "train") if "short answer" in s[1])
    assert context == "[CLS] " + "word " * 125 + "word[SEP]"
    response = next(r for _, r in samples(lost, "train") if "word" in r)
    assert response == "[CLS] " + "word " * 126 + "word"  # no [SEP]: it was cut


def test_background_opens_the_context_and_is_dropped_first(tmp_path):
    turns = [
        {"text": "what do you do ?", "speaker": "a"},
        {"text": "I paint .", "speaker": "b", "knowledge": ["painters paint ."]},
    ]
    persona = {"a": ["I am a ."], "b": ["I am b ."]}
    path = write(tmp_path / "a.jsonl", [{"turns": turns, "persona": persona}, dialogue(1), dialogue(2)])
    contexts = [
        c for c, r in samples(run(path, tmp_path / "on", background="context"), "train") if "paint" in r
    ]
    assert contexts == ["[CLS] I am b .[SEP] painters paint .[SEP] what do you do ?[SEP]"]
    folder = run(path, tmp_path / "short", background="context", max_context=13)
    assert [c for c, r in samples(folder, "train") if "paint" in r] == [
        "[CLS] painters paint .[SEP] what do you do ?[SEP]"
    ]
    assert [c for c, r in samples(run(path, tmp_path / "off"), "train") if "paint" in r] == [
        "[CLS] what do you do ?[SEP]"
    ]


def test_tsv_lines_give_one_sample_each(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"a {i} [SEP] b {i} [SEP] c {i}\td {i}\n" for i in range(20)))
    folder = run(path, tmp_path / "out", corpus="tsv")
    found = samples(folder, "train") + samples(folder, "valid")
    assert sorted(response for _, response in found) == sorted(f"[CLS] d {i}[SEP]" for i in range(20))


def test_unigram_is_that_of_a_slow_loop(corpus, tmp_path):
    folder = run(corpus, tmp_path / "out")
    index, counts, targets = read_index(folder), np.ones(8001), []
    for split in ("train", "valid"):
        for shard in index.splits[split].shards:
            data = read_shard(folder, shard)
            for i, n in enumerate(data.context_len):
                ids = data.token_ids[data.offsets[i] + n + 1 : data.offsets[i + 1]].tolist()
                if split == "train":
                    for token in ids:
                        counts[token] += 1
                else:
                    targets += ids
    nll = -np.mean([np.log(counts[token] / counts.sum()) for token in targets])
    assert index.unigram == {"nll": pytest.approx(nll), "ppl": pytest.approx(np.exp(nll))}


def test_unigram_of_a_uniform_world_is_its_size():
    assert np.exp(unigram_nll(np.full(50, 7), np.arange(50))) == pytest.approx(50)


def test_a_corpus_that_is_mostly_lost_is_said(tmp_path):
    """Such as a file in another encoding, of which a few lines are read."""
    good = "".join(json.dumps(dialogue(i)) + "\n" for i in range(9)).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + '{"turns": ["caf\u00e9"]}\n'.encode("latin-1") * 20)
    done = CliRunner().invoke(
        app, ["prepare", "jsonl", str(path), "--tokenizer", str(KNOVER), "--out", f"{tmp_path}/out"]
    )
    assert done.exit_code == 0, done.output
    assert "warning: most records are lost: 20 of 29 could not be read; the first of them:" in done.stdout
    assert "a.jsonl:10: not valid UTF-8: save the file as UTF-8" in done.stdout
    assert "--test-dialogues sets a number" in done.stdout


def test_card_tells_the_funnel(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [*(dialogue(i) for i in range(9)), "{broken | <b>line", {"turns": ["one"]}]
    )
    folder = run(path, tmp_path / "out")
    card = (folder / "card.md").read_text()
    for line in ("| dialogues | 10 |", "| of two or more turns | 9 |", "| (context, response) pairs | 36 |"):
        assert line in card
    assert "1 records could not be read" in card
    assert "a.jsonl:10: not valid JSON" in card
    assert "1972-08-" in card or "1972-09-" in card
    assert "2.78 | 26.3" in card
    assert (folder / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert read_index(folder).tokenizer_sha256 == Tokenizer.load(KNOVER).sha256 in card


def test_text_in_the_card_is_escaped():
    assert escape("a|b <script> *c*\n# d [e](f)") == r"a\|b &lt;script&gt; \*c\* \# d \[e\](f)"


@given(st.lists(st.lists(st.integers(0, 8000), min_size=2, max_size=5), max_size=50), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_disk_shuffle_is_a_permutation(tmp_path_factory, records, bucket_samples):
    folder = tmp_path_factory.mktemp("shuffle") / "buckets"
    with DiskShuffle(folder, len(records), bucket_samples, [1, 2]) as shuffle:
        for i, record in enumerate(records):
            shuffle.add(record, i % 3)
        out = [(r.tolist(), n) for rs, ns in shuffle.buckets() for r, n in zip(rs, ns, strict=True)]
    assert sorted(out) == sorted((record, i % 3) for i, record in enumerate(records))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "tree"}, "policy=tree: use one of split, subtree, response"),
        ({"background": "yes"}, "background=yes"),
        ({"max_context": 2}, "max_context=2"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0"),
        ({"valid_dialogues": 0}, "valid_dialogues=0"),
        ({"max_dialogues": 0}, "max_dialogues=0"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be at least 0 and below"),
        ({"out": "s3://bucket/x"}, "out=s3://bucket/x"),
        ({"valid_dialogues": 40}, "valid_dialogues=40: .* has 40 dialogue"),
        ({"tokenizer": "/nowhere"}, "no tokenizer at /nowhere"),
        ({"files": []}, "files is empty"),
        ({"corpus": "chitchet"}, "corpus='chitchet' is not known"),
        ({"clean": CleanRules(min_letters=1.0)}, "no sample is left for train: of 160"),
    ],
)
def test_wrong_options_leave_nothing_behind(corpus, tmp_path, changes, message):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        run(corpus, **{"out": tmp_path / "out", **changes})
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{bad"], r"is empty: no dialogue in .*; 1 records could not be read, the first: .*:1"),
        ([{"turns": ["alone"]}], r"no dialogue with two .* \(1 dialogue\(s\) read\)$"),
        (
            [{"turns": [{"text": text, "speaker": "a"} for text in "xyz"]}] * 4,
            r"no dialogue with two .* \(4 dialogue\(s\) read; 8 turn\(s\) joined to the one before",
        ),
    ],
)
def test_empty_corpora(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        run(write(tmp_path / "a.jsonl", lines), tmp_path / "out")


def test_what_was_dropped_is_said_with_the_error(tmp_path):
    """Commas at the ends of lines; labels of negatives; a greeting that rule 7 removes everywhere."""
    lines = [json.dumps(dialogue(i)) + "," * (i < 19) for i in range(20)]
    commas = write(tmp_path / "commas.jsonl", lines)
    with pytest.raises(
        UserError, match=r"has 1 dialogue.*; 19 records could not be read, the first: .*:1: not"
    ):
        run(commas, tmp_path / "out")
    (tmp_path / "a.tsv").write_text("label\tsrc\ttgt\n" + "0.0\thi\thello\n" * 3)
    with pytest.raises(
        UserError, match=r"is empty: no dialogue in .*; 3 records were left out: label is not 1"
    ):
        run(tmp_path / "a.tsv", tmp_path / "out", corpus="tsv")
    greeted = [{"turns": ["Hello there friend", f"number {i} says {WORDS[i % 11]}"]} for i in range(120)]
    message = (
        r"of 120 pairs of context and response: no context left by the policy 120; "
        r"messages that break a rule: 7\. repeated more than 100 times \(max_repeats: 120\)"
    )
    with pytest.raises(UserError, match=message):
        run(write(tmp_path / "greeted.jsonl", greeted), tmp_path / "out", clean=CleanRules())


def test_columns_that_are_not_read_are_said_at_the_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", ["src\ttgt\tscore", *(f"hi {i}\tyes {i}\t0" for i in range(20))])
    folder = run(path, tmp_path / "out", corpus="tsv")
    assert any(line.startswith("columns that are not read: score (") for line in summary(folder))
    assert "columns that are not read: score (" in (folder / "card.md").read_text()


def test_what_was_dropped_is_said_at_the_end(corpus, tmp_path):
    with corpus.open("a") as file:
        file.write("{bad\n")
    out = tmp_path / "out"
    said = summary(run(corpus, out, clean=CleanRules(max_chars=26), tokenizer=None, vocab_pieces=500))
    (dropped,) = (line for line in said if line.startswith("left out of the pairs: "))
    assert "response fails a rule" in dropped
    assert "2. more than 26 characters (max_chars: " in dropped
    assert f"  {corpus}:41: not valid JSON" in " ".join(said)
    vocab_size = read_index(out).vocab_size
    assert (
        f"the corpus gives {vocab_size - 1} pieces, not 500: its models have model.vocab_size={vocab_size}"
        in said
    )


def test_a_tokenizer_of_another_language_is_said(tmp_path):
    chinese = write(tmp_path / "zh.jsonl", [{"turns": ["你好吗", "我很好谢谢"]}] * 20)
    said = summary(run(chinese, tmp_path / "out"))
    assert any(line.startswith("warning: ") and "unknown to the tokenizer" in line for line in said)


def test_turns_longer_than_sentencepiece_takes(tmp_path):
    turns = ["abcdefg qrstuv wxyz " * 300, "number one says hi"]
    long = write(tmp_path / "long.jsonl", [{"turns": turns}] * 40)
    out = run(long, tmp_path / "out", tokenizer=None, vocab_pieces=60, cut_turn=True)
    assert Tokenizer.load(out / "tokenizer").unread_share(turns[0]) == 0
    with pytest.raises(UserError, match=r"2\. more than 1024 characters \(max_chars: 40\)"):
        run(
            write(tmp_path / "longer.jsonl", [{"turns": turns[:1] * 2}] * 20),
            tmp_path / "none",
            tokenizer=None,
            vocab_pieces=60,
            clean=CleanRules(max_repeats=None),
        )


def test_options_from_a_config_node():
    made = PrepareOptions.from_dict({"corpus": "jsonl", "out": "x", "clean": {"max_repeats": None}})
    assert made.clean == CleanRules(max_repeats=None)
    for values, message in (
        ({"corpus": "jsonl", "out": "x", "polcy": "split"}, r"prepare\.polcy is not an option"),
        ({"corpus": "jsonl", "out": "x", "clean": {"url": True}}, r"prepare\.clean\.url is not an option"),
        ({"out": "x"}, r"prepare\.corpus is missing"),
    ):
        with pytest.raises(UserError, match=message):
            PrepareOptions.from_dict(values)


def test_an_existing_corpus_is_replaced_only_by_force(corpus, tmp_path):
    out = run(corpus, tmp_path / "out")
    before = hashes(out)
    with pytest.raises(UserError, match="is already a prepared corpus"):
        run(corpus, out, seed=12)
    assert hashes(out) == before
    run(corpus, out, seed=12, force=True)
    assert hashes(out) != before


@pytest.mark.parametrize("name", ["notes.txt", "index.json"])
def test_a_folder_of_the_users_is_never_replaced(corpus, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(UserError, match="exists and is not a prepared corpus"):
        run(corpus, out, force=True)
    assert (out / name).read_text() == "{}"


def test_a_users_file_in_a_prepared_corpus_is_not_deleted(corpus, tmp_path):
    out = run(corpus, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        run(corpus, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_failed_replacement_keeps_the_old_corpus(corpus, tmp_path):
    out = run(corpus, tmp_path / "out")
    before = hashes(out)
    corpus.write_text("{bad\n")
    with pytest.raises(UserError):
        run(corpus, out, force=True)
    assert hashes(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "talk.jsonl"]


def plato2(*arguments, **keys) -> subprocess.Popen:
    command = [sys.executable, "-m", "plato2", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keys
    )


def started(tmp_path) -> subprocess.Popen:
    """A run of the real corpus that has begun to write."""
    process = plato2("prepare", "chitchat", "--out", tmp_path / "out", "--tokenizer", KNOVER)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.preparing/train.buckets/*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_killed_run_leaves_no_corpus_and_the_next_one_clears_up(corpus, tmp_path):
    process = started(tmp_path)
    with pytest.raises(UserError, match="is being written by another process"):
        run(corpus, tmp_path / "out")
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    run(corpus, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "talk.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", ["ENOSYS", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ENOTSUP", "ENOLCK"))]
)
def test_a_file_system_without_locks(corpus, tmp_path, error):
    program = (
        "import errno, fcntl, sys\n"
        f"def flock(file, flags): raise OSError(errno.{error}, 'no locks here')\n"
        "fcntl.flock = flock\n"
        "from plato2.commands import main\n"
        "main()\n"
    )
    arguments = ["prepare", "jsonl", corpus, "--out", tmp_path / "out", "--tokenizer", KNOVER, "--no-clean"]
    arguments += ["--test-fraction", 0]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out") == hashes(run(corpus, tmp_path / "again", valid_fraction=0.02))


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to where nothing is yet"])
def test_a_link_is_followed(corpus, tmp_path, there):
    disk, out = tmp_path / "disk", tmp_path / "out"
    if there:
        (disk / "mine").mkdir(parents=True)
    out.symlink_to(disk / "mine")
    run(corpus, out)
    run(corpus, out, force=True, seed=12)
    assert out.is_symlink()
    assert (disk / "mine" / "index.json").exists()
    assert sorted(path.name for path in disk.iterdir()) == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out", "talk.jsonl"]


def test_ctrl_c_ends_quietly_and_leaves_nothing(tmp_path):
    process = started(tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_command_prints_one_json_object(corpus, tmp_path):
    arguments = ["prepare", "jsonl", str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", str(KNOVER)]
    result = CliRunner().invoke(app, [*arguments, "--no-clean", "--rule", "max_tokens=9", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["counts"]["pairs"] == 160
    assert list(summary["rules"]) == ["1. more than 9 tokens"]
    assert summary["samples"] == {"train": 152, "valid": 4, "test": 4}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--rule", "urls=maybe"], "--rule urls=maybe: the value must be on or off"),
        (["--rule", "min_tokens=many"], "the value must be int or off"),
        (["--rule", "speling=off"], "there is no rule speling"),
        (["--rule", "urls"], "must be NAME=VALUE"),
        (["--rule", "max_repeats=-1"], "max_repeats=-1: must be at least 1, or off"),
        (["--rule", "max_overlap=2"], "max_overlap=2.0: must be between 0 and 1, or off"),
        (["--strict"], "talk.jsonl:41: not valid JSON"),
    ],
)
def test_command_prints_errors_as_one_line(corpus, tmp_path, extra, message):
    with corpus.open("a") as file:
        file.write("{bad\n")
    arguments = ["prepare", "jsonl", str(corpus), "--out", str(tmp_path / "out"), "--tokenizer", str(KNOVER)]
    result = CliRunner().invoke(app, [*arguments, *extra])
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_tokenizer_commands(corpus, tmp_path):
    out = str(tmp_path / "tok")
    train = ["tokenizer", "train", str(corpus), "--pieces", "60", "--out", out]
    assert CliRunner().invoke(app, train).exit_code == 0
    again = CliRunner().invoke(app, train)
    assert again.exit_code == 2
    assert "is already a tokenizer" in again.stderr
    shown = CliRunner().invoke(app, ["tokenizer", "show", out, "turn 3", "--json"])
    assert json.loads(shown.stdout)["text"] == "turn 3"


def test_help_is_fast_and_needs_no_torch():
    code = "import sys; from plato2.commands import app; app(['--help'], standalone_mode=False);"
    code += "assert not {'torch', 'numpy', 'pytorch_lightning'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert "prepare" in process.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "kept"), [("split", 0.919), ("subtree", 0.334), ("response", 0.954)])
def test_chitchat_keeps_what_it_should(tmp_path, policy, kept):
    made = PrepareOptions("chitchat", str(tmp_path / "out"), policy=policy)
    index = read_index(prepare(made, show_progress=False))
    n_samples = sum(split.samples for split in index.splits.values())
    assert n_samples / 131_569 == pytest.approx(kept, abs=0.003)
    assert index.extra["facts"]["counts"]["pairs"] == 131_569
    assert 500 < index.unigram["ppl"] < 700


@pytest.mark.parametrize(
    ("turns", "paper"),
    [
        (
            ["hello my friend .", "what a fine day ."],
            "| paper (English, Reddit) | 684M |  |  |  |  | 2.78 | 26.3 |",
        ),
        (["你好 我 的 朋友 。", "今天 天气 真 好 。"], "| paper (Chinese) |  |  |  |  |  | 2.82 | 22.2 |"),
        (["你好", "谢谢"], "| paper (Chinese) |  |  |  |  |  | 2.82 | 22.2 |"),
    ],
)
def test_the_card_compares_with_the_corpus_of_the_same_language(
    tmp_path: Path, turns: list[str], paper: str
) -> None:
    path = write(
        tmp_path / "talk.jsonl", [{"turns": [f"{text} {i % 10}" for text in turns]} for i in range(40)]
    )
    out = run(path, tmp_path / "out", tokenizer=None, vocab_pieces=40, character_coverage=1.0)
    assert paper in (out / "card.md").read_text(encoding="utf-8")
