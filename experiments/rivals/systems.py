"""What each row says: replies to the contexts of each set, and self-chats.

All write with top-k 10, at most 64 tokens, the same seeds. A row that chooses writes 20 candidates and keeps
them. All choose in the same way: by the ranker, after Knover's penalties (plato2/talk/rank.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from plan import ROWS, SMOLLM2

from plato2.commands.playing import play_missing
from plato2.commands.reply import reply_to_contexts
from plato2.config import DecodeConfig
from plato2.data.examples import read_examples
from plato2.data.samples import read_context
from plato2.data.tokenizer import EOS_ID, Tokenizer
from plato2.evaluate.pretrained import DialoGPT, Sample
from plato2.evaluate.speakers import read_speaker
from plato2.random import draw_key
from plato2.talk.bot import PlatoBot
from plato2.talk.decode import Hypothesis
from plato2.talk.rank import rank
from plato2.talk.self_chat import describe, plan, read_starts
from plato2.talk.speaker import DIGITS, PlatoSpeaker, Said, Speaker, weights_hash
from plato2.weights.folder import load_evaluation

MAX_TOKENS, BATCH = 64, 16
REFERENCES = 4
"""A context of the multi-reference set has at least so many different ones."""
ANOTHER_DRAW = 1 << 20
"""Number of the draw of z, apart from those of the tokens."""


class GPT2(DialoGPT):
    """The rival as a speaker; with a ranker its candidates are ranked exactly as ours are.

    Args:
        folder: what gpt2.py made.
        data: the corpus, for the tokenizer: the ids are the same.
        ranker: a run of stage 2.2, or None.
        candidates: samples for each reply.
        name: what its turns are marked with.
    """

    def __init__(self, folder: Path, data: Path, ranker: Path | None, candidates: int, name: str) -> None:
        super().__init__(folder, decode=DecodeConfig(max_tokens=MAX_TOKENS, n_samples=candidates), name=name)
        self.ours = Tokenizer.load(data / "tokenizer")
        self.evaluation = None if ranker is None else load_evaluation(ranker)

    def ranked(self, history: Sequence[str], samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """As `DialoGPT.ranked`, by our ranker. A sample without its end is as long as a sample may be."""
        most = self.decode.max_tokens
        found = [
            Hypothesis((*one.ids, *([EOS_ID] if len(one.ids) < most else [])), None, one.log_prob)
            for one in samples
        ]
        limit = most if self.evaluation is None else self.evaluation.model_config.max_position // 2
        context = read_context(history, self.ours, limit).ids
        (candidates,) = rank(self.ours, [context], [found], self.evaluation, [history])
        return [candidate.to_dict(digits=DIGITS) for candidate in candidates]

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`."""
        ranker = {} if self.evaluation is None else {"evaluation": weights_hash(self.evaluation)}
        return super().describe() | ranker


@dataclass(frozen=True)
class RandomLatent:
    """Stage 2.1 without a ranker: of the candidates of all latents, that of one drawn at random."""

    speaker: PlatoSpeaker

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
        found = []
        for said, seed in zip(self.speaker.reply_batch(histories, seeds), seeds, strict=True):
            by_latent = sorted(said.candidates, key=lambda candidate: candidate["latent"])
            found.append(Said([by_latent[draw_key(seed, ANOTHER_DRAW) % len(by_latent)]]))
        return found

    def reads(self, text: str) -> bool:
        """As `Speaker.reads`."""
        return self.speaker.reads(text)

    def describe(self) -> dict[str, Any]:
        """As `Speaker.describe`."""
        return {**self.speaker.describe(), "latent": "random"}


def speaker_of(row: str, runs: Path, data: Path, smollm2: Path | None = None) -> Speaker:
    """The speaker of a row.

    Args:
        row: its letter, or SMOLLM2.
        runs: the folder of the trained runs.
        data: the corpus.
        smollm2: the folder of that model.
    """
    if row == SMOLLM2:
        return read_speaker(f"{SMOLLM2}=hf:{smollm2},max_tokens={MAX_TOKENS}", "--smollm2", "cpu")
    it = ROWS[row]
    ranker = None if it.ranker is None else runs / it.ranker
    if it.generation.startswith("gpt2"):
        return GPT2(runs / it.generation, data, ranker, it.candidates, row)
    decode = DecodeConfig(max_tokens=MAX_TOKENS)
    speaker = PlatoSpeaker(row, PlatoBot.load(runs / it.generation, ranker, "cpu", decode), decode)
    return RandomLatent(speaker) if it.generation.startswith("latent") and ranker is None else speaker


@dataclass(frozen=True)
class Asked:
    """What the systems answer; files of contexts with references by the name of the set."""

    contexts: dict[str, Path]
    starts: int
    """Self-chats."""


def write_contexts(data: Path, out: Path, multiref: Path | None, n: int, starts: int) -> Asked:
    """The same contexts for all rows and seeds, written once.

    Args:
        data: the corpus, of whose test split n are taken, evenly.
        out: where to write.
        multiref: DailyDialog's multi-reference test, of which n are drawn that have 4 references or more.
        n: contexts of each set.
        starts: self-chats.
    """
    found = {}
    if multiref is not None:
        several = [s for s in read_starts(multiref, "--multiref") if len(set(s.references)) >= REFERENCES]
        places = np.sort(np.random.default_rng(0).permutation(len(several))[:n])
        found["dailydialog"] = [(several[place].turns, several[place].references) for place in places]
    tokenizer = Tokenizer.load(data / "tokenizer")
    held_out = read_examples(data, tokenizer, n, "test")
    found["chitchat"] = [(tuple(one.turns), (one.reference,)) for one in held_out]
    files = {}
    for name, pairs in found.items():
        files[name] = out / f"{name}-{len(pairs)}.jsonl"
        lines = [json.dumps({"turns": list(turns), "references": list(r)}) for turns, r in pairs]
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Asked(files, starts)


def reply(
    row: str, folder: Path, asked: Asked, data: Path, seed: int, utterances: int, smollm2: Path | None = None
) -> None:
    """Replies of a row to all contexts, and its self-chats; what was said before stays.

    Args:
        row: its letter, or SMOLLM2.
        folder: of the seed: its runs are in `runs`, and `said` gets what is said.
        asked: what is answered.
        data: the corpus.
        seed: of the samples.
        utterances: turns of a self-chat.
        smollm2: the folder of that model.
    """
    speaker = speaker_of(row, folder / "runs", data, smollm2)
    chooses = row in ROWS and ROWS[row].candidates > 1
    of_plato = {"rank": None, "precision": "float32", "candidates": chooses}
    for name, contexts in asked.contexts.items():
        out = said_file(folder, name, row)
        reply_to_contexts(contexts, out, BATCH, seed, speaker, of_plato, as_json=False)
    starts = read_starts()
    starts = starts[:: max(1, len(starts) // asked.starts)][: asked.starts]
    about = {"settings": {**speaker.settings, "seed": seed}, "utterances": utterances, **describe([speaker])}
    dialogues = plan(starts, [speaker], utterances)
    play_missing(dialogues, [speaker], said_file(folder, "chats", row), BATCH, seed, False, about)


def said_file(folder: Path, name: str, row: str) -> Path:
    """Where a row's replies to a set are, or its self-chats."""
    return folder / "said" / f"{name}-{row}.jsonl"
