"""How rotary embedding reaches past the lengths that a model was trained on.

Each class changes the rates at which pairs turn; `MultiHeadAttention` takes one
as `rope_scaling`. Parameters are called as in the `rope_scaling` of the
configurations that checkpoints of Hugging Face carry.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from nnx.nn import checks


class RopeScaling:
  """Base of the ways to scale rotary embedding; by itself it scales nothing.

  A subclass must be hashable, as frozen dataclasses are.

  Example:

    >>> import dataclasses
    >>> from nnx.nn import rope_scaling
    >>> @dataclasses.dataclass(frozen=True)
    ... class Slower(rope_scaling.RopeScaling):
    ...   factor: float
    ...
    ...   def rates(self, features, base):
    ...     return super().rates(features, base) / self.factor
    >>> Slower(4.0).rates(4, 10000.0).tolist()
    [0.25, 0.0025]

  Attributes:
    magnitude: By this the cosines and sines are multiplied.
  """

  @property
  def magnitude(self) -> float:
    return 1.0

  def rates(self, features: int, base: float) -> np.ndarray:
    """Returns by what angle, in radians, each pair turns per position.

        rate_i = base ** (-2 * i / features)

    Example:

      >>> from nnx.nn import rope_scaling
      >>> rope_scaling.RopeScaling().rates(4, 10000.0).tolist()
      [1.0, 0.01]

    Args:
      features: How many features are rotated, even.
      base: Base of the wavelengths.

    Returns:
      `[features // 2]`, float64.
    """
    pairs = features // 2
    return base ** (-np.arange(pairs, dtype=np.float64) / pairs)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
  """Slows long waves down and leaves short ones alone, as Llama 3.1 does.

      turns = original_max_position_embeddings * rate / (2 * pi)
      keep = clip((turns - low) / (high - low), 0, 1)
      rate = keep * rate + (1 - keep) * rate / factor

  with `low_freq_factor` and `high_freq_factor` as low and high: a pair that
  turns fewer than `low` times within the lengths of the training is slowed
  down.

  Source: Llama Team 2024, "The Llama 3 herd of models", as in the reference
  implementation of Llama 3.1.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> scaling = nnx.Llama3Scaling(8.0)
    >>> layer = nnx.MultiHeadAttention(
    ...   2,
    ...   16,
    ...   rope_base=500000.0,
    ...   rope_scaling=scaling,
    ...   decode=False,
    ...   rngs=nnx.Rngs(0),
    ... )
    >>> layer(jnp.ones((5, 16)), is_causal=True).shape
    (5, 16)

  Args:
    factor: How much longer texts may be.
    low_freq_factor: Turns below which a pair is slowed down.
    high_freq_factor: Turns above which it is left alone.
    original_max_position_embeddings: The lengths of the training.

  Raises:
    ValueError: If a number is not positive, or the second factor is not above
      the first.
  """

  factor: float = 8.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position_embeddings: int = 8192

  def __post_init__(self):
    for field in dataclasses.fields(self):
      checks.positive(field.name, getattr(self, field.name))
    if self.high_freq_factor <= self.low_freq_factor:
      raise ValueError(
        "`high_freq_factor` must be above `low_freq_factor`, but got"
        f" {self.high_freq_factor} and {self.low_freq_factor}."
      )

  def rates(self, features: int, base: float) -> np.ndarray:
    """Returns by what angle, in radians, each pair turns per position.

    Example:

      >>> import nnx
      >>> nnx.Llama3Scaling(8.0).rates(4, 1e8).tolist()
      [1.0, 1.25e-05]

    Args:
      features: How many features are rotated, even.
      base: Base of the wavelengths.

    Returns:
      `[features // 2]`, float64.
    """
    rates = super().rates(features, base)
    turns = self.original_max_position_embeddings * rates / (2 * math.pi)
    low, high = self.low_freq_factor, self.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * rates + (1 - keep) * rates / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling(RopeScaling):
  """Slows pairs down by how often they turn, and sharpens attention.

      pair(n) = features * log(length / (2 * pi * n)) / (2 * log(base))
      slow_i = clip((i - pair(beta_fast)) / (pair(beta_slow) - pair(beta_fast)),
                    0, 1)
      rate_i = (1 - slow_i) * rate_i + slow_i * rate_i / factor
      cos, sin = magnitude * cos, magnitude * sin

  with `original_max_position_embeddings` as length: a pair that turns more than
  `beta_fast` times within it is left alone, one that turns fewer than
  `beta_slow` times is slowed down. The magnitude is `attention_factor`; if that
  is None

      0.1 * mscale * log(factor) + 1

  over the same of `mscale_all_dim`, or over 1 where that is 0.

  Source: Peng et al. 2023, "YaRN: Efficient context window extension of large
  language models", arXiv:2309.00071; `mscale_all_dim` as in DeepSeek-V2.

  Example:

    >>> import nnx
    >>> scaling = nnx.YarnScaling(4.0, 32768)
    >>> scaling.rates(4, 1e6).tolist(), round(scaling.magnitude, 4)
    ([1.0, 0.000625], 1.1386)

  Args:
    factor: How much longer texts may be, at least 1.
    original_max_position_embeddings: The lengths of the training.
    beta_fast: Turns above which a pair is left alone.
    beta_slow: Turns below which it is slowed down.
    attention_factor: The magnitude, in place of the formula.
    mscale: Factor of the logarithm in the formula.
    mscale_all_dim: The same for what the magnitude is divided by.
    truncate: Whether the bounds between pairs are rounded to whole pairs,
      outwards.

  Raises:
    ValueError: If a number is out of range, or `beta_fast` is not above
      `beta_slow`.
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float = 1.0
  mscale_all_dim: float = 0.0
  truncate: bool = True

  def __post_init__(self):
    for name in (
      "factor",
      "original_max_position_embeddings",
      "beta_fast",
      "beta_slow",
    ):
      checks.positive(name, getattr(self, name))
    if self.attention_factor is not None:
      checks.positive("attention_factor", self.attention_factor)
    for name in ("mscale", "mscale_all_dim"):
      checks.small(name, getattr(self, name))
    if self.factor < 1:
      raise ValueError(f"`factor` must be at least 1, but got {self.factor}.")
    if self.beta_fast <= self.beta_slow:
      raise ValueError(
        "`beta_fast` must be above `beta_slow`, but got"
        f" {self.beta_fast} and {self.beta_slow}."
      )

  @property
  def magnitude(self) -> float:
    if self.attention_factor is not None:
      return self.attention_factor

    def of(mscale):
      return 0.1 * mscale * math.log(self.factor) + 1.0

    return of(self.mscale) / of(self.mscale_all_dim)

  def rates(self, features: int, base: float) -> np.ndarray:
    """Returns by what angle, in radians, each pair turns per position.

    Example:

      >>> import nnx
      >>> nnx.YarnScaling(2.0, 1024).rates(8, 10000.0)[-1].round(6).item()
      0.0005

    Args:
      features: How many features are rotated, even.
      base: Base of the wavelengths, above 1.

    Returns:
      `[features // 2]`, float64.

    Raises:
      ValueError: If the base is not above 1.
    """
    if base <= 1:
      raise ValueError(
        f"The base must be above 1 for `YarnScaling`, but got {base}."
      )
    rates = super().rates(features, base)
    length = self.original_max_position_embeddings

    def pair(turns):
      far = math.log(length / (2 * math.pi * turns))
      return features * far / (2 * math.log(base))

    first, last = pair(self.beta_fast), pair(self.beta_slow)
    if self.truncate:
      first, last = math.floor(first), math.ceil(last)
    # As published: the bounds are cut to the features, not to the pairs.
    first, last = max(first, 0), min(last, features - 1)
    if first == last:
      last += 0.001  # a step
    slow = (np.arange(features // 2, dtype=np.float64) - first) / (last - first)
    slow = np.clip(slow, 0.0, 1.0)
    return (1 - slow) * rates + slow * rates / self.factor
