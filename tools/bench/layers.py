"""Suite `layers`: what layers cost in Python, outside of `jit`.

Both sides call the same layer with the same parameters on arrays so small that
the arithmetic hardly counts. A further baseline is the plain jax expression, as
it stands; the floor of `eager_batch_norm` is the one compiled call of its
kernel. `build_transformer` makes a model and calls nothing.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp

from kernels import batch_stat
import nnx
from tools.bench import harness, models

NAME = "layers"
_BATCH = 32
_FEATURES = 64
_LAYERS = 24

Library = models.Library


def _array(*shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(1), shape)


def _call(layer: Any, x: jax.Array) -> Any:
  return layer(x)


# Computes with a layer's arrays, by name, and no layer.
Plain = Callable[[dict[str, jax.Array], jax.Array], Any]


def _compare(
  make: Callable[[Library], Any],
  x: jax.Array,
  *,
  plain: tuple[str, Plain] | None = None,
  floor: tuple[str, Plain] | None = None,
  call: Callable[[Any, jax.Array], Any] = _call,
) -> harness.Comparison:
  """Calls the same layer of both libraries.

  Args:
    make: makes the layer.
    x: its input.
    plain: a name, and the same as an expression in jax.
    floor: a name, and what is compiled of it at best.
    call: calls the layer.
  """
  layers = {
    name: models.make(library, functools.partial(make, library))
    for name, library in models.LIBRARIES
  }
  arrays = {
    name: value.value
    for name, value in vars(layers["nnx"]).items()
    if isinstance(value, nnx.Variable)
  }

  def side(library: Library, name: str) -> harness.Side:
    del library
    return harness.Side(
      name=name,
      fresh=lambda: x,
      call=functools.partial(call, layers[name]),
    )

  def plain_side(name: str, function: Plain) -> harness.Side:
    return harness.Side(
      name=name,
      fresh=lambda: x,
      call=functools.partial(function, arrays),
    )

  both = models.comparison(side)
  return dataclasses.replace(
    both,
    baselines=[*both.baselines, *([plain_side(*plain)] if plain else [])],
    floor_side=plain_side(*floor) if floor else None,
    floor_name=floor[0] if floor else "",
  )


def _build_linear() -> harness.Comparison:
  """Calls `Linear`, beside `x @ kernel + bias`."""
  return _compare(
    lambda lib: lib.Linear(_FEATURES, _FEATURES, rngs=lib.Rngs(0)),
    _array(_BATCH, _FEATURES),
    plain=("x @ kernel + bias", lambda p, x: x @ p["kernel"] + p["bias"]),
  )


def _build_batch_norm() -> harness.Comparison:
  """Calls `BatchNorm` in training, beside one compiled call of its kernel."""

  @jax.jit
  def kernel(p, x):
    return batch_stat.batch_norm(
      x, p["scale"], p["bias"], p["mean"], p["var"], 0.99, epsilon=1e-5
    )

  return _compare(
    lambda lib: lib.BatchNorm(_FEATURES, rngs=lib.Rngs(0)),
    _array(_BATCH, _FEATURES),
    floor=("one call of kernels.batch_stat.batch_norm", kernel),
  )


def _build_batch_norm_eval() -> harness.Comparison:
  """Calls `BatchNorm` by its running averages."""
  return _compare(
    lambda lib: lib.BatchNorm(
      _FEATURES, use_running_average=True, rngs=lib.Rngs(0)
    ),
    _array(_BATCH, _FEATURES),
  )


def _build_layer_norm() -> harness.Comparison:
  """Calls `LayerNorm`, beside its formula."""

  def plain(p, x):
    mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) * p["scale"] + p["bias"]

  return _compare(
    lambda lib: lib.LayerNorm(_FEATURES, rngs=lib.Rngs(0)),
    _array(_BATCH, _FEATURES),
    plain=("the formula in jnp", plain),
  )


def _build_conv() -> harness.Comparison:
  """Calls `Conv` of 3x3."""
  return _compare(
    lambda lib: lib.Conv(8, 8, (3, 3), rngs=lib.Rngs(0)), _array(4, 8, 8, 8)
  )


def _build_embed() -> harness.Comparison:
  """Calls `Embed`, beside indexing."""
  return _compare(
    lambda lib: lib.Embed(128, _FEATURES, rngs=lib.Rngs(0)),
    jnp.arange(_BATCH),
    plain=("embedding[tokens]", lambda p, x: p["embedding"][x]),
  )


def _build_attention() -> harness.Comparison:
  """Calls `MultiHeadAttention` of a short sequence."""
  return _compare(
    lambda lib: lib.MultiHeadAttention(
      4, _FEATURES, decode=False, rngs=lib.Rngs(0)
    ),
    _array(1, 16, _FEATURES),
  )


def _build_lstm() -> harness.Comparison:
  """Calls `LSTMCell` for one step."""
  carry = (jnp.zeros((_BATCH, _FEATURES)),) * 2
  return _compare(
    lambda lib: lib.LSTMCell(_FEATURES, _FEATURES, rngs=lib.Rngs(0)),
    _array(_BATCH, _FEATURES),
    call=lambda cell, x: cell(carry, x),
  )


def _build_rnn() -> harness.Comparison:
  """Calls `RNN` of an `LSTMCell` over 16 steps, outside of `jit`."""
  return _compare(
    lambda lib: lib.RNN(
      lib.LSTMCell(_FEATURES, _FEATURES, rngs=lib.Rngs(0)), rngs=lib.Rngs(0)
    ),
    _array(_BATCH, 16, _FEATURES),
  )


def _build_scan() -> harness.Comparison:
  """Scans over 8 stacked layers outside of `jit`, by one function for all."""

  def make(library: Library) -> Any:
    layer = library.vmap(
      lambda key: library.Linear(_FEATURES, _FEATURES, rngs=library.Rngs(key)),
      in_axes=0,
      out_axes=0,
    )
    return layer(jax.random.split(jax.random.key(0), 8))

  scans = {}
  for _, library in models.LIBRARIES:
    scans[library.Linear] = library.scan(
      lambda x, layer: jnp.tanh(layer(x)),
      in_axes=(library.Carry, 0),
      out_axes=library.Carry,
    )
  return _compare(
    make,
    _array(_BATCH, _FEATURES),
    call=lambda layers, x: scans[type(layers)](x, layers),
  )


def _make_transformer(library: Library, layers: int) -> Any:
  """Returns what makes a stack of layers as in an encoder."""

  class Block(library.Module):
    """Attention and two linear maps."""

    def __init__(self, rngs):
      self.attention_norm = library.LayerNorm(_FEATURES, rngs=rngs)
      self.attention = library.MultiHeadAttention(
        4, _FEATURES, dropout_rate=0.1, rngs=rngs
      )
      self.map_norm = library.LayerNorm(_FEATURES, rngs=rngs)
      self.up = library.Linear(_FEATURES, 4 * _FEATURES, rngs=rngs)
      self.down = library.Linear(4 * _FEATURES, _FEATURES, rngs=rngs)
      self.dropout = library.Dropout(0.1, rngs=rngs)

  class Transformer(library.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, rngs):
      self.embed = library.Embed(128, _FEATURES, rngs=rngs)
      self.blocks = library.List([Block(rngs) for _ in range(layers)])
      self.head = library.Linear(_FEATURES, 128, rngs=rngs)

  return lambda: Transformer(library.Rngs(0))


def _build_transformer(layers: int) -> harness.Comparison:
  """Builds the row of making a transformer, parameters and all."""

  def side(library: Library, name: str) -> harness.Side:
    make = _make_transformer(library, layers)

    def arrays(model: Any) -> list[jax.Array]:
      return jax.tree.leaves(library.state(model, library.Param))

    return harness.Side(
      name=name,
      fresh=lambda: None,
      call=lambda _: make(),
      observe=lambda _, model: arrays(model),
    )

  return models.comparison(side, clock=harness.THREAD_CPU)


_ROWS = f"{_BATCH}x{_FEATURES}"
# The shape of the input, and how to build the row.
_OPS = {
  "eager_linear": (_ROWS, _build_linear),
  "eager_batch_norm": (_ROWS, _build_batch_norm),
  "eager_batch_norm_eval": (_ROWS, _build_batch_norm_eval),
  "eager_layer_norm": (_ROWS, _build_layer_norm),
  "eager_conv": ("4x8x8x8", _build_conv),
  "eager_embed": (f"{_BATCH}", _build_embed),
  "eager_attention": (f"1x16x{_FEATURES}", _build_attention),
  "eager_lstm": (_ROWS, _build_lstm),
  "eager_rnn": (f"{_BATCH}x16x{_FEATURES}", _build_rnn),
  "eager_scan": (f"8 layers, {_ROWS}", _build_scan),
}
_QUICK_OPS = ("eager_linear", "eager_batch_norm", "eager_embed")


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: a call of each layer, and building a transformer."""
  rows = [
    harness.Case(NAME, op, shape, "float32", build)
    for op, (shape, build) in _OPS.items()
  ]
  if settings.quick:
    return [row for row in rows if row.op in _QUICK_OPS]
  rows.append(
    harness.Case(
      NAME,
      "build_transformer",
      f"{_LAYERS} layers",
      "",
      lambda: _build_transformer(_LAYERS),
    )
  )
  return rows
