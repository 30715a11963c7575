"""The engine: what walks graphs in C++, and the Python that it is made with.

It imports nothing of ours; everything else in `nnx` stands on it. README.md
says how it works, and `nnx.runtime` tells it what it needs to know of the rest.
"""

import importlib.util as _util
import sysconfig as _sysconfig

# An extension for one kind of Python would crash in the other.
if _sysconfig.get_config_var("Py_GIL_DISABLED"):
  raise ImportError(
    "`nnx` needs a Python with the global lock, but this one is free-threaded:"
    " run a build of CPython 3.11 to 3.14 that is not."
  )
if _util.find_spec("nnx.engine._engine") is None:
  raise ModuleNotFoundError(
    "`nnx` has not been built here: run `tools/bazel run //tools:develop` in"
    " the checkout, or `pip install .` where there is a C++ compiler.",
    name="nnx.engine._engine",
  )
