#!/usr/bin/env bash
# From nothing to results.json: three trainings of together three hours on two cores, then the measuring. The same
# command continues after a kill. COARSE may name a stage 1 that is there already. Options go to pretrained.py:
# --ship writes plato2/weights/smollm2, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=.:experiments/rivals OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
base=${BASE:-$(python -c 'from plato2.weights.smollm2_base import ready_base; print(ready_base())')}
data=${DATA:-data/chitchat_smollm2} out=${OUT:-outputs/pretrained} coarse=${COARSE:-}
if [ ! -e "$data/index.json" ]; then
    python -m plato2 prepare chitchat --out "$data" --tokenizer "hf:$base" --max-context 96 --max-response 64
fi

# train STAGE STEPS TOKENS RATE [KEY=VALUE ...]: steps of so many tokens, as many as the budget has. 2,048 tokens take
# stages 1 and 2.2 5 to 10 CPU s on one thread of an AMD EPYC, and 2.1 twice as long, since it reads each sample twice.
# The rates are those of experiments/rates.
train() {
    if [ -e "$out/$1/done" ]; then return; fi
    python train.py model=pretrained model.path="$base" model.max_position=192 \
        model.adapter=lora model.adapter_rank=8 model.adapter_alpha=16 model.context_mask=causal \
        data=shards data.path="$data" data.unit_tokens=1024 data.row_length="${rows:-256}" data.valid_units=48 \
        stage="$1" trainer.max_steps="$2" optim.lr="$4" trainer.val_check_interval="$(($2 / 2))" \
        optim.batch_tokens="$3" optim.warmup_steps="${warmup:-40}" optim.schedule=linear seed=0 strategy=cpu checkpoint_steps=25 \
        selection=300 human_rank=0 sample_replies=0 latent_contexts=0 report=false \
        output_dir="$(dirname "$out")" name="$(basename "$out")" run_id="$1" "${@:5}"
    touch "$out/$1/done"
}
if [ -z "$coarse" ]; then
    coarse=$out/1_coarse
    train 1_coarse "${STEPS_COARSE:-500}" 2048 1.25e-3
fi
train 2_gen "${STEPS_FINE:-800}" 1024 5e-4 init_from="$coarse"
# rows: room for a context with four responses
rows=512 warmup=20 train 2_eval_pmi "${STEPS_RANKER:-300}" 2048 5e-4 init_from="$coarse"
given=()
if [ -n "${STEPS_DUAL:-}" ]; then # another ranker to compare with, on top of the budget: the README's took 900 steps
    train 2_eval_dual "$STEPS_DUAL" 2048 1.25e-3 init_from="$coarse"
    given+=(--other "dual=$out/2_eval_dual")
fi

multiref=${MULTIREF:-../shared/data/dailydialog/multireftest.jsonl.gz}
given+=(--base "$base" --data "$data" --work "$out/work")
given+=(--coarse "$coarse" --fine "$out/2_gen" --ranker "$out/2_eval_pmi")
if [ -e "$multiref" ]; then given+=(--multiref "$multiref"); fi
OMP_NUM_THREADS=1 python -m experiments.pretrained.pretrained "${given[@]}" "$@"
python experiments/tables.py
