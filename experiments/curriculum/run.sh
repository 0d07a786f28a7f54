#!/usr/bin/env bash
# From a prepared corpus to results.json, config/, the pictures and the tables of the documents: about two and a half
# hours of one CPU core. README.md says how to call it. After a kill, the same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=1
python experiments/curriculum/curriculum.py "$@"
python experiments/tables.py
