"""p(r|c) of stage 2.1, the mean of p(r|c,z) over all z, beside stage 1's, on every third validation sample.

    python experiments/evening/mixture.py --data DIR --json FILE COARSE FINE

COARSE is a run of stage 1, FINE one of stage 2.1. Talking draws z uniformly, so it talks with this mixture.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from plato2.data.shards import read_index, read_shard
from plato2.talk.score import Record, score
from plato2.weights.folder import load_stage

EVERY, BATCH = 3, 32


def validation(data: str) -> list[Record]:
    """Contexts and responses of the validation split, the shortest first."""
    records = []
    for shard in read_index(data).splits["valid"].shards:
        samples = read_shard(data, shard)
        for first, end, length in zip(
            samples.offsets, samples.offsets[1:], samples.context_len, strict=False
        ):
            ids = samples.token_ids[first:end].tolist()
            records.append(Record(ids[:length], ids[length:]))
    return sorted(records[::EVERY], key=lambda record: len(record.context) + len(record.response))


def main() -> None:
    """Measures perplexities of a token."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="the prepared corpus")
    parser.add_argument("--json", type=Path, required=True, help="where to write")
    parser.add_argument("coarse")
    parser.add_argument("fine")
    given = parser.parse_args()
    coarse, fine = load_stage(given.coarse), load_stage(given.fine)
    records = validation(given.data)
    sums, n_tokens = dict.fromkeys(("stage 1", "posterior", "uniform z", "mixture"), 0.0), 0
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        for found, of_stage_1 in zip(score(fine, batch), score(coarse, batch), strict=True):
            nll = torch.tensor(found["nll_by_latent"], dtype=torch.float64)  # (K,)
            p_z = torch.tensor(found["posterior"], dtype=torch.float64)  # (K,)
            sums["stage 1"] += of_stage_1["nll"]
            sums["posterior"] += float(p_z @ nll)
            sums["uniform z"] += float(nll.mean())
            sums["mixture"] += math.log(len(nll)) - float(torch.logsumexp(-nll, 0))
            n_tokens += found["n_tokens"]
    perplexity = {name: round(math.exp(value / n_tokens), 2) for name, value in sums.items()}
    report = {"samples": len(records), "tokens": n_tokens, "perplexity": perplexity}
    print(report)
    given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
