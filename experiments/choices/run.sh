#!/usr/bin/env bash
# From nothing to results.json, the pictures and the tables of README.md. One thread for each run: more than half a day
# on one CPU core.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PYTHONPATH=.
corpus=data/chitchat_64 first=outputs/tiny-1_coarse/choices
python -m plato2 prepare chitchat --out $corpus --max-context 64 --max-response 64
python -m plato2 prepare chitchat --out ${corpus}_32 --max-context 32 --max-response 32 --tokenizer $corpus/tokenizer
stage1=(python train.py hydra.mode=RUN stage=1_coarse report=false data.path=$corpus)
"${stage1[@]}" experiment=evening run_id=choices
"${stage1[@]}" experiment=quickstart run_id=choices-520
"${stage1[@]}" experiment=small run_id=choices
python experiments/choices/choices.py --parent $first --small outputs/small-1_coarse/choices --data $corpus
python experiments/tables.py
