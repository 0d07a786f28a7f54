#!/usr/bin/env bash
# One stage on 8 machines of 8 GPUs, from the folder of plato2's source:
#   sbatch examples/slurm/stage.sh model=1.6b strategy=fsdp_64 stage=1_coarse
# Three minutes before its time is over the run saves its step and goes back into the queue (docs/slurm.md).
#SBATCH --nodes=8 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=USR1@180 --requeue --open-mode=append
srun python train.py "$@"
