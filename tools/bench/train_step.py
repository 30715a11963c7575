"""Suite `train_step`: what training costs in Python, and what tracing costs.

Both libraries run the same program on the same model. The floor of every row
is the program that one would write by hand in JAX, on a flat tuple of arrays.
Arrays are tiny: what is left is what the libraries do.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import optax

import nnx
from tools.bench import compare, harness, models

NAME = "train_step"
_WIDTH = 4
_BATCH = 2
_RATE = 0.01

_BLOCKS = (5, 25)
_QUICK_BLOCKS = (1,)
_TRACED_LAYERS = 50
_QUICK_TRACED_LAYERS = 2
_SCANNED_LAYERS = 24

# A step of Adam divides by the size of the gradient, which may be small.
_TOLERANCE = compare.Tolerance(1e-3, 1e-4)

Library = models.Library


# One class for each library, made once: a new class would be a new structure.
@functools.cache
def _block_type(library: Library) -> type:
  """Returns the class of a residual block of two layers behind a norm."""

  class Block(library.Module):
    def __init__(self, rngs):
      self.norm = library.LayerNorm(_WIDTH, rngs=rngs)
      self.wide = library.Linear(_WIDTH, 2 * _WIDTH, rngs=rngs)
      self.narrow = library.Linear(2 * _WIDTH, _WIDTH, rngs=rngs)

    def __call__(self, x):
      return x + self.narrow(jnp.tanh(self.wide(self.norm(x))))

  return Block


@functools.cache
def _model_type(library: Library) -> type:
  """Returns the class of a model of blocks."""
  block_type = _block_type(library)

  class Model(library.Module):
    def __init__(self, blocks: int):
      rngs = library.Rngs(0)
      self.blocks = library.List([block_type(rngs) for _ in range(blocks)])

    def __call__(self, x):
      for block in self.blocks:
        x = block(x)
      return x

  return Model


@functools.cache
def _layers_type(library: Library) -> type:
  """Returns the class of a model of dense layers."""

  class Layers(library.Module):
    def __init__(self, layers: int):
      rngs = library.Rngs(0)
      self.layers = library.List(
        [library.Linear(_WIDTH, _WIDTH, rngs=rngs) for _ in range(layers)]
      )

    def __call__(self, x):
      for layer in self.layers:
        x = jnp.tanh(layer(x))
      return x

  return Layers


@functools.cache
def _stack_type(library: Library) -> type:
  """Returns the class of a model of blocks stacked for a scan."""
  block_type = _block_type(library)

  class Stack(library.Module):
    def __init__(self, layers: int):
      @library.vmap(in_axes=0, out_axes=0)
      def make(key):
        return block_type(library.Rngs(key))

      self.blocks = make(jax.random.split(jax.random.key(0), layers))

    def __call__(self, x):
      scan = library.scan(
        lambda x, block: block(x),
        in_axes=(library.Carry, 0),
        out_axes=library.Carry,
      )
      return scan(x, self.blocks)

  return Stack


def _batch() -> tuple[jax.Array, jax.Array]:
  x = jnp.linspace(-1.0, 1.0, _BATCH * _WIDTH).reshape(_BATCH, _WIDTH)
  return x, 1.0 - x


def _square(y: jax.Array, target: jax.Array) -> jax.Array:
  return jnp.mean((y - target) ** 2)


def _loss(model: Callable[[jax.Array], jax.Array], x: Any, target: Any) -> Any:
  return _square(model(x), target)


def _params(library: Library, model: Any) -> dict[str, jax.Array]:
  return models.arrays(library, library.state(model, library.Param))


# The same by hand: arrays in the order of the paths.


def plain_block(arrays: Sequence[jax.Array], x: jax.Array) -> jax.Array:
  """Applies a block of `_block_type` to arrays in the order of its paths."""
  narrow_bias, narrow, bias, scale, wide_bias, wide = arrays
  mean = x.mean(-1, keepdims=True)
  variance = (x * x).mean(-1, keepdims=True) - mean * mean
  y = (x - mean) * (lax.rsqrt(variance + 1e-6) * scale) + bias
  return x + jnp.tanh(y @ wide + wide_bias) @ narrow + narrow_bias


def plain_blocks(arrays: Sequence[jax.Array], x: jax.Array) -> jax.Array:
  """Applies a model of `_model_type` to arrays in the order of its paths."""
  for i in range(0, len(arrays), 6):
    x = plain_block(arrays[i : i + 6], x)
  return x


def _plain_layers(arrays: Sequence[jax.Array], x: jax.Array) -> jax.Array:
  for i in range(0, len(arrays), 2):
    x = jnp.tanh(x @ arrays[i + 1] + arrays[i])
  return x


def _plain_stack(arrays: Sequence[jax.Array], x: jax.Array) -> jax.Array:
  def step(x, layer):
    return plain_block(layer, x), None

  return lax.scan(step, x, tuple(arrays))[0]


def plain_adam(
  state: tuple[Any, ...], grads: Sequence[jax.Array]
) -> tuple[Any, ...]:
  """Takes a step of Adam.

  Args:
    state: tuples of parameters, means and mean squares, and the count.
    grads: of the parameters.

  Returns:
    The new state.
  """
  params, means, squares, count = state
  count = count + 1
  means = tuple(0.9 * m + 0.1 * g for m, g in zip(means, grads, strict=True))
  squares = tuple(
    0.999 * s + 0.001 * g * g for s, g in zip(squares, grads, strict=True)
  )
  first, second = 1 - 0.9**count, 1 - 0.999**count
  params = tuple(
    p - _RATE * (m / first) / (jnp.sqrt(s / second) + 1e-8)
    for p, m, s in zip(params, means, squares, strict=True)
  )
  return params, means, squares, count


def _arrays(make_model: Callable[[Library], Any]) -> tuple[jax.Array, ...]:
  model = models.make(nnx, lambda: make_model(nnx))
  return tuple(_params(nnx, model).values())


def _build_step(blocks: int) -> harness.Comparison:
  """Builds the row of a step, jitted, the old state donated."""
  x, target = _batch()
  tx = optax.adam(_RATE)

  def make(library: Library, name: str) -> harness.Side:
    return models.training(
      library,
      f"{name}.jit",
      lambda: _model_type(library)(blocks),
      tx,
      _loss,
      (x, target),
    )

  @functools.partial(jax.jit, donate_argnums=0)
  def plain_step(state, x, target):
    def loss_of(params):
      return _square(plain_blocks(params, x), target)

    loss, grads = jax.value_and_grad(loss_of)(state[0])
    return plain_adam(state, grads), loss

  params = _arrays(lambda library: _model_type(library)(blocks))
  zeros = tuple(map(jnp.zeros_like, params))
  return models.comparison(
    make,
    floor_side=harness.Side(
      name="plain jax.jit",
      fresh=lambda: jax.tree.map(
        jnp.copy, (params, zeros, zeros, jnp.int32(0))
      ),
      call=lambda state: plain_step(state, x, target),
      advance=lambda _, result: result[0],
    ),
    floor_name="jax.jit of the step written by hand on flat tuples",
    clock=harness.THREAD_CPU,
    tolerance=_TOLERANCE,
  )


def _build_trace(layers: int) -> harness.Comparison:
  """Builds the row of tracing `value_and_grad` of a model under `jit`."""
  x, target = _batch()

  def make(library: Library, name: str) -> harness.Side:
    def fresh_step():
      # A new function, so that nothing of it is cached.
      def step(model, x, target):
        return library.value_and_grad(_loss)(model, x, target)

      return library.jit(step)

    model = models.make(library, lambda: _layers_type(library)(layers))
    check = fresh_step()
    return harness.Side(
      name=f"{name}.jit, trace",
      fresh=lambda: model,
      call=lambda model: fresh_step().trace(model, x, target),
      observe=lambda model, _: _loss_and_grads(
        library, *check(model, x, target)
      ),
    )

  def plain_trace(arrays):
    def step(arrays, x, target):
      return jax.value_and_grad(
        lambda arrays: _square(_plain_layers(arrays, x), target)
      )(arrays)

    return jax.jit(step).trace(arrays, x, target)

  arrays = _arrays(lambda library: _layers_type(library)(layers))
  return models.comparison(
    make,
    floor_side=harness.Side("plain jax.jit", lambda: arrays, plain_trace),
    floor_name="jax.jit, trace, of the function written by hand",
    clock=harness.THREAD_CPU,
    tolerance=_TOLERANCE,
  )


def _loss_and_grads(library: Library, loss: Any, grads: Any) -> Any:
  return loss, _params(library, grads)


def _build_compile_scan(layers: int) -> harness.Comparison:
  """Builds the row of tracing and compiling a scan over stacked layers."""
  x, _ = _batch()

  def make(library: Library, name: str) -> harness.Side:
    def fresh_call():
      return library.jit(lambda model, x: model(x))

    model = models.make(library, lambda: _stack_type(library)(layers))
    check = fresh_call()
    return harness.Side(
      name=f"{name}.scan, compile",
      fresh=lambda: model,
      call=lambda model: fresh_call().lower(model, x).compile(),
      observe=lambda model, _: check(model, x),
    )

  def plain_compile(arrays):
    call = jax.jit(lambda arrays, x: _plain_stack(arrays, x))
    return call.lower(arrays, x).compile()

  arrays = _arrays(lambda library: _stack_type(library)(layers))
  return models.comparison(
    make,
    floor_side=harness.Side("jax.lax.scan", lambda: arrays, plain_compile),
    floor_name="jax.lax.scan written by hand, traced and compiled",
    tolerance=_TOLERANCE,
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows."""
  rows: list[tuple[str, str, Callable[[int], harness.Comparison], int]] = [
    ("step", f"{blocks}_blocks", _build_step, blocks)
    for blocks in (_QUICK_BLOCKS if settings.quick else _BLOCKS)
  ]
  traced = _QUICK_TRACED_LAYERS if settings.quick else _TRACED_LAYERS
  rows.append(("trace", f"{traced}_layers", _build_trace, traced))
  if not settings.quick:
    case = f"{_SCANNED_LAYERS}_layers"
    rows.append(("compile_scan", case, _build_compile_scan, _SCANNED_LAYERS))
  return [
    harness.Case(NAME, op, case, "", functools.partial(build, size))
    for op, case, build, size in rows
  ]
