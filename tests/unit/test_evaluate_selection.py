"""Response selection: sets, scores and figures against other implementations and slow loops."""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import KNOVER, make_run
from scipy.stats import permutation_test
from sklearn.metrics import average_precision_score, label_ranking_average_precision_score
from torchmetrics.functional.retrieval import retrieval_reciprocal_rank
from typer.testing import CliRunner

from plato2.commands import app
from plato2.commands.talking import TOLD
from plato2.config import UserError
from plato2.data.samples import encode_context, encode_response
from plato2.data.tokenizer import Tokenizer
from plato2.evaluate.candidates import Query, read_queries
from plato2.evaluate.kept import kept
from plato2.evaluate.results import read_result
from plato2.evaluate.scorers import (
    BM25,
    Coherence,
    LogProb,
    WordOverlap,
    backward,
    baselines,
    forward,
    model_scorers,
    random_scores,
)
from plato2.evaluate.selection import (
    Scores,
    chance,
    evaluate_selection,
    measured,
    permutation_p,
    score_queries,
    sets_of,
)
from plato2.metrics import bootstrap, bootstrap_means
from plato2.talk.rank import backward_log_probs, coherence
from plato2.talk.score import Record, score
from plato2.weights.folder import load_backward, load_evaluation, load_generation
from plato2.words import split_words

SHARED = Path(__file__).parents[3] / "shared" / "data" / "dailydialog_pp" / "dev.jsonl.gz"
CPU = torch.device("cpu")
SET = [
    {
        "context": ["hi", f"how are you {n} ?"],
        "candidates": ["fine", "no", f"you are {n}"],
        "labels": [1, 0, n % 2],
    }
    for n in range(6)
]


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    names = ("1_coarse", "2_gen", "2_eval", "backward")
    return {name: make_run(folder / name, name) for name in names}


# ------------------------------------------------------------------------------------------------- figures


def by_definition(ranked: list[bool], k: int) -> list[float]:
    """AP, RR, P@1 and R@k of labels in their order, as the definitions say."""
    hits = [place for place, right in enumerate(ranked, start=1) if right]
    precisions = [sum(ranked[:place]) / place for place in hits]
    return [sum(precisions) / len(hits), 1 / hits[0], float(ranked[0]), sum(ranked[:k]) / len(hits)]


def test_figures_are_those_of_the_definitions_and_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    for seed in range(60):
        n = int(random.integers(2, 16))
        labels = random.permutation([True, False, *(random.random(n - 2) < 0.4)])
        scores = random.normal(size=n)
        found, tied = measured(scores, labels, [2], seed)
        ranked = [bool(labels[place]) for place in np.argsort(-scores)]
        assert found == pytest.approx(by_definition(ranked, 2), abs=1e-6)
        assert found[0] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
        assert found[0] == pytest.approx(label_ranking_average_precision_score([labels], [scores]), abs=1e-6)
        assert not tied


def test_scores_of_0_or_less_are_scores_too() -> None:
    """torchmetrics takes them for not retrieved; log-probabilities are all below 0."""
    scores, labels = [-3.0, -1.0, 0.0, -2.0], [True, True, False, False]
    assert float(retrieval_reciprocal_rank(torch.tensor(scores), torch.tensor(labels))) == 0.0
    found, _ = measured(scores, labels, [2], 0)
    assert found == pytest.approx([(1 / 2 + 2 / 4) / 2, 1 / 2, 0.0, 1 / 2])


def test_equal_scores_share_what_they_could_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plato2.evaluate.selection.TIE_DRAWS", 4000)
    scores, labels = [2.0, 1.0, 1.0, 1.0, 0.0], [False, True, False, True, True]
    found, tied = measured(scores, labels, [2], 0)
    orders = [by_definition([labels[0], *middle, labels[4]], 2) for middle in permutations(labels[1:4])]
    assert tied
    assert found == pytest.approx(np.mean(orders, axis=0), abs=0.02)


@pytest.mark.parametrize(("n", "right"), [(2, 1), (4, 1), (6, 3), (5, 4), (3, 3)])
def test_chance_is_the_mean_over_all_orders(n: int, right: int) -> None:
    labels = [True] * right + [False] * (n - right)
    expected = np.mean([by_definition(list(order), 2) for order in permutations(labels)], axis=0)
    assert list(chance(n, right, [2]).values()) == pytest.approx(expected)


def test_p_values_are_those_of_scipy() -> None:
    differences = np.random.default_rng(1).normal([0.0, 0.25, 0.6], 1.0, (40, 3))
    found = permutation_p(differences, seed=3)
    for column, p in zip(differences.T, found, strict=True):
        options: dict[str, Any] = {"permutation_type": "samples", "n_resamples": 9999, "rng": 5}
        expected = permutation_test((column,), lambda x, axis: x.mean(axis=axis), vectorized=True, **options)
        assert p == pytest.approx(expected.pvalue, abs=0.015)
    assert permutation_p(np.zeros((5, 1)), 0) == [1.0]


def test_intervals_of_columns_are_those_of_each_column() -> None:
    values = np.random.default_rng(0).normal(size=(30, 2))
    low, high = bootstrap_means(values, 200, seed=4)
    for number, column in enumerate(values.T):
        assert (low[number], high[number]) == pytest.approx(
            bootstrap(lambda draw, column=column: column[draw].mean(), 30, 200, seed=4)
        )
    assert np.isnan(bootstrap_means(np.zeros((0, 2)))).all()


def test_a_result_counts_what_is_left_out_and_corrects_its_tests() -> None:
    labels = [(True, False), (False, True), (False, False), (True, True), (True, False)]
    queries = [Query(("hi",), ("a", "b"), some, {"x": range(2)}) for some in labels]
    scored = [{"first": [1.0, 0.0], "same": [0.5, 0.5], "right": list(map(float, some))} for some in labels]
    result = evaluate_selection(queries, scored, [1, 2])
    assert result.details["sets"]["x"] == {
        "contexts": 3,
        "without_right": 1,
        "without_wrong": 1,
        "candidates": [2, 2],
    }
    assert "x/r2" not in result.measures  # of two candidates
    assert result.measures["x/r1"].label == "x: R_2@1"
    assert result.measures["x/p1"].chance == 0.5
    value = {name: figures["x/p1"].value for name, figures in result.systems.items()}
    assert value["first"] == pytest.approx(2 / 3)
    assert value["right"] == 1.0
    assert value["same"] == pytest.approx(0.5, abs=0.25)
    assert [result.systems[name]["x/ties"].value for name in value] == [0.0, 1.0, 0.0]
    tests = [test for test in result.details["tests"] if test["measure"] == "p1"]
    ordered = sorted(tests, key=lambda test: test["p"])
    running = 0.0
    for rank, test in enumerate(ordered):  # Holm, 1979
        running = max(running, min(1.0, (len(ordered) - rank) * test["p"]))
        assert test["p_holm"] == pytest.approx(running)
    assert evaluate_selection(queries, scored, [1, 2]).details == result.details


def test_a_set_with_nothing_to_choose_is_refused() -> None:
    queries = [Query(("hi",), ("a", "b"), (False, False), {"x": range(2)})]
    with pytest.raises(UserError, match=r"x: none of 1 contexts has both .* \(1 have no right one\)"):
        sets_of(queries, [1])


# -------------------------------------------------------------------------------------------------- scores


def test_scores_of_models_are_those_of_ranking_and_scoring(models: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(KNOVER)
    turns, candidates = ["hi there", "how are you ?"], ["fine thanks", "", "a much longer answer than that"]
    context = encode_context(tokenizer.encode_batch(turns), 128)
    assert context is not None
    words = tokenizer.encode_batch(candidates)
    pairs = [(context, some) for some in words]
    expected = coherence(load_evaluation(models["2_eval"]), pairs)
    judge = Coherence(load_evaluation(models["2_eval"]), tokenizer)
    assert judge(turns, candidates) == pytest.approx(expected)

    back = LogProb(backward(load_backward(models["backward"]), tokenizer))
    means = backward_log_probs(load_backward(models["backward"]), pairs)
    assert back.per_token(turns, candidates) == pytest.approx(means)
    assert back.summed(turns, candidates) == pytest.approx([mean * (len(context) - 1) for mean in means])

    records = [Record(context, encode_response(some)) for some in words]
    for name in ("1_coarse", "2_gen"):
        both = LogProb(forward(load_generation(models[name]), tokenizer))
        found = score(load_generation(models[name]), records)
        for candidate, log_p, mean in zip(
            found, both.summed(turns, candidates), both.per_token(turns, candidates), strict=True
        ):
            by_z = candidate.get("nll_by_latent", [candidate.get("nll")])
            assert log_p == pytest.approx(math.log(sum(math.exp(-nll) for nll in by_z) / len(by_z)))
            assert mean == pytest.approx(log_p / candidate["n_tokens"])


def test_sums_are_weighted_and_side_by_side(models: dict[str, Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "2_eval", head="dual")
    scorers, hashes = model_scorers(
        models["1_coarse"], [models["2_eval"], other], None, ["coherence=2,forward=0.5"], "both", CPU
    )
    assert len(set(hashes.values())) == 3
    given = ["hi"], ["hello", "no"]
    found = {name: np.array(scorer(*given)) for name, scorer in scorers.items()}
    for judge in ("2_eval", "other"):
        for way in ("", ", summed"):
            expected = 2 * found[f"coherence {judge}"] + 0.5 * found[f"forward{way}"]
            assert found[f"coherence=2,forward=0.5{way} {judge}"] == pytest.approx(expected)
    with pytest.raises(UserError, match="--rank backward: backward needs a model; give --backward"):
        model_scorers(models["1_coarse"], [], None, ["backward"], "both", CPU)


def test_shared_words_and_bm25_are_those_of_slow_loops() -> None:
    texts = ["the cat sat", "the dog", "a cat , a dog", ""]
    context, candidates = ["The cat !", "and a mouse"], ["the mouse", "cat", "", "mouse"]
    said = {*split_words(" ".join(context))}
    counted = Counter(word for text in texts for word in {*split_words(text)})
    idf = {word: math.log(5 / (counted[word] + 1)) for word in {*said, *counted}}
    expected = []
    for candidate in candidates:
        own = {*split_words(candidate)}
        norm = math.sqrt(sum(idf[word] ** 2 for word in own))
        expected.append(sum(idf[word] ** 2 for word in own & said) / norm if own else 0.0)
    assert WordOverlap(texts)(context, candidates) == pytest.approx(expected)

    documents, k1, b = [split_words(text) for text in candidates], 1.5, 0.75
    mean = sum(map(len, documents)) / 4
    expected = []
    for document in documents:
        total = 0.0
        for word in split_words(" ".join(context)):
            n = sum(word in other for other in documents)
            tf, longer = document.count(word), 1 - b + b * len(document) / mean
            total += math.log(1 + (4 - n + 0.5) / (n + 0.5)) * tf / (tf + k1 * longer)  # Lucene's
        expected.append(total)
    assert BM25(candidates)(context, candidates) == pytest.approx(expected, rel=1e-5)
    assert BM25(["", "?"])(context, ["", "?"]) == [0.0, 0.0]
    assert BM25(candidates)(["?"], ["cat"]) == [0.0]
    assert random_scores(1)(["a"], candidates) == random_scores(1)(["a"], candidates)


def test_scores_are_kept_and_continued(tmp_path: Path) -> None:
    queries = read_queries(write(tmp_path / "a.jsonl", *SET))
    path, asked = tmp_path / "scores", []

    def scorer(context: Any, candidates: Any) -> list[float]:
        asked.append(context)
        return [float(len(text)) for text in candidates]

    with kept(path, {"a": 1}, Scores) as (done, append):
        found = score_queries(queries[:4], {"length": scorer}, done, append)
        assert len(list(found)) == 4
    path.write_bytes(path.read_bytes()[:-5])  # killed in the middle of a line
    with kept(path, {"a": 1}, Scores) as (done, append):
        assert len(done) == 3
        found = list(score_queries(queries, {"length": scorer}, done, append))
    assert len(asked) == 4 + 3
    assert found == [{"length": [float(len(text)) for text in query.candidates]} for query in queries]
    with pytest.raises(UserError, match="has scores of other a; remove it"), kept(path, {"a": 2}, Scores):
        pass
    with pytest.raises(UserError, match=r"a.jsonl:1: bad gives a candidate nan, not a number"):
        list(score_queries(queries, {"bad": lambda c, r: [math.nan] * len(r)}))


# ---------------------------------------------------------------------------------------------------- sets


def test_dailydialog_has_two_sets_of_one_context(tmp_path: Path) -> None:
    record = {"id": 1, "context": ["hi"], "positive_responses": ["a", "b"]}
    record |= {"adversarial_negative_responses": ["c"], "random_negative_responses": ["d", "e"]}
    path = tmp_path / "dev.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(record).encode()))
    (query,) = read_queries(path, "dailydialog++")
    assert query.labels == (True, True, False, False, False)
    assert {name: "".join(query.candidates[n] for n in own) for name, own in query.sets.items()} == {
        "dev random": "abde",
        "dev adversarial": "abc",
    }


def test_mutual_is_a_folder_of_articles(tmp_path: Path) -> None:
    folder = tmp_path / "dev"
    folder.mkdir()
    for n, letter in enumerate("CA"):
        record = {"answers": letter, "options": ["m : yes .", "f : no .", "M: maybe"], "id": f"dev_{n}"}
        write(folder / f"dev_{n}.txt", record | {"article": "m : is it 5 ? f : 6 : not 5 . m : oh"})
    first, second = read_queries(folder, "mutual")
    assert first.context == ("is it 5 ?", "6 : not 5 .", "oh")
    assert first.candidates == ("yes .", "no .", "maybe")
    assert first.labels == (False, False, True)
    assert second.labels == (True, False, False)


@pytest.mark.parametrize(
    ("record", "format", "message"),
    [
        ({"context": ["a"], "candidates": ["b"]}, "jsonl", "a.jsonl:1: labels is missing; a line is"),
        ({**SET[0], "labels": [1]}, "jsonl", "3 candidates and 1 labels; give each candidate one"),
        ({**SET[0], "labels": [1, 0, 2]}, "jsonl", r"labels.2.*=2"),
        ({**SET[0], "context": ["a", " "]}, "jsonl", "the last turn of the context is empty"),
        ({**SET[0], "context": []}, "jsonl", r"context=\[\]"),
        ({"article": "m : a", "options": ["b"], "answers": "C"}, "mutual", "answers='C' with 1 options"),
        (SET[0], "csv", "--format csv: no such format"),
    ],
)
def test_what_is_wrong_with_a_set_is_one_line(
    tmp_path: Path, record: dict[str, Any], format: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_queries(write(tmp_path / "a.jsonl", record), format)


def test_an_empty_set_and_an_id_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no context in it"):
        read_queries(write(tmp_path / "a.jsonl"))
    twice = [{**SET[0], "id": 1}, {**SET[0], "id": "1"}]
    with pytest.raises(UserError, match=r"a\.jsonl:2: the id 1 again"):
        read_queries(write(tmp_path / "a.jsonl", *twice))


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data, ../shared/data")
def test_adversarial_candidates_deceive_shared_words() -> None:
    queries = read_queries(SHARED, "dailydialog++")
    assert len(queries) == 1028
    queries = queries[:150]
    candidates = [text for query in queries for text in query.candidates]
    scorers = baselines([query.context for query in queries], candidates, None, seed=0)
    result = evaluate_selection(queries, list(score_queries(queries, scorers)))
    found = {
        name: [figures[f"dev {kind}/map"] for kind in ("random", "adversarial")]
        for name, figures in result.systems.items()
    }
    assert result.measures["dev random/map"].chance == pytest.approx(0.607, abs=0.001)
    for figure in found["random"]:
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low < 0.607 < figure.high
    easy, hard = found["short"]  # people's own negatives are longer
    assert (easy.low or 0.0) > 0.607
    assert (hard.low or 0.0) > 0.75
    for name in ("shared words", "BM25"):
        easy, hard = found[name]
        assert (easy.low or 0.0) > 0.65
        assert (hard.high or 1.0) < 0.607


# -------------------------------------------------------------------------------------------------- the verb


def test_the_verb(models: dict[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *SET)
    out, picture, scores = tmp_path / "out.json", tmp_path / "out.svg", tmp_path / "scores.jsonl"
    arguments = [
        "evaluate",
        "selection",
        file,
        "--evaluation",
        models["2_eval"],
        "--generation",
        models["2_gen"],
    ]
    arguments += ["--backward", models["backward"], "--rank", "coherence=1,backward=0.5", "--device", "cpu"]
    arguments += ["--out", out, "--picture", picture, "--scores", scores]
    shown = CliRunner().invoke(app, list(map(str, arguments)))
    assert shown.exit_code == 0, shown.output
    assert "MAP" in shown.stdout
    again = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    result = read_result(out)
    assert json.loads(again.stdout)["systems"] == result.model_dump()["systems"]
    assert list(result.systems)[:5] == ["random", "shared words", "BM25", "short", "coherence"]
    assert "coherence=1,backward=0.5, summed" in result.systems
    assert len(scores.read_text().splitlines()) == 1 + len(SET)
    assert picture.read_text().startswith("<?xml")
    for bad, message in (
        (["--k", "0"], "--k 0: give whole numbers"),
        (["--length", "tokens"], "--length tokens"),
        (["--rank", "backward"], "--rank backward: backward needs a model; give --backward"),
        (["--data", tmp_path / "no"], f"--data {tmp_path}/no: no prepared corpus there"),
    ):
        done = CliRunner().invoke(app, ["evaluate", "selection", str(file), *map(str, bad)])
        assert done.exit_code == 2, done.output
        (error,) = done.stderr.removeprefix(f"{TOLD}\n").splitlines()  # what is said of the default model
        assert message in error


def test_without_the_extra_nothing_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    file = write(tmp_path / "a.jsonl", *SET)
    for verb in (
        ["selection", str(file)],
        ["systems", "--speaker", "a=plato2:no", "--out", str(tmp_path / "x")],
    ):
        done = CliRunner().invoke(app, ["evaluate", *verb])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert f"plato2 evaluate {verb[0]} needs bm25s: pip install '.[eval]'" in done.stderr


def test_rivals_choose_beside_ours(models: dict[str, Path], tmp_path: Path) -> None:
    rivals = pytest.importorskip("rivals")
    file, scores = write(tmp_path / "a.jsonl", *SET), tmp_path / "scores.jsonl"
    gpt2, reverse = rivals.gpt2(tmp_path / "gpt2"), rivals.gpt2(tmp_path / "reverse", seed=1)
    ours = f"plato2:{models['2_gen']},evaluation={models['2_eval']},backward={models['backward']}"
    given = ["evaluate", "selection", str(file), "--no-baselines", "--device", "cpu", "--json"]
    given += ["--generation", str(models["2_gen"]), "--scores", str(scores), "--speaker", f"ours={ours}"]
    rival = f"gpt2=dialogpt:{gpt2},reverse={reverse}"
    done = CliRunner().invoke(app, [*given, "--speaker", rival])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    own = ["coherence ours", "forward ours", "forward ours, summed", "backward ours", "backward ours, summed"]
    theirs = ["forward gpt2", "forward gpt2, summed", "backward gpt2", "backward gpt2, summed"]
    assert list(result["systems"]) == ["forward", "forward, summed", *own, *theirs]
    assert result["systems"]["forward ours"] == result["systems"]["forward"]
    kept = scores.read_bytes()
    scores.write_bytes(kept[: len(kept) // 2])  # killed in the middle
    again = CliRunner().invoke(app, [*given, "--speaker", rival])
    assert json.loads(again.stdout)["systems"] == result["systems"]
    assert scores.read_bytes() == kept
    for bad, message in (
        ([rival, "gpt2=log:x"], f"--speaker {rival}: gpt2 twice; give each a name of its own"),
        (["openai:http://127.0.0.1:1/v1#x"], "x: gives replies but no probabilities, so it cannot choose"),
        ([f"gpt2=dialogpt:{reverse}"], f"--scores {scores}: has scores of other models"),
    ):
        done = CliRunner().invoke(app, [*given, *(part for text in bad for part in ("--speaker", text))])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert message in done.stderr


def test_rare_words_of_a_corpus(corpus: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *SET)
    done = CliRunner().invoke(app, ["evaluate", "selection", str(file), "--data", str(corpus), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["data"] == str(corpus)
