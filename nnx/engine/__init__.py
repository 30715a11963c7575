"""The engine: what walks graphs in C++, and the Python that it is made with.

It imports nothing of ours; everything else in `nnx` stands on it. README.md
says how it works, and `nnx.runtime` tells it what it needs to know of the rest.
"""

import importlib.util as _util

if _util.find_spec("nnx.engine._engine") is None:
  raise ModuleNotFoundError(
    "`nnx` has not been built here: run `tools/bazel run //tools:develop` in"
    " the checkout, or `pip install .` where there is a C++ compiler.",
    name="nnx.engine._engine",
  )
