#!/usr/bin/env bash
# From nothing to results.json and the tables of README.md, which says how long it took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export RUN_ID=evening PYTHONPATH=.
python train.py experiment=evening

runs=(outputs/tiny-1_coarse/evening-0 outputs/tiny-2_gen/evening-1 outputs/tiny-2_eval_dual/evening-2 outputs/tiny-2_eval/evening-3)
data=data/chitchat_64 out=outputs/evening
mkdir -p $out
python experiments/evening/mixture.py --data $data --json $out/mixture.json "${runs[@]:0:2}"
python experiments/evening/controls.py --data $data --json $out/controls.json "${runs[@]:2}"
python -m plato2 report --data $data --coarse "${runs[0]}" --generation "${runs[1]}" --latent-contexts 400 --contexts 0 --json \
    > $out/report.json
python experiments/evening/collect.py --minutes "$((SECONDS / 60))" $out "${runs[@]}"
python experiments/tables.py
