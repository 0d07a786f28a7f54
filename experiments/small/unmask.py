"""What would unmask `small`: its people and its candidates, its ranker and word order, its writer and z.

    python experiments/small/unmask.py --data DIR --work DIR

`--work` is that of small_model.py. The shards do not say which conversation a sample is of, so the test
split is looked up in the corpus itself (`chitchat-dataset`). Adds `unmasked` to results.json, and writes the
model card from all of it (small_model.py).
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logsumexp

from plato2.config import SMALL
from plato2.data.samples import encode_response
from plato2.data.selection import inverse_document_frequency, overlap
from plato2.data.shards import read_index, read_shard
from plato2.data.tokenizer import BOS_ID, EOS_ID, Tokenizer
from plato2.metrics import bootstrap
from plato2.prepare.corpora import ReadReport
from plato2.prepare.corpora.chitchat import read
from plato2.talk.rank import coherence_of_records
from plato2.weights.folder import load_evaluation, saved_tokenizer

HERE = Path(__file__).parent
CONTEXTS, CANDIDATES, MAX_IDS = 400, 10, 64
APART = 3
"""Turns between a response and another one of its conversation: nearer ones may answer the context, too."""

Group = list[int]
"""Numbers of samples: a context with its own response, and nine whose responses stand beside it."""


@dataclass(frozen=True)
class Sample:
    """A sample of a split, and where in the corpus it is from."""

    context: list[int]
    response: list[int]
    dialogue: int
    turn: int
    speaker: str


def samples_of(data: Path, tokenizer: Tokenizer) -> tuple[list[Sample], list[list[str]], list[list[str]]]:
    """The test split with its places; who speaks in each dialogue of test and of training, by turn."""
    dialogues = [one for one in read([], ReadReport()) if len(one.turns) > 1]
    texts = [[turn.text for turn in one.turns] for one in dialogues]
    places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    encoded = [tokenizer.encode_batch(one) for one in texts]
    for number, turns in enumerate(encoded):
        for turn, ids in enumerate(turns[1:], start=1):
            places.setdefault(tuple(encode_response(ids, MAX_IDS)), []).append((number, turn))
    index, found, speakers = read_index(data), {}, [[str(t.speaker) for t in one.turns] for one in dialogues]
    for split in ("test", "train"):
        found[split] = []
        for shard in index.splits[split].shards:
            read_samples = read_shard(data, shard)
            for row, cut in enumerate(read_samples.context_len.tolist()):
                first, end = read_samples.offsets[row : row + 2]
                ids = read_samples.token_ids[first:end].tolist()
                last = last_turn(ids[:cut])
                for number, turn in places.get(tuple(ids[cut:]), ()):
                    if encoded[number][turn - 1][-len(last) :] == last:
                        found[split].append(
                            Sample(ids[:cut], ids[cut:], number, turn, speakers[number][turn])
                        )
                        break
    held_out, trained = ({one.dialogue for one in found[split]} for split in ("test", "train"))
    assert not held_out & trained, "a conversation is in two splits"
    return found["test"], [speakers[n] for n in sorted(held_out)], [speakers[n] for n in sorted(trained)]


def last_turn(context: Sequence[int]) -> list[int]:
    """Its ids, without [SEP]: [CLS] (turn [SEP])*."""
    ids = [*context][:-1] if context[-1] == EOS_ID else [*context]
    starts = [place for place, token in enumerate(ids) if token in (BOS_ID, EOS_ID)]
    return ids[starts[-1] + 1 :]


def people(held_out: list[list[str]], trained: list[list[str]]) -> dict[str, float]:
    """Who of the test split also speaks in training."""
    known = {name for turns in trained for name in turns}
    pairs = {frozenset(turns) for turns in trained}
    names = {name for turns in held_out for name in turns}
    said = [name in known for turns in held_out for name in turns]
    return {
        "conversations": len(held_out),
        "conversations_of_a_known_pair": sum(frozenset(turns) in pairs for turns in held_out),
        "people": len(names),
        "known_people": len(names & known),
        "turns_of_known_people": round(float(np.mean(said)), 4),
    }


def groups_of(samples: Sequence[Sample], seed: int = 0) -> dict[str, list[Group]]:
    """Contexts with ten responses each, by where the nine others are from; no two of them are equal."""
    rng = np.random.default_rng(seed)
    first = {tuple(one.response): row for row, one in reversed([*enumerate(samples)])}
    rows = np.array(sorted(row for row in first.values() if samples[row].response[-1] == EOS_ID))
    dialogue, turn, speaker = (
        np.array([getattr(samples[row], key) for row in rows]) for key in ("dialogue", "turn", "speaker")
    )
    kinds: dict[str, list[Group]] = {kind: [] for kind in KINDS}
    for place in rng.permutation(len(rows))[:CONTEXTS]:
        own, same = dialogue == dialogue[place], speaker == speaker[place]
        pools = (~own, ~own & same, own & (abs(turn - turn[place]) >= APART))
        for kind, pool in zip(KINDS, pools, strict=True):
            if pool.sum() >= CANDIDATES - 1:
                others = rng.choice(rows[pool], CANDIDATES - 1, replace=False)
                kinds[kind].append([int(rows[place]), *others.tolist()])
    return kinds


KINDS = (
    "other conversations",
    "the same person in other conversations",
    "the same conversation",
)


def style(text: str) -> np.ndarray:
    """How a text is typed, whatever it says: capitals, marks, apostrophes, spelling of `I`."""
    n = max(1, len(text))
    words = text.split()
    return np.array(
        [
            text[:1].isupper(),
            *(text[-1:] == mark for mark in ".!?"),
            text[-1:].isalnum(),
            sum(map(str.isupper, text)) / n,
            sum(map(text.count, ".,")) / n,
            "'" in text,
            "i" in words,
            "I" in words,
            bool(re.search(r"\b(dont|im|ive|thats|cant|didnt)\b", text)),
        ],
        dtype=float,
    )


def styles(samples: Sequence[Sample], groups: Sequence[Group], tokenizer: Tokenizer) -> np.ndarray:
    """How alike each response is typed to what the same person said before: (G, 10), 0 = just so.

    Where a context has one turn alone, that of the other person takes its place.
    """
    responses = np.array([style(tokenizer.decode(one.response[1:-1])) for one in samples])
    spread = responses.std(axis=0) + 1e-9
    found = []
    for group in groups:
        turns: list[list[int]] = [[]]
        for token in samples[group[0]].context[1:]:
            if token == EOS_ID:
                turns.append([])
            else:
                turns[-1].append(token)
        texts = [tokenizer.decode(ids) for ids in turns if ids]
        own = np.mean([style(text) for text in texts[-2::-2] or texts], axis=0)
        found.append(-(abs(responses[group] - own) / spread).sum(axis=1))
    return np.array(found)


def first_of(scores: np.ndarray) -> np.ndarray:
    """Whether the first column is the highest, (G, 10) -> (G,); equal scores share it."""
    above, equal = (scores[:, 1:] > scores[:, :1]).sum(1), (scores[:, 1:] == scores[:, :1]).sum(1)
    return (above == 0) / (1 + equal)


def by_dialogue(values: np.ndarray, dialogues: np.ndarray) -> list[float]:
    """The mean and its 95 % interval; whole conversations are drawn again, since their contexts are alike."""
    _, place = np.unique(dialogues, return_inverse=True)
    sums, n = np.bincount(place, values), np.bincount(place)
    low, high = bootstrap(lambda draw: float(sums[draw].sum() / n[draw].sum()), len(n))
    return [round(x, 4) for x in (float(values.mean()), low, high)]


def chosen(samples: Sequence[Sample], data: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """P@1 of 10 of three scores and the lead over shared words, by where the nine others are from."""
    index, network, found = read_index(data), load_evaluation(SMALL), {}
    shard = read_shard(data, index.splits["train"].shards[0])
    counted = [
        shard.token_ids[first + cut : end]
        for first, end, cut in zip(shard.offsets, shard.offsets[1:], shard.context_len, strict=False)
    ]
    rarity = inverse_document_frequency(counted, index.vocab_size)
    for kind, groups in groups_of(samples).items():
        dialogues = np.array([samples[group[0]].dialogue for group in groups])
        pairs = [(samples[group[0]].context, samples[other].response) for group in groups for other in group]
        coherence = np.concatenate(
            [coherence_of_records(network, pairs[start : start + 400]) for start in range(0, len(pairs), 400)]
        )
        words = [
            overlap([samples[group[0]].context], [samples[one].response for one in group], rarity)[0]
            for group in groups
        ]
        ours = first_of(coherence.reshape(-1, CANDIDATES))
        shared = first_of(np.array(words))
        found[kind] = {
            "contexts": len(groups),
            "conversations": len(np.unique(dialogues)),
            "coherence": by_dialogue(ours, dialogues),
            "shared words": by_dialogue(shared, dialogues),
            "typed alike": by_dialogue(first_of(styles(samples, groups, tokenizer)), dialogues),
            "coherence less shared words": by_dialogue(ours - shared, dialogues),
        }
    return found


def spoilt(samples: Sequence[Sample], judge: Callable[..., list[float]], seed: int = 0) -> dict[str, Any]:
    """How often a true pair has more coherence than the same one in disorder; chance is a half."""
    rng = np.random.default_rng(seed)
    long = [one for one in samples if len(one.response) > 6 and one.response[-1] == EOS_ID]
    some = [long[place] for place in rng.permutation(len(long))[:CONTEXTS]]

    def mixed(response: list[int]) -> list[int]:
        return [BOS_ID, *rng.permutation(response[1:-1]).tolist(), EOS_ID]

    def reversed_turns(context: list[int]) -> list[int]:
        turns: list[list[int]] = [[]]
        for token in context[1:]:
            turns[-1].append(token)
            if token == EOS_ID:
                turns.append([])
        return [BOS_ID, *(token for turn in turns[::-1] for token in turn)]

    several = [one for one in some if one.context.count(EOS_ID) > 1]
    cases = {
        "words of the response in disorder": (some, [(one.context, mixed(one.response)) for one in some]),
        "turns of the context in reverse": (
            several,
            [(reversed_turns(one.context), one.response) for one in several],
        ),
    }
    found = {}
    for name, (of, pairs) in cases.items():
        true = np.array(judge([(one.context, one.response) for one in of]))
        other = np.array(judge(pairs))
        wins = (true > other) + 0.5 * (true == other)
        found[name] = {
            "pairs": len(of),
            "the true one is ahead": by_dialogue(wins, np.array([one.dialogue for one in of])),
        }
    return found


def used(scores: Path) -> dict[str, float]:
    """What the writer makes of z: perplexities by where z comes from, and nats that z saves for a response.

    Args:
        scores: of `plato2 score`, lines with `nll_by_latent`, `posterior` and `n_tokens`.
    """
    lines = [line for line in map(json.loads, scores.read_text().splitlines()) if "error" not in line]
    nll, posterior = (np.array([line[key] for line in lines]) for key in ("nll_by_latent", "posterior"))
    n_tokens = sum(line["n_tokens"] for line in lines)
    ways = {
        "mean over z": np.log(nll.shape[1]) - logsumexp(-nll, axis=1),
        "one z, uniform": nll.mean(axis=1),
        "z from the posterior": (posterior * nll).sum(axis=1),
    }
    found = {name: round(float(np.exp(nats.sum() / n_tokens)), 2) for name, nats in ways.items()}
    saved = ways["mean over z"] - ways["z from the posterior"]
    return found | {"nats saved": round(float(saved.mean()), 4)}


def main() -> None:
    """Adds what was found to results.json, and writes the model card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="the prepared corpus")
    parser.add_argument("--work", required=True, type=Path, help="folder of small_model.py")
    given = parser.parse_args()
    tokenizer, network = saved_tokenizer(SMALL), load_evaluation(SMALL)
    samples, held_out, trained = samples_of(given.data, tokenizer)
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    results["unmasked"] = {
        "people": people(held_out, trained),
        "chosen": chosen(samples, given.data, tokenizer),
        "spoilt": spoilt(samples, lambda pairs: coherence_of_records(network, pairs)),
        "used": used(given.work / "scores.jsonl"),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    small_model = runpy.run_path(str(HERE / "small_model.py"))
    (small_model["MODEL"] / "README.md").write_text(small_model["card"](results), encoding="utf-8")


if __name__ == "__main__":
    main()
