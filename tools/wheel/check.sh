#!/bin/bash
# Tries the wheel that pip makes of this checkout, without Bazel: in a clean virtual
# environment with the packages of the lock file, outside of the sources, it runs the
# example of README.md, the kernels and the bridge, and some of the tests.
#   usage: tools/wheel/check.sh [PYTHON ...]
#   By default with the newest Python there is: Debian testing's python3.14.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
TESTS="tests/nnx/module_test.py tests/nnx/state_test.py
  tests/nnx/transforms/jit_test.py tests/nnx/training/optimizer_test.py"

check() (  # check PYTHON
  set -e
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  python=$work/venv/bin/python
  # The pip of the host: Debian has a Python's own in one package more.
  pip() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 python3 -m pip --python "$python" install --quiet "$@"
  }
  "$1" -m venv --without-pip "$work/venv"
  lock=3_12
  [ "$("$python" -c 'import sys; print(sys.version_info < (3, 12))')" = False ] || lock=3_11
  pip --no-deps --require-hashes --only-binary=:all: \
    --requirement="$root/tools/build_defs/requirements_lock_$lock.txt"
  pip --no-deps --no-build-isolation "$root"

  cp -r "$root/tests" "$root/pyproject.toml" "$work"
  cd "$work"
  export PYTHONPATH='' JAX_PLATFORMS=cpu
  sed -n '/^```python$/,/^```$/{//!p}' "$root/README.md" > readme.py
  "$python" -W error readme.py
  "$python" -W error tests/repo/foreign_names_program.py
  # shellcheck disable=SC2086  # a list of names
  "$python" -m pytest -q -p no:cacheprovider $TESTS
)

if [ "$#" -eq 0 ]; then
  newest=$("$root/tools/install_python_debian.sh") || newest=python3
  set -- "$newest"
fi
status=0
for each in "$@"; do
  start=$SECONDS
  version=$("$each" -c 'import platform; print(platform.python_version())')
  check "$each"  # no condition of an `if`, in which bash goes on after errors
  # shellcheck disable=SC2181
  if [ "$?" -eq 0 ]; then
    result=PASSED
  else
    result=FAILED
    status=1
  fi
  # A line as Bazel has them, for .ci/run to count.
  echo "//tools/wheel/check.sh:python-$version $result in $((SECONDS - start))s"
done
exit "$status"
