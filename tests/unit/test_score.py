"""Scores of a file of lines: one result a line whatever is in it, and the same for a line in any company."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from knover import CONFIG, KNOVER, knover_stage, load
from typer.testing import CliRunner
from units import MODEL, make_stage, make_window, pack_for

from plato2.commands import app
from plato2.data.tokenizer import Tokenizer
from plato2.stages import CoarseGeneration, CoherenceEstimation, FineGeneration
from plato2.talk import score as score_module
from plato2.talk.score import Record, score, score_lines
from plato2.weights.knover import import_knover
from plato2.weights.paddle import write_parameter

TOKENIZER = Tokenizer.load(KNOVER)
LIMIT = CONFIG.max_position // 2 - 2
"""Tokens a turn or a response may have."""


@functools.cache
def stage_of(name: str) -> Any:
    classes: dict[str, Any] = {"1_coarse": CoarseGeneration, "2_gen": FineGeneration}
    if name in classes:
        return knover_stage(classes[name], "plato_weights.npz")
    return knover_stage(CoherenceEstimation, "nsp_weights.npz")


def scores_of(lines: Sequence[bytes], generation: str = "1_coarse") -> list[dict[str, Any]]:
    return list(score_lines(lines, TOKENIZER, stage_of(generation), stage_of("2_eval")))


def words(n: int) -> str:
    """A text of exactly n tokens."""
    text = "and " * n
    assert len(TOKENIZER.encode(text)) == n
    return text.strip()


# ------------------------------------------------------------------------------------------- in any company

GOOD = st.builds(
    lambda turns, n: f"{' [SEP] '.join(map(words, turns))}\t{words(n)}\n".encode(),
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(0, 60),
)
BAD = st.sampled_from([b"\n", b"no tab\n", b"two\ttabs\there\n", b"\xff\tyes\n"])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(GOOD, BAD), max_size=12), st.integers(1, 5), st.integers(1, 4))
def test_one_result_a_line_in_their_order_however_they_are_cut_into_batches(
    lines: list[bytes], at_once: int, batch: int
) -> None:
    alone = [scores_of([line])[0] for line in lines]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_module, "LINES_AT_ONCE", at_once)
        patch.setattr(score_module, "BATCH", batch)
        found = scores_of(lines)
    assert len(found) == len(lines)
    for number, (scores, expected) in enumerate(zip(found, alone, strict=True), start=1):
        if "error" in expected:
            assert scores == {"error": expected["error"].replace("line 1:", f"line {number}:")}
        else:
            assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["1_coarse", "2_gen", "2_eval"])
@pytest.mark.parametrize("roles", [False, True])
def test_scores_are_the_losses_that_training_computes(name: str, roles: bool) -> None:
    """Of samples packed several a row by the batch makers; `score` puts one a row."""
    stage = make_stage(name, replace(MODEL, n_role=2 * roles)).eval()
    packed = pack_for(name, make_window(), roles=roles, **({"mask_prob": 0.0} if name == "2_eval" else {}))
    unit, records = packed.unit, [Record(*packed.record(sample)) for sample in range(len(packed))]
    found = score(stage, records)
    with torch.no_grad():
        if name == "2_eval":
            expected = {"coherence": stage.coherence_logits(unit).softmax(-1)[:, 1]}
        elif name == "1_coarse":
            expected = {"nll": per_sample(stage.losses(unit)["nll"], unit)}
        else:
            x, one_hot = stage.backbone.embed_unit(unit), torch.eye(MODEL.n_latent)
            nll = [
                per_sample(stage.given_latent(unit, x, z.expand(len(records), -1))["nll"], unit)
                for z in one_hot
            ]
            posterior = stage.posterior(unit, x).softmax(-1)
            expected = {"nll_by_latent": torch.stack(nll, 1), "posterior": posterior}
    if name != "2_eval":
        assert [scores["n_tokens"] for scores in found] == unit["target_sample"].bincount().tolist()
    for key, value in expected.items():
        torch.testing.assert_close(
            torch.tensor([scores[key] for scores in found]), value, rtol=1e-5, atol=1e-6
        )


def per_sample(values: torch.Tensor, unit: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.zeros(len(unit["sample_index"])).index_add(0, unit["target_sample"], values)


def test_roles_are_read_where_the_model_has_them() -> None:
    stage = make_stage("1_coarse", replace(MODEL, n_role=2)).eval()
    record = Record([1, 5, 6, 2, 7, 8, 2], [1, 9, 2])
    (before,) = score(stage, [record])
    with torch.no_grad():
        stage.backbone.role.weight[1, 0] += 1.0  # of the last context turn
    (after,) = score(stage, [record])
    assert abs(before["nll"] - after["nll"]) > 1e-3


def test_a_stage_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage\.eval\(\)"):
        score(make_stage("1_coarse"), [Record([1, 5, 2], [1, 6, 2])])


# --------------------------------------------------------------------------------------------- odd lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "no TAB"),
        (b"\r\n", "no TAB"),
        (b"a context alone\n", "no TAB"),
        (b"a\tb\tc\n", "2 TABs"),
        (b"caf\xe9\tyes\n", "not UTF-8 (invalid continuation byte at byte 3)"),
        (f"{words(LIMIT + 1)}\tyes".encode(), f"the last turn has {LIMIT + 1} tokens; at most {LIMIT}"),
    ],
)
def test_a_line_that_cannot_be_scored_is_an_error_in_its_place(line: bytes, message: str) -> None:
    found = scores_of([b"hi\tyes\n", line, b"hi\tyes\n"])
    assert found[1].keys() == {"error"}
    assert found[1]["error"].startswith("line 2: ")
    assert message in found[1]["error"]
    assert found[0] == found[2] == pytest.approx(scores_of([b"hi\tyes"])[0], rel=1e-5)


def test_a_response_that_is_too_long_is_cut_and_says_so() -> None:
    fits, cut = scores_of([f"hi\t{words(LIMIT)}".encode(), f"hi\t{words(LIMIT + 1)}".encode()])
    assert "response_cut" not in fits
    assert cut["response_cut"]
    assert cut["n_tokens"] == fits["n_tokens"] == LIMIT + 1  # one without its end, the other with it


def test_a_text_that_the_tokenizer_cannot_read_says_so() -> None:
    foreign = ["你好 [SEP] hi\tyes".encode(), "hi\t你好吗".encode()]
    reads, context, response = scores_of([b"hi there\tyes", *foreign])
    assert "unread_share" not in reads
    assert context["unread_share"] == response["unread_share"] == 1
    assert response["nll"] > 0


def test_an_empty_file_has_no_scores() -> None:
    assert scores_of([]) == []


@pytest.mark.parametrize(
    "same",
    [
        b"hi there\tyes\n",
        b"hi there\tyes\r\n",
        b"hi  there \t yes",
        "hi\u00a0there\tyes\n".encode(),
        "\ufeffhi there\tyes\n".encode(),  # the mark that Windows editors put at the start of a file
    ],
)
def test_line_ends_and_white_space_do_not_matter(same: bytes) -> None:
    assert scores_of([same]) == scores_of([b"hi there\tyes"])


def test_an_empty_response_is_its_end_alone_and_an_empty_context_an_empty_turn() -> None:
    empty_response, empty_context = scores_of([b"hi\t\n", b"\tyes\n"])
    assert empty_response["n_tokens"] == 1
    assert empty_context["n_tokens"] == len(TOKENIZER.encode("yes")) + 1
    (expected,) = score(stage_of("1_coarse"), [Record([1, 2], [1, *TOKENIZER.encode("yes"), 2])])
    assert empty_context["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_the_longest_turn_and_the_longest_response_are_scored_whole() -> None:
    (found,) = scores_of([f"{words(LIMIT)}\t{words(LIMIT)}".encode()], "2_gen")
    assert found["n_tokens"] == LIMIT + 1
    assert sum(found["posterior"]) == pytest.approx(1.0, abs=1e-6)


def test_old_turns_that_do_not_fit_are_dropped_as_in_training() -> None:
    with_old, without = scores_of(
        [f"old [SEP] {words(LIMIT)}\tyes".encode(), f"{words(LIMIT)}\tyes".encode()]
    )
    assert with_old == pytest.approx(without, rel=1e-5)


def test_a_separator_in_a_response_is_ordinary_text() -> None:
    (found,) = scores_of([b"hi\tyes [SEP] no"])
    assert found["n_tokens"] == len(TOKENIZER.encode("yes [SEP] no")) + 1 > 4


# ------------------------------------------------------------------------------------------- the command

PAIRS = b"hello ! [SEP] how are you ?\ti am fine .\nno tab\nhi\tyes\r\n"


def released(folder: Path, parts: dict[str, str], leave_out: tuple[str, ...] = ()) -> Path:
    """Knover's tiny models as a release of its files, imported as a model folder."""
    for part, weights in parts.items():
        (folder / "knover" / part).mkdir(parents=True)
        for name, array in load(weights).items():
            if not name.startswith(leave_out):
                write_parameter(folder / "knover" / part / name, array)
    import_knover(folder / "knover", folder / "model", KNOVER, n_head=CONFIG.n_head)
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"Plato": "plato_weights.npz", "NSP": "nsp_weights.npz"}
    return released(tmp_path_factory.mktemp("release"), parts)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    (tmp_path / "pairs.tsv").write_bytes(PAIRS)
    return tmp_path / "pairs.tsv"


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["score", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_near(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for scores, wanted in zip(found, expected, strict=True):
        assert scores.keys() == wanted.keys()
        for key in scores.keys() - {"error"}:
            assert scores[key] == pytest.approx(wanted[key], rel=1e-5)


def test_the_command_prints_a_json_object_a_line(model: Path, pairs: Path) -> None:
    done = run(pairs, "--generation", model, "--evaluation", model, "--device", "cpu")
    assert done.exit_code == 0
    found = json_lines(done.stdout)
    assert [scores.keys() for scores in found] == [
        {"n_tokens", "posterior", "nll_by_latent", "coherence"},
        {"error"},
        {"n_tokens", "posterior", "nll_by_latent", "coherence"},
    ]
    assert_near(found, scores_of(PAIRS.splitlines(keepends=True), "2_gen"))
    assert done.stderr == "1 of 3 lines could not be scored; each has an error in its place\n"


def test_lines_that_the_tokenizer_cannot_read_are_counted(model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.tsv"
    foreign.write_text("hi there\tyes\n你好\tyes\n", encoding="utf-8")
    done = run(foreign, "--evaluation", model, "--device", "cpu")
    assert done.exit_code == 0
    assert done.stderr.startswith("1 of 2 lines have a text that the tokenizer cannot read")


def test_out_writes_the_same_to_a_file(model: Path, pairs: Path, tmp_path: Path) -> None:
    printed = run(pairs, "--evaluation", model, "--device", "cpu")
    (tmp_path / "disk").mkdir()
    (tmp_path / "scores.jsonl").symlink_to(tmp_path / "disk" / "scores")  # a link is followed
    written = run(pairs, "--evaluation", model, "--device", "cpu", "--out", tmp_path / "scores.jsonl")
    assert (tmp_path / "scores.jsonl").is_symlink()
    assert written.stdout == ""
    assert written.exit_code == 0
    assert (tmp_path / "scores.jsonl").read_text(encoding="utf-8") == printed.stdout
    assert {key for scores in json_lines(printed.stdout) for key in scores} == {"coherence", "error"}


@pytest.mark.parametrize(
    ("lines", "n_errors", "message"),
    [(b"", 0, "is empty"), (b"no tab\n\xff\ta\n", 2, "not one of its 2 lines could be scored")],
)
def test_where_nothing_is_scored_the_command_fails(
    model: Path, tmp_path: Path, lines: bytes, n_errors: int, message: str
) -> None:
    (tmp_path / "pairs.tsv").write_bytes(lines)
    done = run(tmp_path / "pairs.tsv", "--evaluation", model, "--device", "cpu")
    assert done.exit_code == 2
    assert [scores.keys() for scores in json_lines(done.stdout)] == [{"error"}] * n_errors
    (error,) = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert message in error


def test_a_release_without_recognition_head_gives_no_posterior(pairs: Path, tmp_path: Path) -> None:
    bare = released(tmp_path, {"Plato": "plato_weights.npz"}, ("recognition_", "bow_"))
    done = run(pairs, "--generation", bare, "--device", "cpu")
    assert done.exit_code == 0
    assert "no recognition head" in done.stderr
    expected = list(score_lines(PAIRS.splitlines(), TOKENIZER, stage_of("2_gen")))
    for scores in expected:
        scores.pop("posterior", None)
    assert_near(json_lines(done.stdout), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{pairs}x", "--generation", "{model}"], "pairs.tsvx: no such file"),
        (["{pairs}", "--generation", "{model}x"], "no such run folder, checkpoint or model folder"),
        (["{pairs}", "--generation", "{model}", "--out", "{pairs}"], "the input file itself"),
        (["{pairs}", "--generation", "{model}", "--out", "{model}"], "a folder; give a new file"),
        (["{pairs}", "--generation", "{model}", "--out", "{model}/no/x"], "no is not a folder"),
    ],
)
def test_mistakes_are_one_line(model: Path, pairs: Path, arguments: list[str], message: str) -> None:
    done = run(*(argument.format(model=model, pairs=pairs) for argument in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert pairs.read_bytes() == PAIRS


def test_models_of_different_tokenizers_are_refused(model: Path, pairs: Path, tmp_path: Path) -> None:
    other = released(tmp_path, {"NSP": "nsp_weights.npz"})
    lower = TOKENIZER.with_lower_case(True)
    lower.save(other / "tokenizer")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tokenizer_sha256": lower.sha256}))
    (other / "config.json.sha256").unlink()  # edited on purpose
    done = run(pairs, "--generation", model, "--evaluation", other)
    assert done.exit_code == 2
    assert "different tokenizers" in done.stderr
