"""Attention with the options of today's models: its formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array

FEATURES, HEADS, KV_HEADS, LENGTH, PROMPT = 16, 4, 2, 7, 4
# Two sequences of up to 8 tokens in blocks of 2, in no order.
TABLE = jnp.array([[7, 0, 3, 2], [1, 6, 5, 4]])
POSITIONS = np.array([[3, 4, 5, 9, 10, 11, 70_000], [0, 2, 4, 6, 8, 10, 12]])


def llama3_rates(dim, base, factor, low, high, old):
  """As transformers computes them, a pair at a time."""
  rates = []
  for i in range(dim // 2):
    rate = 1.0 / base ** (2 * i / dim)
    wavelength = 2 * np.pi / rate
    if wavelength > old / low:
      rate = rate / factor
    elif wavelength > old / high:
      smooth = (old / wavelength - low) / (high - low)
      rate = (1 - smooth) * rate / factor + smooth * rate
    rates.append(rate)
  return np.array(rates)


def yarn_rates(dim, base, factor, old, fast=32, slow=1, truncate=True):
  def correction(rotations):
    return (dim * np.log(old / (rotations * 2 * np.pi))) / (2 * np.log(base))

  low, high = correction(fast), correction(slow)
  if truncate:
    low, high = np.floor(low), np.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  rates = []
  for i in range(dim // 2):
    extrapolated = 1.0 / base ** (2 * i / dim)
    ramp = min(max((i - low) / (high - low), 0), 1)
    rates.append(extrapolated / factor * ramp + extrapolated * (1 - ramp))
  return np.array(rates)


YARN = nnx.YarnScaling(4.0, 64, 8.0, 1.0)


LLAMA = nnx.Llama3Scaling(8.0, 1.0, 4.0, 64)


OPTIONS = {
  "head_dim": {"head_dim": 6},
  "RMS norms": {"qk_norm": functools.partial(nnx.RMSNorm, epsilon=1e-2)},
  "interleaved": {"rope_base": 10.0, "rope_interleaved": True},
  "partial": {"rope_base": 10.0, "rope_dim": 2},
  "Llama 3": {"rope_base": 100.0, "rope_scaling": LLAMA, "head_dim": 8},
  "YaRN": {"rope_base": 100.0, "rope_scaling": YARN, "head_dim": 8},
  "everything": {
    "head_dim": 10,
    "qk_norm": functools.partial(nnx.RMSNorm, epsilon=1e-2),
    "rope_base": 100.0,
    "rope_dim": 8,
    "rope_interleaved": True,
    "rope_scaling": YARN,
    "rope_scale": 2.0,
    "window": 4,
    "softcap": 3.0,
  },
}


def make(**options):
  layer = nnx.MultiHeadAttention(
    HEADS,
    FEATURES,
    num_kv_heads=KV_HEADS,
    decode=True,
    is_causal=True,
    kernel_init=jax.nn.initializers.normal(0.5),
    bias_init=jax.nn.initializers.normal(),
    rngs=nnx.Rngs(0),
    **options,
  )
  for norm in (layer.query_ln, layer.key_ln):
    if norm is not None:
      norm.scale.value = 1 + array(*norm.scale.shape) / 4
  return layer


def angles(layer, options, positions):
  """`[b, t, pairs]` in float64, and the magnitude."""
  dim = options.get("rope_dim") or layer.head_dim
  base, scaling = options["rope_base"], options.get("rope_scaling")
  magnitude = 1.0
  if scaling is LLAMA:
    rates = llama3_rates(dim, base, 8.0, 1.0, 4.0, 64)
  elif scaling is YARN:
    rates = yarn_rates(dim, base, 4.0, 64, 8.0, 1.0)
    magnitude = 0.1 * np.log(4.0) + 1
  else:
    rates = base ** (-np.arange(0, dim, 2) / dim)
  at = positions[..., None] / options.get("rope_scale", 1.0)
  return at * rates, magnitude


def turned(x, angle, magnitude, interleaved):
  """Rotates `[b, t, n, h]` by a 2 x 2 matrix for each pair."""
  x = x.copy()
  pairs = angle.shape[-1]
  for i in range(pairs):
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
    cos, sin = (magnitude * f(angle[..., None, i]) for f in (np.cos, np.sin))
    first, second = x[..., a].copy(), x[..., b].copy()
    x[..., a] = cos * first - sin * second
    x[..., b] = sin * first + cos * second
  return x


def in_full(layer, options, x, positions=None, is_causal=True):
  """What the layer computes, in float64."""
  x = np.asarray(x, np.float64)
  batch, tokens = x.shape[:2]
  if positions is None:
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens))

  def project(linear, norm=None):
    kernel, bias = (
      np.asarray(p.value, np.float64) for p in (linear.kernel, linear.bias)
    )
    y = np.einsum("btf,fnh->btnh", x, kernel) + bias
    if norm is not None:
      y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-2)
      y = y * np.asarray(norm.scale.value, np.float64)
    return y

  query = project(layer.query, layer.query_ln)
  key, value = project(layer.key, layer.key_ln), project(layer.value)
  if "rope_base" in options:
    angle = angles(layer, options, positions)
    query, key = (
      turned(y, *angle, options.get("rope_interleaved")) for y in (query, key)
    )
  groups = HEADS // KV_HEADS
  key, value = np.repeat(key, groups, 2), np.repeat(value, groups, 2)
  logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(layer.head_dim)
  if "softcap" in options:
    logits = options["softcap"] * np.tanh(logits / options["softcap"])
  behind = np.arange(tokens)[:, None] - np.arange(tokens)
  seen = (behind >= 0) | (not is_causal)
  if "window" in options:
    seen = seen & (behind < options["window"])
  logits = np.where(seen, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum("bnts,bsnh->btnh", weights, value)
  kernel = np.asarray(layer.out.kernel.value, np.float64)
  return np.einsum("btnh,nhf->btf", out, kernel) + np.asarray(
    layer.out.bias.value, np.float64
  )


def close(got, want, tolerance=5e-6):
  np.testing.assert_allclose(
    np.asarray(got, np.float64), want, 0, tolerance * np.abs(want).max()
  )


def run(layer, function, *arrays):
  """Calls `function(layer, *arrays)` in one quickly compiled program."""
  graphdef, state = nnx.split(layer)

  @comparison.jit
  def call(state, *arrays):
    model = nnx.merge(graphdef, state)
    return function(model, *arrays), nnx.state(model)

  y, state = call(state, *arrays)
  nnx.update(layer, state)
  return y


PARTS = ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, LENGTH))


def in_steps(layer, x, positions=None, prepare=False, **kwargs):
  """A prompt, a token, and two at once."""
  parts = []
  for first, last in PARTS:
    part, given = x[:, first:last], dict(kwargs)
    if positions is not None:
      given["input_positions"] = positions[..., first:last]
    if prepare:
      given = {"step": layer.prepare_step(part, **given)}
    parts.append(layer(part, **given))
  return jnp.concatenate(parts, 1)


class Stack(nnx.Module):
  def __init__(self, count, **options):
    self.layers = nnx.List(make(**options) for _ in range(count))

  def __call__(self, x, prepare=True, **kwargs):
    if prepare:
      kwargs = {"step": self.layers[0].prepare_step(x, **kwargs)}
    for layer in self.layers:
      x = x + layer(x, **kwargs)
    return x
