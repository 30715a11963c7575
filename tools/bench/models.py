"""Makes models fast, where only what they do is measured."""

from collections.abc import Callable
from typing import Any

import jax

from tools.build_defs import quick_xla


def make(library: Any, constructor: Callable[[], Any]) -> Any:
  """Returns `constructor()`, made as one compiled program.

  Args:
    library: `nnx` or `flax.nnx`.
    constructor: makes a Module of that library.
  """
  graphdef = None

  def init() -> Any:
    nonlocal graphdef
    graphdef, state = library.split(constructor())
    return state

  state = jax.jit(init, compiler_options=quick_xla.options())()
  return library.merge(graphdef, state)
