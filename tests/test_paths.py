"""Paths as people write them (`~`, variables, any letters), and output in any encoding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import ROOT, Train, assert_one_line, write_dialogues
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError, expand_path
from plato2.data.module import DialogueDataModule
from plato2.data.tokenizer import Tokenizer
from plato2.prepare.options import PrepareOptions
from plato2.prepare.reddit.options import RedditOptions
from plato2.weights.model_folder import new_folder

KNOVER = ROOT / "tests" / "fixtures" / "knover"
PREPARE = "{corpus: jsonl, files: [$TALK/talk.jsonl], vocab_pieces: 300, max_context: 32, max_response: 32}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, TALK = a folder in it with dialogues; the working directory is another one."""
    found, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (found / "talk").mkdir(parents=True)
    elsewhere.mkdir()
    write_dialogues(found / "talk" / "talk.jsonl", 60)
    monkeypatch.setenv("HOME", str(found))
    monkeypatch.setenv("TALK", str(found / "talk"))
    monkeypatch.chdir(elsewhere)
    return found


def plato2(*arguments: str, expect: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "plato2", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        encoding=variables.get("PYTHONIOENCODING", "utf-8"),
        timeout=300,
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# -------------------------------------------------------------------------------------- ~ and variables


def test_what_is_written_out(home: Path) -> None:
    assert expand_path("~/a", "out") == f"{home}/a"
    assert expand_path("$TALK/a ~ b", "out") == f"{home}/talk/a ~ b"
    assert expand_path("s3://${TALK}x/~", "out") == f"s3://{home}/talkx/~"
    assert expand_path("costs 5$, a~b", "out") == "costs 5$, a~b"
    with pytest.raises(UserError, match=r"out=\$NOT_SET/a: there is no environment variable NOT_SET"):
        expand_path("$NOT_SET/a", "out")
    with pytest.raises(UserError, match="out=~no-such-user/a: there is no user"):
        expand_path("~no-such-user/a", "out")


@pytest.mark.slow
def test_prepare_and_the_tokenizer_on_the_command_line(home: Path) -> None:
    plato2("prepare", "jsonl", "$TALK/*.jsonl", "--out=~/mine", "--vocab-pieces", "300")
    assert (home / "mine" / "index.json").exists()
    plato2("tokenizer", "train", "~/talk/talk.jsonl", "--pieces=300", "--out=~/tok")
    assert "pieces" in plato2("tokenizer", "show", "~/tok", "hi").stdout
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        "prepare jsonl x.jsonl --out=$HOME/x --tokenizer=~/nowhere",
        "prepare jsonl ~/nowhere --out=x",
        "prepare weibo $TALK/talk.jsonl --out=x --reader replies=~/nowhere",
        "prepare jsonl $TALK/talk.jsonl --out=x --tokenizer={knover} --rule offensive_words=~/nowhere",
        "prepare reddit --comments=~/nowhere --out=x",
        "prepare explain hi --tokenizer=~/nowhere",
        "tokenizer show ~/nowhere hi",
        "reply --generation=~/nowhere hi",
        "reply --generation=x --safety=~/nowhere hi",
        "chat --generation=~/nowhere",
        "serve ~/nowhere",
        "self-chat --starts=~/nowhere --generation=x --out=x.jsonl",
        "score ~/nowhere --generation=x",
        "report --data=~/nowhere --coarse=x",
        "export hf --generation=~/nowhere --out=x",
        "import knover ~/nowhere --out=x",
        "runs ~/nowhere",
        "score $TALK/talk.jsonl --generation=x --out=~/nowhere/x",
    ],
)
def test_every_verb_takes_them(home: Path, arguments: str) -> None:
    done = CliRunner().invoke(app, arguments.format(knover=KNOVER).split())
    assert done.exit_code == 2, done.output
    assert f"{home}/nowhere" in done.output.replace("\n", ""), done.output


def test_where_dialogues_are_written(home: Path) -> None:
    done = CliRunner().invoke(app, ["self-chat", "--generation=x", "--out=~/talk"])
    assert f"--out {home}/talk: a folder" in done.output.replace("\n", "")


def test_options_from_a_file(home: Path) -> None:
    options = PrepareOptions.from_dict(
        {"corpus": "jsonl", "out": "~/x", "files": "$TALK/talk.jsonl", "reader": {"wiki": "~/w"}}
    )
    assert (options.out, options.files) == (f"{home}/x", [f"{home}/talk/talk.jsonl"])
    assert options.reader == {"wiki": f"{home}/w"}
    reddit = RedditOptions(comments="~/RC", out="~/x", work="$TALK/w")  # type: ignore[arg-type]
    assert (reddit.comments, reddit.out, reddit.work) == ([f"{home}/RC"], f"{home}/x", f"{home}/talk/w")


def test_copies_of_remote_shards(home: Path) -> None:
    batch: Any = None
    data = DialogueDataModule(str(home), batch, 8192, cache_dir="$TALK/copies")
    assert data.cache_dir == f"{home}/talk/copies"


def test_train_writes_home(home: Path, train_here: Train, tmp_path: Path) -> None:
    keys = ["data.path=~/mine", f"+data.prepare={PREPARE}", "model.vocab_size=301", "output_dir=~/outputs"]
    variables = {"HOME": str(home), "TALK": str(home / "talk")}
    train_here(*keys, "run_id=first", "trainer.max_steps=2", **variables)
    assert (home / "mine" / "index.json").exists()
    run = home / "outputs" / "tiny-1_coarse" / "first"
    assert (run / "checkpoints" / "last.ckpt").exists()
    train_here(
        "-m", *keys, "stage=2_gen", f"init_from={run}".replace(str(home), "~"), "plan=true", **variables
    )
    assert not list(tmp_path.rglob("~"))


def test_train_reads_them_from_conf_local(home: Path, train_here: Train, tmp_path: Path) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    own = "# @package _global_\nresume: $NOT_SET/run\n"
    (tmp_path / "conf" / "local").mkdir(exist_ok=True)
    (tmp_path / "conf" / "local" / "default.yaml").write_text(own, encoding="utf-8")
    done = train_here(script=tmp_path / "train.py", expect=2)
    assert_one_line(done.stderr, "resume=$NOT_SET/run", "no environment variable NOT_SET")


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to where nothing is yet"])
def test_links_are_followed(tmp_path: Path, there: bool) -> None:
    """A model folder and a tokenizer; tests/unit/test_prepare.py has corpora."""
    disk = tmp_path / "disk"
    for name in ("model", "tokenizer"):
        if there:
            (disk / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(disk / name)
    with new_folder(tmp_path / "model") as new:
        assert new.parent in (disk, tmp_path)  # on the disk that will have it, as far as there is a folder
        (new / "x").touch()
    Tokenizer.load(KNOVER).save(tmp_path / "tokenizer")
    assert (disk / "model" / "x").exists()
    assert (disk / "tokenizer" / "spm.model").exists()
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "tokenizer").is_symlink()


def test_a_folder_of_further_configurations(home: Path, train_here: Train) -> None:
    (home / "conf" / "model").mkdir(parents=True)
    (home / "conf" / "model" / "mine.yaml").write_text("n_latent: 7\n", encoding="utf-8")
    done = train_here("--config-dir=~/conf", "--cfg=job", "model=mine", HOME=str(home))
    assert yaml.safe_load(done.stdout)["model"]["n_latent"] == 7


# ------------------------------------------------------------------------------------ Hydra's overrides


@pytest.mark.parametrize("text", ["x=1", "数据", "it's", "a;b#c", "~x"])
def test_an_override_is_a_text_where_hydra_has_no_room_for_it(train_here: Train, text: str) -> None:
    assert yaml.safe_load(train_here("--cfg=job", f"run_id={text}").stdout)["run_id"] == text


def test_texts_in_a_list_and_in_a_mapping(train_here: Train) -> None:
    overrides = ["tags=[a=b,plain,数据]", "data.prepare={corpus: jsonl, files: [~/x]}"]
    printed = yaml.safe_load(train_here("--cfg=job", *overrides).stdout)
    assert printed["tags"] == ["a=b", "plain", "数据"]
    assert printed["data"]["prepare"] == {"corpus": "jsonl", "files": ["~/x"]}
    overrides = ["data.prepare={corpus:jsonl,files:数据/a=b.jsonl}"]  # without blanks
    printed = yaml.safe_load(train_here("--cfg=job", *overrides).stdout)
    assert printed["data"]["prepare"] == {"corpus": "jsonl", "files": "数据/a=b.jsonl"}
    done = train_here("data.prepare={corpus:jsonl,files:[a:数]}", expect=2)
    assert_one_line(done.stderr, "a mapping is data.prepare={NAME: VALUE, ", "with a space after each colon")


@pytest.mark.parametrize(
    ("override", "quoted"),
    [
        ('run_id=a"b', 'run_id="a\\"b"'),
        ("data.path=~/${x}", 'data.path="~/${x}"'),
        ("tags=[a", 'tags="[a"'),
    ],
)
def test_what_cannot_be_read_is_named_with_the_quoting_that_works(
    train_here: Train, override: str, quoted: str
) -> None:
    assert_one_line(train_here(override, expect=2).stderr, override, f"write '{quoted}'")


# ------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_text_that_an_encoding_lacks_is_escaped(home: Path, encoding: str) -> None:
    text = "naïve 你好 😀"
    shown = plato2("tokenizer", "show", str(KNOVER), text, "--json", PYTHONIOENCODING=encoding)
    expected = plato2("tokenizer", "show", str(KNOVER), text, "--json")
    assert json.loads(shown.stdout) == json.loads(expected.stdout)
    assert (
        "\\u4f60\\u597d" in plato2("tokenizer", "show", str(KNOVER), text, PYTHONIOENCODING=encoding).stdout
    )
    failed = plato2("tokenizer", "show", "/数据", "hi", PYTHONIOENCODING=encoding, expect=2)
    assert_one_line(failed.stderr, "no tokenizer at /\\u6570\\u636e")


def test_a_locale_that_is_not_utf_8() -> None:
    ascii = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    assert "\\u2581hi" in plato2("tokenizer", "show", str(KNOVER), "hi", **ascii).stdout
    failed = plato2("tokenizer", "show", "/é", "hi", **ascii, expect=2)
    assert_one_line(failed.stderr, "FOLDER '/\\udcc3\\udca9': its name is not UTF-8")  # its two bytes


@pytest.mark.slow
def test_train_says_any_path_in_any_encoding(run_train, tmp_path: Path) -> None:
    done = run_train(f"data.path={tmp_path}/数据", expect=2, PYTHONIOENCODING="cp1252")
    assert done.stdout == ""
    assert_one_line(done.stderr, "\\u6570\\u636e")
