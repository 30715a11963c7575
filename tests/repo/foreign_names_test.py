"""Other people's `kernels`, `bridge` and `tools` do not reach `nnx`."""

import os
import subprocess
import sys

PROGRAM = "tests/repo/foreign_names_program.py"


def test_all_of_nnx_works_behind_packages_of_the_same_names(tmp_path):
  for name in ("bridge", "kernels", "tools"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise ImportError('foreign')")
  path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
  done = subprocess.run(
    [sys.executable, "-W", "error", PROGRAM],
    env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr


def test_the_long_names_are_second_names_of_the_same_modules():
  import kernels
  import kernels.kv_cache.api
  import nnx
  import nnx.kernels.kv_cache.api

  assert nnx.kernels is kernels
  assert sys.modules["nnx.kernels.kv_cache.api"] is kernels.kv_cache.api
  assert kernels.kv_cache.api.__spec__.name == "kernels.kv_cache.api"
