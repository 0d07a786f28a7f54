"""Whether a judge is to be believed: two controls that it passes on the spot, or its table is withheld.

1. It prefers dialogues between people to the same dialogues with their utterances shuffled, and knows
   more of them than which words neighbouring lines share.
2. Where people have voted, it may stand in for one of them: the alternative annotator test of Calderon,
   Reichart and Dror (ACL 2025, "The Alternative Annotator Test for LLM-as-a-Judge").
"""

from __future__ import annotations

import operator
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from plato2.config import UserError
from plato2.evaluate.human.formats import Item, Rating, Tasks
from plato2.evaluate.judge import Match, Outcome, Side, judge_figures

TURNS = 10
"""Of a dialogue between people, as many as a self-chat has (section 3.2)."""
LEAST_TURNS = 6
"""A shorter dialogue shuffled may be a good one."""
SHUFFLED_P = 0.01
"""The sign test's p-value below which a judge passes the first control."""
WORDS_P = 0.05
"""The same for knowing more than which words neighbouring lines share."""
MOST_UNREADABLE = 0.1
"""A judge whose answers lack a verdict more often is none."""
EPSILON = 0.1
"""What a judge may be worse than a person and still be the better choice: it costs less. Calderon et al. take
0.1 for crowd workers, 0.15 for skilled people and 0.2 for experts."""
WINNING_RATE = 0.5
"""The share of people that a judge must be able to stand in for."""
FEWEST_ITEMS = 30
"""Of one rater; with fewer the test is Wilcoxon's, not Student's, as in the paper."""
_LONG_WORD = re.compile(r"[a-z']{4,}")
"""All lines share words such as `the` and `you`."""
Q = 0.05
"""False discovery rate over raters (Benjamini-Yekutieli)."""


@dataclass(frozen=True)
class Control:
    """A control and what came of it."""

    name: str
    passed: bool
    text: str
    """One sentence with the figures."""
    figures: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def shuffled_matches(dialogues: Sequence[Sequence[str]], n: int, seed: int = 0) -> list[Match]:
    """Dialogues between people against themselves with the utterances in another order.

    Args:
        dialogues: the turns of each, two people in turn.
        n: how many, those that are long enough in a random order.
        seed: of the order and of the shuffling.

    Raises:
        UserError: too few of them are long enough.
    """
    draw = random.Random(seed)
    long_enough = [turns[:TURNS] for turns in dialogues if len(turns) >= LEAST_TURNS]
    if len(long_enough) < n:
        raise UserError(
            f"the control needs {n} dialogues between people of at least {LEAST_TURNS} turns, there are "
            f"{len(long_enough)}; give more of them, or a smaller --controls"
        )
    found = []
    for number, turns in enumerate(draw.sample(long_enough, n)):
        order = list(range(len(turns)))
        while any(place == old for place, old in enumerate(order)):
            draw.shuffle(order)
        true, shuffled = _by_people("human", turns), _by_people("shuffled", [turns[old] for old in order])
        found.append(Match(f"control/{number}", str(number), true, shuffled))
    return found


def _by_people(name: str, turns: Sequence[str]) -> Side:
    return Side(name, tuple((place % 2 == 1, text) for place, text in enumerate(turns)))


def shared_words(shown: Side) -> float:
    """The mean share of long words in the lines that are judged which the line before has too, 0 to 1.

    The simplest judge of coherence: it knows nothing of dialogue, and tells shuffled ones by their topic.
    """
    words = [set(_LONG_WORD.findall(text.lower())) for _, text in shown.lines]
    shares = [
        len(words[place] & words[place - 1]) / len(words[place])
        for place, (judged, _) in enumerate(shown.lines)
        if judged and place and words[place]
    ]
    return sum(shares) / len(shares) if shares else 0.0


def shuffled_control(outcomes: Sequence[Outcome]) -> Control:
    """Whether people's dialogues beat the shuffled ones, and by more than the words that their lines share.

    Two one-sided sign tests: of wins against losses, ties left out; and of the pairs in which only the judge
    prefers people's dialogue against those in which only counting shared words does.
    """
    won, lost = (sum(one.score == score for one in outcomes) for score in (1, 0))
    found = [one.score == 1 for one in outcomes]
    counted = [shared_words(one.match.left) > shared_words(one.match.right) for one in outcomes]
    better, worse = sum(map(operator.gt, found, counted)), sum(map(operator.lt, found, counted))
    p, p_words = _sign_test(won, lost), _sign_test(better, worse)
    figures = {"won": won, "lost": lost, "n": len(outcomes), "p": p}
    figures |= {"won_by_words": sum(counted), "better": better, "worse": worse, "p_words": p_words}
    figures["consistency"] = sum(one.is_consistent for one in outcomes) / len(outcomes)
    tied = len(outcomes) - won - lost
    text = f"people's dialogues beat shuffled ones {won} times, lost {lost} times, tied {tied} times "
    text += (
        f"(sign test {_told(p, SHUFFLED_P)}); counting shared words finds {sum(counted)} of them, {better} "
    )
    text += f"are found by the judge alone and {worse} by counting alone ({_told(p_words, WORDS_P)}); "
    text += f"its verdicts in both orders agree for {figures['consistency']:.0%} of the pairs"
    if (first := judge_figures(outcomes)["first"].value) is not None:
        figures["first"] = first
        text += f", and {first:.0%} of those that decide prefer what stands first"
    return Control("shuffled", p < SHUFFLED_P and p_words < WORDS_P, text, figures)


def _sign_test(better: int, worse: int) -> float:
    """One-sided p-value; 1 where nothing speaks for either."""
    from scipy.stats import binomtest

    n = better + worse
    return float(binomtest(better, n, alternative="greater").pvalue) if n else 1.0


def _told(p: float, limit: float) -> str:
    return f"p = {p:.2g}, {'below' if p < limit else 'not below'} {limit:g}"


def readable_control(outcomes: Sequence[Outcome]) -> Control:
    """Whether the answers have verdicts."""
    said = [verdict for one in outcomes for verdict in one.verdicts]
    share = said.count(None) / len(said)
    passed = share <= MOST_UNREADABLE
    text = f"{share:.0%} of {len(said)} answers have no verdict ({MOST_UNREADABLE:.0%} are allowed)"
    return Control("readable", passed, text, {"unreadable": share, "n": len(said)})


# ------------------------------------------------------------------------------------------- people's votes


def voted_matches(tasks: Tasks, ratings: Sequence[Rating], question: str) -> list[Match]:
    """The pairs that people voted on, as the judge sees them; attention checks are none.

    Raises:
        UserError: no pairs in the tasks, or no votes on them.
    """
    voted = {rating.item for rating in ratings if rating.question == question}
    pairs = [item for item in tasks.items if len(item.shown) == 2 and item.expected is None]
    found = [_as_match(item) for item in pairs if item.id in voted]
    if not found:
        known = ", ".join(sorted({rating.question for rating in ratings})) or "nothing"
        raise UserError(
            f"--ratings: no votes on pairs for --question {question}; people were asked about {known}"
        )
    return found


def _as_match(item: Item) -> Match:
    left, right = (
        Side(shown.system, tuple((turn.by_system, turn.text) for turn in shown.turns)) for shown in item.shown
    )
    return Match(item.id, item.start, left, right)


def votes(ratings: Sequence[Rating], question: str) -> dict[str, dict[str, str]]:
    """Rater -> item -> left, right or tie; of two votes on one item the first counts."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for rating in ratings:
        if rating.question == question:
            found[rating.rater].setdefault(rating.item, str(rating.value))
    return dict(found)


def people_control(outcomes: Sequence[Outcome], people: Mapping[str, Mapping[str, str]]) -> Control:
    """The alternative annotator test of a judge on the pairs that people voted on."""
    said = {one.match.id: {1.0: "left", 0.0: "right"}.get(one.score, "tie") for one in outcomes}
    found = alternative_annotator_test(said, people)
    passed = found["winning_rate"] >= WINNING_RATE
    judge, human = found["agreement"], found["human_agreement"]
    text = f"the judge agrees with {judge:.0%} of people's votes, people with {human:.0%} of each other's"
    text += f"; it could stand in for {found['winning_rate']:.0%} of {found['raters']:.0f} raters"
    text += f" ({WINNING_RATE:.0%} are needed; advantage probability {found['advantage']:.2f})"
    return Control("people", passed, text, found)


def alternative_annotator_test(
    judge: Mapping[str, str], people: Mapping[str, Mapping[str, str]], epsilon: float = EPSILON
) -> dict[str, float]:
    """Whether a judge may stand in for people.

    Each rater j is left out in turn. On every item of theirs, j and the judge are held against the other
    raters: who agrees with more of them wins, both on a tie. Rho_j is the share that the judge wins or ties,
    and the judge may stand in for j if it is higher than j's own share minus epsilon, by a one-sided t-test
    with a correction over raters.

    Args:
        judge: item -> label.
        people: rater -> item -> label.
        epsilon: see `EPSILON`.

    Returns:
        `winning_rate`: the share of raters for whom that is so; `advantage`: the mean of rho_j; `raters` and
        `items` that were tested; `agreement` of the judge with single votes, `human_agreement` of votes with
        each other.

    Raises:
        UserError: no rater shares an item with two others.
    """
    from statsmodels.stats.multitest import multipletests

    by_item: dict[str, dict[str, str]] = defaultdict(dict)
    for rater, labels in people.items():
        for item, label in labels.items():
            if item in judge:
                by_item[item][rater] = label
    p_values, advantages = [], []
    for rater in people:
        judge_wins, rater_wins = [], []
        for item, labels in by_item.items():
            others = [label for other, label in labels.items() if other != rater]
            if rater not in labels or len(others) < 2:
                continue
            of_judge, of_rater = others.count(judge[item]), others.count(labels[rater])
            judge_wins.append(of_judge >= of_rater)
            rater_wins.append(of_rater >= of_judge)
        if not judge_wins:
            continue
        advantages.append(float(np.mean(judge_wins)))
        p_values.append(_p_of_lower(np.subtract(rater_wins, judge_wins, dtype=float) - epsilon))
    if not p_values:
        raise UserError("--ratings: no item has votes of three people; the test needs that")
    rejected = multipletests(p_values, alpha=Q, method="fdr_by")[0]
    votes_of = [(item, label) for item, labels in by_item.items() for label in labels.values()]
    pairs = [a == b for labels in by_item.values() for a, b in combinations(labels.values(), 2)]
    return {
        "winning_rate": float(np.mean(rejected)),
        "advantage": float(np.mean(advantages)),
        "raters": float(len(p_values)),
        "items": float(len(by_item)),
        "agreement": float(np.mean([judge[item] == label for item, label in votes_of])),
        "human_agreement": float(np.mean(pairs)),
    }


def _p_of_lower(differences: np.ndarray) -> float:
    """The one-sided p-value that the mean of these differences is not below 0."""
    from scipy.stats import ttest_1samp, wilcoxon

    if differences.std() == 0:
        return 0.0 if differences[0] < 0 else 1.0
    if len(differences) < FEWEST_ITEMS:
        return float(wilcoxon(differences, alternative="less").pvalue)
    return float(ttest_1samp(differences, 0.0, alternative="less").pvalue)
