"""The audit of the latents: figures against slow loops; an alarm where, and only where, z says nothing."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import KNOVER, make_corpus, make_run, make_stage
from small import WORDS
from typer.testing import CliRunner

from plato2.commands import app
from plato2.config import DecodeConfig
from plato2.data.examples import read_examples
from plato2.data.tokenizer import Tokenizer
from plato2.evaluate.latents import (
    Heard,
    alarms,
    audit,
    entropy_of_mean,
    hear,
    latent_lines,
    log_odds,
    saved_by_own_latent,
)
from plato2.evaluate.results import Figure, read_result
from plato2.stages import known_stages
from plato2.talk.bot import PlatoBot
from plato2.talk.score import Record, score
from plato2.talk.variety import variety, variety_by_context
from plato2.weights.folder import load_generation

K = 5
RANDOM = random.Random(0)
PAIRS = [([" ".join(RANDOM.choices(WORDS, k=6))], " ".join(RANDOM.choices(WORDS, k=6))) for _ in range(12)]
TOKENIZER = Tokenizer.load(KNOVER)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), PAIRS)


def heard_of(stage: Any, data: Path, coarse: Any = None) -> list[Heard]:
    bot = PlatoBot(stage, TOKENIZER, decode=DecodeConfig(max_tokens=8))
    return list(hear(bot, read_examples(data, TOKENIZER, 12), coarse, stage))


def test_figures_are_those_of_a_loop(data: Path) -> None:
    stage = make_stage("2_gen", vocab_size=TOKENIZER.vocab_size)
    coarse = make_stage("1_coarse", vocab_size=TOKENIZER.vocab_size)
    heard = heard_of(stage, data, coarse)  # in parts: 8 and 4
    result = audit("m", heard)
    figures, examples = result.systems["m"], read_examples(data, TOKENIZER, 12)
    whole = variety(stage, [example.context_ids for example in examples], coarse, DecodeConfig(max_tokens=8))
    for name in ("greedy_different", "distinct_2_between_z", "distinct_2_within_z", "distinct_2_stage_1"):
        assert figures[name].value == pytest.approx(getattr(whole, name).mean), name
    records = [Record(example.context_ids, [1, *example.reference_ids, 2]) for example in examples]
    posterior = [found["posterior"] for found in score(stage, records)]
    entropies = [-sum(x * math.log(x) for x in p) for p in posterior]

    def information(cases: list[int]) -> float:
        mean = [sum(posterior[n][z] for n in cases) / len(cases) for z in range(K)]
        return -sum(x * math.log(x) for x in mean) - sum(entropies[n] for n in cases) / len(cases)

    left = [information([n for n in range(12) if n != out]) for out in range(12)]
    expected = 12 * information(list(range(12))) - 11 * sum(left) / 12
    assert figures["mutual_information"].value == pytest.approx(expected)
    half = 1.96 * math.sqrt(11 / 12 * sum((x - sum(left) / 12) ** 2 for x in left))
    assert figures["mutual_information"].high == pytest.approx(expected + half)
    assert figures["posterior_entropy"].value == pytest.approx(sum(entropies) / 12)
    nll = [found["nll_by_latent"] for found in score(stage, records)]

    def expected_nll(of: int, z_of: int) -> float:
        return sum(p * nll[of][z] for z, p in enumerate(posterior[z_of]))

    saved = [
        sum(expected_nll(n, other) - expected_nll(n, n) for other in range(12) if other != n) / 11
        for n in range(12)
    ]
    assert figures["heeded"].value == pytest.approx(sum(saved) / 12)
    bot = PlatoBot(stage, TOKENIZER, decode=DecodeConfig(max_tokens=8))
    winners = [
        max(bot.reply_to_ids([example.context_ids])[0].candidates, key=lambda c: c.score).latent
        for example in examples
    ]
    wins = [winners.count(z) / 12 for z in range(K)]
    assert [line["wins"] for line in result.details["latents"]] == pytest.approx(wins)
    assert figures["most_wins"].value == max(wins)
    won = np.eye(K)[winners]
    assert figures["winners_in_effect"] == entropy_of_mean(won, in_effect=True)
    assert json.loads(result.model_dump_json())["details"]["latents"][0]["z"] == 0


def test_typical_words_are_those_of_the_equations() -> None:
    groups = [Counter(a=30, b=1, the=20), Counter(a=2, c=9, the=22), Counter(b=4, the=18)]
    words = sum(groups, Counter[str]())
    total = words.total()
    for number, found in enumerate(log_odds(groups)):
        own, rest = groups[number], words - groups[number]
        prior_size = total / 3
        for word, z in found.items():
            prior = prior_size * words[word] / total  # the words of all groups, as many as of one
            y, y_rest = own[word] + prior, rest[word] + prior
            odds = y / (own.total() + prior_size - y)
            odds_rest = y_rest / (rest.total() + prior_size - y_rest)
            assert z == pytest.approx(math.log(odds / odds_rest) / math.sqrt(1 / y + 1 / y_rest))
    assert max(log_odds(groups)[0].items(), key=lambda item: item[1])[0] == "a"


def test_lines_of_each_z() -> None:
    texts = [["what is it ?", "no", ""], ["what do you say ?", "no no", ""]] * 20
    first, second, third = latent_lines(texts, np.array([28, 12, 0]), None)
    assert (first["wins"], first["questions"], first["length"]) == (0.7, 1.0, 3.5)
    assert (second["questions"], second["length"]) == (0.0, 1.5)
    assert first["typical"][0][0] == "what"
    assert [word for word, _ in second["typical"]] == ["no"]
    assert (third["length"], third["typical"], third["posterior"]) == (0.0, [], None)
    assert first["wins_low"] < 0.7 < first["wins_high"]


def test_words_are_typical_only_where_chance_would_not_make_them_so() -> None:
    """30 contexts, K = 10, 200 words: a z that asks has its word, latents alike rarely have any."""
    rng = np.random.default_rng(0)

    def candidates(asks: bool) -> list[list[str]]:
        said = [[" ".join(f"w{n}" for n in rng.zipf(1.5, 8) % 200) for _ in range(10)] for _ in range(30)]
        return [[*row[:9], f"what {row[9]} ?" if asks else row[9]] for row in said]

    lines = latent_lines(candidates(asks=True), np.ones(10), None)
    assert [word for word, _ in lines[9]["typical"]] == ["what"]
    assert not any(line["typical"] for line in lines[:9])
    with_words = sum(
        any(line["typical"] for line in latent_lines(candidates(asks=False), np.ones(10), None))
        for _ in range(5)
    )
    assert with_words <= 2  # one in twenty; more than 2 of 5 have a probability of 0.001


def test_intervals_of_entropies_cover_the_truth() -> None:
    """At 100 contexts; those of a percentile bootstrap cover 40 %."""
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(20))
    truth = math.exp(-(p * np.log(p)).sum())
    found = [entropy_of_mean(np.eye(20)[random.choice(20, 100, p=p)], in_effect=True) for _ in range(300)]
    assert 0.92 <= np.mean([one.low <= truth <= one.high for one in found]) <= 0.98
    assert np.mean([one.value for one in found]) == pytest.approx(truth, rel=0.02)
    one = entropy_of_mean(np.eye(20)[:1])
    assert (one.value, one.low, one.n) == (0.0, None, 1)


def test_heeded_is_what_a_latent_says_of_its_own_response() -> None:
    """Two kinds of response, of which each has its z: told right it costs 1 nat less than told wrong."""
    posterior = np.eye(2)[[0, 1] * 50]
    nll = 5.0 + (1.0 - posterior)
    assert saved_by_own_latent(posterior, nll).mean() == pytest.approx(50 / 99)  # of 99 others 50 are wrong
    assert saved_by_own_latent(posterior[::-1], nll).mean() == pytest.approx(-50 / 99)  # told wrong
    assert saved_by_own_latent(np.full((100, 2), 0.5), nll) == pytest.approx(0.0)  # z knows nothing
    assert saved_by_own_latent(posterior, np.full((100, 2), 5.0)) == pytest.approx(0.0)  # nobody heeds it
    assert saved_by_own_latent(posterior[:1], nll[:1]).tolist() == [0.0]


# ------------------------------------------------------------------------------------------------- collapse


def test_latents_that_differ_give_no_alarm(data: Path) -> None:
    stage = make_stage("2_gen", vocab_size=TOKENIZER.vocab_size)
    with torch.no_grad():
        stage.recognition.latent_embedding.mul_(20.0)  # a posterior that knows something
    result = audit("m", heard_of(stage, data))
    assert result.details["alarms"] == []
    assert result.systems["m"]["greedy_different"].value > 1.5


def test_an_untrained_model_gives_an_alarm(data: Path) -> None:
    arguments = {"n_layer": 1, "n_head": 2, "hidden_size": 16, "n_latent": K, "dropout": 0.0}
    from plato2.config import ModelConfig

    stage = known_stages()["2_gen"](ModelConfig(**arguments, vocab_size=TOKENIZER.vocab_size)).eval()
    found = audit("m", heard_of(stage, data)).details["alarms"]
    assert any("z knows nothing of a response" in alarm for alarm in found), found


def test_collapsed_latents_give_an_alarm(data: Path) -> None:
    stage = make_stage("2_gen", vocab_size=TOKENIZER.vocab_size)
    with torch.no_grad():
        table = stage.recognition.latent_embedding
        table.copy_(table[:, :1].expand_as(table))
    found = audit("m", heard_of(stage, data)).details["alarms"]
    assert any("z changes nothing that is said: 1.0 of 5" in alarm for alarm in found), found


def test_where_the_alarms_begin() -> None:
    """docs/latents.md has the models of these figures."""

    def raised(different: float, information: float, heeded: float = 0.4) -> int:
        figures = {
            "greedy_different": Figure(value=different, low=different - 0.3, high=different + 0.3),
            "mutual_information": Figure(value=information, low=0.0, high=information + 0.02),
            "heeded": Figure(value=heeded, low=heeded - 0.005, high=heeded + 0.005),
            "most_wins": Figure(value=0.2, low=0.1, high=0.3),
        }
        return len(alarms(figures, 20))

    assert (raised(15.8, 1.9), raised(17.2, 0.45)) == (0, 0)  # in use; z at 0.3 of their distances
    assert (raised(15.0, 0.06), raised(6.4, 0.005)) == (1, 1)  # at 0.1 and 0.03
    assert (raised(1.8, 0.4), raised(1.0, 0.0)) == (1, 2)  # of the quickstart; all alike
    assert (raised(15.8, 1.9, heeded=0.006), raised(15.8, 1.9, heeded=0.004)) == (0, 1)


def test_one_latent_that_always_wins_gives_an_alarm() -> None:
    sure = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 50}
    well = {
        "greedy_different": Figure(value=4.0, low=3.5, high=4.5),
        "mutual_information": Figure(value=None),
        "heeded": Figure(value=None),
    }
    assert alarms({**well, "most_wins": Figure(**sure)}, K) == [
        "one z stands for all: the same one wins 90% of the contexts"
    ]
    assert alarms({**well, "most_wins": Figure(**{**sure, "low": 0.4})}, K) == []  # not certain


# ------------------------------------------------------------------------------------------------- the verb


def test_the_verb(data: Path, tmp_path: Path) -> None:
    runs = {name: make_run(tmp_path / name, name) for name in ("1_coarse", "2_gen", "2_eval")}
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["evaluate", "latents", "--generation", runs["2_gen"], "--evaluation", runs["2_eval"]]
    arguments += ["--coarse", runs["1_coarse"], "--data", data, "--contexts", "4", "--max-tokens", "6"]
    arguments = list(map(str, [*arguments, "--device", "cpu", "--out", out, "--picture", picture]))
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "typical words" in shown.stdout
    assert "on the valid split" in shown.stdout  # this corpus has no test split
    result = read_result(out)
    assert result.settings["split"] == "valid"
    again = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert again["systems"] == result.model_dump()["systems"]
    assert again["details"] == result.details
    assert "distinct_2_stage_1" in result.systems[str(runs["2_gen"])]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert load_generation(runs["2_gen"]).recognition is not None
    for bad, message in (
        (["--generation", runs["1_coarse"]], "a stage-1 model, which has no latents"),
        (["--generation", runs["2_gen"], "--split", "test"], "--split test: "),
        (["--generation", runs["2_gen"], "--picture", "x.gif"], "--picture x.gif"),
        (["--data", tmp_path / "no"], f"--data {tmp_path}/no: no prepared corpus there"),
        (["--generation", runs["2_gen"], "--coarse", runs["2_eval"]], "2_eval"),
    ):
        done = CliRunner().invoke(app, ["evaluate", "latents", "--data", str(data), *map(str, bad)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert message in done.stderr


def test_an_interrupted_audit_continues(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first context that is not in the file, also in the middle of those decoded together."""
    run, kept = make_run(tmp_path / "2_gen", "2_gen"), tmp_path / "kept"
    arguments = ["evaluate", "latents", "--generation", run, "--data", data, "--contexts", "12", "--json"]
    arguments = list(map(str, [*arguments, "--max-tokens", "6", "--device", "cpu"]))

    def result(*more: str) -> Any:  # posteriors differ in the last digit with what is scored together
        shown = CliRunner().invoke(app, [*arguments, *more]).stdout
        return json.loads(shown, parse_float=lambda number: round(float(number), 5))

    whole = result()
    decoded, parts = [], [1]

    def interrupted(generator: Any, contexts: Any, *rest: Any, **options: Any) -> Any:
        if len(decoded) == parts[0]:
            raise KeyboardInterrupt
        decoded.append(len(contexts))
        return variety_by_context(generator, contexts, *rest, **options)

    monkeypatch.setattr("plato2.evaluate.latents.variety_by_context", interrupted)
    assert CliRunner().invoke(app, [*arguments, "--scores", str(kept)]).exit_code == 130
    assert kept.read_bytes().count(b"\n") == 1 + 8
    parts[0] = 9
    for lines, rest in ((9, [4]), (4, [8, 1])):
        written = kept.read_bytes().splitlines(keepends=True)
        kept.write_bytes(b"".join(written[:lines]) + written[-1][:20])  # killed in the middle of a line
        decoded[:] = []
        again = result("--scores", str(kept))
        assert decoded == rest
        assert (again["systems"], again["details"]) == (whole["systems"], whole["details"])
    other = CliRunner().invoke(app, [*arguments, "--scores", str(kept), "--contexts", "6"])
    assert other.stderr.startswith(f"error: --scores {kept}: has scores of other contexts; remove it")
    assert other.stderr.count("\n") == 1
