"""What the curriculum makes of SmolLM2-135M: selection, replies, latents, self-chats, and what it all costs.

    python -m experiments.pretrained.pretrained --data DIR --coarse RUN --fine RUN --ranker RUN

Everything found is kept in --work, so the same command continues after a kill. One seed. experiments/rivals,
which measures the replies, has to be on PYTHONPATH, as run.sh has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import measure
from systems import said_file, write_contexts

from experiments.configs import keep_config
from experiments.pretrained.select_replies import selection
from experiments.rivals.rivals import tokens_per_sample
from plato2.config import SMALL, SMOLLM2, UserError
from plato2.evaluate.automatic import evaluate
from plato2.evaluate.options import AutomaticOptions
from plato2.files import replace_text, write_sha256
from plato2.runs.folder import provenance
from plato2.runs.saved import read_metrics
from plato2.weights.export import export_folder
from plato2.weights.folder import read_saved
from plato2.weights.smollm2_base import WEIGHTS_SHA256, ready_base

HERE = Path(__file__).parent
SHIPPED = HERE.parents[1] / "plato2" / "weights" / SMOLLM2
MAX_TOKENS, SAMPLES = 64, 20
TIMED = 16
"""Replies whose CPU time is measured."""
ROWS = {
    "as_it_is": "SmolLM2 as it is, its own chat",
    "tuned": "fine-tuned (stage 1), one sample",
    "tuned_20": "fine-tuned, 20 samples, ranker",
    "plato2": "stage 2.1, 20 latents, ranker",
    "small": "small from scratch, 20 latents, its ranker",
}
OF_CHATS = ("length", "distinct_2", "repeated_3")
OF_LATENTS = (
    "mutual_information",
    "heeded",
    "latents_in_effect",
    "greedy_different",
    "distinct_2_between_z",
    "distinct_2_within_z",
    "distinct_2_stage_1",
    "distinct_2_difference",
)


def rows_of(given: argparse.Namespace, base: Path) -> dict[str, str]:
    """What each row is as a speaker (docs/speakers.md)."""
    ranked = f"plato2:{given.fine},evaluation={given.ranker}"
    rows = {
        "as_it_is": f"hf:{base}",
        "tuned": f"plato2:{given.coarse}",
        "tuned_20": f"plato2:{given.coarse},evaluation={given.ranker},n_samples={SAMPLES}",
        "plato2": ranked,
        "small": f"plato2:{SMALL}",
    }
    return {name: f"{of},max_tokens={MAX_TOKENS}" for name, of in rows.items()}


def run(*words: object) -> None:
    """Runs a module of Python in a process of its own; what it prints is not needed.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, "-m", *map(str, words)]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise UserError(f"{' '.join(map(str, words))}: failed; the same command continues")


def trained(run: Path, data: Path) -> dict[str, Any]:
    """What a run cost, and what its last validation found."""
    rows = read_metrics(run / "metrics.csv")
    last = {name: value for _, name, value in rows}
    per_sample = tokens_per_sample(data)
    saved = read_saved(run)
    return {
        "stage": saved.stage,
        "head": saved.arguments.get("head"),
        "steps": max(step for step, _, _ in rows),
        "million_tokens": round(last["perf/samples"] * per_sample / 1e6, 3),
        "cpu_s": round(last["perf/cpu_s"], 1),
        "memory_gib": round(max(v for _, name, v in rows if name == "perf/memory_gib"), 2),
        "trained_parameters": sum(weight.numel() for weight in saved.weights.values()),
        "validation": {name: round(value, 4) for name, value in last.items() if name.startswith("val/")},
    }


def latents(given: argparse.Namespace) -> dict[str, Any]:
    """What z says, by `plato2 evaluate latents`."""
    out, scores = given.work / "latents.json", given.work / "latents.jsonl"
    if not out.exists():
        run(
            *("plato2", "evaluate", "latents", "--data", given.data, "--contexts", given.latent_contexts),
            *("--generation", given.fine, "--evaluation", given.ranker, "--coarse", given.coarse),
            *("--scores", scores, "--out", out, "--device", "cpu"),
        )
    found = json.loads(out.read_text(encoding="utf-8"))
    (system,) = found["systems"].values()
    shown = {key: system[key] for key in OF_LATENTS if key in system}
    return {key: [of["value"], of.get("low"), of.get("high")] for key, of in shown.items()}


def chats(rows: list[str], work: Path) -> dict[str, Any]:
    """Row -> measure -> [value, low, high] of self-chats, by `plato2 evaluate dialogues`."""
    files = [f"{row}={said_file(work, 'chats', row)}" for row in rows]
    result = evaluate("dialogues", files, AutomaticOptions(device="cpu"), work / "chats.json")
    return {
        row: {
            key: [of.value, of.low, of.high]
            for key in OF_CHATS
            if (of := result.systems[row].get(key)) is not None
        }
        for row in rows
    }


def ship(given: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """The adapters as they come with plato2: bfloat16, their base by name, and a card.

    Raises:
        UserError: they stand on another base, or there are some already.
    """
    for run in (given.fine, given.ranker):
        if (sha256 := read_saved(run).model_config.base_sha256) != WEIGHTS_SHA256:
            raise UserError(f"{run}: its base (sha256 {sha256[:12]}) is not the one that smollm2 is made of")
    from jinja2 import Template

    from experiments.pretrained.tables import card

    text = Template((HERE / "card.md").read_text(encoding="utf-8")).render(card(results))
    export_folder(SHIPPED, given.fine, given.ranker, text + "\n", "bfloat16")
    name_base(SHIPPED)


def name_base(folder: Path) -> None:
    """Puts the name of the base into config.json, in place of where it was on this machine."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in ("generation", "evaluation"):
        config[part]["arguments"]["model"]["path"] = SMOLLM2
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_sha256(file)


def make(given: argparse.Namespace, base: Path) -> dict[str, Any]:
    """All of it, row by row."""
    given.work.mkdir(parents=True, exist_ok=True)
    rows = rows_of(given, base)
    asked = write_contexts(given.data, given.work, given.multiref, given.contexts, given.starts)
    for name, speaker in rows.items():  # each in a process of its own, whose memory is its own
        if not (given.work / "costs" / f"{name}.json").exists():
            words = ["--work", given.work, "--starts", given.starts, "--utterances", given.utterances]
            words += ["--seed", given.seed, "--timed", TIMED, *asked.contexts.values()]
            run("experiments.pretrained.say", f"{name}={speaker}", *words)
    others = {name: Path(run) for name, _, run in (of.partition("=") for of in given.other)}
    runs = {"coarse": given.coarse, "fine": given.fine, "ranker": given.ranker, **others}
    for name, path in runs.items():
        keep_config(path, given.results / "config" / f"{name}.yaml", given.coarse.parent)
    rankers = {"ranker": given.ranker, **others, "small's ranker": Path(SMALL)}
    said = measure(list(rows), given.work, asked)
    options = ("seed", "contexts", "starts", "utterances", "choices", "latent_contexts")
    return {
        "asked": {key: getattr(given, key) for key in options} | {"sets": sorted(asked.contexts)},
        "labels": {name: ROWS[name] for name in rows},
        "rows": said["rows"],
        "settings": said["settings"],
        "chats": chats(list(rows), given.work),
        "latents": latents(given),
        "selection": selection(
            given.data, base, given.coarse, rankers, given.choices, given.work / "selection"
        ),
        "runs": {name: trained(path, given.data) for name, path in runs.items()},
        "costs": {
            name: json.loads((given.work / "costs" / f"{name}.json").read_text("utf-8")) for name in rows
        },
        "made_with": provenance(),
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the prepared corpus, with a test split")
    add("--coarse", type=Path, required=True, help="run of stage 1")
    add("--fine", type=Path, required=True, help="run of stage 2.1")
    add("--ranker", type=Path, required=True, help="run of stage 2.2")
    add("--other", action="append", default=[], metavar="NAME=RUN", help="another ranker to choose by")
    add("--base", type=Path, help="folder of the decoder; default: that of smollm2")
    add("--multiref", type=Path, help="DailyDialog's multireftest.jsonl.gz; without it the test split alone")
    add("--work", type=Path, default=Path("outputs/pretrained/work"), help="where what is found is kept")
    add("--results", type=Path, default=HERE, help="folder of results.json and config/")
    add("--seed", type=int, default=0, help="of the samples")
    add("--contexts", type=int, default=200, help="contexts of each set that are answered")
    add("--starts", type=int, default=20, help="self-chats")
    add("--utterances", type=int, default=10, help="turns of a self-chat, the start included")
    add("--choices", type=int, default=200, help="contexts of each selection set")
    add("--latent-contexts", type=int, default=50, help="contexts whose latents are heard")
    add("--ship", action="store_true", help="write plato2/weights/smollm2, too")
    return parser.parse_args()


def main() -> None:
    """Measures, and records it."""
    given = arguments()
    results = make(given, given.base or ready_base())
    given.results.mkdir(parents=True, exist_ok=True)
    replace_text(given.results / "results.json", json.dumps(results, indent=1) + "\n")
    if given.ship:
        ship(given, results)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
