#!/usr/bin/env bash
# From nothing to results.json. Without options: 60 CPU minutes a row, three seeds, and 20 million tokens a row once.
# With options, one seed of one budget: run.sh --budget-minutes 20 --seed 0 --out FOLDER (rivals.py --help has all).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=.
data=${DATA:-data/chitchat_64}
if [ ! -e "$data/index.json" ]; then
    python -m plato2 prepare chitchat --out "$data" --max-context 64 --max-response 64
fi
rivals=(python experiments/rivals/rivals.py --data "$data")
multiref=${MULTIREF:-../shared/data/dailydialog/multireftest.jsonl.gz}
if [ -e "$multiref" ]; then rivals+=(--multiref "$multiref"); fi
if [ -n "${SMOLLM2:-}" ]; then rivals+=(--smollm2 "$SMOLLM2"); fi
if [ $# -gt 0 ]; then
    "${rivals[@]}" "$@"
else
    rivals+=(--gpt2-rates 3e-4 1e-3 3e-3)
    for seed in 0 1 2; do "${rivals[@]}" --budget-minutes 60 --seed $seed; done
    "${rivals[@]}" --budget-tokens 20
fi
python experiments/tables.py
