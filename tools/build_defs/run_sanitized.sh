#!/bin/bash
# Runs a test of --config=asan, tsan or ubsan.  The host's python is not built
# with the sanitizer, so the run time of it is loaded ahead of the program;
# libstdc++ too, whose throw the run time looks up when it starts.
set -euo pipefail

preload() {
  local library path
  for library in "$1" libstdc++.so.6; do
    path=$("${CC:-gcc}" -print-file-name="$library")
    [ -e "$path" ] || {
      echo "run_sanitized.sh: ${CC:-gcc} has no $library: install the sanitizer libraries of the compiler" >&2
      exit 1
    }
    export LD_PRELOAD="${LD_PRELOAD:+$LD_PRELOAD:}$(realpath "$path")"
  done
}

case ${NNX_SANITIZER:-} in
  asan)
    # Python and jaxlib keep memory until exit, and jaxlib's allocators, which
    # are not instrumented, mix operators new and delete.
    # Objects in pools of Python's own would be one block to the sanitizer.
    export PYTHONMALLOC=malloc
    export ASAN_OPTIONS="detect_leaks=0:alloc_dealloc_mismatch=0:${ASAN_OPTIONS:-}"
    preload libasan.so
    exec "$@"
    ;;
  tsan)
    # Code that is not instrumented synchronises in ways that are not seen.
    # Older run times cannot place their shadow among randomised addresses.
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1:${TSAN_OPTIONS:-}"
    preload libtsan.so
    exec setarch "$(uname -m)" --addr-no-randomize "$@"
    ;;
  ubsan)
    export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
    exec "$@"
    ;;
  *)
    echo "run_sanitized.sh: NNX_SANITIZER must be asan, tsan or ubsan, but is \`${NNX_SANITIZER:-}\`" >&2
    exit 1
    ;;
esac
