#!/usr/bin/env bash
# From prepared data to results.json in an hour of one core; the same command continues after a kill. BASE, DATA and OUT
# may name SmolLM2, its prepared corpus and the folder of the runs. With --keep, what results.json has is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
base=${BASE:-$(python -c 'from plato2.weights.smollm2_base import ready_base; print(ready_base())')}
data=${DATA:-data/chitchat_smollm2}
if [ ! -e "$data/index.json" ]; then
    python -m plato2 prepare chitchat --out "$data" --tokenizer "hf:$base" --max-context 96 --max-response 64
fi
python -m experiments.decoder_latents.decoder_latents --base "$base" --data "$data" \
    --out "${OUT:-outputs/decoder_latents}" "$@"
python experiments/tables.py
