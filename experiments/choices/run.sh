#!/usr/bin/env bash
# From nothing to results.json. One thread for each run: most of a day on one CPU core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1
python -m plato2 prepare chitchat --out data/chitchat_64 --max-context 64 --max-response 64
python train.py experiment=evening hydra.mode=RUN stage=1_coarse run_id=choices report=false
python experiments/choices/choices.py --parent outputs/tiny-1_coarse/choices --data data/chitchat_64
