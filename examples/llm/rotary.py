"""Rotary embedding with the scalings that long contexts have.

Element i of the first half of a head and element i of the second are a pair,
which turns by `position * rate[i]`.
"""

from collections.abc import Mapping
import dataclasses
import math
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
  kind = values.get("rope_type", values.get("type", "default"))
  base = values["rope_theta"]
  rates = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
  factor = 1.0
  if values.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError(
      "`partial_rotary_factor` must be 1, but got"
      f" {values['partial_rotary_factor']}."
    )
  if kind == "linear":
    rates = rates / values["factor"]
  elif kind == "llama3":
    rates = _llama3(rates, values)
  elif kind == "yarn":
    rates, factor = _yarn(rates, values, base, context)
  elif kind != "default":
    raise ValueError(
      "`rope_type` must be `default`, `linear`, `llama3` or `yarn`, but got"
      f" `{kind}`."
    )
  return Rotary(tuple(rates.tolist()), factor)


def _llama3(rates: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
  """Slows down pairs that turn less than once or so in the first context."""
  turns = values["original_max_position_embeddings"] * rates / (2 * math.pi)
  low, high = values["low_freq_factor"], values["high_freq_factor"]
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return rates * (kept + (1 - kept) / values["factor"])


def _yarn(
  rates: np.ndarray, values: Mapping[str, Any], base: float, context: int
) -> tuple[np.ndarray, float]:
  """Slows down slow pairs, keeps fast ones, and sharpens the attention.

  Source: Peng et al. 2023, arXiv:2309.00071.
  """
  factor = values["factor"]
  first = values.get("original_max_position_embeddings") or context

  def pair_of(turns: float) -> float:
    """Returns which pair turns so often in the first context."""
    return len(rates) * math.log(first / (turns * 2 * math.pi), base)

  low = pair_of(values.get("beta_fast") or 32)
  high = pair_of(values.get("beta_slow") or 1)
  if values.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * len(rates) - 1)
  slowed = np.clip((np.arange(len(rates)) - low) / max(high - low, 1e-3), 0, 1)
  sharpness = values.get("attention_factor") or 0.1 * math.log(factor) + 1
  return rates * (1 - slowed + slowed / factor), sharpness


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
