"""Builds the rows of suite `graph` of large Variables, not to be copied.

A jitted function writes a row of each, as a cache is written, or all of them,
as a step of training does. Ours is `nnx.jit` as it is, which updates in place.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx as flax_nnx
import jax
from jax import numpy as jnp

import nnx
from tools.bench import harness, models

_COUNT = 4
_SHAPE = (8192, 512)  # 16 MiB each, in float32

Write = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _write_row(rows: jax.Array, at: jax.Array, kernel: jax.Array) -> jax.Array:
  # Nothing is updated in place that computes next to nothing.
  row = jnp.ones((1, rows.shape[1])) @ kernel
  return jax.lax.dynamic_update_slice(rows, row, (at % rows.shape[0], 0))


def _write_all(rows: jax.Array, at: jax.Array, kernel: jax.Array) -> jax.Array:
  del at
  return rows * 0.0 + kernel[0]


WRITES: dict[str, Write] = {"one_row": _write_row, "all": _write_all}


def _model(library: models.Library) -> Any:
  model = library.Module()
  for i in range(_COUNT):
    setattr(model, f"rows_{i}", library.Variable(jnp.zeros(_SHAPE)))
  model.at = library.Variable(jnp.zeros((), jnp.int32))
  model.kernel = library.Param(jnp.eye(_SHAPE[1]))
  return model


def _side(
  library: models.Library, name: str, write: Write, **options: Any
) -> harness.Side:
  """Makes the side of a library; the result is there when all is written."""

  def step(model: Any) -> jax.Array:
    at = model.at[...]
    for i in range(_COUNT):
      variable = getattr(model, f"rows_{i}")
      variable[...] = write(variable[...], at, model.kernel[...])
    model.at[...] = at + 1
    return at * 2

  # One for all samples, of which the harness does not know: a call finds what a
  # call has left, and nobody has looked at it.
  model = _model(library)
  jitted = library.jit(step, **options)
  return harness.Side(
    name=name,
    fresh=lambda: None,
    call=lambda _: jitted(model),
    observe=lambda _, result: [
      result,
      *(getattr(model, f"rows_{i}")[...].sum() for i in range(_COUNT)),
    ],
  )


def _copying(side: harness.Side) -> harness.Side:
  """Makes the side of `nnx.jit` that is told not to update in place."""

  def switched(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
      with nnx.use_updates_in_place(False):
        return function(*args)

    return call

  return dataclasses.replace(side, call=switched(side.call))


def _donating(write: Write) -> harness.Side:
  """Makes the side of `jax.jit` that is given up its arrays."""

  def step(
    arrays: tuple[jax.Array, ...], at: jax.Array, kernel: jax.Array
  ) -> Any:
    return tuple(write(rows, at, kernel) for rows in arrays), at + 1, at * 2

  jitted = jax.jit(step, donate_argnums=0)
  arrays = tuple(jnp.zeros(_SHAPE) for _ in range(_COUNT))
  at = jnp.zeros((), jnp.int32)
  kernel = jnp.eye(_SHAPE[1])

  def call(_: None) -> jax.Array:
    nonlocal arrays, at
    arrays, at, result = jitted(arrays, at, kernel)
    return result

  return harness.Side(
    name="jax.jit, donated",
    fresh=lambda: None,
    call=call,
    observe=lambda _, result: [result, *(rows.sum() for rows in arrays)],
  )


def build(case: str) -> harness.Comparison:
  """Builds a row of `jit_write_large`.

  Args:
    case: of `WRITES`.
  """
  write = WRITES[case]
  return harness.Comparison(
    ours=_side(nnx, "nnx.jit", write),
    baselines=[
      _copying(_side(nnx, "nnx.jit, not in place", write)),
      _side(flax_nnx, "flax.nnx.jit", write),
      _side(flax_nnx, "flax.nnx.jit, donated", write, donate_argnums=0),
      _donating(write),
    ],
  )
