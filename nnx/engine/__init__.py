"""The engine: what walks graphs in C++, and the Python that it is made with.

It imports nothing of ours; everything else in `nnx` stands on it. README.md
says how it works, and `nnx.runtime` tells it what it needs to know of the rest.
"""

import importlib.util as _util
import sys as _sys
import sysconfig as _sysconfig

import jax as _jax

# A checkout may be on the path of any Python.
if _sys.version_info < (3, 11):  # noqa: UP036
  raise ImportError(
    "`nnx` needs CPython 3.11 to 3.14, but this is Python"
    f" {_sys.version_info[0]}.{_sys.version_info[1]}."
  )
# An extension for one kind of Python would crash in the other.
if _sysconfig.get_config_var("Py_GIL_DISABLED"):
  raise ImportError(
    "`nnx` needs a Python with the global lock, but this one is free-threaded:"
    " run a build of CPython 3.11 to 3.14 that is not."
  )
if _jax.__version_info__ < (0, 10, 2):
  raise ImportError(
    "`nnx` needs jax 0.10.2 or later, but this is jax"
    f" {_jax.__version__}: run `pip install --upgrade jax`."
  )
if _util.find_spec("nnx.engine._engine") is None:
  raise ModuleNotFoundError(
    "`nnx` has not been built here: run `tools/bazel run //tools:develop` in"
    " the checkout, or `pip install .` where there is a C++ compiler.",
    name="nnx.engine._engine",
  )
