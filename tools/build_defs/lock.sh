#!/bin/bash
# Makes the lock files anew from requirements*.in, with uv (`pip install uv`).
#   usage: tools/build_defs/lock.sh [further options of `uv pip compile`]
# Without --upgrade the versions locked now are kept where they still can be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

compile() {
  uv pip compile --quiet --generate-hashes --no-annotate --no-header \
    --no-emit-index-url "$@"
}

for version in 3.11 3.12; do
  base=requirements_lock_${version/./_}.txt
  compile --python-version="$version" requirements.in --output-file="$base" "$@"
  # An accelerator's lock file is what it adds to that one.
  for accelerator in ecosystem gpu gpu_device tpu; do
    lock=requirements_${accelerator}_lock_${version/./_}.txt
    compile --python-version="$version" requirements_$accelerator.in \
      --constraints="$base" --output-file="$lock.all" "$@"
    awk '/^[^ ]/ { keep = !(FNR != NR && ($1 in locked)) }
         FNR == NR { if (/^[^ ]/) locked[$1]; next }
         keep' "$base" "$lock.all" > "$lock"
    rm "$lock.all"
  done
done
# Tools of check.sh; they are run, never imported, so one file serves them all.
compile --python-version=3.11 --universal requirements_check.in \
  --output-file=requirements_check_lock.txt "$@"
