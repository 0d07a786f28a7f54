#!/usr/bin/env bash
# Everything worth measuring on one data-centre GPU, in one command without a network (docs/benchmarks.md).
#
#   bash benchmarks/device.sh [OUT] [--dry-run] [--minutes M]
#
# The parts run one after the other, each under its own limit. A part writes its results before the next begins,
# and one that fails or runs out of time is recorded and stops nothing. OUT (default: device-results) gets
# device.json, dialogues.txt, curriculum.csv and log.txt. --dry-run goes through all of it on a CPU with tiny
# models. What has to be carried along is made by benchmarks/wheels.sh. MODELS="93m 314m" leaves sizes out, DEVICE_DATA is another folder
# of corpora than benchmarks/data.
set -u
cd "$(dirname "$0")/.."

out=device-results dry_run="" minutes=8
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry_run=--dry-run ;;
    --minutes) minutes=$2 && shift ;;
    -*) echo "error: $1: use [OUT] [--dry-run] [--minutes M]" >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done

# Seconds of each part when the whole takes 8 minutes; the evening gets what the others leave, 165 at least.
declare -A limits=(
  [machine]=25 [tests]=50
  ["train 93m"]=40 ["train 314m"]=45 ["train 1.6b"]=70
  ["decode 93m"]=25 ["decode 314m"]=25 ["decode 1.6b"]=35
)
models=${MODELS:-93m 314m 1.6b}
total=$((minutes * 60))
margin=5                          # seconds in which a part that is told to end does so by itself
dry_limit=300 dry_work=1          # a dry run has no hurry to be over, only little to do

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/device.json "$out"/dialogues.txt "$out"/curriculum.csv
export PYTHONPATH="$PWD:$work/site" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline

install_wheels() { # only what this Python lacks, or has in another version
  [ -d benchmarks/wheels ] || return 0
  local missing=()
  for wheel in benchmarks/wheels/*.whl; do
    local name version
    IFS=- read -r name version _ <<<"${wheel##*/}"
    python3 -c "import importlib.metadata as m, sys; sys.exit(m.version(sys.argv[1]) != sys.argv[2])" "$name" "$version" \
      2>/dev/null || missing+=("$wheel")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  echo "installing ${missing[*]##*/}"
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "${missing[@]}"
}

part() { # NAME LIMIT: the words of NAME are the arguments of device.py
  local name=$1 limit=$2 left=$((total - SECONDS)) began=$SECONDS soft code
  [ "$limit" -gt "$left" ] && limit=$left
  soft=$((limit - margin))
  [ -n "$dry_run" ] && limit=$dry_limit soft=$dry_work
  if [ "$soft" -le 0 ]; then
    python3 -m benchmarks.device_results "$out" ended "$name" 124 0 0
    return
  fi
  echo "== $name: at most $limit s, after $SECONDS s"
  # shellcheck disable=SC2086
  timeout --kill-after=$margin "$limit" python3 -m benchmarks.device --out "$out" --work "$work" \
    --deadline $(($(date +%s) + soft)) $dry_run $name
  code=$?
  python3 -m benchmarks.device_results "$out" ended "$name" $code "$limit" $((SECONDS - began))
  [ $code -eq 0 ] || echo "== $name ended with exit code $code"
}

main() {
  install_wheels
  part machine $((limits[machine] * minutes / 8))
  part tests $((limits[tests] * minutes / 8))
  for verb in train decode; do
    for model in $models; do
      part "$verb $model" $((${limits["$verb $model"]:-30} * minutes / 8))
    done
  done
  part evening $((total - SECONDS))
  echo "== $SECONDS s; results in $out"
  python3 -m benchmarks.device_results "$out" summary
}

main 2>&1 | tee "$out/log.txt"
exit "${PIPESTATUS[0]}"
