"""Table 1: self-chats of the parts of the curriculum, from trained runs to results.json and a picture.

    python experiments/table1/table1.py --data DIR --coarse RUN --fine RUN --first RUN --dual RUN --plato RUN
    python experiments/table1/table1.py --data DIR --coarse RUN --fine RUN --dual RUN --train-plato 30
    python experiments/table1/table1.py --data DIR --coarse RUN --fine RUN --dual RUN --limit 10 --out r.json

Every run may be left out; the rows that need it are then missing. Conversations are kept in --work, so the
same command continues after a kill, and a run that is added later costs its own conversations alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import people
import torch
from paired import difference, distinct_difference, of_share, shares, words_by_dialogue
from plato import trained
from variants import (
    BATCH,
    DIGITS,
    MAX_TOKENS,
    System,
    add_options,
    described,
    given_runs,
    machine,
    random_latent,
    record,
    systems_of,
)

from experiments.configs import keep_config
from plato2.commands.playing import play_missing
from plato2.config import DecodeConfig
from plato2.evaluate.automatic import Compared, evaluate
from plato2.evaluate.options import AutomaticOptions
from plato2.evaluate.results import picture, save_picture
from plato2.evaluate.said import read_systems
from plato2.report.paper import TALK
from plato2.talk.bot import PlatoBot
from plato2.talk.self_chat import UTTERANCES, Start, describe, plan, read_starts
from plato2.talk.speaker import PlatoSpeaker, Said

HERE = Path(__file__).parent
PEOPLE = {"people": "people", "shuffled": "people, turns of other dialogues"}
"""What stands beside the systems, and its label."""
MEASURES = (
    "utterances", "words", "length", "distinct_1", "distinct_2", "matched_1", "matched_2", "repeated_3",
)  # fmt: skip
"""Those of `plato2 evaluate dialogues` that are kept. The topic is from `paired`, with chance by system."""
PAIRS = (
    ("fine_dual", "coarse"),
    ("fine_dual", "fine"),
    ("fine_dual", "coarse_dual"),
    ("fine_dual", "plato"),
    ("fine_first", "coarse"),
    ("fine_first", "fine"),
    ("fine_first", "coarse_first"),
    ("fine_first", "plato"),
    ("fine", "coarse"),
    ("coarse_dual", "coarse"),
    ("coarse_first", "coarse"),
    ("people", "shuffled"),
)
"""What is compared: the whole curriculum with less of it, the latents alone, ranking alone, and a control."""
DRAWN = ("length", "distinct_1", "distinct_2", "matched_1", "matched_2", "repeated_3")


@dataclass(frozen=True)
class Talker:
    """A system as a speaker (plato2/talk/speaker.py), which notes what each reply costs.

    Stage 2.1 without a ranker says the candidate of a random z, the next one if nothing of it can be read.
    """

    speaker: PlatoSpeaker
    draws_latent: bool

    @property
    def name(self) -> str:
        """As `Speaker.name`."""
        return self.speaker.name

    @property
    def settings(self) -> dict[str, Any]:
        """As `Speaker.settings`."""
        return self.speaker.settings

    def reply_batch(self, histories: Sequence[Sequence[str]], seeds: Sequence[int]) -> list[Said]:
        """As `Speaker.reply_batch`."""
        began, found = time.process_time(), []
        replies = self.speaker.reply_batch(histories, seeds)
        cpu_s = round((time.process_time() - began) / len(histories), DIGITS)
        for said, seed in zip(replies, seeds, strict=True):
            candidates = list(said.candidates)
            if self.draws_latent:
                candidates.sort(key=lambda one: one["latent"])
                z = random_latent(seed, len(candidates))
                candidates = candidates[z:] + candidates[:z]
            found.append(Said([{**one, "cpu_s": cpu_s} for one in candidates]))
        return found

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return self.speaker.reads(text)

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`."""
        return self.speaker.describe() | {"draws_latent": self.draws_latent}


def talk(
    name: str, system: System, runs: Mapping[str, Path], starts: Sequence[Start], out: Path, seed: int
) -> float:
    """The self-chats of a system, both sides its own; those that are in the file stay.

    Returns:
        The CPU seconds of all its replies.
    """
    decode = DecodeConfig(max_tokens=MAX_TOKENS, n_candidates=system.candidates)
    other = system.ranker is not None and system.ranker != system.writer
    bot = PlatoBot.load(runs[system.writer], runs[str(system.ranker)] if other else None, "cpu", decode)
    talker = Talker(PlatoSpeaker(name, bot, decode), system.writer == "fine" and system.ranker is None)
    about = {
        "settings": {**talker.settings, "seed": seed},
        "starts": sha256(json.dumps([start.turns for start in starts]).encode()).hexdigest()[:16],
        **describe([talker]),
    }
    dialogues = plan(starts, [talker], UTTERANCES)
    play_missing(dialogues, [talker], out, BATCH, seed, False, about)
    turns = [turn for line in out.read_bytes().splitlines() for turn in json.loads(line)["turns"]]
    return float(sum(turn.get("cpu_s", 0.0) for turn in turns))


def between_people(data: Path, work: Path, limit: int | None) -> dict[str, Path]:
    """Held-out dialogues and the same in disorder, as files; written once."""
    files = {name: work / f"{name}-{limit or 'all'}.jsonl" for name in PEOPLE}
    if not all(file.exists() for file in files.values()):
        dialogues = people.excerpts(people.held_out(data), UTTERANCES)[:limit]
        people.write(files["people"], "people", dialogues)
        people.write(files["shuffled"], "shuffled", people.shuffled(dialogues))
    return files


def measure(files: Mapping[str, Path], kept: Path, drawn: Path) -> dict[str, Any]:
    """Figures of all systems, and their differences.

    Args:
        files: the dialogues of each.
        kept: what takes long is kept beside this file.
        drawn: the picture.

    Returns:
        `figures`: system -> measure -> [value, low, high]; `size`: words that distinct is matched at;
        `dialogues`: how many of each; `differences`: pair -> measure -> [value, low, high].
    """
    named = [f"{name}={file}" for name, file in files.items()]
    has_encoder = bool(find_spec("all_minilm_l6_v2") and find_spec("sentence_transformers"))
    options = AutomaticOptions(speaker="B", device="cpu", embedding=has_encoder)
    result = evaluate("dialogues", named, options, kept)
    save_picture(drawn, picture(result, DRAWN))
    said, _ = read_systems(named, "dialogues", "B")
    common = Compared("dialogues", said, options, kept)  # finds the embeddings that evaluate has kept
    numbers = {name: len(file.read_bytes().splitlines()) for name, file in files.items()}
    similarity = common.similarity if has_encoder else None
    sums = {name: shares(one, numbers[name], similarity) for name, one in said.items()}
    words = {name: words_by_dialogue(one, numbers[name]) for name, one in said.items()}
    figures: dict[str, dict[str, list[float | None]]] = {}
    for name, found in result.systems.items():
        figures[name] = {
            key: rounded((one.value, one.low, one.high)) for key in MEASURES if (one := found.get(key))
        }
        figures[name] |= {key: rounded(of_share(one)) for key, one in sums[name].items() if "topic" in key}
    differences = {}
    for a, b in PAIRS:
        if a in files and b in files:
            of = {
                key: rounded(difference(sums[a][key], sums[b][key]))
                for key in sums[a]
                if key != "topic_other"
            }
            for n in (1, 2):
                of[f"distinct_{n}"] = rounded(distinct_difference(words[a], words[b], n))
            differences[f"{a} - {b}"] = of
    return {"figures": figures, "size": common.match_words, "dialogues": numbers, "differences": differences}


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """For results.json: nothing is known where it is not finite."""
    return [None if x is None or not math.isfinite(x) else round(x, DIGITS) for x in values]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--train-plato", type=float, metavar="MINUTES",
        help="train a run of stage plato for so many CPU minutes; 0: as many as the curriculum took",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/table1"), help="what was said is kept here"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    return parser.parse_args()


def main() -> None:
    """Talks, measures, records and draws."""
    given, began = arguments(), time.process_time()
    torch.set_num_threads(1)
    folder = given.work / f"seed-{given.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if given.train_plato is not None:
        given.plato = trained(given_runs(given), given.data, given.train_plato, given.seed, folder)
    runs, starts = given_runs(given), read_starts()[: given.limit]
    files, cpu_s = {}, {}
    for name, system in systems_of(runs).items():
        files[name] = folder / f"{name}-{len(starts)}.jsonl"
        cpu_s[name] = round(talk(name, system, runs, starts, files[name], given.seed), 1)
        print(f"{name}: {cpu_s[name]} CPU s", flush=True)
    files |= between_people(given.data, given.work, given.limit)
    found = {
        "about": machine(),
        "asked": {"starts": len(starts), "utterances": UTTERANCES, "speaker": "B"},
        "labels": {name: system.label for name, system in systems_of(runs).items()} | PEOPLE,
        "paper": {
            name: dict(zip(TALK.measures, values, strict=True))
            for name, values in TALK.rows.items()
            if "Chinese" not in name  # table 2, and of characters
        },
        "models": described(runs),
        "cpu_s": cpu_s,
        **measure(files, folder / f"all-{len(starts)}.json", given.out.with_name("self_chats.png")),
    }
    found["about"]["cpu_s"] = round(time.process_time() - began, 1)
    for name, run in runs.items():
        keep_config(run, given.out.parent / "config" / f"seed-{given.seed}" / f"{name}.yaml")
    record(given.out, given.seed, found)


if __name__ == "__main__":
    main()
