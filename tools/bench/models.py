"""What the suites share that run one program on `nnx` and on `flax.nnx`."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx as flax_nnx
import jax
from jax import numpy as jnp

import nnx
from tools.bench import harness
from tools.build_defs import quick_xla

# `nnx` or `flax.nnx`: a program that is written once uses only what both have.
Library = Any
LIBRARIES: tuple[tuple[str, Library], ...] = (
  ("nnx", nnx),
  ("flax.nnx", flax_nnx),
)


def comparison(
  make: Callable[[Library, str], harness.Side], **options: Any
) -> harness.Comparison:
  """Compares the same side of both libraries.

  Args:
    make: makes it, of a library and its name.
    **options: further attributes of the comparison.
  """
  ours, theirs = (make(library, name) for name, library in LIBRARIES)
  return harness.Comparison(ours=ours, baselines=[theirs], **options)


def make(library: Library, constructor: Callable[[], Any]) -> Any:
  """Returns `constructor()`, made fast, as one compiled program.

  Args:
    library: the library.
    constructor: makes a Module of that library.
  """
  graphdef = None

  def init() -> Any:
    nonlocal graphdef
    graphdef, state = library.split(constructor())
    return state

  state = jax.jit(init, compiler_options=quick_xla.options())()
  return library.merge(graphdef, state)


def training(
  library: Library,
  name: str,
  make_model: Callable[[], Any],
  tx: Any,
  loss: Callable[..., jax.Array],
  batch: Sequence[jax.Array],
) -> harness.Side:
  """Makes the side of a step of training.

  It is jitted, model and optimizer are donated; the result is the loss. The
  model's parameters are compared as well.

  Args:
    library: the library.
    name: of the side.
    make_model: makes the model, once.
    tx: the optimizer's transformation of optax.
    loss: of the model and the batch.
    batch: arrays.
  """

  @functools.partial(library.jit, donate_argnums=(0, 1))
  def step(model, optimizer, *batch):
    value, grads = library.value_and_grad(loss)(model, *batch)
    optimizer.update(model, grads)
    return value

  model = make_model()
  optimizer = library.Optimizer(model, tx, wrt=library.Param)
  graphdef, state = library.split((model, optimizer))

  def fresh() -> Any:
    return library.merge(graphdef, jax.tree.map(jnp.copy, state))

  def observe(state: Any, loss: Any) -> Any:
    return loss, arrays(library, library.state(state[0], library.Param))

  return harness.Side(
    name=name,
    fresh=fresh,
    call=lambda state: step(*state, *batch),
    observe=observe,
  )


def arrays(library: Library, state: Any) -> dict[str, Any]:
  """Returns the arrays of a State by path, to compare the two libraries."""
  return {
    "/".join(map(str, path)): leaf[...] if hasattr(leaf, "get_value") else leaf
    for path, leaf in library.to_flat_state(state)
  }
