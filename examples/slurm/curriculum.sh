#!/usr/bin/env bash
# The three stages as jobs, from the folder of plato2's source; NAME is that of their run folders:
#   examples/slurm/curriculum.sh NAME model=1.6b strategy=fsdp_64
# Stages 2.1 and 2.2 wait in the queue until stage 1 is finished, and leave it if stage 1 fails.
set -euo pipefail
export RUN_ID=${1:?give the run folders a name, as above}
job=$(dirname "$0")/stage.sh
first=$(sbatch --parsable "$job" stage=1_coarse "${@:2}")
echo "Submitted batch job $first"
for stage in 2_gen 2_eval; do
    sbatch --dependency="afterok:$first" --kill-on-invalid-dep=yes "$job" stage="$stage" "${@:2}"
done
