#!/usr/bin/env bash
# From a prepared corpus to results.json, ladder.png, config/ and the tables of README.md, on one thread.
# Without options: seed 0. With options, as ladder.py takes them: run.sh --seed 1 (--data is DATA).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=.
data=${DATA:-data/chitchat_64}
if [ ! -e "$data/index.json" ]; then
    python -m plato2 prepare chitchat --out "$data" --max-context 64 --max-response 64
fi
python experiments/ladder/ladder.py --data "$data" "$@"
python experiments/tables.py
