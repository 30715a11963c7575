"""Rotary embedding with the scalings that long contexts have.

Element i of the first half of a head and element i of the second are a pair,
which turns by `position * rate[i]`.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

import nnx


@dataclasses.dataclass(frozen=True)
class Rotary:
  """By what angles positions turn.

  Attributes:
    rates: the angle of each pair at position 1, in radians.
    factor: of cosines and sines.
  """

  rates: tuple[float, ...]
  factor: float = 1.0

  def table(self, positions: int) -> np.ndarray:
    """Returns cosines and sines: `[2, positions, pairs]` float32."""
    # In float64: a float32 angle is off by 0.01 at position 100,000.
    angles = np.arange(positions)[:, None] * np.array(self.rates)
    table = np.stack([np.cos(angles), np.sin(angles)])
    return (self.factor * table).astype(np.float32)


def from_json(values: Mapping[str, Any], head_dim: int, context: int) -> Rotary:
  """Reads `rope_scaling` or `rope_parameters` of `config.json`.

  Args:
    values: what is there, with `rope_theta`.
    head_dim: features of a head.
    context: the model's `max_position_embeddings`.

  Raises:
    ValueError: if the scaling is of a kind that is not here.
  """
  if values.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError(
      "`partial_rotary_factor` must be 1, but got"
      f" {values['partial_rotary_factor']}."
    )
  scaling = _scaling(values, context)
  rates = scaling.rates(head_dim, values["rope_theta"])
  return Rotary(tuple(rates.tolist()), scaling.magnitude)


def _scaling(values: Mapping[str, Any], context: int) -> nnx.RopeScaling:
  kind = values.get("rope_type", values.get("type", "default"))
  if kind == "default":
    return nnx.RopeScaling()
  if kind == "linear":
    return LinearScaling(values["factor"])
  if kind == "llama3":
    return nnx.Llama3Scaling(
      values["factor"],
      values["low_freq_factor"],
      values["high_freq_factor"],
      values["original_max_position_embeddings"],
    )
  if kind == "yarn":  # where 0 and null are as if nothing was said
    return nnx.YarnScaling(
      values["factor"],
      values.get("original_max_position_embeddings") or context,
      values.get("beta_fast") or 32.0,
      values.get("beta_slow") or 1.0,
      values.get("attention_factor") or None,
      truncate=values.get("truncate", True),
    )
  raise ValueError(
    "`rope_type` must be `default`, `linear`, `llama3` or `yarn`, but got"
    f" `{kind}`."
  )


@dataclasses.dataclass(frozen=True)
class LinearScaling(nnx.RopeScaling):
  """Slows all pairs down alike.

  Attributes:
    factor: how much longer texts may be.
  """

  factor: float

  def rates(self, features: int, base: float) -> np.ndarray:
    """Returns by what angle each pair turns per position."""
    return super().rates(features, base) / self.factor


class Tables(nnx.Module):
  """Cosines and sines of all positions, for both kinds of layers.

  Args:
    rope: of layers that see all keys.
    local_rope: of layers with a window.
    positions: how many.

  Attributes:
    full: `Variable`, `[2, positions, pairs]`; `local` likewise.
  """

  def __init__(self, rope: Rotary, local_rope: Rotary, positions: int):
    self.full = nnx.Variable(jnp.asarray(rope.table(positions)))
    self.local = self.full
    if local_rope != rope:
      self.local = nnx.Variable(jnp.asarray(local_rope.table(positions)))


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
  """Rotates tokens at positions from 0 on.

  Args:
    x: `[b, t, n, h]`.
    table: `[2, positions, h // 2]`.
  """
  cos, sin = table[:, None, : x.shape[1], None]
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, -1).astype(x.dtype)
