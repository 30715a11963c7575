"""Graph functions: between objects with shared references and pure states.

See README.md in this folder for how the C++ engine works.
"""

from __future__ import annotations

import importlib as _importlib
from typing import Any as _Any

# The modules of the library import the engine from this package, and the graph
# functions import those modules: so the public names resolve on first use.
_NAMES = {
  "GraphDef": "graphdef",
  "NodeDef": "graphdef",
  "GraphState": "functional",
  "call": "functional",
  "clone": "functional",
  "graphdef": "functional",
  "merge": "functional",
  "pop": "functional",
  "split": "functional",
  "state": "functional",
  "update": "functional",
}


def __getattr__(name: str) -> _Any:
  module = _NAMES.get(name)
  if module is None:
    raise AttributeError(f"module `nnx.graph` has no attribute `{name}`")
  return getattr(_importlib.import_module(f"nnx.graph.{module}"), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_NAMES])
