#!/usr/bin/env bash
# From nothing to results.json, mixture.json and controls.json: about three hours on two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export RUN_ID=evening
python train.py experiment=evening
runs=(outputs/tiny-1_coarse/evening-0 outputs/tiny-2_gen/evening-1 outputs/tiny-2_eval_dual/evening-2 outputs/tiny-2_eval/evening-3)
export PYTHONPATH=.
python experiments/evening/collect.py "${runs[@]}"
python experiments/evening/mixture.py --data data/chitchat_64 --json experiments/evening/mixture.json "${runs[@]:0:2}"
python experiments/evening/controls.py --data data/chitchat_64 --json experiments/evening/controls.json "${runs[@]:2}"
