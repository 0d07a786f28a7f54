#!/usr/bin/env bash
# From nothing to results.json: the first steps of each stage at several rates, a linear schedule to 0 each. The same
# command continues after a kill. COARSE is a finished stage 1 of experiments/pretrained, from which stages 2 start.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
base=${BASE:-$(python -c 'from plato2.weights.smollm2_base import ready_base; print(ready_base())')}
data=${DATA:-data/chitchat_smollm2} out=${OUT:-outputs/rates} coarse=${COARSE:-outputs/pretrained/1_coarse}
if [ ! -e "$data/index.json" ]; then
    python -m plato2 prepare chitchat --out "$data" --tokenizer "hf:$base" --max-context 96 --max-response 64
fi

# beginning NAME STEPS RATE [KEY=VALUE ...]: a run of STEPS steps of 2,048 tokens, validated at every third.
beginning() {
    local run="$out/$1-$3"
    if [ -e "$run/done" ]; then return; fi
    python train.py model=pretrained_lora model.path="$base" model.max_position=192 \
        model.adapter_rank=8 model.adapter_alpha=16 \
        data=shards data.path="$data" data.unit_tokens=1024 data.row_length=256 data.valid_units=24 \
        trainer.max_steps="$2" trainer.val_check_interval="$(($2 / 3))" optim.warmup_steps="$(($2 / 6))" \
        optim.lr="$3" optim.batch_tokens=2048 optim.schedule=linear seed=0 strategy=cpu checkpoint_steps=10 \
        selection=300 human_rank=0 sample_replies=0 latent_contexts=0 report=false \
        output_dir="$(dirname "$out")" name="$(basename "$out")" run_id="$(basename "$run")" "${@:4}"
    touch "$run/done"
}
for mask in prefix causal; do # as it is: three steps that change nothing
    beginning "as_it_is_$mask" 3 1e-9 stage=1_coarse model.context_mask="$mask"
done
for rate in ${RATES_COARSE:-2e-4 5e-4 1.25e-3}; do
    beginning 1_coarse "${STEPS_COARSE:-60}" "$rate" stage=1_coarse
    beginning 1_coarse_causal "${STEPS_COARSE:-60}" "$rate" stage=1_coarse model.context_mask=causal
done
if [ -e "$coarse/done" ]; then
    for rate in ${RATES_FINE:-2e-4 5e-4 1.25e-3}; do
        beginning 2_gen "${STEPS_FINE:-36}" "$rate" stage=2_gen init_from="$coarse"
    done
    for rate in ${RATES_RANKER:-2e-4 5e-4 1.25e-3}; do
        beginning 2_eval_dual "${STEPS_RANKER:-60}" "$rate" stage=2_eval_dual init_from="$coarse"
    done
fi
python -m experiments.rates.rates "$out"
python experiments/tables.py
