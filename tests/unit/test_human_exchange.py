"""The power calculation, and tasks and ratings in the formats of other tools."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_ind
from test_human_ratings import (
    SIDES,
    assert_documented,
    call,
    files,
    needs_data,
    pair_ratings,
    question,
    scores_of,
    shown,
)
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.evaluate.dialogues import read_dialogues
from plato2.evaluate.human.exchange import (
    acute_tasks,
    from_acute,
    from_csv,
    from_potato,
    to_acute,
    to_acute_table,
    to_csv,
    to_potato,
    to_potato_answers,
)
from plato2.evaluate.human.formats import Item, Rating, Said, Shown, Tasks, read_tasks
from plato2.evaluate.human.power import (
    Variances,
    majority_share,
    measured,
    pair_cases,
    score_cases,
    score_difference,
    sign_test_power,
)
from plato2.evaluate.human.ratings import check_ratings, read_ratings, units_of
from plato2.evaluate.results import read_result

SHARED = Path(__file__).parents[3] / "shared" / "data"

# --------------------------------------------------------------------------------------------------- power


def test_cases_that_a_t_test_needs_are_those_of_a_simulation() -> None:
    variances, raters, difference = Variances(0.1, 0.3), 3, 0.2
    n = score_cases(difference, raters, variances, 0.8, 0.05)
    rng = np.random.default_rng(0)

    def means(shift: float) -> np.ndarray:
        true = rng.normal(shift, math.sqrt(0.1), (2000, n, 1))
        return (true + rng.normal(0, math.sqrt(0.3), (2000, n, raters))).mean(axis=2)

    found = ttest_ind(means(0), means(difference), axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    seen = score_difference(n, raters, variances, 0.8, 0.05)
    assert seen == pytest.approx(difference, rel=0.01)
    assert score_cases(difference, 5, variances, 0.8, 0.05) < n < score_cases(0.1, 3, variances, 0.8, 0.05)


def test_power_of_the_sign_test() -> None:
    power = sign_test_power(0.7, 0.05, 60)
    for n in (1, 5, 6, 23, 60):
        slow = sum(
            math.comb(n, wins) * 0.7**wins * 0.3 ** (n - wins)
            for wins in range(n + 1)
            if binomtest(wins, n).pvalue <= 0.05
        )
        assert power[n - 1] == pytest.approx(slow), n


def test_the_majority_of_raters_of_pairs() -> None:
    assert majority_share(0.7, 1, 0.4) == (pytest.approx(0.7), pytest.approx(1))
    assert majority_share(0.7, 3, 0.0)[0] == pytest.approx(0.7**3 + 3 * 0.7**2 * 0.3)
    won, decided = majority_share(0.7, 2, 0.0)
    assert (won, decided) == (pytest.approx(0.49 / 0.58), pytest.approx(0.58))
    assert 0.7 < majority_share(0.7, 3, 0.4)[0] < majority_share(0.7, 3, 0.0)[0]
    n = pair_cases(0.7, 1, 0.8, 0.05)
    assert n is not None
    assert (sign_test_power(0.7, 0.05)[n - 1 : n + 200] >= 0.8).all()
    assert sign_test_power(0.7, 0.05)[n - 2] < 0.8
    assert pair_cases(0.7, 1, 0.8, 0.05, ties=0.5) == 2 * n
    assert pair_cases(0.501, 1, 0.8, 0.05) is None


def test_variances_are_found_in_ratings() -> None:
    rng = np.random.default_rng(3)
    true = {"a": rng.normal(10, 2, 400), "b": rng.normal(30, 2, 400)}
    values = {
        name: [rng.normal(case, 3, 3).round().astype(int).tolist() for case in cases]
        for name, cases in true.items()
    }
    tasks, ratings = scores_of(values)
    levels = question("good", levels=list(range(-20, 60)))
    tasks = tasks.model_copy(update={"questions": [levels]})
    name, variances = measured(check_ratings(tasks, ratings))
    assert name == "good"
    assert (variances.case, variances.rater) == (pytest.approx(4, rel=0.15), pytest.approx(9, rel=0.1))
    with pytest.raises(UserError, match="question=nice: the tasks have scores of good"):
        measured(check_ratings(tasks, ratings), "nice")
    with pytest.raises(UserError, match="needs two cases"):
        measured(check_ratings(tasks, ratings[:3]))


def test_the_power_verb(tmp_path: Path) -> None:
    out = tmp_path / "power.json"
    done = call("power", "--items", "200", "--out", str(out), "--picture", str(tmp_path / "p.png"))
    assert done.exit_code == 0, done.output
    result = read_result(out)
    assert list(result.systems) == ["1 rater", "2 raters", "3 raters", "5 raters"]
    assert result.systems["3 raters"]["d0.1"].value == score_cases(0.1, 3, Variances(), 0.8, 0.05)
    assert "smallest difference seen with 200" in done.stdout
    assert (tmp_path / "p.png").stat().st_size > 1000
    pairs = json.loads(call("power", "--preset", "acute", "--rater", "3", "--items", "100", "--json").stdout)
    assert pairs["systems"]["3 raters"]["d0.6"]["value"] == pair_cases(0.6, 3, 0.8, 0.05)
    assert 0.5 < pairs["systems"]["3 raters"]["seen"]["value"] < 0.8
    given = files(tmp_path, *scores_of({"a": [[2, 2, 1], [0, 1, 0], [2, 1, 2]]}))
    done = call("power", "--tasks", given[0], "--ratings", given[1])
    assert "measured, good" in done.stdout


def test_the_table_of_power_in_the_documents() -> None:
    assert_documented("ratings.md", call("power", "--items", "200", width=80).stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "x"], "--preset x: there are plato"),
        (["--difference", "2"], "--difference 2.0: must be between 0 and 2"),
        (["--preset", "acute", "--difference", "0.5"], "--difference 0.5: must be between 0.5 and 1"),
        (["--rater", "0"], "--rater 0: must be"),
        (["--power", "1"], "--power 1.0: must be"),
        (["--tasks", "t.json"], "give both"),
    ],
)
def test_options_of_power(arguments: list[str], message: str) -> None:
    done = call("power", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr


# ------------------------------------------------------------------------------------------------ exchange


def all_kinds() -> tuple[Tasks, list[Rating]]:
    """Turns, dialogues, candidates and pairs, with texts that are not harmless."""
    evil = [Said(text="<script>alert(1)</script>", by_system=False), Said(text='a,"b"\n& c', by_system=True)]
    one = Shown(system="m|n", dialogue="7", turns=evil)
    listed = Shown(system="m", dialogue="8", turns=evil[:1], candidates=["yes", "<b>"])
    items = [
        Item(id="0", start="s@0", shown=[one]),
        Item(id="x@1", start="s1", shown=[one, shown("n")]),
        Item(id="2", start="s2", shown=[listed]),
        Item(id="3", start="s3", shown=[one, one], expected={"better": "left"}),
    ]
    questions = [question("turn", "utterance"), question("whole"), question("fits", "candidate", [0, 1])]
    questions.append(question("better", "pair", SIDES))
    tasks = Tasks(preset="x", questions=questions, items=items)
    rng = random.Random(0)
    ratings = [
        Rating(
            item=item.id,
            question=unit.question.name,
            rater=rater,
            value=rng.choice(unit.question.levels).value,
            place=unit.place,
        )
        for item in items
        for unit in units_of(item, questions)
        for rater in ("ann", "bob, jr")
    ]
    return tasks, ratings


def key(rating: Rating) -> tuple[Any, ...]:
    return rating.item, rating.question, rating.place or 0, rating.rater


def test_csv_there_and_back(tmp_path: Path) -> None:
    tasks, ratings = all_kinds()
    ratings[0] = ratings[0].model_copy(update={"seconds": 2.5})
    path = tmp_path / "r.csv"
    path.write_text(to_csv(tasks, ratings))
    assert from_csv(path) == ratings
    rows = list(csv.DictReader(path.read_text().splitlines(keepends=True)))
    assert {row["systems"] for row in rows} == {"m|n", "m|n|n", "m", "m|n|m|n"}


def test_the_command_converts_what_it_says(tmp_path: Path) -> None:
    """A table needs no pairs; ACUTE-Eval does, and where there are none, no option of others is named."""
    tasks, ratings = all_kinds()
    single = [item for item in tasks.items if len(item.shown) == 1]
    asked = [question for question in tasks.questions if question.per != "pair"]
    tasks = tasks.model_copy(update={"items": single, "questions": asked})
    ratings = [rating for rating in ratings if rating.item in {item.id for item in single}]
    files = [tmp_path / "tasks.json", tmp_path / "r.jsonl", tmp_path / "out.csv", tmp_path / "again.jsonl"]
    files[0].write_text(tasks.model_dump_json())
    files[1].write_text("".join(rating.model_dump_json() + "\n" for rating in ratings))
    there = ["convert", files[0], files[1], "--to", "csv", "--out", files[2]]
    back = ["import", files[2], "--from", "csv", "--tasks", files[0], "--out", files[3]]
    for arguments in (there, back):
        done = CliRunner().invoke(app, ["evaluate", "human", *map(str, arguments)])
        assert done.exit_code == 0, done.output
    assert read_ratings([files[3]]) == ratings
    there[there.index("csv")] = "acute"
    done = CliRunner().invoke(app, ["evaluate", "human", *map(str, there)])
    assert done.exit_code == 2
    assert "no item has two dialogues" in done.stderr
    assert "--preset" not in done.stderr


def answered_in_potato(folder: Path, ratings: list[Rating]) -> None:
    """What Potato writes: a folder for each rater, a line for each instance."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for rating in ratings:
        instance = rating.item if rating.place is None else f"{rating.item}@{rating.place}"
        labels = lines.setdefault((rating.rater, instance), {"other": {"text": "fine"}})
        labels[rating.question] = {str(rating.value): "1"}
    for (rater, instance), labels in lines.items():
        path = folder / rater / "annotated_instances.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "id": instance,
            "displayed_text": "...",
            "label_annotations": labels,
            "span_annotations": {},
        }
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def test_potato_there_and_back(tmp_path: Path) -> None:
    import yaml

    tasks, ratings = all_kinds()
    configs = to_potato(tasks, tmp_path / "p")
    assert [path.parent.name for path in configs] == ["utterance", "dialogue", "candidate", "pair"]
    asked = {}
    for path in configs:
        config = yaml.safe_load(path.read_text())
        data = [json.loads(line) for line in (path.parent / config["data_files"][0]).read_text().splitlines()]
        assert not any("<script>" in one["text"] for one in data)
        asked[path.parent.name] = [one["id"] for one in data]
        scheme = config["annotation_schemes"][0]
        assert [label["name"] for label in scheme["labels"]]
    assert asked == {
        "utterance": ["0@1"],
        "dialogue": ["0", "2"],
        "candidate": ["2@0", "2@1"],
        "pair": ["x@1", "3"],
    }
    answered_in_potato(tmp_path / "answers", ratings)
    assert sorted(from_potato(tmp_path / "answers", tasks), key=key) == sorted(ratings, key=key)
    with pytest.raises(UserError, match=r"no annotated_instances\.jsonl below it"):
        from_potato(tmp_path / "none", tasks)


def test_acute_there_and_back(tmp_path: Path) -> None:
    tasks, _ = all_kinds()
    path = tmp_path / "pairings.jsonl"
    path.write_text(to_acute(tasks))
    first, check = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["speakers_to_eval"], first["is_onboarding"]) == (["m|n", "n"], False)
    assert (check["correct_answer"], check["speakers_to_eval"]) == ("m|n", ["m|n", "m|n (2)"])
    back = acute_tasks(path)
    assert [item.shown[0].turns for item in back.items] == [tasks.items[1].shown[0].turns] * 2
    assert back.items[1].expected == {"preference": "left"}
    answers = tmp_path / "answers.csv"
    answers.write_text("worker,winner,loser,pairing_id\nw,n,m|n,0\nv,m|n (2),m|n,1\n")
    assert from_acute(answers, tasks) == [
        Rating(item="x@1", question="better", rater="w", value="right"),
        Rating(item="3", question="better", rater="v", value="right"),
    ]
    checked = check_ratings(tasks, from_acute(answers, tasks))
    assert checked.failed == {"v": 1}


def test_ratings_of_acute_there_and_back(tmp_path: Path) -> None:
    tasks, ratings = all_kinds()
    pairs = [one.model_copy(update={"seconds": 2.5}) for one in ratings if one.question == "better"]
    pairs = [
        one.model_copy(update={"value": side}) for one, side in zip(pairs, ["left", "right"] * 2, strict=True)
    ]
    path = tmp_path / "answers.csv"
    path.write_text(to_acute_table(tasks, pairs))
    assert from_acute(path, tasks) == pairs
    rows = list(csv.DictReader(path.read_text().splitlines(keepends=True)))
    assert [row["correct"] for row in rows] == ["-1", "-1", "True", "False"]
    assert [row["winner"] for row in rows] == ["m|n", "n", "m|n", "m|n (2)"]
    assert {row["matchup"] for row in rows} == {"m|n__vs__n", "m|n__vs__m|n (2)"}
    for wrong in (pairs[0].model_copy(update={"value": "tie"}), ratings[0]):
        with pytest.raises(UserError, match="ACUTE-Eval has pairs and their winners only; use --to csv"):
            to_acute_table(tasks, [wrong])
    path.write_text("worker,winner,pairing_id,time_taken\nw,n,0,long\n")
    with pytest.raises(UserError, match="row 1: time_taken='long': not a number"):
        from_acute(path, tasks)


def test_ratings_of_potato_there_and_back(tmp_path: Path) -> None:
    tasks, ratings = all_kinds()
    to_potato(tasks, tmp_path / "p")
    to_potato_answers(tasks, ratings, tmp_path / "p")
    assert sorted(from_potato(tmp_path / "p", tasks), key=key) == sorted(ratings, key=key)
    line = (tmp_path / "p/utterance/annotation_output/bob, jr/annotated_instances.jsonl").read_text()
    value = str(next(one.value for one in ratings if (one.rater, one.question) == ("bob, jr", "turn")))
    assert json.loads(line) == {
        "id": "0@1",
        "label_annotations": {"turn": {value: value}},
        "span_annotations": {},
    }
    for rater in ("../ann", "", ".."):
        with pytest.raises(UserError, match="a rater whose name can be a folder's; use --to csv"):
            to_potato_answers(tasks, [ratings[0].model_copy(update={"rater": rater})], tmp_path / "p")


@needs_data
def test_parlais_own_pairings(tmp_path: Path) -> None:
    path = SHARED / "parlai_acute" / "pairings.jsonl"
    tasks = acute_tasks(path)
    onboarding, real = tasks.items
    assert onboarding.expected == {"preference": "left"}
    assert [one.system for one in real.shown] == ["modelb", "modela"]
    assert [turn.by_system for turn in real.shown[0].turns[:2]] == [False, True]
    ours = [json.loads(line) for line in to_acute(tasks).splitlines()]
    theirs = [json.loads(line) for line in path.read_text().splitlines()]
    for one, other in zip(ours, theirs, strict=True):
        assert [d["id"] for d in one["dialogue_dicts"]] == [d["id"] for d in other["dialogue_dicts"]]
        assert one["speakers_to_eval"] == other["speakers_to_eval"]
        assert one.get("correct_answer") == other.get("correct_answer")
        for left, right in zip(one["dialogue_dicts"], other["dialogue_dicts"], strict=True):
            assert left.keys() <= right.keys()
            assert [act["text"] for act in left["dialogue"]] == [act["text"] for act in right["dialogue"]]
    assert read_dialogues(SHARED / "parlai_acute" / "model1.blended_skill_talk.jsonl")


def test_the_verbs(tmp_path: Path) -> None:
    tasks, ratings = pair_ratings(5)
    given = files(tmp_path, tasks, ratings)
    for arguments in (
        ["convert", *given, "--to", "csv", "--out", str(tmp_path / "r.csv")],
        [
            "import",
            str(tmp_path / "r.csv"),
            "--from",
            "csv",
            "--tasks",
            given[0],
            "--out",
            str(tmp_path / "r.jsonl"),
        ],
        ["convert", given[0], "--to", "acute", "--out", str(tmp_path / "p.jsonl")],
        ["import", str(tmp_path / "p.jsonl"), "--from", "acute", "--out", str(tmp_path / "t.json")],
        ["convert", given[0], "--to", "potato", "--out", str(tmp_path / "potato")],
    ):
        done = call(*arguments)
        assert done.exit_code == 0, done.output
    assert read_ratings([tmp_path / "r.jsonl"]) == ratings
    assert len(read_tasks(tmp_path / "t.json").items) == 5
    answered_in_potato(tmp_path / "potato" / "pair" / "annotation_output", ratings)
    out = str(tmp_path / "back.jsonl")
    done = call("import", str(tmp_path / "potato"), "--from", "potato", "--tasks", given[0], "--out", out)
    assert "15 ratings of 3 raters" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "TASKS", "--to", "x", "--out", "o"], "--to x: there are csv, acute, potato"),
        (["convert", "TASKS", "--to", "csv", "--out", "o"], "--to csv: give RATINGS, too"),
        (["convert", "TASKS", "--to", "acute", "--out", "o"], "no item has two dialogues"),
        (["import", "r.csv", "--from", "csv", "--out", "o"], "--from csv: give --tasks"),
        (["import", "CSV", "--from", "csv", "--tasks", "TASKS", "--out", "o"], "no column rater"),
        (["import", "none.jsonl", "--from", "acute", "--out", "o"], "none.jsonl: no such file"),
        (["import", "BAD", "--from", "acute", "--out", "o"], "bad.jsonl:1: speakers_to_eval is missing"),
    ],
)
def test_what_the_verbs_refuse(tmp_path: Path, arguments: list[str], message: str) -> None:
    given = files(tmp_path, *scores_of({"a": [[2]]}))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "r.csv").write_text("item,question,value\na,b,1\n")
    names = {"TASKS": given[0], "CSV": str(tmp_path / "r.csv"), "BAD": str(tmp_path / "bad.jsonl")}
    done = call(*(names.get(word, word) for word in arguments))
    assert done.exit_code == 2
    assert message in done.stderr.replace("\n", "")
    assert not (tmp_path / "o").exists()
