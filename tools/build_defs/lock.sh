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
  # The others' lock files are what each adds to that one.
  for hub in docs ecosystem gpu gpu_device llm tpu; do
    lock=requirements_${hub}_lock_${version/./_}.txt
    # That of llm lists all of its packages: what else they require is not used.
    [ "$hub" = llm ] && deps=--no-deps || deps=
    # tunix's examples alone want the one, and the other has no wheel.
    [ "$hub" = ecosystem ] &&
      deps="--no-emit-package=tensorflow-datasets --no-emit-package=promise"
    compile --python-version="$version" requirements_$hub.in $deps \
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
