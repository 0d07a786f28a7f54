"""What is made of human ratings: which count, scores, comparisons, agreement."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import UserError
from plato2.evaluate.human.agreement import (
    count_table,
    fleiss_kappa,
    krippendorff_alpha,
    majority,
    plain_agreement,
    same_number,
)
from plato2.evaluate.human.formats import Item, Level, Question, Rating, Said, Shown, Tasks
from plato2.evaluate.human.ratings import check_ratings, read_ratings, told
from plato2.evaluate.human.report import agreement_table, human_picture, human_result
from plato2.evaluate.results import read_result

SHARED = Path(__file__).parents[3] / "shared" / "data"
DOCS = Path(__file__).parents[2] / "docs"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data, ../shared/data")
LEVELS = [0, 1, 2]
SIDES = ["left", "right", "tie"]


def question(name: str, per: Any = "dialogue", levels: list[Any] = LEVELS) -> Question:
    return Question(
        name=name, text=f"{name}?", per=per, levels=[Level(value=v, label=str(v)) for v in levels]
    )


def shown(system: str, n_turns: int = 2) -> Shown:
    turns = [Said(text=f"turn {n}", by_system=n % 2 == 1) for n in range(n_turns)]
    return Shown(system=system, dialogue="0", turns=turns)


def scores_of(values: dict[str, list[list[int]]], raters: int = 3) -> tuple[Tasks, list[Rating]]:
    """System -> for each start the ratings of its dialogue."""
    items, ratings = [], []
    for system, starts in values.items():
        for number, given in enumerate(starts):
            item = Item(id=f"{system}{number}", start=f"s{number}", shown=[shown(system)])
            items.append(item)
            ratings += [
                Rating(item=item.id, question="good", rater=f"r{n}", value=value)
                for n, value in enumerate(given)
            ]
    tasks = Tasks(preset="x", questions=[question("good")], items=items, raters_per_item=raters)
    return tasks, ratings


def result_of(tasks: Tasks, ratings: list[Rating], **options: Any) -> Any:
    return human_result(check_ratings(tasks, ratings, **options), [])


# --------------------------------------------------------------------------------------- which ratings count


def test_each_rating_is_counted_once_and_none_is_lost() -> None:
    tasks, ratings = scores_of({"a": [[2, 2, 1], [0, 1, 2]], "b": [[1, 1, 1], [0, 0]]})
    check = Item(id="check", start="s", shown=[shown("a")], expected={"good": 0})
    tasks = tasks.model_copy(update={"items": [*tasks.items, check]})
    ratings += [Rating(item="check", question="good", rater=f"r{n}", value=n // 2) for n in range(3)]
    ratings.append(Rating(item="a0", question="good", rater="r0", value=2))
    ratings.append(Rating(item="a0", question="good", rater="r1", value=0))
    ratings.append(Rating(item="other", question="good", rater="r1", value=0))
    checked = check_ratings(tasks, ratings)
    counts = checked.counts
    assert counts["ratings"] == len(ratings) == 17
    parts = ("used", "again", "unknown", "checks", "excluded")
    assert counts["ratings"] == sum(counts[name] for name in parts)
    assert (counts["again"], counts["changed"], counts["unknown"], counts["checks"]) == (2, 1, 1, 3)
    assert (checked.failed, counts["raters"], counts["raters_excluded"]) == ({"r2": 1}, 3, 1)
    assert (counts["excluded"], counts["short"]) == (3, 4)
    assert checked.rated[0].answers == {"r0": 2, "r1": 0}
    assert check_ratings(tasks, ratings, failed_checks=1).counts["excluded"] == 0
    assert len(told(counts)) == 4


def test_a_rater_who_never_finishes() -> None:
    item = Item(id="a", start="s", shown=[shown("a", 6)])
    tasks = Tasks(preset="x", questions=[question("good"), question("fine", "utterance")], items=[item])
    ratings = [Rating(item="a", question="fine", rater="r0", value=1, place=place) for place in (1, 3, 5)]
    assert check_ratings(tasks, ratings).counts["unfinished"] == 1
    ratings.append(Rating(item="a", question="good", rater="r0", value=1))
    counts = check_ratings(tasks, ratings).counts
    assert (counts["unfinished"], counts["units"], counts["unrated"], counts["short"]) == (0, 4, 0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": "nice"}, "question=nice: the tasks ask good"),
        ({"place": 1}, "place=1: good is not asked there"),
        ({"value": 3}, "value=3: good can be 0, 1, 2"),
        ({"item": "x"}, "item x: not in these tasks, nor is that of any other rating"),
    ],
)
def test_ratings_of_other_tasks(change: dict[str, Any], message: str) -> None:
    tasks, ratings = scores_of({"a": [[2]]})
    with pytest.raises(UserError, match=message):
        check_ratings(tasks, [ratings[0].model_copy(update=change)])


def test_files_of_ratings(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for data, message in (
        ("", "no rating in it"),
        ("\n", "no rating in it"),
        ('{"item": "a"}', "r.jsonl:1: question is missing"),
        ('{"item": "a", "question": "q", "rater": "r", "value": 1.5}', "r.jsonl:1: value"),
    ):
        path.write_text(data)
        with pytest.raises(UserError) as caught:
            read_ratings([path])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- agreement


def slow_kappa(answers: list[list[Any]]) -> float:
    """Fleiss (1971), word by word."""
    n, rows = len(answers[0]), len(answers)
    agree = [sum(a == b for a, b in combinations(row, 2)) / math.comb(n, 2) for row in answers]
    shares = [count / (rows * n) for count in Counter(v for row in answers for v in row).values()]
    chance = sum(share**2 for share in shares)
    return (sum(agree) / rows - chance) / (1 - chance)


def slow_alpha(answers: list[list[Any]], ordinal: bool) -> float:
    """Krippendorff (2011), by the coincidences of all pairs."""
    values = sorted({v for row in answers for v in row})
    pairs: Counter[tuple[Any, Any]] = Counter()
    for row in answers:
        for i, a in enumerate(row):
            for j, b in enumerate(row):
                if i != j:
                    pairs[a, b] += 1 / (len(row) - 1)
    n_of = {a: sum(pairs[a, b] for b in values) for a in values}
    n = sum(n_of.values())

    def distance(a: Any, b: Any) -> float:
        if not ordinal:
            return float(a != b)
        low, high = sorted((values.index(a), values.index(b)))
        return (sum(n_of[v] for v in values[low : high + 1]) - (n_of[a] + n_of[b]) / 2) ** 2

    observed = sum(pairs[a, b] * distance(a, b) for a in values for b in values) / n
    expected = sum(n_of[a] * n_of[b] * distance(a, b) for a in values for b in values) / (n * (n - 1))
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(5))
def test_agreement_against_the_definitions(seed: int) -> None:
    rng = random.Random(seed)
    answers = [[rng.choice([0, 1, 2, 2, base]) for _ in range(4)] for base in rng.choices(LEVELS, k=60)]
    table = count_table(answers, LEVELS)
    assert fleiss_kappa(table) == pytest.approx(slow_kappa(answers))
    assert krippendorff_alpha(table, LEVELS) == pytest.approx(slow_alpha(answers, True))
    words = [[SIDES[value] for value in row] for row in answers]
    assert krippendorff_alpha(count_table(words, SIDES), SIDES) == pytest.approx(slow_alpha(words, False))
    unequal = [row[: rng.randint(1, 4)] for row in answers]
    paired = [row for row in unequal if len(row) > 1]
    table = count_table(unequal, LEVELS)
    assert krippendorff_alpha(table, LEVELS) == pytest.approx(slow_alpha(paired, True))
    plain = [np.mean([a == b for a, b in combinations(row, 2)]) for row in paired]
    assert plain_agreement(table) == pytest.approx(np.mean(plain))
    most = Counter(map(len, paired)).most_common(1)[0][1]
    assert same_number(table).sum() == most


def test_all_ratings_are_equal() -> None:
    table = count_table([[2, 2, 2]] * 4, LEVELS)
    assert (fleiss_kappa(table), krippendorff_alpha(table, LEVELS), plain_agreement(table)) == (1, 1, 1)
    tasks, ratings = scores_of({"a": [[2, 2, 2]] * 4})
    found = result_of(tasks, ratings).details["agreement"]["good"]
    assert found["all_equal"]
    assert (found["plain"], found["fleiss_kappa"], found["fleiss_kappa_low"]) == (1, 1, 1)


def test_one_rater_agrees_with_nobody() -> None:
    table = count_table([[2], [1]], LEVELS)
    assert all(
        math.isnan(value)
        for value in (
            fleiss_kappa(table[same_number(table)]),
            krippendorff_alpha(table, LEVELS),
            plain_agreement(table),
        )
    )
    tasks, ratings = scores_of({"a": [[2], [1]]})
    found = result_of(tasks, ratings).details["agreement"]["good"]
    assert (found["plain"], found["fleiss_kappa"], found["krippendorff_alpha"]) == (None, None, None)
    alone = Console(width=100, record=True)
    alone.print(agreement_table(result_of(*scores_of({"a": [[2], [2]]}))))
    assert "all ratings are equal" not in alone.export_text()  # which would be praise


@needs_data
def test_agreement_on_a_large_real_table() -> None:
    lines = (SHARED / "eval_via_selection" / "human_scores.jsonl").read_text().splitlines()
    answers = [row for line in lines for row in json.loads(line)]
    levels = list(range(6))
    table = count_table(answers, levels)
    assert len(table) == 1019 * 4
    assert fleiss_kappa(table) == pytest.approx(slow_kappa(answers))
    assert fleiss_kappa(table) == pytest.approx(0.2156, abs=1e-4)
    assert krippendorff_alpha(table, levels) == pytest.approx(slow_alpha(answers, True))


def test_majority_and_splits() -> None:
    answers = [[0, 0, 2], [0, 1, 2], [0, 2], [1, 1, 2, 2], [2], [0, 0, 1, 2, 2]]
    voted, split = majority(count_table(answers, LEVELS), LEVELS)
    assert voted == [0, 1, 1, 1.5, 2, 1]
    assert split.tolist() == [False, True, True, True, False, True]
    words = [["left", "left", "tie"], ["left", "right", "tie"], ["left", "right"]]
    assert majority(count_table(words, SIDES), SIDES)[0] == ["left", "tie", "tie"]


# ------------------------------------------------------------------------------------------ scores and pairs


def test_scores() -> None:
    tasks, ratings = scores_of(
        {"a": [[2, 2, 0], [0, 1, 2], [2, 2, 2]], "b": [[0, 0, 1], [1, 1, 1], [2, 2, 1]]}
    )
    result = result_of(tasks, ratings)
    a, b = result.systems["a"], result.systems["b"]
    assert (a["good"].value, b["good"].value) == (pytest.approx(5 / 3), 1)
    assert a["good_mean"].value == pytest.approx((4 / 3 + 1 + 2) / 3)
    assert a["good"].note == "1 units without a majority: the median"
    assert a["good"].n == 3
    (found,) = result.details["comparisons"]
    assert (found["wins"], found["ties"], found["losses"], found["of"]) == (1, 2, 0, "start")
    assert found["difference"] == pytest.approx(2 / 3)
    assert found["p"] == 1


def test_intervals_draw_starts_and_not_turns() -> None:
    """Ten equal turns of each of three dialogues are three cases, not thirty."""
    item = [Item(id=str(n), start=f"s{n}", shown=[shown("a", 20)]) for n in range(3)]
    tasks = Tasks(preset="x", questions=[question("good", "utterance")], items=item)
    ratings = [
        Rating(item=str(n), question="good", rater="r", value=n, place=place)
        for n in range(3)
        for place in range(1, 20, 2)
    ]
    figure = result_of(tasks, ratings).systems["a"]["good"]
    assert (figure.value, figure.low, figure.high, figure.n) == (1, 0, 2, 30)


def pair_ratings(n: int, seed: int = 0, share: float = 0.8) -> tuple[Tasks, list[Rating]]:
    """Raters who prefer `a`, which stands left or right by chance."""
    rng = random.Random(seed)
    items, ratings = [], []
    for number in range(n):
        sides = rng.sample(["a", "b"], 2)
        items.append(Item(id=str(number), start=f"s{number}", shown=[shown(side) for side in sides]))
        for rater in range(3):
            better = "a" if rng.random() < share else "b"
            value = rng.choice(["tie", *SIDES[:2], *[SIDES[sides.index(better)]] * 6])
            ratings.append(Rating(item=str(number), question="q", rater=f"r{rater}", value=value))
    return Tasks(preset="x", questions=[question("q", "pair", SIDES)], items=items), ratings


def test_pairs_whichever_side_they_were_on() -> None:
    from scipy.stats import binom

    tasks, ratings = pair_ratings(60)
    result = result_of(tasks, ratings)
    wins = ties = 0
    for number, item in enumerate(tasks.items):
        votes = Counter(r.value for r in ratings[3 * number : 3 * number + 3])
        value, most = votes.most_common(1)[0]
        if most == 1 or value == "tie":
            ties += 1
        else:
            wins += item.shown[SIDES.index(str(value))].system == "a"
    losses = 60 - wins - ties
    first = result.details["comparisons"][0]
    sign = 1 if first["system"] == "a" else -1
    assert (first["wins"], first["ties"], first["losses"])[::sign] == (wins, ties, losses)
    assert wins > losses > 0
    expected = min(1.0, 2 * binom.cdf(losses, wins + losses, 0.5))
    assert first["p"] == first["p_holm"] == pytest.approx(expected)
    a, b = result.systems["a"]["q"], result.systems["b"]["q"]
    assert a.value == pytest.approx((wins + ties / 2) / 60)
    assert a.value + b.value == pytest.approx(1)
    assert a.low < a.value < a.high


def test_p_is_corrected_for_the_number_of_comparisons() -> None:
    tasks, ratings = scores_of({name: [[value] * 3] * 6 for name, value in zip("abc", LEVELS, strict=True)})
    comparisons = result_of(tasks, ratings).details["comparisons"]
    assert [found["p"] for found in comparisons] == [pytest.approx(2 / 2**6)] * 3
    assert [found["p_holm"] for found in comparisons] == [pytest.approx(3 * 2 / 2**6)] * 3


# ------------------------------------------------------------------------------------------------- real data


def fed() -> tuple[Tasks, list[Rating], int]:
    """The turn-level ratings of FED as tasks and ratings; how many labels are no number."""
    records = json.loads(gzip.decompress((SHARED / "fed" / "fed_data.json.gz").read_bytes()))
    records = [record for record in records if "response" in record]
    names = list(records[0]["annotations"])
    questions = [question(name, levels=list(range(5 if name == "Overall" else 3))) for name in names]
    items, ratings, n_words = [], [], 0
    for number, record in enumerate(records):
        items.append(Item(id=str(number), start=record["context"], shown=[shown(record["system"])]))
        for name, labels in record["annotations"].items():
            for rater, label in enumerate(labels):
                if isinstance(label, int):
                    ratings.append(Rating(item=str(number), question=name, rater=f"r{rater}", value=label))
                n_words += not isinstance(label, int)
    return Tasks(preset="fed", questions=questions, items=items, raters_per_item=5), ratings, n_words


@needs_data
def test_fed() -> None:
    tasks, ratings, n_words = fed()
    checked = check_ratings(tasks, ratings)
    result = human_result(checked, [])
    assert len(tasks.items) == 375
    assert n_words > 0
    assert checked.counts["used"] == len(ratings) == 375 * 9 * 5 - n_words
    for name, found in result.details["agreement"].items():
        answers: dict[str, list[Any]] = {}
        for rating in ratings:
            if rating.question == name:
                answers.setdefault(rating.item, []).append(rating.value)
        full = [row for row in answers.values() if len(row) == 5]
        assert found["fleiss_kappa"] == pytest.approx(slow_kappa(full)), name
        several = [row for row in answers.values() if len(row) > 1]
        assert found["krippendorff_alpha"] == pytest.approx(slow_alpha(several, True)), name
        assert found["fleiss_kappa_units"] == len(full)
    overall = {system: figures["Overall"].value for system, figures in result.systems.items()}
    assert overall["Human"] > overall["Meena"] > overall["Mitsuku"]


@needs_data
def test_the_report_in_the_documents(tmp_path: Path) -> None:
    tasks, ratings, _ = fed()
    shown = {"Interesting", "Relevant", "Fluent"}
    tasks = tasks.model_copy(update={"questions": [q for q in tasks.questions if q.name in shown]})
    given = files(tmp_path, tasks, [rating for rating in ratings if rating.question in shown])
    assert_documented("ratings.md", call("report", *given, width=110).stdout)


def assert_documented(page: str, printed: str) -> None:
    text = "\n".join(line.rstrip() for line in printed.splitlines())
    assert f"```text\n{text.rstrip()}\n```" in (DOCS / page).read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------- the verb


def files(folder: Path, tasks: Tasks, ratings: list[Rating]) -> list[str]:
    (folder / "tasks.json").write_text(tasks.model_dump_json())
    lines = "".join(rating.model_dump_json() + "\n" for rating in ratings)
    (folder / "ratings.jsonl").write_text(lines)
    return [str(folder / "tasks.json"), str(folder / "ratings.jsonl")]


def call(*arguments: str, width: int = 200) -> Any:
    return CliRunner().invoke(app, ["evaluate", "human", *arguments], env={"COLUMNS": str(width)})


def test_the_report(tmp_path: Path) -> None:
    given = files(tmp_path, *scores_of({"a": [[2, 2, 0], [0, 1, 2]], "b": [[0, 0, 1], [1, 1]]}))
    out, image = tmp_path / "human.json", tmp_path / "human.svg"
    done = call("report", *given, "--out", str(out), "--picture", str(image))
    assert done.exit_code == 0, done.output
    for told_of in (
        "1.500",
        "(the paper's kappa: 0.466)",
        "11 ratings of 3 raters count",
        "1 of 4 units have fewer",
    ):
        assert told_of in done.stdout
    assert read_result(out).kind == "human"
    assert image.read_text().startswith("<?xml")
    again = json.loads(call("report", *given, "--json").stdout)
    assert again["systems"] == read_result(out).model_dump()["systems"]


def test_the_report_of_pairs(tmp_path: Path) -> None:
    tasks, ratings = pair_ratings(20)
    done = call("report", *files(tmp_path, tasks, ratings))
    assert done.exit_code == 0, done.output
    assert "share of wins" in done.stdout
    drawing = human_picture(result_of(tasks, ratings))
    assert [text.get_text() for text in drawing.axes[0].get_legend().get_texts()] == [
        "wins",
        "ties",
        "losses",
    ]


def test_no_rating_counts(tmp_path: Path) -> None:
    tasks, ratings = scores_of({"a": [[2]]})
    check = Item(id="check", start="s", shown=[shown("a")], expected={"good": 0})
    tasks = tasks.model_copy(update={"items": [*tasks.items, check]})
    ratings.append(Rating(item="check", question="good", rater="r0", value=1))
    done = call("report", *files(tmp_path, tasks, ratings))
    assert done.exit_code == 2
    assert "no rating counts (1 of 1 raters failed attention checks" in done.stderr
    done = call("report", *files(tmp_path, tasks, ratings), "--failed-checks", "-1")
    assert "--failed-checks -1: must be at least 0" in done.stderr
