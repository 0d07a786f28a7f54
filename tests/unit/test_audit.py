"""What automatic scores have to do with human ratings: files, scores, correlations, the verb."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import make_run
from scipy.stats import spearmanr
from test_human_ratings import assert_documented
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.evaluate import audit
from plato2.evaluate.audit import (
    ceiling,
    correlation,
    embedding_scores,
    model_scores,
    reference_scores,
    spearman,
    text_scores,
    to_line,
)
from plato2.evaluate.rated import RatedReply, read_rated
from plato2.evaluate.results import read_result
from plato2.talk.score import score

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data, ../shared/data")


def rated(context: list[str], reply: str, ratings: list[float], references: list[str] | None = None) -> Any:
    return RatedReply(tuple(context), reply, {"rating": tuple(ratings)}, tuple(references or ()))


# ------------------------------------------------------------------------------------------------- files


def test_own_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        {"context": ["hi"], "reply": "hello", "ratings": [1, None, 2.5], "references": ["hey"], "id": 3},
        {"context": [], "reply": "", "ratings": {"fluent": [3], "nice": [None]}},
        {"context": ["a"], "reply": "b", "ratings": []},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replies, counts = read_rated(path)
    assert replies == [
        RatedReply(("hi",), "hello", {"rating": (1, 2.5)}, ("hey",)),
        RatedReply((), "", {"fluent": (3,)}),
    ]
    assert counts == {"replies": 2, "unrated": 1, "labels_missing": 2, "dialogues": 0}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", "", "no rated reply in it"),
        ("a.jsonl", '{"context": ["a"], "reply": "b"}', "a.jsonl:1: ratings is missing"),
        ("a.jsonl", '{"context": ["a"], "reply": "b", "ratings": [null]}', "no rated reply in it"),
        ("a.jsonl", '{"context": "a", "reply": "b", "ratings": [1]}', "a.jsonl:1: context='a'"),
        ("a.json", "{}", "a.json: "),
        ("a.csv", "context,response\na,b\n", "no column human_average_rating"),
        (
            "a.csv",
            "context,response,human_average_rating,all_references\na,b,x,c\n",
            "row 1: human_average_rating='x': not a number",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, data: str, message: str) -> None:
    (tmp_path / name).write_text(data)
    with pytest.raises(UserError) as caught:
        read_rated(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_data
def test_real_files() -> None:
    replies, counts = read_rated(SHARED / "fed" / "fed_data.json.gz")
    assert (len(replies), counts["dialogues"], counts["labels_missing"]) == (375, 125, 12)
    assert replies[0].context[:2] == ("Hi!", "Hi! What's up?")
    assert replies[0].reply == "It's probably boring, isn't it?"
    assert replies[0].ratings["Overall"] == (2, 1, 3, 3, 4)
    replies, counts = read_rated(SHARED / "dailydialog" / "mturk_rating.csv")
    assert (len(replies), replies[0].ratings) == (500, {"rating": (4.8,)})
    assert [len(replies[0].context), len(replies[0].references)] == [5, 4]


# ------------------------------------------------------------------------------------------------- scores


def test_scores_of_texts() -> None:
    replies = [
        rated(["Do you like tea ?", "Yes .", "Why ?"], "you like tea , you do", [1]),
        rated(["Hello"], "", [1]),
        rated(["x"], "x", [1]),
    ]
    found = text_scores(replies)
    assert found["words"].tolist() == [5, 0, 1]
    assert found["distinct_1"][0] == 4 / 5
    assert found["distinct_2"][0] == 1
    assert found["seen"][0] == 1
    assert found["overlap"][0] == pytest.approx(1)
    assert found["repeated"][0] == 0  # its speaker said only "Yes ."
    assert all(math.isnan(found[name][1]) for name in ("seen", "overlap", "repeated", "distinct_1"))
    spoken = rated(["I like tea", "ok"], "I like tea now", [1])
    assert text_scores([spoken])["repeated"].tolist() == [2 / 3]


def test_overlap_is_weighted_by_idf() -> None:
    replies = [rated(["the cat"], "the dog", [1]), rated(["the tea"], "cat", [1])]
    idf_the, idf_dog = math.log(4 / 3), math.log(4 / 1)
    assert text_scores(replies)["overlap"][0] == pytest.approx(idf_the / (idf_the + idf_dog))


def test_scores_by_references() -> None:
    same = rated(["hi"], "i am fine thank you", [1], ["what is up", "i am fine thank you"])
    other = rated(["hi"], "zzz", [1], ["what is up"])
    found = reference_scores([same, other, rated(["hi"], "a", [1])])
    assert [found["bleu"][0], found["chrf"][0]] == pytest.approx([100, 100])
    assert found["rouge_l"].tolist()[:2] == [1, 0]
    assert all(math.isnan(values[2]) for values in found.values())


def test_scores_by_embedding() -> None:
    def encode(texts: Any) -> np.ndarray:
        angles = np.array([0.1 * len(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[text != ""] for text in texts]

    replies = [rated(["aa"], "aaaa", [1], ["a", "aaaaa"]), rated([], "", [1], ["a"])]
    found = embedding_scores(replies, encode)
    assert found["similarity_context"][0] == pytest.approx(math.cos(0.2))
    assert found["similarity_references"][0] == pytest.approx(math.cos(0.1))
    assert all(math.isnan(values[1]) for values in found.values())


def test_scores_by_models() -> None:
    scored = [
        {"coherence": 0.5, "nll_by_latent": [1.0, 2.0], "n_tokens": 2},
        {"nll": 3.0, "n_tokens": 3},
        {"nll": 3.0, "n_tokens": 3, "response_cut": True},
        {"error": "line 4: too long"},
    ]
    found = model_scores(scored)
    assert found["log_p"][0] == pytest.approx(math.log((math.exp(-1) + math.exp(-2)) / 2))
    assert found["log_p_token"][:2].tolist() == [pytest.approx(found["log_p"][0] / 2), -1]
    assert np.isnan(found["log_p"][2:]).all()
    assert found["coherence"][0] == 0.5
    assert to_line(rated(["a\tb [SEP] c", "d"], "e\nf", [1])) == b"a b   c [SEP] d\te f"


def test_a_model_that_gives_no_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="reply 2: the model gives nll nan; is it trained to its end"):
        model_scores([{"nll": 3.0, "n_tokens": 3}, {"nll": math.nan, "n_tokens": 3}])


# ------------------------------------------------------------------------------------------- correlations


def test_correlation_is_spearmans_of_the_cases_written_out() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40).astype(float), rng.integers(0, 4, 40).astype(float)
    weights = rng.integers(0, 4, (20, 40))
    slow = [spearmanr(np.repeat(x, w), np.repeat(y, w)).statistic for w in weights]
    assert spearman(x, y, weights) == pytest.approx(np.array(slow))


def test_the_interval_draws_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a slow loop that draws contexts with all their replies; in several blocks as in one."""
    rng = np.random.default_rng(1)
    contexts = [str(n) for n in range(20) for _ in range(1 + n % 3)]
    x = rng.normal(size=len(contexts))
    y = x + rng.normal(size=len(contexts))
    x[3] = np.nan
    monkeypatch.setattr(audit, "AT_ONCE", 7 * len(contexts))
    figure = correlation([(x, y)], contexts, seed=4)
    kept = np.isfinite(x)
    assert figure.value == pytest.approx(spearmanr(x[kept], y[kept]).statistic)
    assert figure.n == kept.sum()
    slow = []
    for draw in np.random.default_rng(4).integers(0, 20, (audit.RESAMPLES, 20)):
        rows = [
            row for context in draw for row, of in enumerate(contexts) if of == str(context) and kept[row]
        ]
        slow.append(spearmanr(x[rows], y[rows]).statistic)
    assert [figure.low, figure.high] == pytest.approx(np.quantile(slow, (0.025, 0.975)))


def test_ceiling() -> None:
    rng = np.random.default_rng(2)
    ratings = [tuple(rng.integers(0, 5, size=n).astype(float)) for n in rng.integers(3, 6, 50)]
    ratings.append((3.0,))
    contexts = list(map(str, range(51)))
    slow = []
    for k in range(5):
        rows = [given for given in ratings if 1 < len(given) > k]
        others = [np.mean([v for place, v in enumerate(given) if place != k]) for given in rows]
        slow.append(spearmanr([given[k] for given in rows], others).statistic)
    assert ceiling(ratings, contexts, 0).value == pytest.approx(np.mean(slow))
    assert ceiling([(1.0,), (2.0,)], ["a", "b"], 0).note == "one rating for each reply"


@pytest.mark.parametrize(
    ("x", "y", "note"),
    [
        ([1, 2, 3, 4], [2, 2, 2, 2], "all ratings are equal: not defined"),
        ([1, 1, 1, 1], [1, 2, 3, 4], "all scores are equal: not defined"),
        ([1], [1], "1 replies are too few"),
        ([math.nan] * 4, [1, 2, 3, 4], "no reply has it"),
    ],
)
def test_where_it_is_not_defined(x: list[float], y: list[float], note: str) -> None:
    figure = correlation([(np.array(x, float), np.array(y, float))], list(map(str, x)), 0)
    assert (figure.value, figure.note) == (None, note)


# ------------------------------------------------------------------------------------------------ the verb


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", "audit", *arguments], env={"COLUMNS": "200"})


def own_file(folder: Path, ratings: Any) -> Path:
    path = folder / "own.jsonl"
    with path.open("w") as file:
        for n in range(30):
            record = {"context": [f"c{n}"], "reply": " ".join(["w"] * (1 + n)), "ratings": ratings(n)}
            file.write(json.dumps(record) + "\n")
    return path


def test_the_verb(tmp_path: Path) -> None:
    path, out = own_file(tmp_path, lambda n: [n, n + (n % 2)]), tmp_path / "audit.json"
    image = tmp_path / "audit.svg"
    done = call(str(path), "--no-embedding", "--out", str(out), "--picture", str(image))
    assert done.exit_code == 0, done.output
    figures = read_result(out).systems["rating"]
    assert figures["words"].value == pytest.approx(1, abs=0.01)
    assert figures["seen"].note == "all scores are equal: not defined"
    assert "bleu" not in figures
    assert all(measure.chance is None for measure in read_result(out).measures.values())
    assert figures["ceiling"].value > 0.9
    assert "own: 30 rated replies" in done.stdout
    assert image.read_text().startswith("<?xml")
    again = json.loads(call(str(path), "--no-embedding", "--json").stdout)
    assert again["systems"] == read_result(out).model_dump()["systems"]


def test_a_score_that_says_nothing_is_marked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = own_file(tmp_path, lambda n: rng.integers(0, 5, 3).tolist())
    done = call(str(path), "--no-embedding")
    line = next(line for line in done.stdout.splitlines() if line.startswith("│ words "))
    assert "·" in line
    assert "·" not in line.replace("·", "", 1)


def test_all_ratings_are_equal(tmp_path: Path) -> None:
    done = call(str(own_file(tmp_path, lambda n: [3, 3])), "--no-embedding")
    assert done.stdout.count("(all ratings are equal: not defined)") == 7
    assert "holds 0" not in done.stdout  # nothing is marked, so no mark is explained


def test_options(tmp_path: Path) -> None:
    path = str(own_file(tmp_path, lambda n: {"a": [n], "b": [n]}))
    assert list(json.loads(call(path, "--no-embedding", "--quality", "b", "--json").stdout)["systems"]) == [
        "b"
    ]
    for arguments, message in (
        (["--quality", "c"], "--quality c: not rated there; there are a, b"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        ([path], "own: twice; give it once"),
        (["--picture", "x.txt"], "--picture x.txt: give a file that ends in"),
    ):
        done = call(path, "--no-embedding", *arguments)
        assert done.exit_code == 2
        assert message.replace("own:", f"{path}:") in done.stderr.replace("\n", "")


@needs_data
def test_fed() -> None:
    """Length has to do with how interesting a reply is, and shared words with nothing there."""
    path = str(SHARED / "fed" / "fed_data.json.gz")
    given = [path, "--no-embedding", "--quality", "Overall", "--quality", "Interesting"]
    done = CliRunner().invoke(app, ["evaluate", "audit", *given], env={"COLUMNS": "100"})
    assert_documented("audit.md", done.stdout)


@needs_data
@pytest.mark.slow
def test_dailydialog_with_embeddings() -> None:
    """The figures of docs/audit.md."""
    done = call(str(SHARED / "dailydialog" / "mturk_rating.csv"), "--json")
    figures = json.loads(done.stdout)["systems"]["rating"]
    for name, value in (("similarity_references", 0.44), ("bleu", 0.26), ("words", -0.19)):
        assert figures[name]["value"] == pytest.approx(value, abs=0.006), name
    assert figures["ceiling"]["note"] == "one rating for each reply"


def test_what_models_say_of_the_replies(tmp_path: Path) -> None:
    """Through the verb as through plato2 score."""
    path = tmp_path / "own.jsonl"
    lines = [
        (["hi , how are you ?"], "i am fine ."),
        (["what ?", "no ."], "why not ?"),
        (["ok"], "see you !"),
    ]
    with path.open("w") as file:
        for n, (context, reply) in enumerate(lines):
            file.write(json.dumps({"context": context, "reply": reply, "ratings": [n]}) + "\n")
    generation = str(make_run(tmp_path / "g", "2_gen"))
    evaluation = str(make_run(tmp_path / "e", "2_eval"))
    models = ["--generation", generation, "--evaluation", evaluation]
    done = call(str(path), "--no-embedding", *models, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)["systems"]["rating"]
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{' [SEP] '.join(context)}\t{reply}\n" for context, reply in lines))
    scored = CliRunner().invoke(app, ["score", str(pairs), *models]).stdout.splitlines()
    found = model_scores(list(map(json.loads, scored)))
    for name in ("coherence", "log_p", "log_p_token"):
        assert np.isfinite(found[name]).all()
        assert figures[name]["value"] == pytest.approx(spearmanr(found[name], [0, 1, 2]).statistic), name


def test_an_interrupted_audit_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keep = own_file(tmp_path, lambda n: [n % 4]), tmp_path / "scores"
    model = str(make_run(tmp_path / "g", "2_gen"))
    arguments = [str(path), "--generation", model, "--no-embedding", "--json"]
    monkeypatch.setattr("plato2.talk.score.LINES_AT_ONCE", 8)
    whole = json.loads(call(*arguments).stdout)
    read: list[int] = []

    def interrupted(network: Any, records: Any) -> Any:
        if read == [8, 8]:
            raise KeyboardInterrupt
        read.append(len(records))
        return score(network, records)

    monkeypatch.setattr("plato2.talk.score.score", interrupted)
    assert call(*arguments, "--scores", str(keep)).exit_code == 130
    assert keep.read_bytes().count(b"\n") == 1 + 16
    read[:] = []
    again = json.loads(call(*arguments, "--scores", str(keep)).stdout)
    assert read == [8, 6]
    assert again["systems"] == whole["systems"]


@pytest.mark.slow
def test_imports_that_print_do_not_reach_json(tmp_path: Path) -> None:
    """With WANDB_MODE=offline transformers prints when it is imported, also by torchmetrics' text metrics."""
    path = tmp_path / "own.jsonl"
    lines = [{"context": ["a"], "reply": "b " * n, "references": ["b c"], "ratings": [n]} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, lines)))
    command = [sys.executable, "-m", "plato2", "evaluate", "audit", str(path), "--json"]
    done = subprocess.run(
        command, env=os.environ | {"WANDB_MODE": "offline"}, capture_output=True, check=True
    )
    assert "similarity_references" in json.loads(done.stdout)["measures"]


@pytest.mark.slow
def test_embeddings_are_kept(tmp_path: Path) -> None:
    path, keep = own_file(tmp_path, lambda n: [n % 4]), tmp_path / "scores"
    first = json.loads(call(str(path), "--scores", str(keep), "--json").stdout)
    kept = keep.with_name("scores.embeddings")
    size = kept.stat().st_size
    kept.write_bytes(kept.read_bytes()[:-5])  # killed in the middle of one
    assert json.loads(call(str(path), "--scores", str(keep), "--json").stdout)["systems"] == first["systems"]
    assert kept.stat().st_size == size
