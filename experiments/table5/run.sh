#!/usr/bin/env bash
# From a prepared corpus and trained models to results.json, differences.png, config/ and the tables of the documents.
# README.md says how to call it. Candidates are kept in outputs/table5.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=.:experiments/table1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python experiments/table5/table5.py "$@"
python experiments/tables.py
