"""Small made checkpoints of each architecture, with random weights."""

import json
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

from examples.llm import config as config_lib

_COMMON = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
}
_LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
_YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 32,
}
# What `config.json` says, of each architecture and of some variants.
CONFIGS: dict[str, dict[str, Any]] = {
  "llama": _COMMON
  | {"model_type": "llama", "rope_theta": 1e4, "tie_word_embeddings": True},
  "llama3": _COMMON
  | {
    "model_type": "llama",
    "rope_theta": 5e5,
    "rope_scaling": _LLAMA3,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
  },
  "qwen3": _COMMON
  | {
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
  },
  "qwen3_yarn": _COMMON
  | {
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_theta": 1e4,
    "rope_scaling": _YARN,
    "tie_word_embeddings": True,
  },
  "gemma3": _COMMON
  | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 6,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 5,
    "sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
  },
}
# Whose heads eight devices can share.
WIDE = CONFIGS["llama"] | {
  "num_attention_heads": 8,
  "num_key_value_heads": 8,
  "intermediate_size": 64,
}


def tensors(values: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
  """Draws the weights of a configuration, by the names of transformers.

  Args:
    values: of `config.json`.
    seed: of the numbers.
  """
  random = np.random.default_rng(seed)
  c, hidden = values["hidden_size"], values["intermediate_size"]
  heads, kv_heads = (
    values[f"num_{kind}_heads"] for kind in ("attention", "key_value")
  )
  h = values.get("head_dim") or c // heads
  gemma = values["model_type"].startswith("gemma")
  result = {}

  def matrix(name, rows, columns, bias=False):
    scale = 1.5 / columns**0.5
    result[f"{name}.weight"] = scale * random.normal(size=(rows, columns))
    if bias:
      result[f"{name}.bias"] = 0.3 * random.normal(size=rows)

  def norm(name, size):
    center = 0.0 if gemma else 1.0
    result[f"{name}.weight"] = center + 0.3 * random.normal(size=size)

  matrix("model.embed_tokens", values["vocab_size"], c)
  for i in range(values["num_hidden_layers"]):
    layer = f"model.layers.{i}"
    bias = values.get("attention_bias", False)
    matrix(f"{layer}.self_attn.q_proj", heads * h, c, bias)
    matrix(f"{layer}.self_attn.k_proj", kv_heads * h, c, bias)
    matrix(f"{layer}.self_attn.v_proj", kv_heads * h, c, bias)
    matrix(f"{layer}.self_attn.o_proj", c, heads * h, bias)
    if values["model_type"] != "llama":
      norm(f"{layer}.self_attn.q_norm", h)
      norm(f"{layer}.self_attn.k_norm", h)
    bias = values.get("mlp_bias", False)
    matrix(f"{layer}.mlp.gate_proj", hidden, c, bias)
    matrix(f"{layer}.mlp.up_proj", hidden, c, bias)
    matrix(f"{layer}.mlp.down_proj", c, hidden, bias)
    norm(f"{layer}.input_layernorm", c)
    norm(f"{layer}.post_attention_layernorm", c)
    if gemma:
      norm(f"{layer}.pre_feedforward_layernorm", c)
      norm(f"{layer}.post_feedforward_layernorm", c)
  norm("model.norm", c)
  if not values["tie_word_embeddings"]:
    matrix("lm_head", values["vocab_size"], c)
  return {name: x.astype(np.float32) for name, x in result.items()}


class Checkpoint:
  """Weights that are in no file.

  Args:
    values: of `config.json`.
    weights: by the names of transformers; those of `tensors`, if None.
  """

  def __init__(
    self, values: dict[str, Any], weights: dict[str, np.ndarray] | None = None
  ):
    self.config = config_lib.from_json(values)
    weights = tensors(values) if weights is None else weights
    self._weights = {
      name.removeprefix("model."): value for name, value in weights.items()
    }
    self.names = frozenset(self._weights)

  def read(self, name: str, dtype: Any) -> np.ndarray:
    return self._weights[name].astype(dtype)


class Letters:
  """Stands for a tokenizer: a token is a letter, the last one the end."""

  ends = frozenset({63})
  template = None

  def encode(self, text: str) -> list[int]:
    return [ord(letter) - 48 for letter in text]

  def decode(self, tokens) -> str:
    return "".join(chr(48 + token) for token in tokens)


# GGUF's names for what comes before `.weight`.
_LAYER_NAMES = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm",
}
_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}


def write_gguf(
  path: pathlib.Path,
  values: dict[str, Any],
  weights: dict[str, np.ndarray],
  dtype: str = "float32",
  tokenizer: dict[str, Any] | None = None,
) -> None:
  """Writes a checkpoint as llama.cpp's converter does.

  Args:
    path: of the file.
    values: of `config.json`.
    weights: by the names of transformers.
    dtype: of matrices; vectors are float32.
    tokenizer: further metadata, of the vocabulary.
  """
  name = values["model_type"].removesuffix("_text")
  heads, kv_heads = (
    values[f"num_{kind}_heads"] for kind in ("attention", "key_value")
  )
  metadata: dict[str, Any] = {
    "general.architecture": name,
    "general.alignment": 64,
    f"{name}.block_count": values["num_hidden_layers"],
    f"{name}.context_length": values["max_position_embeddings"],
    f"{name}.embedding_length": values["hidden_size"],
    f"{name}.feed_forward_length": values["intermediate_size"],
    f"{name}.attention.head_count": heads,
    f"{name}.attention.head_count_kv": kv_heads,
    f"{name}.attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
    f"{name}.rope.freq_base": values["rope_theta"],
  }
  if "head_dim" in values:
    metadata[f"{name}.attention.key_length"] = values["head_dim"]
  if "sliding_window" in values:
    metadata[f"{name}.attention.sliding_window"] = values["sliding_window"]
  arrays = {}
  scaling = values.get("rope_scaling") or {}
  if scaling.get("rope_type") in ("linear", "yarn"):
    prefix = f"{name}.rope.scaling"
    metadata[f"{prefix}.type"] = scaling["rope_type"]
    metadata[f"{prefix}.factor"] = scaling["factor"]
    if scaling["rope_type"] == "yarn":
      metadata[f"{prefix}.original_context_length"] = scaling[
        "original_max_position_embeddings"
      ]
  elif scaling.get("rope_type") == "llama3":
    arrays["rope_freqs.weight"] = _rope_factors(values)
  for key, x in weights.items():
    if name == "llama" and ("q_proj" in key or "k_proj" in key):
      count = heads if "q_proj" in key else kv_heads
      halves = x.reshape(count, 2, -1, *x.shape[1:])
      x = halves.swapaxes(1, 2).reshape(x.shape)
    if name == "gemma3" and "norm" in key:
      x = x + 1
    arrays[_gguf_name(key, name)] = x
  _write(path, metadata | (tokenizer or {}), arrays, dtype)


def _gguf_name(key: str, architecture: str) -> str:
  key, suffix = key.removeprefix("model.").rsplit(".", 1)
  whole = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
  }
  if key in whole:
    return f"{whole[key]}.{suffix}"
  _, layer, part = key.split(".", 2)
  names = _LAYER_NAMES | {"post_attention_layernorm": "ffn_norm"}
  if architecture == "gemma3":
    names |= {
      "post_attention_layernorm": "post_attention_norm",
      "pre_feedforward_layernorm": "ffn_norm",
      "post_feedforward_layernorm": "post_ffw_norm",
    }
  return f"blk.{layer}.{names[part]}.{suffix}"


def _rope_factors(values: dict[str, Any]) -> np.ndarray:
  """What the converter makes of Llama 3's scaling: a divisor of each rate."""
  scaling = values["rope_scaling"]
  h = values["hidden_size"] // values["num_attention_heads"]
  first = scaling["original_max_position_embeddings"]
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  factors = []
  for rate in values["rope_theta"] ** (-np.arange(0, h, 2) / h):
    wavelength = 2 * np.pi / rate
    if wavelength < first / high:
      factors.append(1.0)
    elif wavelength > first / low:
      factors.append(scaling["factor"])
    else:
      smooth = (first / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
  return np.array(factors, np.float32)


def _string(text: str) -> bytes:
  data = text.encode()
  return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
  """A value with its type in front."""
  if isinstance(value, bool):
    return struct.pack("<I?", 7, value)
  if isinstance(value, int):
    return struct.pack("<Ii", 5, value)
  if isinstance(value, float):
    return struct.pack("<If", 6, value)
  if isinstance(value, str):
    return struct.pack("<I", 8) + _string(value)
  items = [_value(item) for item in value]
  kind = items[0][:4]
  body = b"".join(item[4:] for item in items)
  return struct.pack("<I", 9) + kind + struct.pack("<Q", len(items)) + body


def _write(
  path: pathlib.Path,
  metadata: dict[str, Any],
  arrays: dict[str, np.ndarray],
  dtype: str,
) -> None:
  alignment = metadata["general.alignment"]
  head = b"GGUF" + struct.pack("<IQQ", 3, len(arrays), len(metadata))
  head += b"".join(_string(k) + _value(v) for k, v in metadata.items())
  body = b""
  for name, x in arrays.items():
    kind = dtype if x.ndim > 1 else "float32"
    stored = x.astype(
      ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
    )
    head += _string(name) + struct.pack("<I", x.ndim)
    head += struct.pack(f"<{x.ndim}Q", *x.shape[::-1])
    head += struct.pack("<IQ", _TYPES[kind], len(body))
    body += stored.tobytes()
    body += bytes(-len(body) % alignment)
  path.write_bytes(head + bytes(-len(head) % alignment) + body)


def write_folder(
  path: pathlib.Path, values: dict[str, Any], weights: dict[str, np.ndarray]
) -> None:
  """Writes a checkpoint as transformers does, into two files.

  Args:
    path: of the folder.
    values: of `config.json`.
    weights: by the names of transformers.
  """
  from safetensors import numpy as safetensors

  (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
  names = sorted(weights)
  for i, part in enumerate((names[::2], names[1::2])):
    safetensors.save_file(
      {name: weights[name] for name in part},
      path / f"model-{i + 1:05}-of-00002.safetensors",
    )
