#!/usr/bin/env bash
# What benchmarks/device.sh needs on a machine without a network: wheels and two prepared corpora.
#
#   bash benchmarks/wheels.sh        (on any machine with a network and plato2's requirements installed)
#
# Writes benchmarks/wheels/ (Python 3.12, Linux x86-64) and benchmarks/data/; neither is under version control.
# PyTorch, Lightning, torchmetrics, numpy, pyarrow, sentencepiece, safetensors, matplotlib and pytest have to be
# there already.
set -eu
cd "$(dirname "$0")/.."
here=benchmarks
limit_bytes=$((64 * 1024 * 1024)) # of wheels, data and the files under version control together

wheels=(
  hydra-core==1.3.8 omegaconf==2.3.1 pyyaml==6.0.3
  rich==15.0.0 markdown-it-py mdurl pygments typer==0.29.2 annotated-doc shellingham
  fsspec==2026.9.0 filelock==4.3.1 chitchat-dataset==0.9.0
  pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0
)
sources=(antlr4-python3-runtime==4.9.3) # has no wheel; pure Python, so one made here runs anywhere

rm -rf "$here/wheels" && mkdir -p "$here/wheels"
pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --dest "$here/wheels" "${wheels[@]}"
pip wheel --quiet --no-deps --wheel-dir "$here/wheels" "${sources[@]}"

# The same options as conf/data/chitchat.yaml and chitchat_64.yaml.
[ -f "$here/data/chitchat/index.json" ] || python -m plato2 prepare chitchat --out "$here/data/chitchat"
[ -f "$here/data/chitchat_64/index.json" ] ||
  python -m plato2 prepare chitchat --max-context 64 --max-response 64 --out "$here/data/chitchat_64"

size_of() { du --bytes --summarize --total "$@" | tail -1 | cut -f1; }
tracked=$(git ls-files -z | xargs -0 du --bytes --total | tail -1 | cut -f1)
total=$(($(size_of "$here/wheels" "$here/data") + tracked))
du --human-readable --apparent-size --summarize "$here/wheels" "$here/data"
echo "with the files under version control: $total bytes of at most $limit_bytes"
if [ "$total" -gt "$limit_bytes" ]; then
  echo "error: more than can be carried" >&2
  exit 1
fi
