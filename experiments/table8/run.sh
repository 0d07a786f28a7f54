#!/usr/bin/env bash
# From a prepared corpus and trained models to results.json, map.png, config/ and the tables of the documents.
# README.md says how to call it. A model may be left out and added later: scores are kept in outputs/table8.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python experiments/table8/table8.py "$@"
python experiments/tables.py
