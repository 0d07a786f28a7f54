"""What one row says: replies to each set's contexts, self-chats, and what a reply costs.

    python -m experiments.pretrained.say NAME=SPEAKER --work DIR CONTEXTS.jsonl ...

What was said before stays. The costs are written last: where they are, the row is done.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

from systems import said_file

from plato2.commands.playing import play_missing
from plato2.commands.reply import reply_to_contexts
from plato2.evaluate.speakers import read_speaker
from plato2.files import replace_text
from plato2.talk.self_chat import describe, plan, read_starts, turn_seed
from plato2.talk.speaker import PlatoSpeaker, Speaker

BATCH = 16


def cost(speaker: Speaker, contexts: Path, n: int, seed: int) -> dict[str, float]:
    """CPU seconds of a reply, one at a time, and the most memory that this process had, in GiB."""
    turns = [start.turns for start in read_starts(contexts, "contexts")][: n + 1]
    speaker.reply_batch(turns[:1], [seed])  # what the first one sets up is not counted
    began = time.process_time()
    for number, one in enumerate(turns[1:]):
        speaker.reply_batch([one], [turn_seed(seed, number, 0)])
    cpu_s = (time.process_time() - began) / max(1, len(turns) - 1)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"cpu_s": round(cpu_s, 3), "memory_gib": round(most, 2)}


def main() -> None:
    """Says all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("speaker", help="NAME=KIND:WHERE")
    parser.add_argument("contexts", nargs="+", type=Path, help="files whose names begin with that of the set")
    parser.add_argument("--work", required=True, type=Path, help="where it is kept")
    parser.add_argument("--starts", type=int, required=True, help="self-chats")
    parser.add_argument("--utterances", type=int, required=True, help="turns of one")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--timed", type=int, default=16, help="replies whose time is measured")
    given = parser.parse_args()
    speaker = read_speaker(given.speaker, "speaker", "cpu")
    writes_several = isinstance(speaker, PlatoSpeaker) and speaker.bot.evaluation is not None
    of_plato = {"rank": None, "precision": "float32", "candidates": writes_several}
    for contexts in given.contexts:
        out = said_file(given.work, contexts.stem.partition("-")[0], speaker.name)
        out.parent.mkdir(parents=True, exist_ok=True)
        reply_to_contexts(contexts, out, BATCH, given.seed, speaker, of_plato, as_json=False)
    starts = read_starts()
    starts = starts[:: max(1, len(starts) // given.starts)][: given.starts]
    about = {"settings": {**speaker.settings, "seed": given.seed}, "utterances": given.utterances}
    dialogues = plan(starts, [speaker], given.utterances)
    out = said_file(given.work, "chats", speaker.name)
    play_missing(dialogues, [speaker], out, BATCH, given.seed, False, about | describe([speaker]))
    made = cost(speaker, given.contexts[-1], given.timed, given.seed)
    (given.work / "costs").mkdir(exist_ok=True)
    replace_text(given.work / "costs" / f"{speaker.name}.json", json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
