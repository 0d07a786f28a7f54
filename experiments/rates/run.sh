#!/usr/bin/env bash
# From nothing to results.json; the same command continues after a kill. BASE, DATA, OUT and COARSE may name a decoder,
# its prepared corpus, the folder of the runs, and the stage 1 from which stages 2.1 and 2.2 start. With --keep, what
# results.json has is not trained again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
base=${BASE:-$(python -c 'from plato2.weights.smollm2_base import ready_base; print(ready_base())')}
data=${DATA:-data/chitchat_smollm2} out=${OUT:-outputs/rates} coarse=${COARSE:-outputs/pretrained/1_coarse}
if [ ! -e "$data/index.json" ]; then
    python -m plato2 prepare chitchat --out "$data" --tokenizer "hf:$base" --max-context 96 --max-response 64
fi
given=(--base "$base" --data "$data" --out "$out")
if [ -e "$coarse/done" ]; then given+=(--coarse "$(realpath "$coarse")"); fi
python -m experiments.rates.rates "${given[@]}" "$@"
python experiments/tables.py
