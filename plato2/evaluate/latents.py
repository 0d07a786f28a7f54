"""What the latents say: how often each wins, how its candidates differ, its words, and an alarm at collapse.

Stage 2.1 can end with latents that change nothing, and neither its loss nor the number of latents in use
shows it. So all that can show it stands side by side: what z knows of a response (posterior), whether
writing heeds it (a response with its own z and with those of others), what changes when z does (greedy
candidates; variety between latents against that within one, and against stage 1), and which z is said in
the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from plato2.data.examples import Example
from plato2.data.samples import encode_response
from plato2.evaluate.results import Figure, Measure, Result, print_table, result_table
from plato2.metrics import bootstrap, jackknife, wilson
from plato2.model.networks import Generator
from plato2.talk.bot import PlatoBot
from plato2.talk.score import Record, score
from plato2.talk.variety import variety_by_context
from plato2.words import split_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

CONTEXTS_AT_ONCE = 8
TYPICAL_WORDS = 5
DEALS, BY_CHANCE = 100, 0.05
"""Candidates are dealt to latents at random so often; in this share of that a word may still be typical."""
LEAST_INFORMATION = 0.05
"""Below this share of ln K, what z knows of a response is nothing."""
LEAST_HEEDED = 0.01
"""Nats of a response that its own z must save; where it saves less, writing does not heed what z knows."""
LEAST_DIFFERENT = 0.1
"""Below this share of the K - 1 possible others, greedy candidates of the K latents are all one."""
MOST_WINS = 0.5
"""A z that wins more than this share of the contexts stands for all."""

MEASURES = {
    "mutual_information": Measure(
        label="mutual information of z with context and response, nats", better="high"
    ),
    "posterior_entropy": Measure(label="entropy of the posterior of z, nats"),
    "heeded": Measure(label="nats of a response that its own z saves, beside the z of others", better="high"),
    "latents_in_effect": Measure(label="latents in effect used, by the posterior", digits=1),
    "winners_in_effect": Measure(label="latents in effect said", digits=1),
    "most_wins": Measure(label="share of contexts that the most frequent winner wins", better="low"),
    "greedy_different": Measure(label="greedy: how many candidates differ", digits=1, better="high"),
    "greedy_distinct_2": Measure(label="greedy: distinct-2", better="high"),
    "distinct_2_between_z": Measure(label="sampled: distinct-2 of one sample of each z", better="high"),
    "distinct_2_within_z": Measure(label="sampled: distinct-2 of as many samples of one z"),
    "distinct_2_difference": Measure(label="sampled: the difference", better="high"),
    "distinct_2_stage_1": Measure(label="sampled: distinct-2 of as many samples of stage 1"),
}


@dataclass(frozen=True)
class Heard:
    """What the latents do with one context."""

    winner: int
    """The z of the candidate that is said."""
    texts: list[str]
    """The candidate of each z."""
    variety: dict[str, float]
    """See `variety_by_context`."""
    posterior: list[float] | None
    """p(z|c,r) of what a human said; None without a recognition head."""
    nll_by_latent: list[float] | None
    """-log p(r|c,z) of what a human said, in nats, with each z; None without a recognition head."""


def hear(
    bot: PlatoBot,
    examples: Sequence[Example],
    coarse: Generator | None = None,
    recognition: Generator | None = None,
    first: int = 0,
) -> Iterator[Heard]:
    """What the latents do with each context, one after the other.

    Args:
        bot: a generation model with latents, and an evaluation model to choose with or none.
        examples: contexts and what a human said.
        coarse: a model of stage 1 to compare with.
        recognition: the bot's generation model with its recognition head, if it has one.
        first: the number of the context to begin with; what is said to a context does not depend on it.
    """
    for start in range(first, len(examples), CONTEXTS_AT_ONCE):
        part = examples[start : start + CONTEXTS_AT_ONCE]
        contexts = [example.context_ids for example in part]
        replies = bot.reply_to_ids(contexts)
        variety = variety_by_context(bot.generation, contexts, coarse, bot.decode_config, first=start)
        human: list[dict[str, Any]] = [{}] * len(part) if recognition is None else _scores(recognition, part)
        for number, (reply, said) in enumerate(zip(replies, human, strict=True)):
            by_z = {candidate.latent or 0: candidate.text for candidate in reply.candidates}
            yield Heard(
                reply.candidates[0].latent or 0,
                [by_z[z] for z in sorted(by_z)],
                {name: float(values[number]) for name, values in variety.items()},
                said.get("posterior"),
                said.get("nll_by_latent"),
            )


def _scores(recognition: Generator, examples: Sequence[Example]) -> list[dict[str, Any]]:
    limit = recognition.model_config.max_position // 2
    records = [
        Record(example.context_ids, encode_response(example.reference_ids, limit)) for example in examples
    ]
    return score(recognition, records)


def audit(system: str, heard: Sequence[Heard], seed: int = 0) -> Result:
    """The figures of a model, a line for each z, and alarms.

    Args:
        system: the model's name.
        heard: what was heard of each context.
        seed: of the resamples.

    Returns:
        A result; its `details` has `latents` (a line for each z) and `alarms` (sentences; none: all is well).
    """
    k, n = len(heard[0].texts), len(heard)
    wins = np.bincount([one.winner for one in heard], minlength=k)
    winners = np.eye(k)[[one.winner for one in heard]]  # (n, K)

    def mean_of(values: np.ndarray) -> Figure:
        low, high = bootstrap(lambda draw: float(values[draw].mean()), n, seed=seed)
        return Figure(value=float(values.mean()), low=low, high=high, n=n)

    figures = {name: mean_of(np.array([one.variety[name] for one in heard])) for name in heard[0].variety}
    figures["winners_in_effect"] = entropy_of_mean(winners, in_effect=True)
    low, high = wilson(wins.max() / n, n)
    figures["most_wins"] = Figure(value=float(wins.max() / n), low=low, high=high, n=n)
    posterior = np.array([one.posterior for one in heard if one.posterior is not None])  # (n, K)
    if len(posterior):
        entropies = np.array([entropy(p) for p in posterior])
        figures["posterior_entropy"] = mean_of(entropies)
        figures["latents_in_effect"] = entropy_of_mean(posterior, in_effect=True)
        figures["mutual_information"] = entropy_of_mean(posterior, entropies)
        nll = np.array([one.nll_by_latent for one in heard if one.nll_by_latent is not None])  # (n, K)
        figures["heeded"] = mean_of(saved_by_own_latent(posterior, nll))
    else:
        for name in ("mutual_information", "heeded", "posterior_entropy", "latents_in_effect"):
            figures[name] = Figure(value=None, note="no recognition head")
    measures = {name: one for name, one in MEASURES.items() if name in figures}
    result = Result(kind="latents", measures=measures, systems={system: figures})
    lines = latent_lines(
        [one.texts for one in heard], wins, posterior.mean(axis=0) if len(posterior) else None
    )
    result.details = {"latents": lines, "alarms": alarms(figures, k)}
    return result


def saved_by_own_latent(posterior: np.ndarray, nll: np.ndarray) -> np.ndarray:
    """How many nats its own z saves each response, beside the z of all others in turn; by chance none.

    Args:
        posterior: p(z|c_n,r_n), (n, K).
        nll: -log p(r_n|c_n,z), (n, K).

    Returns:
        (n,); 0 of a single response.
    """
    others = (posterior.sum(axis=0) - posterior) / max(1, len(posterior) - 1)  # (n, K), what others mean
    return ((others - posterior) * nll).sum(axis=1) if len(posterior) > 1 else np.zeros(1)


def entropy(p: np.ndarray) -> float:
    """In nats; 0 log 0 = 0."""
    some = p[p > 0]
    return float(-(some * np.log(some)).sum())


def entropy_of_mean(p: np.ndarray, less: np.ndarray | None = None, in_effect: bool = False) -> Figure:
    """The entropy of the mean of distributions, by the jackknife: that of n cases alone would be too low.

    Args:
        p: (n, K).
        less: (n,), whose mean is taken from it.
        in_effect: exp of it.
    """
    n, k = p.shape
    taken = np.zeros(n) if less is None else less
    whole = entropy(p.mean(axis=0)) - float(taken.mean())
    found: tuple[float, ...] = (whole,)
    if n > 1:
        left = [entropy(rest) for rest in (p.sum(axis=0) - p) / (n - 1)]
        found = jackknife(whole, np.array(left) - (taken.sum() - taken) / (n - 1))
    value, *bounds = (min(max(one, 0.0), math.log(k)) for one in found)
    if in_effect:
        value, *bounds = map(math.exp, (value, *bounds))
    low, high = bounds or (None, None)
    return Figure(value=value, low=low, high=high, n=n)


def alarms(figures: Mapping[str, Figure], k: int) -> list[str]:
    """What speaks for latents that have collapsed; only what is certain, by the end of an interval.

    Args:
        figures: of `audit`.
        k: latents.
    """
    found = []
    different, information, heeded, wins = (
        figures[name] for name in ("greedy_different", "mutual_information", "heeded", "most_wins")
    )
    if different.high is not None and different.high < 1 + LEAST_DIFFERENT * (k - 1):
        found.append(f"z changes nothing that is said: {different.value:.1f} of {k} greedy candidates differ")
    if information.high is not None and information.high < LEAST_INFORMATION * math.log(k):
        found.append(
            f"z knows nothing of a response: {information.value:.3f} nats of mutual information, of at most "
            f"{math.log(k):.2f}"
        )
    if heeded.high is not None and heeded.high < LEAST_HEEDED:
        found.append(f"writing does not heed z: its own saves a response {heeded.value:.3f} nats")
    if wins.low is not None and wins.low > MOST_WINS:
        found.append(f"one z stands for all: the same one wins {wins.value:.0%} of the contexts")
    return found


def latent_lines(
    texts: Sequence[Sequence[str]], wins: np.ndarray, posterior: np.ndarray | None
) -> list[dict[str, Any]]:
    """What each z says.

    Args:
        texts: of each context the candidate of each z.
        wins: (K,) how often each z's candidate was said.
        posterior: (K,) mean of p(z|c,r); None if unknown.

    Returns:
        A dict per z: `z`, `wins` (a share, with `wins_low` and `wins_high`), `posterior`, `questions` (share
        of candidates with a question mark), `length` (mean words), `typical` (word and z-score).
    """
    by_z = list(zip(*texts, strict=True))  # K lists of n texts
    words = [[Counter(split_words(text)) for text in candidates] for candidates in texts]
    counts = [sum(said, Counter[str]()) for said in zip(*words, strict=True)]
    scores = log_odds(counts)
    least = typical_from(words)
    lines = []
    for z, said in enumerate(by_z):
        low, high = wilson(wins[z] / len(said), len(said))
        typical = sorted(scores[z].items(), key=lambda item: (-item[1], item[0]))[:TYPICAL_WORDS]
        lines.append(
            {
                "z": z,
                "wins": float(wins[z] / len(said)),
                "wins_low": low,
                "wins_high": high,
                "posterior": None if posterior is None else float(posterior[z]),
                "questions": float(
                    np.mean(["?" in text or "\N{FULLWIDTH QUESTION MARK}" in text for text in said])
                ),
                "length": counts[z].total() / len(said),
                "typical": [[word, round(value, 2)] for word, value in typical if value > least],
            }
        )
    return lines


def typical_from(words: Sequence[Sequence[Counter[str]]], seed: int = 0) -> float:
    """The z-score that a word must exceed to be typical of a z: the highest one, of all words of all latents,
    stays below it in 95 of 100 deals of each context's candidates to the latents at random.

    A fixed limit would not do: K latents say thousands of words, and each of them is a test. With 1.96, as
    for a single one, latents that mean nothing have as many typical words as those that do.

    Args:
        words: of each context the words of the candidate of each z.
        seed: of the deals.
    """
    rng, highest = np.random.default_rng(seed), []
    for _ in range(DEALS):
        counts = [Counter[str]() for _ in words[0]]
        for candidates in words:
            for own, place in zip(counts, rng.permutation(len(candidates)).tolist(), strict=True):
                own.update(candidates[place])
        highest.append(max((z for scores in log_odds(counts) for z in scores.values()), default=0.0))
    return float(np.quantile(highest, 1 - BY_CHANCE))


def log_odds(counts: Sequence[Counter[str]]) -> list[dict[str, float]]:
    """z-scores of each group's words against all other groups': log-odds with an informative Dirichlet prior
    (Monroe, Colaresi and Quinn, 2008, equations 16 and 22).

    The prior is the words of all groups together, scaled to what a group says on average: what everybody says
    needs more to be typical, and a rare word is not typical because it came once.

    Args:
        counts: words of each group.

    Returns:
        word -> z-score for each group.
    """
    total = sum(counts, Counter[str]())
    prior = {word: count / len(counts) for word, count in total.items()}
    prior_size = total.total() / len(counts)
    found = []
    for own in counts:
        scores = {}
        n_own, n_rest = own.total(), total.total() - own.total()
        for word in own:
            y, rest = own[word] + prior[word], total[word] - own[word] + prior[word]
            odds, odds_rest = y / (n_own + prior_size - y), rest / (n_rest + prior_size - rest)
            scores[word] = (math.log(odds) - math.log(odds_rest)) / math.sqrt(1 / y + 1 / rest)
        found.append(scores)
    return found


def print_latents(result: Result, console: Console) -> None:
    """The figures, a line for each z, and the alarms."""
    split = result.settings.get("split", "valid")
    print_table(result_table(result, f"The latents, on the {split} split"), console)
    table = Table("z", title="What each z says", title_justify="left")
    for column in ("wins", "posterior", "questions", "words"):
        table.add_column(column, justify="right")
    table.add_column("typical words")
    for line in result.details["latents"]:
        table.add_row(
            str(line["z"]),
            f"{line['wins']:.0%}",
            "" if line["posterior"] is None else f"{line['posterior']:.0%}",
            f"{line['questions']:.0%}",
            f"{line['length']:.1f}",
            " ".join(word for word, _ in line["typical"]),
        )
    console.print(table)
    for alarm in result.details["alarms"]:
        console.print(f"collapse: {alarm}", style="bold red", soft_wrap=True)


def latents_picture(result: Result) -> Picture:
    """Wins and posterior, questions, and length of each z."""
    from matplotlib.figure import Figure as Picture

    lines = result.details["latents"]
    z = np.arange(len(lines))
    drawing = Picture(figsize=(4.2 * 3, 3.2), layout="constrained")
    panels = drawing.subplots(1, 3)
    of: Any = {
        name: [line[name] or 0.0 for line in lines] for name in ("wins", "posterior", "questions", "length")
    }
    panels[0].bar(z - 0.2, of["wins"], 0.4, color="#1f3552", label="wins")
    panels[0].bar(z + 0.2, of["posterior"], 0.4, color="#9ecae9", label="mean posterior")
    panels[0].axhline(1 / len(lines), color="#b0413e", linestyle="--", linewidth=1)
    panels[0].legend(fontsize=8)
    panels[1].bar(z, of["questions"], color="#4c78a8")
    panels[2].bar(z, of["length"], color="#4c78a8")
    for panel, title in zip(panels, ("share of contexts", "share of questions", "words"), strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("z", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.set_xticks(z)
    return drawing
