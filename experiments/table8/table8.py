"""Response selection as in table 8, from runs to results.json and a picture.

    python experiments/table8/table8.py --data DIR --dailydialog FILE --coarse RUN --fine RUN --backward RUN \
        --first RUN --dual RUN

Every model may be left out, its rows are then missing. Scores are kept in a folder (--scores), by model and
set: the same command continues after a kill, and only computes the scores of models that were added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from controls import combined, elsewhere, surface
from prior import Prior
from sets import Source, dailydialog, held_out, records

from experiments.configs import keep_config
from plato2.data.samples import encode_context, encode_response
from plato2.evaluate.candidates import Query
from plato2.evaluate.kept import kept
from plato2.evaluate.results import Result, picture, save_picture
from plato2.evaluate.scorers import (
    Coherence,
    LogProb,
    Scorer,
    Texts,
    backward,
    baselines,
    corpus_texts,
    forward,
)
from plato2.evaluate.selection import Scores, evaluate_selection, score_queries
from plato2.runs.folder import provenance
from plato2.runs.saved import checkpoint_step
from plato2.talk.score import Record, score
from plato2.talk.speaker import weights_hash
from plato2.weights.folder import (
    checkpoint_file,
    load_backward,
    load_evaluation,
    load_generation,
    read_saved,
    saved_tokenizer,
)

HERE = Path(__file__).parent
OTHER = ", another context"
SURFACE = ("short", "few characters", "frequent words, summed", "frequent words")
SUM = "length and frequencies"
FITTED, CHECKED = 20_000, 2_000
"""Samples that p(z|c) is fitted to, and that it is checked on."""
DIGITS = 4
CPU = "cpu_s"


# ---------------------------------------------------------------------------------------------- scores


def coarse(path: Path, given: argparse.Namespace) -> tuple[dict[str, Scorer], dict[str, Any]]:
    """log p(r|c) of stage 1, per token and summed."""
    network = load_generation(path, "--coarse")
    found = LogProb(forward(network, saved_tokenizer(path)))
    scorers: dict[str, Scorer] = {
        "forward, stage 1": found.per_token,
        "forward, stage 1, summed": found.summed,
    }
    return scorers, {"sha256": weights_hash(network)}


def fine(path: Path, given: argparse.Namespace) -> tuple[dict[str, Scorer], dict[str, Any]]:
    """log sum_z p(z) p(r|c,z) of stage 2.1, p(z) = 1/K or the learned p(z|c), per token and summed."""
    network = load_generation(path, "--fine", with_recognition=True)
    prior = Prior(network, list(islice(records(given.data, "train"), given.fitted)))
    latents = Latents(network, saved_tokenizer(path), prior)
    scorers: dict[str, Scorer] = {}
    for name, find in (("uniform z", latents.uniform), ("p(z|c)", latents.learned)):
        found = LogProb(find)
        scorers[f"forward, stage 2.1, {name}"] = found.per_token
        scorers[f"forward, stage 2.1, {name}, summed"] = found.summed
    checked = prior.figures(list(islice(records(given.data, "valid"), CHECKED)))
    return scorers, {"sha256": weights_hash(network), "prior": {"fitted to": given.fitted, **checked}}


class Latents:
    """log p(r|c) of stage 2.1 as a sum over all latents.

    Args:
        network: of stage 2.1.
        tokenizer: its.
        prior: p(z|c).
    """

    def __init__(self, network: Any, tokenizer: Any, prior: Prior) -> None:
        self.network, self.tokenizer, self.prior = network, tokenizer, prior
        self.most = network.model_config.max_position // 2  # ids of a context, of a response
        self._last: tuple[tuple[Texts, Texts], tuple[np.ndarray, np.ndarray, list[int]]] | None = None

    def uniform(self, context: Texts, candidates: Texts) -> list[tuple[float, int]]:
        """log (1/K) sum_z p(r|c,z) and the number of tokens of each candidate."""
        _, by_latent, n_tokens = self._read(context, candidates)
        summed = np.logaddexp.reduce(by_latent, axis=1) - np.log(by_latent.shape[1])
        return list(zip(summed.tolist(), n_tokens, strict=True))

    def learned(self, context: Texts, candidates: Texts) -> list[tuple[float, int]]:
        """log sum_z p(z|c) p(r|c,z) and the number of tokens of each candidate."""
        log_p_z, by_latent, n_tokens = self._read(context, candidates)
        summed = np.logaddexp.reduce(by_latent + log_p_z, axis=1)
        return list(zip(summed.tolist(), n_tokens, strict=True))

    def _read(self, context: Texts, candidates: Texts) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """log p(z|c) (K,), log p(r|c,z) (n, K), tokens; the last context's are kept."""
        asked = tuple(context), tuple(candidates)
        if self._last is None or self._last[0] != asked:
            turns = self.tokenizer.encode_batch(context[-self.most :])
            c = encode_context(turns, self.most, cut_turn=True)
            assert c is not None  # cut_turn
            replies = self.tokenizer.encode_batch(candidates)
            found = score(self.network, [Record(c, encode_response(ids, self.most)) for ids in replies])
            by_latent = -np.array([one["nll_by_latent"] for one in found])
            n_tokens = [int(one["n_tokens"]) for one in found]
            self._last = asked, (self.prior.log_probs([c])[0], by_latent, n_tokens)
        return self._last[1]


def reverse(path: Path, given: argparse.Namespace) -> tuple[dict[str, Scorer], dict[str, Any]]:
    """log p(c|r). A context has one length, so that per token or summed is the same order."""
    network = load_backward(path, "--backward")
    found = LogProb(backward(network, saved_tokenizer(path)))
    return {"backward": found.per_token}, {"sha256": weights_hash(network)}


def head(name: str) -> Callable[[Path, argparse.Namespace], tuple[dict[str, Scorer], dict[str, Any]]]:
    """p(l=1|c,r) of an evaluation model."""

    def scorers(path: Path, given: argparse.Namespace) -> tuple[dict[str, Scorer], dict[str, Any]]:
        network = load_evaluation(path, f"--{name}")
        judge = Coherence(network, saved_tokenizer(path))
        return {f"coherence, {name}": judge}, {"sha256": weights_hash(network)}

    return scorers


MODELS = {"coarse": coarse, "fine": fine, "backward": reverse, "first": head("first"), "dual": head("dual")}
WITHOUT_OTHER = ("fine",)
"""Twenty passes each: not asked about the contexts of other dialogues."""


def model_scores(
    models: Mapping[str, Path], sources: Sequence[Source], given: argparse.Namespace
) -> tuple[dict[str, list[Scores]], dict[str, Any]]:
    """The scores of all models for the contexts of each source, and what is known of each model."""
    found: dict[str, list[Scores]] = {source.name: [{} for _ in source.queries] for source in sources}
    abouts: dict[str, Any] = {}
    for name, path in models.items():
        scorers, about = MODELS[name](path, given)
        saved = read_saved(path)
        abouts[name] = {"stage": saved.stage, "geometry": saved.arguments["model"], **about}
        abouts[name] |= {"step": checkpoint_step(checkpoint_file(path)), "cpu_s": {}}
        for source in sources:
            asked = dict(scorers)
            if name not in WITHOUT_OTHER:
                other = {
                    query.context: source.queries[number].context
                    for query, number in zip(source.queries, source.other, strict=True)
                }
                asked |= {f"{key}{OTHER}": elsewhere(scorer, other) for key, scorer in scorers.items()}
            file = given.scores / f"{source.name}-{name}.jsonl"
            new = kept_scores(file, source, asked, about["sha256"])
            abouts[name]["cpu_s"][source.name] = round(sum(scores.pop(CPU)[0] for scores in new), 1)
            found[source.name] = [{**old, **more} for old, more in zip(found[source.name], new, strict=True)]
    return found, abouts


def kept_scores(path: Path, source: Source, scorers: Mapping[str, Scorer], model: str) -> list[Scores]:
    """The scores of all contexts of a source and the CPU seconds they took; those that the file has are not
    computed again."""
    contexts = hashlib.sha256(repr([(one.context, one.candidates) for one in source.queries]).encode())
    about = {"model": model, "scores": list(scorers), "contexts": contexts.hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with kept(path, about, Scores) as (done, append):
        began = time.process_time()

        def timed(scores: Scores) -> None:
            nonlocal began
            scores[CPU] = [time.process_time() - began]
            append(scores)
            began = time.process_time()

        return list(score_queries(source.queries, scorers, done, timed))


def simple_scores(source: Source, texts: Texts, seed: int) -> list[Scores]:
    """Those that need no model."""
    candidates = [text for query in source.queries for text in query.candidates]
    scorers = baselines([query.context for query in source.queries], candidates, texts, seed)
    return list(score_queries(source.queries, scorers | surface(texts)))


# --------------------------------------------------------------------------------------------- results


def one_set_each(queries: Sequence[Query], scored: Sequence[Scores]) -> dict[str, list[tuple[Query, Scores]]]:
    """Every set with queries of its own: what is fitted to a set, scores its candidates in that set alone."""
    found: dict[str, list[tuple[Query, Scores]]] = {}
    for query, scores in zip(queries, scored, strict=True):
        for name, numbers in query.sets.items():
            candidates = tuple(query.candidates[number] for number in numbers)
            labels = tuple(query.labels[number] for number in numbers)
            alone = Query(query.context, candidates, labels, {name: range(len(numbers))}, query.place)
            chosen = {key: [values[number] for number in numbers] for key, values in scores.items()}
            found.setdefault(name, []).append((alone, chosen))
    return found


def with_controls(queries: Sequence[Query], scored: Sequence[Scores]) -> list[Scores]:
    """The surface's scores; models' scores beside those with another context; what they add to the surface.

    Args:
        queries: of one set.
        scored: their scores.
    """
    read = [name for name in scored[0] if f"{name}{OTHER}" in scored[0]]
    controls: list[Scores] = []
    for scores in scored:
        own = {name: scores[name] for name in SURFACE}
        for name in read:
            with_other = scores[f"{name}{OTHER}"]
            difference = np.subtract(scores[name], with_other).tolist()
            own |= {name: scores[name], f"{name}{OTHER}": with_other, f"{name}, difference": difference}
        controls.append(own)
    for name in ("", "shared words", *read):
        fitted = combined(queries, scored, [*SURFACE, *([name] if name else [])])
        for own, values in zip(controls, fitted, strict=True):
            own[f"{SUM}, {name}" if name else SUM] = values
    return controls


def compact(result: Result) -> dict[str, Any]:
    """A result with what a table needs; tests of MAP alone."""
    return {
        "sets": result.details["sets"],
        "chance": {name: _rounded(one.chance) for name, one in result.measures.items() if one.chance},
        "figures": {
            system: {
                name: [_rounded(x) for x in (one.value, one.low, one.high)] for name, one in figures.items()
            }
            for system, figures in result.systems.items()
        },
        "tests": [
            {key: _rounded(value) for key, value in test.items() if key != "measure"}
            for test in result.details["tests"]
            if test["measure"] == "map"
        ],
    }


def _rounded(value: Any) -> Any:
    return round(value, DIGITS) if isinstance(value, float) else value


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared corpus with a test split")
    parser.add_argument("--dailydialog", type=Path, help="dev.jsonl.gz of DailyDialog++")
    for name, what in (
        ("coarse", "stage 1"),
        ("fine", "stage 2.1"),
        ("backward", "stage backward"),
        ("first", "stage 2.2"),
        ("dual", "stage 2.2 with head dual"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=f"a run of {what}")
    parser.add_argument("--contexts", type=int, default=1000, help="of the test split")
    parser.add_argument("--limit", type=int, help="only the first contexts of DailyDialog++")
    parser.add_argument(
        "--fitted", type=int, default=FITTED, help="training samples that p(z|c) is fitted to"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scores", type=Path, default=Path("outputs/table8"), help="folder to keep scores in"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    return parser.parse_args()


def main() -> None:
    """Scores, figures, tests and controls, written and drawn."""
    given, began = options(), time.process_time()
    sources = [held_out(given.data, given.contexts, given.seed)]
    if given.dailydialog:
        sources.append(dailydialog(given.dailydialog, given.limit))
    texts = corpus_texts(given.data)
    models = {name: path for name in MODELS if (path := getattr(given, name))}
    by_model, abouts = model_scores(models, sources, given)
    queries: list[Query] = []
    chosen: list[Scores] = []
    controls: list[Scores] = []
    for source in sources:
        simple = simple_scores(source, texts, given.seed)
        scored = [one | more for one, more in zip(simple, by_model[source.name], strict=True)]
        for found in one_set_each(source.queries, scored).values():
            own, values = zip(*found, strict=True)
            queries += own
            chosen += values
            controls += with_controls(own, values)
    left_out = {name for name in chosen[0] if name.endswith(OTHER) or name in SURFACE[1:]}
    chosen = [{key: values for key, values in one.items() if key not in left_out} for one in chosen]
    suite = evaluate_selection(queries, chosen, seed=given.seed)
    maps = [name for name in suite.measures if name.endswith("/map")]
    save_picture(given.out.with_name("map.png"), picture(suite, only=maps))
    results = {
        "about": provenance() | {"seed": given.seed, "cpu_s": round(time.process_time() - began, 1)},
        "sources": {source.name: source.about for source in sources},
        "models": abouts,
        "suite": compact(suite),
        "controls": compact(evaluate_selection(queries, controls, seed=given.seed)),
    }
    for name, path in models.items():
        keep_config(path, given.out.parent / "config" / f"{name}.yaml")
    given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
