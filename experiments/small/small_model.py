"""The model that comes with plato2: written, measured on the test split, and described.

    python experiments/small/small_model.py --runs RUN RUN RUN --data DIR --work DIR

`--runs` are the finished runs of `experiment=small`, stage by stage, `--data` the corpus they read. Writes
plato2/weights/small in bfloat16 unless it is there, measures that folder with the suite (what was measured
stays in `--work`: the same command continues), and writes results.json. unmask.py goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from jinja2 import Template

from plato2.config import SMALL
from plato2.data.examples import read_examples
from plato2.data.selection import read_selection
from plato2.data.tokenizer import Tokenizer
from plato2.runs.folder import RunFolder
from plato2.runs.saved import read_metrics
from plato2.talk.selection import selection_figures
from plato2.weights.export import export_folder
from plato2.weights.folder import load_evaluation, read_saved, saved_tokenizer
from plato2.weights.model_folder import model_path

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "plato2" / "weights" / SMALL
CONTROLS = runpy.run_path(str(HERE.parent / "evening" / "controls.py"))["controls"]
TABLES = runpy.run_path(str(HERE / "tables.py"))
CONTEXTS, CHOICES, REPLIES, STARTS = 100, 1000, 200, 50
"""Contexts whose latents are heard; that are chosen for; that are answered; self-chats."""


def plato2(*arguments: object) -> None:
    """Runs a verb; its own tables are not needed."""
    command = [sys.executable, "-m", "plato2", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(data: Path, work: Path) -> dict[str, Any]:
    """Every figure of the suite on the test split, by the name of its verb."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = saved_tokenizer(SMALL)
    examples = read_examples(data, tokenizer, CHOICES, "test")
    pairs = [f"{' [SEP] '.join(one.turns)}\t{one.reference}" for one in examples]
    (work / "pairs.tsv").write_text("\n".join(pairs) + "\n", encoding="utf-8")
    answered = [
        {"turns": one.turns, "references": [one.reference]} for one in examples[:: CHOICES // REPLIES]
    ]
    write_lines(work / "contexts.jsonl", answered)
    write_sets(data, tokenizer, work)
    models = ("--generation", SMALL, "--evaluation", SMALL)
    for name in ("random", "matched"):
        if not (out := work / f"selection_{name}.json").exists():
            options = ("--evaluation", SMALL, "--data", data, "--out", out)
            plato2("evaluate", "selection", work / f"{name}.jsonl", *options)
    if not (out := work / "latents.json").exists():
        scores = ("--scores", work / "latents.jsonl")
        plato2("evaluate", "latents", "--data", data, "--contexts", CONTEXTS, *models, *scores, "--out", out)
    plato2("reply", "--contexts", work / "contexts.jsonl", "--out", work / "replies.jsonl")
    starts = (model_path(SMALL).parents[1] / "lists" / "starts_en.txt").read_text().splitlines()[:STARTS]
    (work / "starts.txt").write_text("\n".join(starts) + "\n")
    plato2("self-chat", "--starts", work / "starts.txt", "--out", work / "chats.jsonl")
    for verb, file in (("replies", "replies"), ("dialogues", "chats")):
        if not (out := work / f"{verb}.json").exists():
            plato2("evaluate", verb, f"{SMALL}={work / file}.jsonl", "--out", out)
    if not (work / "scores.jsonl").exists():
        plato2("score", work / "pairs.tsv", *models, "--out", work / "scores.jsonl")
    verbs = ("selection_random", "selection_matched", "latents", "replies", "dialogues")
    return {verb: json.loads((work / f"{verb}.json").read_text()) for verb in verbs} | {
        "perplexity": perplexity(work / "scores.jsonl")
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def write_sets(data: Path, tokenizer: Tokenizer, work: Path) -> None:
    """Each context's own response among nine of other contexts: any, and nine of about its length."""
    chosen = read_selection(data, CHOICES, "test")

    def turns(ids: list[int]) -> list[str]:
        texts: list[list[int]] = [[]]
        for token in ids[1:]:
            if token == tokenizer.eos_id:
                texts.append([])
            else:
                texts[-1].append(token)
        return [tokenizer.decode(text) for text in texts if text]  # a response that was cut has no [SEP]

    for name, groups in (("random", chosen.random), ("matched", chosen.matched)):
        queries = [
            {
                "context": turns(chosen.contexts[row]),
                "candidates": [turns(chosen.responses[other])[0] for other in group],
                "labels": [int(other == row) for other in group],
            }
            for group in groups.tolist()
            for row in group
        ]
        write_lines(work / f"{name}.jsonl", queries)


def perplexity(scores: Path) -> dict[str, float]:
    """exp of the mean of -log p(r|c) over the tokens of the responses; p(r|c) is the mean of p(r|c,z)."""
    nats, n_tokens, left_out = 0.0, 0, 0
    for line in scores.read_text().splitlines():
        score = json.loads(line)
        if "error" in score:  # the last turn is cut in the corpus, and too long to be read whole
            left_out += 1
            continue
        by_latent = [-nll for nll in score["nll_by_latent"]]
        most = max(by_latent)
        nats -= most + math.log(sum(math.exp(one - most) for one in by_latent) / len(by_latent))
        n_tokens += score["n_tokens"]
    return {"value": round(math.exp(nats / n_tokens), 2), "n_tokens": n_tokens, "left_out": left_out}


def controls(data: Path) -> dict[str, dict[str, float]]:
    """What the evaluation model finds on texts that were spoilt (experiments/evening/controls.py)."""
    network, chosen = load_evaluation(SMALL), read_selection(data, CHOICES, "test")
    found = {name: selection_figures(network, spoilt) for name, spoilt in CONTROLS(chosen).items()}
    return {
        name: {key: round(figures[key], 4) for key in ("pair_acc", "p1", "p1_matched")}
        for name, figures in found.items()
    }


def trained(run: Path) -> dict[str, Any]:
    """What a run cost, and what its last validation found."""
    lineage, last = RunFolder(run).lineage(), {}
    for step, name, value in read_metrics(run / "metrics.csv"):
        last |= {name: value, "step": step}
    return {
        "steps": int(last["step"]),
        "samples": int(last["perf/samples"]),
        "cpu_s": round(last["perf/cpu_s"]),
        "git": lineage["git"],
        "packages": lineage["packages"],
        "config": lineage["config"] | {"output_dir": "outputs", "init_from": "auto"},
        "validation": {name: round(value, 4) for name, value in last.items() if name.startswith("val/")},
    }


def card(results: dict[str, Any]) -> str:
    """README.md of the model folder, from card.md."""
    runs = results["runs"]
    known = {
        "millions": round(results["n_parameters"] / 1e6, 1),
        "hours": round(sum(run["cpu_s"] for run in runs.values()) / 3600, 1),
        "steps": ", ".join(f"{run['steps']:,} steps of {name}" for name, run in runs.items()),
        "table": TABLES["test_split"](results),
        "same_conversation": f"{results['unmasked']['chosen']['the same conversation']['coherence'][0]:.2f}",
    }
    return Template((HERE / "card.md").read_text(encoding="utf-8")).render(known) + "\n"


def main() -> None:
    """Writes the model, its figures, and what is said of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="of stages 1, 2.1 and 2.2")
    parser.add_argument("--data", required=True, type=Path, help="the prepared corpus")
    parser.add_argument("--work", required=True, type=Path, help="folder of what was measured")
    given = parser.parse_args()
    _, generation, evaluation = given.runs
    if not MODEL.exists():
        export_folder(MODEL, generation, evaluation, "", "bfloat16")
    parameters = read_saved(MODEL, role="generation").weights.values()
    results = {
        "n_parameters": sum(one.numel() for one in parameters),
        "runs": {run.parent.name.partition("-")[2]: trained(run) for run in given.runs},
        **measure(given.data, given.work),
        "controls": controls(given.data),
    }
    for run in results["runs"].values():
        run["config"]["data"]["path"] = "data/chitchat_64"
    for verb in ("selection_random", "selection_matched", "latents", "replies", "dialogues"):
        results[verb]["inputs"] = []
        if "data" in results[verb]["settings"]:
            results[verb]["settings"]["data"] = "data/chitchat_64"
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
