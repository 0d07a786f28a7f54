"""The command line of `plato2 prepare reddit`: its help, and a wrong value is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from preparing import arguments, digest
from small import assert_one_line
from typer.testing import CliRunner

from plato2.commands import app
from plato2.prepare.reddit.options import RedditOptions
from plato2.prepare.reddit.rules import RedditRules


def test_help_lists_everything() -> None:
    done = CliRunner().invoke(
        app, ["prepare", "reddit", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
    )
    assert done.exit_code == 0
    options = [
        name.replace("_", "-") for name in vars(RedditOptions(comments=["x"], out="x")) if name != "rules"
    ]
    renamed = {"spark-master": "master", "spark-conf": "conf"}
    for name in [*(renamed.get(option, option) for option in options), "rule", "no-clean", "json"]:
        assert f"--{name}" in done.output, name
    for rule in vars(RedditRules()):
        assert rule in done.output


WRONG = [
    (["--workers", "0"], ["--workers 0", "at least 1"]),
    (["--workers", "-3"], ["--workers -3", "at least 1"]),
    (["--memory", "nonsense"], ["--memory 'nonsense'", "1GB"]),
    (["--memory", ""], ["--memory ''", "1GB"]),
    (["--memory", "-1GB"], ["--memory '-1GB'", "1GB"]),
    (["--tokenizer", "/nowhere"], ["/nowhere"]),
    (["--vocab-pieces", "3"], ["--vocab-pieces 3", "at least 4"]),
    (["--character-coverage", "0.5"], ["--character-coverage 0.5", "0.98"]),
    (["--tokenizer-messages", "0"], ["--tokenizer-messages 0", "at least 1"]),
    (["--max-context", "2"], ["--max-context 2", "at least 3"]),
    (["--max-context", "70000"], ["--max-context 70000", "at most 65,535"]),
    (["--max-response", "2"], ["--max-response 2", "at least 3"]),
    (["--shard-nodes", "0"], ["--shard-nodes 0", "at least 1"]),
    (["--valid-samples", "0"], ["--valid-samples 0", "at least 1"]),
    (["--valid-from", "yesterday"], ["--valid-from 'yesterday'", "2019-08-01"]),
    (["--language", "fr"], ["--language 'fr'", "en, zh"]),
    (["--rule", "max_chars"], ["--rule max_chars", "NAME=VALUE"]),
    (["--rule", "max_chars=many"], ["--rule max_chars=many", "int or off"]),
    (["--rule", "max_chars=0"], ["max_chars=0", "at least 1"]),
    (["--rule", "fun=1"], ["--rule fun=1", "there is no rule fun"]),
    (["--rule", "min_letters=7"], ["min_letters=7", "between 0 and 1"]),
    (["--rule", "offensive_words=/nowhere"], ["offensive_words", "/nowhere", "cannot be read"]),
    (["--rule", "bots=/nowhere"], ["bots", "/nowhere", "cannot be read"]),
    (["--conf", "executor"], ["--conf executor", "NAME=VALUE"]),
    (["--submissions", "/nowhere/RS_*"], ["--submissions ", "/nowhere/RS_*", "no such file"]),
    (["--out", "s3://bucket/x"], ["--out s3://bucket/x", "folder"]),
    (["--work", "s3://bucket/x"], ["--work s3://bucket/x", "folder"]),
    (["--rule", "max_chars=1"], ["no message to train a tokenizer on", "passes the rules", "--rule"]),
]


@pytest.mark.parametrize(("wrong", "parts"), WRONG, ids=[" ".join(wrong) for wrong, _ in WRONG])
def test_a_wrong_value_is_one_line(
    sound: list[bytes], tmp_path: Path, wrong: list[str], parts: list[str]
) -> None:
    path = tmp_path / "RC_2011-01"
    path.write_bytes(b"\n".join(sound))
    given = ["prepare", "reddit", "--comments", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]
    if "pieces" not in wrong[0] and "coverage" not in wrong[0]:
        given += ["--vocab-pieces", "300"]
    done = CliRunner().invoke(app, [*given, *wrong])
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert_one_line(done.stderr, *parts)
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        (["--orphans", "adopt"], ["drop", "root"]),
        (["--on-broken", "weep"], ["stop", "skip"]),
        (["--engine", "steam"], ["local", "spark"]),
        (["--workers", "two"], ["--workers"]),
    ],
)
def test_a_value_outside_the_choices(tmp_path: Path, wrong: list[str], allowed: list[str]) -> None:
    """Typer's own message: usage, then what may stand there."""
    done = CliRunner().invoke(
        app, ["prepare", "reddit", "--comments", "x", "--out", str(tmp_path / "o"), *wrong]
    )
    assert done.exit_code == 2
    for word in [wrong[0], *allowed]:
        assert word in done.stderr


def test_settings_of_spark_change_nothing_for_the_local_engine(
    sound: list[bytes], tokenizer: str, tmp_path: Path
) -> None:
    """They are refused or ignored, but never halfway."""
    path = tmp_path / "RC_2011-01"
    path.write_bytes(b"\n".join(sound))
    given = arguments(tmp_path / "out", [path], tokenizer=tokenizer, workers=1)
    done = CliRunner().invoke(app, [*given, "--master", "spark://head:7077", "--conf", "spark.x=1"])
    if done.exit_code == 2:
        assert_one_line(done.stderr, "spark")
    else:
        assert done.exit_code == 0, done.output
        digest(tmp_path / "out")
