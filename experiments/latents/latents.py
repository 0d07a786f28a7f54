"""How many latents: stage 2.1 with K = 1, 5 and 20 from one stage 1, trained, measured, recorded and drawn.

    python experiments/latents/latents.py --coarse RUN --data DIR --multiref FILE
    python experiments/latents/latents.py --coarse RUN --data DIR --multiref FILE --seed 1
    python experiments/latents/latents.py --coarse RUN --data DIR --steps 200 --contexts 20

RUN is the finished stage 1 of `experiment=evening`, DIR the corpus it read. One thread. Runs, scores and
replies are kept in --out, so the same command goes on after a kill. Another seed lands in the same
results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import figures
import matplotlib
import numpy as np
import torch
from sacrebleu.metrics import CHRF

import plato2
from experiments.configs import keep_config
from plato2.commands.evaluate_latents import all_heard
from plato2.config import DecodeConfig, UserError
from plato2.data.examples import read_examples
from plato2.data.samples import encode_response, read_context
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import Tokenizer
from plato2.evaluate.kept import continued
from plato2.evaluate.latents import alarms, audit
from plato2.evaluate.results import Figure
from plato2.evaluate.scores import WIDTH, Encoder, Kept, unwatched
from plato2.metrics import distinct_n
from plato2.model.networks import GenerationNetwork
from plato2.runs.folder import RunFolder, provenance
from plato2.runs.saved import read_metrics
from plato2.runs.start import warm_start
from plato2.stages.fine import COLLAPSED_BELOW, SILENT_BELOW, FineGeneration
from plato2.talk.bot import PlatoBot
from plato2.talk.decode import decode
from plato2.talk.score import Record, score
from plato2.talk.self_chat import read_starts
from plato2.talk.speaker import weights_hash
from plato2.weights.folder import load_generation, read_saved, saved_tokenizer
from plato2.words import split_words

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
COARSE, MORE = "stage 1", "stage 1, more"
LATENTS = {"K = 1": 1, "K = 5": 5, "K = 20": 20}
TRAINED = (MORE, *LATENTS)
SYSTEMS = (COARSE, *TRAINED)
PAIRS = (("K = 20", "K = 5"), ("K = 20", "K = 1"), ("K = 20", MORE), ("K = 20", COARSE))
CANDIDATES = 20
REFERENCES = 4
"""A context of the multi-reference set has at least so many different ones."""
VALIDATIONS, VALID_UNITS, VALID_CONTEXTS = 10, 8, 8
"""In a training; units of 4,096 tokens and contexts of each."""
SCORED_AT_ONCE, ANSWERED_AT_ONCE = 32, 16
RANDOM, ELSEWHERE = "training replies at random", "K = 20, those for another context"
ASKED = ("steps", "samples", "contexts", "heard", "multiref", "evaluation")
"""Options that all seeds have in common."""


# --------------------------------------------------------------------------------------------- training


def overrides(name: str, given: argparse.Namespace) -> list[str]:
    """What train.py is given: the evening's values of stage 2.1, for stage 1's further training, too."""
    stage = ["stage=1_coarse"] if name == MORE else ["stage=2_gen", f"model.n_latent={LATENTS[name]}"]
    return [
        "experiment=evening", "hydra.mode=RUN", "strategy=cpu", *stage,
        f"init_from={given.coarse}", f"data.path={given.data}", f"seed={given.seed}",
        "optim.lr=5e-4", "optim.warmup_steps=100", "optim.schedule=linear",
        f"trainer.max_steps={given.steps}",
        f"trainer.val_check_interval={max(1, given.steps // VALIDATIONS)}",
        f"data.valid_units={VALID_UNITS}", f"latent_contexts={VALID_CONTEXTS}", "sample_replies=0",
        "report=false",
    ]  # fmt: skip


def train(name: str, given: argparse.Namespace, folder: Path) -> RunFolder:
    """Trains a system to its last step; one that is there already is left alone."""
    run = RunFolder(folder / "runs" / in_file_name(name))
    if not run.finished:
        where = [f"output_dir={folder}", "name=runs", f"run_id={run.path.name}"]
        plato2.train(*overrides(name, given), *where)
    return run


def in_file_name(name: str) -> str:
    """`K = 20` -> `K-20`."""
    return name.replace(" = ", "-").replace(", ", "-").replace(" ", "-")


def about_run(run: RunFolder, n_latent: int | None) -> dict[str, Any]:
    """What a training cost, and what each of its validations found.

    Args:
        run: its folder.
        n_latent: K; None of stage 1.
    """
    steps: dict[int, dict[str, float]] = {}
    for step, metric, value in read_metrics(run.path / "metrics.csv"):
        steps.setdefault(step, {})[metric] = value
    logged = max(step for step, row in steps.items() if "perf/cpu_s" in row)
    last = max(steps)
    pace = last / logged  # the last steps are not logged where their number is odd
    lineage = run.lineage()
    return {
        "steps": last,
        "samples": round(steps[logged]["perf/samples"] * pace),
        "cpu_s": round(steps[logged]["perf/cpu_s"] * pace, 1),
        "parent": lineage["parent"]["sha256"],
        "git": lineage["git"],
        "curve": [validation(step, row, n_latent) for step, row in sorted(steps.items()) if "val/nll" in row],
    }


SHOWN = ("nll", "nll_uniform", "z_mutual_information", "z_effective", "z_in_use", "greedy_different")


def validation(step: int, row: Mapping[str, float], n_latent: int | None) -> dict[str, Any]:
    """What a validation found, and which rules call its latents useless.

    `alarms` are those of `plato2 evaluate latents` on the values themselves, since a validation has no
    intervals; `warned` is whether stage 2.1 warns.
    """
    found: dict[str, Any] = {"step": step}
    found |= {name: round(row[f"val/{name}"], figures.DIGITS) for name in SHOWN if f"val/{name}" in row}
    if n_latent is None:
        return found
    information, different = found["z_mutual_information"], found.get("greedy_different")
    found["alarms"] = alarms(
        {
            "mutual_information": Figure(value=information, high=information),
            "greedy_different": Figure(value=different, high=different),
            # A validation chooses nothing, and gives no response another's z.
            "heeded": Figure(value=None),
            "most_wins": Figure(value=None),
        },
        n_latent,
    )
    found["warned"] = found["z_effective"] < COLLAPSED_BELOW or information < SILENT_BELOW
    return found


def warm_started(coarse: Path, n_latent: int, seed: int) -> dict[str, Any]:
    """What a stage 2.1 of K latents has of a stage 1 before its first step."""
    saved = read_saved(coarse, ("1_coarse",), "--coarse")
    before = {name: tensor.clone() for name, tensor in saved.weights.items()}
    stage = FineGeneration({**saved.arguments["model"], "n_latent": n_latent}, seed=seed)
    told = warm_start(stage, saved.file, stage.warm_starts_from, saved.tokenizer_sha256 or "")
    own = stage.state_dict()
    return {
        "told": told.removeprefix(f"weights from {saved.file}: "),
        "backbone": sum(name.startswith("backbone.") for name in own),
        "equal": sum(name in before and own[name].equal(before[name]) for name in own),
        "latents": [*own["recognition.latent_embedding"].shape],
    }


# ------------------------------------------------------------------------------------- contexts and replies


@dataclass(frozen=True)
class Case:
    """A context with what people replied to it."""

    context: list[int]
    """[CLS] (turn [SEP])*"""
    references: tuple[str, ...]
    responses: list[list[int]]
    """The references as ids, [CLS] words [SEP]."""


@dataclass(frozen=True)
class Set:
    """What the systems are asked."""

    scored: list[Case]
    """Whose responses get probabilities."""
    answered: list[Case]
    """Which get candidates."""


def read_sets(given: argparse.Namespace, tokenizer: Tokenizer, limit: int) -> dict[str, Set]:
    """The test split and, if it is given, the multi-reference set; the same ones at every call.

    Args:
        given: the command line.
        tokenizer: of the corpus.
        limit: ids of a context, and of a response.
    """
    examples = read_examples(given.data, tokenizer, given.samples, "test", max_context=limit)
    test = [
        Case(one.context_ids, (one.reference,), [encode_response(one.reference_ids, limit)])
        for one in examples
    ]
    every = max(1, len(test) // given.contexts)
    found = {"test": Set(test, test[::every][: given.contexts])}
    if given.multiref is not None:
        starts = read_starts(given.multiref, "--multiref")
        several = [start for start in starts if len(set(start.references)) >= REFERENCES]
        places = np.sort(np.random.default_rng(0).permutation(len(several))[: given.contexts])
        cases = []
        for start in (several[place] for place in places):
            references = tuple(dict.fromkeys(start.references))
            responses = [encode_response(ids, limit) for ids in tokenizer.encode_batch(references)]
            cases.append(Case(read_context(start.turns, tokenizer, limit).ids, references, responses))
        found["dailydialog"] = Set(cases, cases)
    return found


def random_replies(data: Path, tokenizer: Tokenizer, n: int) -> list[list[list[int]]]:
    """n times CANDIDATES responses of the first training shard, as ids without [CLS] and [SEP]."""
    shard = read_shard(data, read_index(data).splits["train"].shards[0])
    places = np.random.default_rng(0).integers(0, len(shard.context_len), (n, CANDIDATES))
    bounds, length = [*pairwise(shard.offsets)], shard.context_len

    def response(place: int) -> list[int]:
        first, end = bounds[place]
        ids = shard.token_ids[first + length[place] + 1 : end].tolist()
        return ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids

    return [[response(place) for place in row] for row in places]


@dataclass(frozen=True)
class Scored:
    """What a model says of a response."""

    n_tokens: int
    nll: list[float]
    """-log p(r|c,z) of each z in nats; of stage 1 -log p(r|c) alone."""
    posterior: list[float]
    """p(z|c,r); of stage 1 [1]."""
    cpu_s: float


def scored(network: GenerationNetwork, cases: Sequence[Case], first: int) -> Iterator[Scored]:
    """Each response of each case, from that number on."""
    records = [Record(case.context, response) for case in cases for response in case.responses]
    for start in range(first, len(records), SCORED_AT_ONCE):
        began = time.process_time()
        found = score(network, records[start : start + SCORED_AT_ONCE])
        spent = (time.process_time() - began) / len(found)
        for one in found:
            by_latent = one.get("nll_by_latent") or [one["nll"]]
            yield Scored(one["n_tokens"], by_latent, one.get("posterior") or [1.0], spent)


@dataclass(frozen=True)
class Answered:
    """What a model says to a context."""

    candidates: list[str]
    """As many of each latent."""
    distinct_2: float
    """Of their token ids."""
    greedy_different: int
    """How many of the greedy candidates of the latents differ."""
    cpu_s: float


def sampling(network: GenerationNetwork, seed: int) -> DecodeConfig:
    """Top-k 10 and CANDIDATES candidates, the same number of each latent; as long as the model can."""
    config = network.model_config
    k = 1 if network.recognition is None else config.n_latent
    most = config.max_position - config.max_position // 2
    return DecodeConfig(max_tokens=most, n_samples=CANDIDATES // k, n_candidates=CANDIDATES, seed=seed)


def answered(
    network: GenerationNetwork, tokenizer: Tokenizer, cases: Sequence[Case], seed: int, first: int
) -> Iterator[Answered]:
    """Each case, from that number on. All systems draw with the same random numbers: those of the seed, the
    context and the number of the candidate."""
    config = sampling(network, seed)
    greedy = replace(config, top_k=1, n_samples=1, n_candidates=1)
    for start in range(first, len(cases), ANSWERED_AT_ONCE):
        began = time.process_time()
        contexts = [case.context for case in cases[start : start + ANSWERED_AT_ONCE]]
        found = decode(network, contexts, config)
        different = [len({one.words for one in group}) for group in decode(network, contexts, greedy)]
        spent = (time.process_time() - began) / len(contexts)
        for group, n in zip(found, different, strict=True):
            words = [one.words for one in group]
            yield Answered([tokenizer.decode(ids) for ids in words], distinct_n(words, 2), n, spent)


def ask(
    name: str, path: Path, sets: Mapping[str, Set], given: argparse.Namespace, folder: Path
) -> dict[str, tuple[list[Scored], list[Answered]]]:
    """What a system says of each set; what the folder has already is not asked again."""
    network, tokenizer = load_generation(path, with_recognition=True), saved_tokenizer(path)
    found = {}
    for of, asked in sets.items():
        file = f"{of}-{in_file_name(name)}"
        about = {"model": weights_hash(network), "cases": sha256(repr(asked).encode()).hexdigest()}
        scores = continued(
            folder / f"scores-{file}.jsonl", about, Scored, partial(scored, network, asked.scored)
        )
        more = {"seed": given.seed, "candidates": CANDIDATES}
        find = partial(answered, network, tokenizer, asked.answered, given.seed)
        replies = continued(folder / f"replies-{file}.jsonl", about | more, Answered, find)
        found[of] = [*scores], [*replies]
    return found


def hear(path: Path, given: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    """What `plato2 evaluate latents` finds of a model: its figures, a line for each z, alarms."""
    bot = PlatoBot.load(path, given.evaluation, "cpu", DecodeConfig(seed=given.seed))
    examples = read_examples(given.data, bot.tokenizer, given.heard, "test", max_context=bot.max_context)
    full = load_generation(path, with_recognition=True)
    began = time.process_time()
    heard = all_heard(bot, examples, None, full, folder / f"heard-{in_file_name(name)}.jsonl")
    result = audit(name, heard, given.seed)
    return {
        "contexts": len(heard),
        "figures": {
            measure: figures.rounded(one.value, one.low, one.high)
            for measure, one in result.systems[name].items()
            if one.value is not None
        },
        "lines": json.loads(json.dumps(result.details["latents"]), parse_float=lambda x: round(float(x), 4)),
        "alarms": result.details["alarms"],
        "cpu_s": round(time.process_time() - began, 1),
    }


# ---------------------------------------------------------------------------------------------- measuring

Replies = dict[str, dict[str, np.ndarray]]
"""System -> measure -> a value for each context."""


class Texts:
    """How alike two texts are, in two ways: chrF, and the cosine of sentence embeddings where the extra
    `eval` is installed.

    Args:
        path: a file that keeps embeddings.
        texts: all that will be compared.
    """

    def __init__(self, path: Path, texts: Sequence[str]) -> None:
        self.chrf = CHRF(lowercase=True)
        self.embeddings: dict[str, np.ndarray] | None = None
        try:
            encoder = Encoder("cpu")
        except UserError as error:
            print(f"without cosines: {error}")
            return
        unique = [*dict.fromkeys(texts)]
        vectors = Kept(path, WIDTH).of(
            unique, lambda text: f"{encoder.name} {text}", encoder, "embeddings", unwatched
        )
        self.embeddings = dict(zip(unique, vectors, strict=True))

    @property
    def kinds(self) -> list[str]:
        """Names of the ways."""
        return ["chrf", *(["cosine"] if self.embeddings is not None else [])]

    def alike(self, kind: str, references: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
        """(references, candidates): chrF from 0 to 100, or a cosine."""
        if kind == "chrf":
            rows = [[self.chrf.sentence_score(text, [r]).score for text in candidates] for r in references]
            return np.array(rows)
        assert self.embeddings is not None
        a, b = (np.array([self.embeddings[text] for text in texts]) for texts in (references, candidates))
        return a @ b.T


def measure_replies(
    cases: Sequence[Case],
    said: Mapping[str, list[list[str]]],
    known: Replies,
    path: Path,
) -> tuple[Replies, dict[str, float]]:
    """The candidates of all systems against the references.

    Args:
        cases: n contexts.
        said: system -> the candidates for each context.
        known: system -> what is known without references.
        path: keeps embeddings, with another suffix.

    Returns:
        What was measured of each context; and from which chrF and cosine on two texts count as near.
    """
    everything = [text for lists in said.values() for texts in lists for text in texts]
    texts = Texts(
        path.with_suffix(".embeddings"), everything + [text for case in cases for text in case.references]
    )
    near = {
        kind: figures.people_are_near([texts.alike(kind, c.references, c.references) for c in cases])
        for kind in texts.kinds
    }
    found: Replies = {}
    for system, lists in said.items():
        words = [np.mean([len(split_words(text)) for text in candidates]) for candidates in lists]
        found[system] = {**known[system], "words": np.array(words)}
        for kind in texts.kinds:
            pairs = zip(cases, lists, strict=True)
            alike = [texts.alike(kind, case.references, candidates) for case, candidates in pairs]
            for measure, values in figures.against(alike, near[kind]).items():
                found[system][f"{kind}_{measure}"] = values
    return found, {kind: round(value, 4) for kind, value in near.items() if not math.isnan(value)}


def measure(
    name: str,
    asked: Set,
    by_system: Mapping[str, tuple[list[Scored], list[Answered]]],
    given: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """All figures of a set, and the differences between systems.

    Args:
        name: of the set.
        asked: the set.
        by_system: what each system said of it.
        given: the command line.
        folder: keeps embeddings.
    """
    seed = given.seed
    case = np.repeat(np.arange(len(asked.scored)), [len(one.responses) for one in asked.scored])
    n_tokens = np.array([one.n_tokens for one in by_system[COARSE][0]])  # of the responses: the same for all
    nats, information = {}, {}
    for system, (scores, _) in by_system.items():
        p, nll = (np.array([getattr(one, of) for one in scores]) for of in ("posterior", "nll"))
        nats[system] = figures.ways(p, nll, case)
        if system in LATENTS:
            information[system] = figures.information(p, nll, case)

    def per_token(values: np.ndarray) -> figures.Interval:
        return figures.rounded(*figures.per_token(values, n_tokens, case, seed))

    replies, near = measure_replies(asked.answered, *candidates_of(asked, by_system, given), folder / name)
    differences = {}
    for one, other in PAIRS:
        found = {"nats": per_token(nats[one]["mixture"] - nats[other]["mixture"])}
        for of in replies[one]:
            if of in replies[other]:
                found[of] = figures.mean_of(replies[one][of] - replies[other][of], seed)
        differences[f"{one} - {other}"] = found
    return {
        "contexts": len(asked.answered),
        "responses": len(case),
        "tokens": int(n_tokens.sum()),
        "near": near,
        "information": information,
        "perplexity": {
            system: {
                way: figures.perplexity(values, n_tokens, case, seed)
                for way, values in found.items()
                if system in LATENTS or way == "mixture"  # all ways are the same without latents
            }
            for system, found in nats.items()
        },
        "gains": {
            system: {way: per_token(found["uniform"] - found[way]) for way in ("other", "right", "mixture")}
            for system, found in nats.items()
            if system in LATENTS
        },
        "candidates": {
            system: {of: figures.mean_of(values, seed) for of, values in found.items()}
            for system, found in replies.items()
        },
        "differences": differences,
        "cpu_s": {
            system: round(sum(one.cpu_s for lines in both for one in lines), 1)
            for system, both in by_system.items()
        },
    }


def candidates_of(
    asked: Set, by_system: Mapping[str, tuple[list[Scored], list[Answered]]], given: argparse.Namespace
) -> tuple[dict[str, list[list[str]]], Replies]:
    """The candidates of all systems and of two controls, and what is known of them without references."""
    said, known = {}, {}
    for system, (_, replies) in by_system.items():
        said[system] = [one.candidates for one in replies]
        known[system] = {"distinct_2": np.array([one.distinct_2 for one in replies])}
        if LATENTS.get(system, 1) > 1:  # one latent has one greedy candidate
            known[system]["greedy_different"] = np.array([float(one.greedy_different) for one in replies])
    tokenizer = saved_tokenizer(given.coarse)
    drawn = random_replies(given.data, tokenizer, len(asked.answered))
    said[RANDOM] = [[tokenizer.decode(ids) for ids in row] for row in drawn]
    known[RANDOM] = {"distinct_2": np.array([distinct_n(row, 2) for row in drawn])}
    said[ELSEWHERE] = said["K = 20"][1:] + said["K = 20"][:1]
    known[ELSEWHERE] = {"distinct_2": np.roll(known["K = 20"]["distinct_2"], -1)}
    return said, known


# ---------------------------------------------------------------------------------------------- recording


def record(path: Path, seed: int, made: dict[str, Any]) -> dict[str, Any]:
    """Puts a seed into results.json beside the others, and returns all.

    Raises:
        UserError: another seed was asked something else.
    """
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"seeds": {}}
    for other, there in results["seeds"].items():
        if other != str(seed) and there["asked"] != made["asked"]:
            raise UserError(
                f"{path}: seed {other} was asked {there['asked']}, this one {made['asked']}; give the same "
                "options, or another file as --results"
            )
    seeds = results["seeds"] | {str(seed): made}
    results["seeds"] = dict(sorted(seeds.items(), key=lambda one: int(one[0])))
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return dict(results)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Mutual information and latents in effect over the steps, a line for each K and seed."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    titles = {"z_mutual_information": "mutual information of z, nats", "z_effective": "latents in effect"}
    for color, (name, k) in enumerate(LATENTS.items()):
        for axis, (measured, title) in zip(axes, titles.items(), strict=True):
            for number, made in enumerate(results["seeds"].values()):
                curve = made["runs"][name]["curve"]
                values = [point[measured] for point in curve]
                label = name if number == 0 else None
                steps = [point["step"] for point in curve]
                axis.plot(steps, values, ".-", color=f"C{color}", label=label)
                fired = [n for n, point in enumerate(curve) if point["alarms"] and k > 1]
                axis.plot(
                    [steps[n] for n in fired], [values[n] for n in fired], "x", color="black", markersize=9
                )
            bound = math.log(k) if measured == "z_mutual_information" else k
            axis.axhline(bound, color=f"C{color}", linestyle=":", linewidth=1)
            axis.set_title(title)
            axis.set_xlabel("step of stage 2.1")
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.supxlabel("dotted: the most that is possible; cross: an alarm of plato2 evaluate latents", size=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--coarse", type=Path, required=True, help="a finished run of stage 1")
    add("--data", type=Path, required=True, help="the prepared corpus, with a test split")
    add("--multiref", type=Path, help="DailyDialog's multireftest.jsonl.gz; without it the test split alone")
    add("--evaluation", type=Path, help="a run of stage 2.2 that chooses which z is said; else log p(r|c,z)")
    add("--steps", type=int, default=1000, help="optimizer steps of each run")
    add("--samples", type=int, default=1000, help="test samples whose response gets a probability")
    add("--contexts", type=int, default=120, help="contexts of each set that get candidates")
    add("--heard", type=int, default=100, help="test contexts on which it is heard what each z says")
    add("--seed", type=int, default=0, help="of weights, order of samples, and sampling")
    add("--out", type=Path, default=Path("outputs/latents"), help="where runs and replies are kept")
    add("--results", type=Path, default=HERE / "results.json")
    return parser.parse_args()


def make(given: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures a seed."""
    began = time.process_time()
    folder = given.out / f"steps-{given.steps}" / f"seed-{given.seed}"
    started = {name: warm_started(given.coarse, k, given.seed) for name, k in LATENTS.items()}
    runs = {name: train(name, given, folder) for name in TRAINED}
    abouts = {name: about_run(run, LATENTS.get(name)) for name, run in runs.items()}
    if len(parents := {about["parent"] for about in abouts.values()}) > 1:
        raise UserError(f"--out {folder}: has runs of {len(parents)} different stage 1; give another folder")
    trained_s = time.process_time() - began
    for name, run in runs.items():
        keep_config(
            run.path, given.results.parent / "config" / f"seed-{given.seed}-{in_file_name(name)}.yaml"
        )
    models = {COARSE: RunFolder(given.coarse).best, **{name: run.last for name, run in runs.items()}}
    tokenizer = saved_tokenizer(models[COARSE])
    sets = read_sets(given, tokenizer, read_saved(models[COARSE]).model_config.max_position // 2)
    said = {name: ask(name, path, sets, given, folder) for name, path in models.items()}
    found = {
        of: measure(of, asked, {name: said[name][of] for name in SYSTEMS}, given, folder)
        for of, asked in sets.items()
    }
    heard = {name: hear(models[name], given, folder, name) for name in LATENTS}
    return {
        "asked": {
            name: value is not None if name in ("multiref", "evaluation") else value
            for name in ASKED
            for value in [getattr(given, name)]
        },
        "made_with": {
            **provenance(),
            "threads": torch.get_num_threads(),
            "cpu_s": {
                "training with validations": round(trained_s, 1),
                "measuring": round(time.process_time() - began - trained_s, 1),
            },
        },
        "started": started,
        "runs": abouts,
        "sets": found,
        "heard": heard,
    }


def main() -> None:
    """Makes one seed, records it and draws all."""
    given = options()
    torch.set_num_threads(1)
    for name in ("coarse", "data", "out"):
        setattr(given, name, getattr(given, name).absolute())
    results = record(given.results, given.seed, make(given))
    draw(results, given.results.with_name("curves.png"))


if __name__ == "__main__":
    main()
