"""The decoders in NumPy and float64, written from their definitions.

It knows nothing of the example: it reads `config.json` for itself.
"""

import math
from typing import Any

import numpy as np


def logits(
  values: dict[str, Any], weights: dict[str, np.ndarray], tokens: np.ndarray
) -> np.ndarray:
  """Returns the logits after each token.

  Args:
    values: of `config.json`.
    weights: by the names of transformers.
    tokens: `[t]`.

  Returns:
    `[t, vocabulary]`.
  """
  w = {name: x.astype(np.float64) for name, x in weights.items()}
  gemma = values["model_type"].startswith("gemma")
  eps = values["rms_norm_eps"]

  def norm(name, x):
    scale = w[f"{name}.weight"] + (1 if gemma else 0)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale

  def linear(name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

  x = w["model.embed_tokens.weight"][tokens]
  if gemma:
    x = x * math.sqrt(values["hidden_size"])
  for i in range(values["num_hidden_layers"]):
    layer = f"model.layers.{i}"
    y = _attention(
      values, i, linear, norm, layer, norm(f"{layer}.input_layernorm", x)
    )
    if gemma:
      x = x + norm(f"{layer}.post_attention_layernorm", y)
      y = norm(f"{layer}.pre_feedforward_layernorm", x)
    else:
      x = x + y
      y = norm(f"{layer}.post_attention_layernorm", x)
    gate = linear(f"{layer}.mlp.gate_proj", y)
    if gemma:
      inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
      gate = gate * 0.5 * (1 + np.tanh(inner))
    else:
      gate = gate / (1 + np.exp(-gate))
    y = linear(
      f"{layer}.mlp.down_proj", gate * linear(f"{layer}.mlp.up_proj", y)
    )
    x = x + (norm(f"{layer}.post_feedforward_layernorm", y) if gemma else y)
  x = norm("model.norm", x)
  head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
  return x @ head.T


def _attention(values, i, linear, norm, layer, x):
  heads = values["num_attention_heads"]
  kv_heads = values["num_key_value_heads"]
  h = values.get("head_dim") or values["hidden_size"] // heads
  t = len(x)
  q = linear(f"{layer}.self_attn.q_proj", x).reshape(t, heads, h)
  k = linear(f"{layer}.self_attn.k_proj", x).reshape(t, kv_heads, h)
  v = linear(f"{layer}.self_attn.v_proj", x).reshape(t, kv_heads, h)
  if values["model_type"] != "llama":
    q = norm(f"{layer}.self_attn.q_norm", q)
    k = norm(f"{layer}.self_attn.k_norm", k)
  pattern = values.get("sliding_window_pattern")
  local = pattern is not None and (i + 1) % pattern != 0
  rates, sharpness = _rates(values, h, local)
  scale = values.get("query_pre_attn_scalar", h) ** -0.5
  out = np.zeros((t, heads, h))
  for p in range(t):
    first = max(0, p - values["sliding_window"] + 1) if local else 0
    for n in range(heads):
      own = n // (heads // kv_heads)
      query = _turn(q[p, n], p, rates) * sharpness
      scores = np.array(
        [
          query @ _turn(k[j, own], j, rates) * sharpness
          for j in range(first, p + 1)
        ]
      )
      scores = np.exp(scale * (scores - scores.max()))
      out[p, n] = scores / scores.sum() @ v[first : p + 1, own]
  return linear(f"{layer}.self_attn.o_proj", out.reshape(t, heads * h))


def _turn(x, position, rates):
  """Turns pairs as complex numbers."""
  half = len(x) // 2
  turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * rates)
  return np.concatenate([turned.real, turned.imag])


def _rates(values, h, local):
  """Returns the angles of a position, and the factor of queries and keys."""
  scaling = values.get("rope_scaling") or {}
  base = values["rope_local_base_freq" if local else "rope_theta"]
  rates = [base ** (-i / h) for i in range(0, h, 2)]
  if local or not scaling:
    return np.array(rates), 1.0
  factor, first = (
    scaling["factor"],
    scaling.get("original_max_position_embeddings"),
  )
  if scaling["rope_type"] == "linear":
    return np.array(rates) / factor, 1.0
  if scaling["rope_type"] == "llama3":
    return np.array([_llama3(rate, scaling) for rate in rates]), 1.0

  def dimension(rotations):
    turns = first / (rotations * 2 * math.pi)
    return h * math.log(turns) / (2 * math.log(base))

  low = max(math.floor(dimension(32)), 0)
  high = min(math.ceil(dimension(1)), h - 1)
  result = []
  for i, rate in enumerate(rates):
    ramp = min(max((i - low) / ((high - low) or 0.001), 0), 1)
    result.append(rate / factor * ramp + rate * (1 - ramp))
  return np.array(result), 0.1 * math.log(factor) + 1


def _llama3(rate, scaling):
  wavelength = 2 * math.pi / rate
  first = scaling["original_max_position_embeddings"]
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  if wavelength < first / high:
    return rate
  if wavelength > first / low:
    return rate / scaling["factor"]
  smooth = (first / wavelength - low) / (high - low)
  return (1 - smooth) * rate / scaling["factor"] + smooth * rate
