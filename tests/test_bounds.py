"""Files that would take all memory, or never end, are refused in one line by a process with little memory."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from small import ROOT, environment

sys.path.insert(0, str(ROOT / "tests" / "unit"))
from runs import KNOVER, checkpoint_of, make_corpus, make_run, make_stage
from test_fuzz import CORPORA

from plato2.data.tokenizer import Tokenizer
from plato2.prepare.corpora import corpus_names
from plato2.weights.export import export_to_huggingface

READ = """
import contextlib, io, json, os, resource, signal, sys
from pathlib import Path
from plato2.commands import app, score
from plato2.config import UserError
from plato2.prepare.corpora import ReadReport, corpus_names, read_corpus
from plato2.prepare.reddit.dumps import DumpReader, find_dumps
from plato2.data.shards import read_index, read_shard
from plato2.talk.self_chat import read_starts
from plato2.words import read_names, read_words
from plato2.runs.folder import RunFolder
from plato2.weights.folder import load_generation, load_stage
from plato2.weights.knover import import_knover

def corpus(reader):
    def read(path):
        report = ReadReport()
        n = sum(1 for _ in read_corpus(reader, [str(path)], report))
        raise UserError(f"{n} dialogues; {report.examples}")
    return read

def shard(folder):
    for split in read_index(folder).splits.values():
        for info in split.shards:
            read_shard(folder, info)

def dump(path):
    for block in DumpReader(*find_dumps([str(path)], "comments")).blocks():
        pass

def scored(path):
    score.check_files(path, None)
    told = io.StringIO()  # the refusal of the line; that none could be scored ends the verb
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
        app(["score", str(path), "--generation", sys.argv[1]], standalone_mode=False)
    raise UserError(told.getvalue().strip())

KINDS = {
    **{name: corpus(name) for name in corpus_names()}, "shard": shard, "dump": dump, "scored": scored,
    "words": lambda path: read_words(str(path), "words"), "names": lambda path: read_names(str(path), "bots"),
    "starts": read_starts,
    "model": load_generation, "stage": load_stage, "lineage": lambda path: RunFolder(path).lineage(),
    "release": lambda path: import_knover(path, path.parent / "imported"),
}
load_stage(Path(sys.argv[1]))  # what is imported late is imported now
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + (500 << 20)
for line in sys.stdin:
    child = os.fork()
    if child:
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
        continue
    signal.alarm(600)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for kind, path in json.loads(line):
        try:
            KINDS[kind](Path(path))
            print(json.dumps([path, None]), flush=True)
        except UserError as error:
            print(json.dumps([path, str(error)]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", "2_gen")


@pytest.fixture(scope="module")
def process(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Reads each list of files in a fork with little memory."""
    command = [sys.executable, "-c", READ, str(run)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True
    ) as started:
        yield started


def read_with_little_memory(files: dict[tuple[str, Path], str], process: subprocess.Popen[str]) -> None:
    """Asserts that each (kind, file) is refused, with these words."""
    assert process.stdin
    assert process.stdout
    print(json.dumps([[kind, str(path)] for kind, path in files]), file=process.stdin, flush=True)
    told = []
    while isinstance(answer := json.loads(process.stdout.readline()), list):
        told.append(answer)
    assert answer == 0
    for (path, message), words in zip(told, files.values(), strict=True):
        assert message is not None, f"{path} was read"
        assert words in message
        assert len(message.splitlines()) == 1


Compress = Callable[[bytes], bytes]


def write_in_parts(path: Path, *parts: tuple[bytes, int], compress: Compress = gzip.compress) -> None:
    """Each part this many times over; a gzip file may have many members, so that this takes no time."""
    with path.open("wb") as file:
        for part, times in parts:
            file.write(compress(part) * times)


@pytest.mark.slow
def test_bombs(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    files: dict[tuple[str, Path], str] = {}
    block = b"a" * (1 << 26)

    line = tmp_path / "line.jsonl.gz"  # a line of 1 GiB
    whole = b'{"turns": ["hi", "yes"]}\n'
    write_in_parts(line, (whole, 1), (b'{"turns": ["', 1), (block, 16), (b'"]}\n', 1), (whole, 1))
    files["jsonl", line] = f"2 dialogues; ['{line}:2: longer than 16 MiB']"
    value = tmp_path / "value.json.gz"
    write_in_parts(value, (b'[["', 1), (block[: 1 << 24], 64))
    files["lccc", value] = "value.json.gz is damaged"

    tar = tmp_path / "model.tar.gz"  # a file of 1 GiB, and a name of 1 GiB
    header = tarfile.TarInfo("Plato/word_embedding")
    header.size = 1 << 30
    write_in_parts(tar, (header.tobuf(), 1), (bytes(1 << 26), 16), (bytes(1024), 1))
    files["release", tar] = "unpacks to more than 20 times its size"
    name = tmp_path / "name.tar.gz"
    header = tarfile.TarInfo("PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    write_in_parts(name, (header.tobuf(), 1), (bytes(1 << 26), 16), (bytes(1024), 1))
    files["release", name] = "neither a folder, a tar nor"
    many = tmp_path / "many.tar.gz"
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("Plato/a"))
    write_in_parts(many, (content.getvalue()[:512] * 4096, 64), (bytes(1024), 1))
    files["release", many] = "not a model of Knover"

    nulls = tmp_path / "nulls.arrow"
    table = pa.table({"messages": pa.nulls(10**9)})
    with pa.ipc.new_stream(str(nulls), table.schema) as writer:
        writer.write_table(table)
    files["hf_datasets", nulls] = "column messages is of type null"
    read_with_little_memory(files, process)


@pytest.mark.slow
def test_bombs_of_every_compression_and_reader(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    files: dict[tuple[str, Path], str] = {}
    block, whole = b"a" * (1 << 26), b'{"turns": ["hi", "yes"]}\n'
    others: dict[str, Compress] = {"bz2": bz2.compress, "xz": lambda data: lzma.compress(data, preset=0)}
    others["zst"] = lambda data: pa.compress(data, "zstd", asbytes=True)
    for ending, compress in others.items():
        path = tmp_path / f"line.jsonl.{ending}"
        write_in_parts(path, (whole, 1), (block, 9), (b"\n", 1), (whole, 1), compress=compress)
        files["jsonl", path] = f"2 dialogues; ['{path}:2: longer than 16 MiB']"
        path = tmp_path / f"RC.{ending}"
        path.write_bytes(compress(bytes(1 << 29)) * 2)  # all that a piece of the file unpacks to is no block
        files["dump", path] = "no line ends within"
    zipped = tmp_path / "line.jsonl.zip"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a", (whole + block * 9))
    files["jsonl", zipped] = f"1 dialogues; ['{zipped}:2: longer than 16 MiB']"
    for reader, (name, _) in CORPORA.items():
        path = tmp_path / f"{reader}-{name}.zst"
        is_json = name.endswith(".json")
        opening = b'[["' if is_json else b""
        write_in_parts(path, (opening, 1), (block, 9), compress=others["zst"])
        files[reader, path] = (
            f"{path} is damaged" if is_json or reader == "lccc" else f"['{path}:1: longer than 16 MiB']"
        )
    read_with_little_memory(files, process)


@pytest.mark.slow
def test_sizes_that_are_lies(tmp_path: Path, run: Path, process: subprocess.Popen[str]) -> None:
    files: dict[tuple[str, Path], str] = {}
    whole = checkpoint_of(make_stage("1_coarse"), Tokenizer.load(KNOVER))

    def changed(name: str, model: dict[str, Any], weights: dict[str, Any]) -> Path:
        arguments = whole["hyper_parameters"] | {"model": whole["hyper_parameters"]["model"] | model}
        path = tmp_path / name
        state = whole["state_dict"] | weights
        torch.save(whole | {"hyper_parameters": arguments, "state_dict": state}, path)
        return path

    files["stage", changed("deep.ckpt", {"n_layer": 10**9}, {})] = "n_layer=1000000000: must be at most 1,000"
    files["stage", changed("deeper.ckpt", {"n_layer": 1000}, {})] = "n_layer is 1000, there are 1 blocks"
    wide = {"backbone.word.weight": torch.zeros(1, 1).expand(1 << 24, 65536)}
    files["stage", changed("wide.ckpt", {"vocab_size": 1 << 24, "hidden_size": 65536}, wide)] = (
        "state_dict is not"
    )

    folder = tmp_path / "model"
    export_to_huggingface(folder, run, None)
    for file in folder.glob("*.sha256"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    config["generation"]["arguments"]["model"]["n_layer"] = 10**9
    (folder / "config.json").write_text(json.dumps(config))
    files["model", folder] = "n_layer=1000000000: must be at most 1,000"

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lineage.json").open("wb") as file:
        file.truncate(1 << 40)  # a file with a hole
    files["lineage", tmp_path / "run"] = "larger than 16,777,216 bytes"
    lines = tmp_path / "lines"
    with lines.open("wb") as file:
        file.truncate(1 << 30)
    files["words", lines] = files["names", lines] = files["starts", lines] = "larger than 67,108,864 bytes"
    files["scored", lines] = '{"error": "line 1: '
    read_with_little_memory(files, process)


@pytest.mark.slow
def test_pipes_are_not_waited_for(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    files: dict[tuple[str, Path], str] = {}
    for name in ("index.json", "valid-00000.parquet"):
        corpus = make_corpus(tmp_path / name, [(["hi there ."], "well .")])
        (corpus / name).unlink()
        os.mkfifo(corpus / name)
        files["shard", corpus] = f"{name}: not a regular file"
    other = make_run(tmp_path / "other", "2_gen")
    for path in (other / "checkpoints" / "last.ckpt", other / "lineage.json"):
        path.unlink()
        os.mkfifo(path)
    files["stage", other] = "last.ckpt: not a readable checkpoint"
    files["lineage", other] = "lineage.json: not a regular file"
    os.mkfifo(tmp_path / "a.jsonl")
    for reader in corpus_names():
        files[reader, tmp_path / "a.jsonl"] = "a.jsonl': "
    files["jsonl", tmp_path / "a.jsonl"] += "a pipe or device; write its output to a file"
    files["dump", tmp_path / "a.jsonl"] = files["jsonl", tmp_path / "a.jsonl"]
    files["jsonl", Path("/dev/zero")] = "files='/dev/zero': a pipe or device"
    for kind in ("words", "names", "starts", "scored"):
        files[kind, tmp_path / "a.jsonl"] = "a.jsonl: not a regular file"
    os.mkfifo(tmp_path / "a.pdparams")
    files["release", tmp_path / "a.pdparams"] = "neither a folder, a tar nor"
    read_with_little_memory(files, process)
