#!/usr/bin/env bash
# From a prepared corpus and a finished stage 1 to results.json, curves.png, config/ and the tables of the README,
# which says how to call it. One seed; another one is added. The same command goes on after a kill.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1
python experiments/latents/latents.py "$@"
python experiments/tables.py
