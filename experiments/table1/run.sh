#!/usr/bin/env bash
# From a prepared corpus and trained models to results.json, self_chats.png, config/ and the tables of the documents.
# README.md says how to call it. A run may be left out and added later: conversations are kept in outputs/table1.
# --train-plato MINUTES also trains `plato` here; 0: for as much CPU time as the curriculum took.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=. OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python experiments/table1/table1.py "$@"
python experiments/tables.py
