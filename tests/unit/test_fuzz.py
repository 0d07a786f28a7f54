"""Files that were changed at random: each is read, or refused in one line; never a traceback, hang or crash.

`mutate` makes two hundred changes of a format's file from their numbers alone, so a failure names the one to
repeat. With `-m slow` there are two thousand.
"""

from __future__ import annotations

import copy
import gzip
import json
import lzma
import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import KNOVER, checkpoint_of, make_corpus, make_run, make_stage

from plato2.bounded import read_lines_of
from plato2.commands.train_sweep import read_sweep
from plato2.config import UserError
from plato2.data.shards import INDEX_FILE, ShardInfo, read_index, read_shard
from plato2.data.tokenizer import Tokenizer
from plato2.evaluate.candidates import read_queries
from plato2.files import check_sha256
from plato2.prepare.corpora import ReadReport, corpus_names, read_corpus
from plato2.prepare.reddit.node_parts import DumpReport
from plato2.prepare.reddit.shard_parts import ShardPart, read_part
from plato2.prepare.reddit.work import read_record
from plato2.report.ranks import ranks, read_flight
from plato2.runs.folder import FORMAT, RunFolder, choose_run, runs
from plato2.runs.saved import best_value, checkpoint_step, read_metrics
from plato2.runs.start import described
from plato2.runs.traces import Trace, read_state, verdict
from plato2.talk.score import read_line
from plato2.talk.self_chat import read_starts, resumed, to_line, write_parlai
from plato2.weights.export import export_to_huggingface
from plato2.weights.folder import load_generation, load_stage, read_saved
from plato2.weights.knover import _unpacked, find_sources
from plato2.weights.model_folder import weight_files
from plato2.weights.paddle import open_parameter, read_pdparams, write_parameter
from plato2.words import read_names, read_words

QUICK = 200
"""Changes of the default run; the slow one goes on after them."""
N = [pytest.param(QUICK), pytest.param(2000, marks=pytest.mark.slow)]
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2,
    10**9,
    10**400,
    2.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "../../x",
    "\x00",
    "\ud800",
    "7",
    [],
    [[]],
    ["x"],
    {},
    {"x": 1},
    [1] * 1000,
]
"""Values where others belong."""
BROKEN = [b"", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"1e999", b"\xff\xfe", b"null", b"5", b"[]"]
"""Texts that are no JSON, or of another kind."""


def mutate(data: bytes, number: int) -> bytes:
    """One to four bytes of a file changed, a part of it lost, doubled or moved."""
    rng = random.Random(number)
    kind = rng.randrange(8)
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == 0:
        return data[:a]
    if kind == 1:
        return data[:a] + data[b:]
    if kind == 2:
        return data[:a] + data[a : min(b, a + 64)] * 2 + data[a:]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed))
        if kind == 3:
            changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 4:
            width = rng.choice([2, 4, 8])
            value = rng.choice(
                [0, 1, (1 << 8 * width - 1) - 1, (1 << 8 * width) - 1, rng.getrandbits(8 * width)]
            )
            changed[place : place + width] = value.to_bytes(width, "little")
        else:
            changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutate_value(value: Any, number: int) -> Any:
    """A copy of plain values with an odd one, one too many or one too few somewhere."""
    rng = random.Random(number)
    root = [copy.deepcopy(value)]
    for _ in range(rng.randint(1, 2)):
        holder, key = _place(root, rng)
        kind = rng.randrange(8)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder[key], dict):
            holder[key]["unknown"] = copy.deepcopy(rng.choice(ODD))
        elif kind == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] *= rng.choice([-1, 10**3, 10**9, 0.5 if abs(holder[key]) < 2**53 else 7])
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return root[0]


def _place(root: list[Any], rng: random.Random) -> tuple[Any, Any]:
    """A container below `root` and one of its keys, all as likely as each other."""
    places: list[tuple[Any, Any]] = [(root, 0)]
    for holder, key in places:
        inner = holder[key]
        if isinstance(inner, dict | list):
            places += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
    return rng.choice(places)


def mutate_json(data: bytes, number: int) -> bytes:
    """JSON with an odd value in it, or changed as bytes are."""
    if number < len(BROKEN):
        return BROKEN[number]
    if number % 4 == 0:
        return mutate(data, number)
    text = json.dumps(mutate_value(json.loads(data), number)).encode()
    return text.replace(b"Infinity", b"1e999")


def fuzz(
    n: int, change: Callable[[int], object], read: Callable[[], object], is_noticed: bool = True
) -> None:
    """`read` after each of `n` changes: it ends, or with a UserError of one line.

    `is_noticed`: some of the changes are refused; where records are counted as broken, none need be.
    """
    n_read = 0
    numbers = range(QUICK if n > QUICK else 0, n)
    for number in numbers:
        change(number)
        told = ""
        try:
            read()
            n_read += 1
        except UserError as error:
            told = str(error)
        except BaseException as error:
            error.add_note(f"change {number}")
            raise
        assert len(told.splitlines()) < 2, f"change {number}: {told}"
        assert len(told) < 1000, f"change {number}: {told}"
    assert n_read < len(numbers) or not is_noticed, "no change was noticed: this is no test"


def of_file(path: Path, mutation: Callable[[bytes, int], bytes] = mutate) -> Callable[[int], object]:
    data = path.read_bytes()
    return lambda number: path.write_bytes(mutation(data, number))


# ---------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    made = make_run(folder / "run", "2_gen"), make_run(folder / "judge", "2_eval")
    export_to_huggingface(folder / "hf", *made)
    return folder / "hf"


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy to change; without hashes beside its files, which would notice every change first."""
    return Path(shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.sha256")))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "tiny-2_gen" / "run", "2_gen")


@pytest.mark.parametrize("n", N)
def test_config_of_a_model_folder(model: Path, n: int) -> None:
    fuzz(
        n,
        of_file(model / "config.json", mutate_json),
        lambda: load_generation(model),
    )


@pytest.mark.parametrize("n", N)
def test_arguments_of_a_stage(model: Path, n: int) -> None:
    """As above, for what only training and scoring need."""
    fuzz(n, of_file(model / "config.json", mutate_json), lambda: load_stage(model, ("2_eval",)))


@pytest.mark.parametrize("n", N)
def test_index_of_weights(model: Path, n: int) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    path = model / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    fuzz(n, of_file(path, mutate_json), lambda: weight_files(model))


@pytest.mark.parametrize("n", N)
def test_safetensors(model: Path, n: int) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")

    def change(number: int) -> None:
        path.write_bytes(
            mutate(data[:header], number) + data[header:] if number % 2 else mutate(data, number)
        )

    fuzz(n, change, lambda: read_saved(model))


@pytest.mark.parametrize("n", N)
def test_bytes_of_a_checkpoint(run: Path, n: int) -> None:
    last = run / "checkpoints" / "last.ckpt"
    fuzz(n, of_file(last), lambda: read_saved(last))


@pytest.mark.parametrize("n", N)
def test_values_of_a_checkpoint(run: Path, n: int) -> None:
    last = run / "checkpoints" / "last.ckpt"
    whole = checkpoint_of(make_stage("1_coarse"), Tokenizer.load(KNOVER))
    whole["callbacks"] = {"Checkpoints": {"best_value": 2.5}}
    odd = [torch.zeros(0), torch.zeros(3, 3), torch.zeros(1).expand(10**9), torch.zeros(2, dtype=torch.bool)]

    def change(number: int) -> None:
        rng = random.Random(number)
        value = mutate_value(whole, number)
        if number % 4 == 0 and isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
            value["state_dict"][rng.choice([*value["state_dict"], "new"])] = rng.choice(odd)
        torch.save(value, last)

    def read() -> None:
        read_saved(last), checkpoint_step(last), best_value(last)
        load_stage(last)

    fuzz(n, change, read)


@pytest.mark.parametrize("n", N)
def test_lineage_of_a_run(run: Path, n: int) -> None:
    config = {"trainer": {"max_steps": 9}, "optim": {"lr": 1.0}, "model": {"n_layer": 1}, "seed": 1}
    parent = {"checkpoint": "a/b.ckpt", "sha256": "ab" * 32, "run": None}
    record = {
        "format": FORMAT,
        "stage": "2_gen",
        "status": "running",
        "step": 9,
        "created": "2026",
        "seed": 1,
    }
    record |= {"config": config, "parent": parent, "resumed": [{"step": 3, "at": "2026"}], "curriculum": "a"}
    record |= {"fingerprint": "ab", "tokenizer_sha256": "ab" * 32, "metrics": {"val/loss": 2.0}}
    (run / "lineage.json").write_text(json.dumps(record))
    folder = RunFolder(run)

    def read() -> None:
        _ = folder.parent, folder.finished, folder.lineage()
        described(folder)
        runs(run.parents[1], "tiny-2_gen")
        choose_run(run.parents[1], "tiny-2_gen", config, None, str(run))

    fuzz(n, of_file(run / "lineage.json", mutate_json), read)


@pytest.mark.parametrize("n", N)
def test_trace_of_a_rank(run: Path, n: int) -> None:
    trace = Trace(run, 0, 2, "first")
    trace.write("failed", 3, "save", error="full", waited_s=1.5, collectives=9, moves=7)
    first, last = trace.path.read_bytes().splitlines()

    def change(number: int) -> None:
        lines = [first, mutate_json(last, number)] if number % 2 else [mutate_json(first, number), last]
        trace.path.write_bytes(b"\n".join([*lines, b""]))

    def read() -> None:
        if state := read_state(trace.path):
            verdict([state], state.world)
        ranks(run)

    fuzz(n, change, read, is_noticed=False)


@pytest.mark.parametrize("n", N)
def test_flight_record_of_a_rank(run: Path, n: int) -> None:
    trace = Trace(run, 0, 1, "first")
    entry = {"profiling_name": "gloo:all_reduce", "process_group": ["0", "default_pg"], "state": "scheduled"}
    entry |= {"collective_seq_id": 1, "input_sizes": [[3, 4]], "timeout_ms": 60_000}
    status = {"0": {"last_enqueued_collective": "2"}}
    trace.flight.write_text(json.dumps({"entries": [entry], "pg_status": status, "version": "2.10"}))

    def read() -> None:
        read_flight(trace.flight)
        ranks(run)

    fuzz(n, of_file(trace.flight, mutate_json), read)


@pytest.mark.parametrize("file", ["spm.model", "vocab.txt", "text.json"])
@pytest.mark.parametrize("n", N)
def test_tokenizer(tmp_path: Path, file: str, n: int) -> None:
    Tokenizer.load(KNOVER).save(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / file
    mutation = mutate_json if file == "text.json" else mutate
    fuzz(n, of_file(path, mutation), lambda: Tokenizer.load(tmp_path / "tokenizer").encode("hello there !"))


@pytest.mark.parametrize("n", N)
def test_parameter_of_knover(tmp_path: Path, n: int) -> None:
    path = tmp_path / "word_embedding"
    write_parameter(path, np.zeros((5, 3), np.float32))
    fuzz(n, of_file(path), lambda: open_parameter(path).read().sum())


@pytest.mark.parametrize("n", N)
def test_pdparams(tmp_path: Path, n: int) -> None:
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps({"a": np.zeros((2, 3), np.float32), "b": np.ones(3)}, 4))
    fuzz(n, of_file(path), lambda: read_pdparams(path))


@pytest.mark.parametrize(
    "compress", [bytes, partial(gzip.compress, mtime=0), lzma.compress], ids=["tar", "gz", "xz"]
)
@pytest.mark.parametrize("n", N)
def test_tar(tmp_path: Path, compress: Callable[[bytes], bytes], n: int) -> None:
    (tmp_path / "tiny" / "Plato").mkdir(parents=True)
    word = tmp_path / "tiny" / "Plato" / "word_embedding"
    write_parameter(word, np.zeros((5, 3), np.float32))
    for path in (word, word.parent):
        os.utime(path, (1.5, 1.5))  # half seconds are written into records apart
    with tarfile.open(tmp_path / "tar", "w") as archive:
        archive.add(word.parent, "Plato")
    path = tmp_path / "archive"
    path.write_bytes(compress((tmp_path / "tar").read_bytes()))

    def read() -> None:
        with _unpacked(path, tmp_path / "out", lambda text: None) as place:
            find_sources(place)

    fuzz(n, of_file(path), read)


# ------------------------------------------------------------------------------------------------------ data


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus", [(["hi there .", f"{n} ?"], "well .") for n in range(8)])


@pytest.mark.parametrize("n", N)
def test_index_of_a_corpus(corpus: Path, n: int) -> None:
    def read() -> None:
        index = read_index(corpus)
        for split in index.splits.values():
            for info in split.shards:
                read_shard(corpus, info)

    fuzz(n, of_file(corpus / INDEX_FILE, mutate_json), read)


@pytest.mark.parametrize("n", N)
def test_shard(corpus: Path, n: int) -> None:
    """Also one whose hash says that it is right."""
    import dataclasses
    import hashlib

    info = read_index(corpus).splits["valid"].shards[0]
    path = corpus / info.file

    def read() -> None:
        data = path.read_bytes()
        told = dataclasses.replace(info, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        read_shard(corpus, told)

    fuzz(n, of_file(path), read)


TURNS = [["hi there", "hello , who are you ?", "a robot ."], ["well", "yes"]] * 4
MESSAGES = [[{"role": "ab"[i % 2], "content": text} for i, text in enumerate(turns)] for turns in TURNS]


def write_arrow(path: Path) -> None:
    table = pa.table({"messages": MESSAGES})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("n", N)
def test_hf_datasets(tmp_path: Path, kind: str, n: int) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "arrow":
        write_arrow(path)
    else:
        pq.write_table(pa.table({"messages": MESSAGES}), path)
    fuzz(n, of_file(path), lambda: list(read_corpus("hf_datasets", [str(path)], ReadReport())))


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("n", N)
def test_records_of_hf_datasets(tmp_path: Path, file: str, n: int) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    write_arrow(tmp_path / "data" / "train" / "data-00000-of-00001.arrow")
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": "ab",
        "_split": "train",
    }
    (tmp_path / "data" / "train" / "state.json").write_text(json.dumps(state))
    (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    path = tmp_path / "data" / ("train" if file == "state.json" else "") / file
    read = lambda: list(read_corpus("hf_datasets", [str(tmp_path / "data")], ReadReport()))  # noqa: E731
    fuzz(n, of_file(path, mutate_json), read)


# --------------------------------------------------------------------------------------------------- corpora

CORPORA: dict[str, tuple[str, Any]] = {
    "jsonl": (
        "a.jsonl",
        [{"turns": ["hi", {"text": "yes", "speaker": "a", "time": 5}], "persona": ["x"], "id": 3}],
    ),
    "chitchat": (
        "a.json",
        {"a": {"messages": [[{"text": "hi", "sender": "a", "timestamp": "2020-02-01T10:00:00Z"}]] * 2}},
    ),
    "cmu_dog": (
        "a.json",
        {"wikiDocumentIdx": 1, "whoSawDoc": ["u"], "history": [{"docIdx": 0, "uid": "u", "text": "hi"}] * 3},
    ),
    "convai2": ("a.txt", ["1 your persona: i ski.", "2 hi\twell\t\tx|y", "3 so\tyes", "1 a\tb"]),
    "crosswoz": (
        "a.json",
        {
            "1": {
                "messages": [
                    {"role": "usr", "content": "hi"},
                    {"role": "sys", "content": "a", "sys_state": {"b": {"c": "d", "selectedResults": ["e"]}}},
                ]
            }
        },
    ),
    "dailydialog": ("a.txt", ["hi __eou__ well __eou__ so", "a __eou__"]),
    "kdconv": (
        "a.json",
        [{"messages": [{"message": "a", "attrs": [{"name": "a", "attrname": "b", "attrvalue": "c"}]}] * 2}],
    ),
    "lccc": ("a.jsonl", [["a b", "c"], ["d", "e"]]),
    "multiwoz": (
        "a.json",
        {
            "A.json": {
                "log": [
                    {"text": "hi", "metadata": {}},
                    {"text": "yes", "metadata": {"hotel": {"book": {"booked": [{"name": "x"}]}}}},
                ]
            }
        },
    ),
    "parlai": ("a.jsonl", [{"dialog": [[{"id": "a", "text": "hi"}, {"id": "b", "text": "yes"}]]}]),
    "sgd": (
        "a.json",
        [
            {
                "dialogue_id": "1",
                "turns": [
                    {
                        "speaker": "SYSTEM",
                        "utterance": "a",
                        "frames": [
                            {"service": "x", "service_call": {"method": "m"}, "service_results": [{"a": "b"}]}
                        ],
                    }
                ]
                * 2,
            }
        ],
    ),
    "topical_chat": (
        "a.json",
        {"a": {"content": [{"agent": "agent_1", "message": "hi", "knowledge_source": ["FS1"]}] * 2}},
    ),
    "tsv": ("a.tsv", ["src\ttgt\tlabel", "a [SEP] b\tc\t1", "d\te\t0"]),
    "weibo": ("a.tsv", ["a b\tc d", "e\tf"]),
}
"""Reader -> a file of its format, and what is in it."""


def score_lines_of(path: Path) -> None:
    with path.open("rb") as file:
        for line in read_lines_of(file):
            read_line(line or b"", TOKENIZER, 64)


TOKENIZER = Tokenizer.load(KNOVER)
DUMP = DumpReport("RC_2011-01.zst", "comments", 9, "ab" * 32, 3, 1, None)
PART = ShardPart(
    0, ShardInfo("a.parquet", 1, 2, 3, "ab" * 32, 9), "ab", 1, 0, {}, [], {"2011": 3}, {}, {}, {"a": [1]}
)
SWEEP = {"command": {"overrides": ["seed=1,2"], "params": {"stage": "2_gen"}}, "name": "a", "finished": True}
STARTS = [{"turns": ["hi", {"text": "yes", "speaker": "a"}, {"text": "so", "speaker": "a"}]}] * 2
CONTEXTS = [
    {"turns": ["hi"], "references": ["yes"]},
    {"dialogue": [{"text": "hi", "responses": ["yes", "no"]}]},
]
SMALL_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "metrics.csv": ("step,metric,value\n1,val/loss,2.5\n2,val/loss,2.0\n", read_metrics),
    "sweep.json": (json.dumps(SWEEP), read_sweep),
    "a.sha256": (f"{'ab' * 32}  a\n", lambda path: check_sha256(path.with_suffix(""), "again")),
    "starts.jsonl": ("\n".join(map(json.dumps, STARTS)), read_starts),
    "starts.tsv": ("hi [SEP] yes\tx\nwell\ty\n", read_starts),
    "starts.txt": ("hi there\nwell\n", read_starts),
    "contexts.jsonl": ("\n".join(map(json.dumps, CONTEXTS)), read_starts),
    "pairs.tsv": ("hi [SEP] yes\tx\nwell\ty\n", score_lines_of),
    "set.jsonl": (
        json.dumps({"id": 1, "context": ["hi"], "candidates": ["yes", "no"], "labels": [1, 0]}),
        read_queries,
    ),
    "set++.jsonl": (
        json.dumps({"context": ["hi"], "positive_responses": ["a"], "random_negative_responses": ["b"]}),
        partial(read_queries, format="dailydialog++"),
    ),
    "set.txt": (
        json.dumps({"article": "m : hi", "options": ["m : yes", "m : no"], "answers": "B"}),
        partial(read_queries, format="mutual"),
    ),
    "words.txt": ("# bad\nheck\nwhat the\n", lambda path: read_words(str(path), "words")),
    "names.txt": ("u/bot\nr/news\n", lambda path: read_names(str(path), "bots")),
    "done.json": (json.dumps(asdict(DUMP)), partial(read_record, DumpReport)),
    "00000.json": (json.dumps(asdict(PART)), read_part),
}
"""What else of a user's is read, or of ours may be damaged: name -> its text, and how it is read."""


@pytest.mark.parametrize("name", SMALL_FILES)
@pytest.mark.parametrize("n", N)
def test_small_file(tmp_path: Path, name: str, n: int) -> None:
    text, read = SMALL_FILES[name]
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    (tmp_path / "a").touch()  # what the hash is of
    mutation = mutate_json if name.endswith(".json") else mutate
    fuzz(n, of_file(path, mutation), lambda: read(path), is_noticed=name not in ("words.txt", "names.txt"))


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.meta.json"])
@pytest.mark.parametrize("n", N)
def test_dialogues_of_self_chat(tmp_path: Path, name: str, n: int) -> None:
    """Going on with a file, and writing it for ParlAI."""
    out, about = tmp_path / "chats.jsonl", {"settings": {"seed": 11}, "rank": None}
    turns = [{"speaker": "A", "model": None, "text": "hi"}, {"speaker": "B", "model": "m", "text": "yes"}]
    lines = [{"id": i, "start": ["hi"], "speakers": {"A": "m", "B": "m"}, "turns": turns} for i in range(2)]
    whole = b"".join(map(to_line, lines))
    with resumed(out, about, 2, 1) as (file, _):
        file.write(whole)

    def read() -> None:
        with resumed(out, about, 2, 1):
            pass
        write_parlai(out)

    change = of_file(tmp_path / name, mutate_json if name.endswith(".meta.json") else mutate)
    fuzz(n, lambda number: (out.write_bytes(whole), change(number)), read)


def test_every_reader_is_fuzzed() -> None:
    assert CORPORA.keys() | {"hf_datasets"} == set(corpus_names())


@pytest.mark.parametrize("corpus", CORPORA)
@pytest.mark.parametrize("n", N)
def test_corpus(tmp_path: Path, corpus: str, n: int) -> None:
    name, content = CORPORA[corpus]
    path = tmp_path / name
    is_text = path.suffix in (".txt", ".tsv")

    def text(value: Any) -> bytes:
        is_lines = path.suffix == ".jsonl" and isinstance(value, list)
        return "\n".join(map(json.dumps, value)).encode() if is_lines else json.dumps(value).encode()

    def change(number: int) -> None:
        rng = random.Random(number)
        data = "\n".join(content).encode() if is_text else text(content)
        if number < len(BROKEN):
            data = BROKEN[number] + b" a\tb"
        elif is_text or number % 3 == 0:
            data = mutate(data, number)
        elif number % 3 == 1:
            data = text(mutate_value(content, number)).replace(b"Infinity", b"1e999")
        if number % 9 == 0:  # a number of 5,000 digits in the place of one of its words
            place = rng.randrange(len(data) + 1)
            data = data[:place] + b"9" * 5000 + data[place + 1 :]
        path.write_bytes(data)

    def read() -> None:
        for dialogue in read_corpus(corpus, [str(path)], ReadReport()):
            json.dumps([turn.text for turn in dialogue.turns])

    fuzz(n, change, read, is_noticed=False)
