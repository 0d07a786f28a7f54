#!/usr/bin/env bash
# From nothing to the model that comes with plato2: about three hours of one CPU core that multiplies bf16 fast.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export RUN_ID=small PYTHONPATH=.
python train.py experiment=small
rm -rf plato2/weights/small
runs=(outputs/small-1_coarse/small-0 outputs/small-2_gen/small-1 outputs/small-2_eval_dual/small-2)
python experiments/small/small_model.py --runs "${runs[@]}" --data data/chitchat_64 --work outputs/small
python experiments/small/unmask.py --data data/chitchat_64 --work outputs/small
python experiments/tables.py
