"""Checkpoints in GGUF files, as llama.cpp has them."""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from examples.llm import config as config_lib
from examples.llm import gguf_file, rotary

_NAMES = {
  "token_embd": "embed_tokens",
  "output_norm": "norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
# Where an MLP has a norm on either side.
_GEMMA_NAMES = _NAMES | {
  "ffn_norm": "pre_feedforward_layernorm",
  "post_attention_norm": "post_attention_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}
# What the files keep that is no weight.
_ROPE_FACTORS = "rope_freqs.weight"


class Checkpoint:
  """A file's weights, under the names and in the order of transformers.

  Args:
    path: of the file.

  Attributes:
    file: the open file.
    config: the model's.
    names: of the weights.

  Raises:
    ValueError: if the model is of another architecture.
  """

  def __init__(self, path: str | pathlib.Path):
    self.file = gguf_file.File(path)
    self.config = _config(self.file)
    names = _GEMMA_NAMES if self.config.post_norms else _NAMES
    self._stored = {
      _translate(name, names): name
      for name in self.file.tensors
      if name != _ROPE_FACTORS
    }
    self.names = frozenset(self._stored)

  def read(self, name: str, dtype: Any) -> np.ndarray:
    """Returns a weight.

    Args:
      name: one of `names`.
      dtype: of the result.
    """
    x = self.file.read(self._stored[name], dtype)
    c = self.config
    if name.split(".")[-2].endswith("norm"):
      # Where transformers adds 1 to the scales of norms, GGUF has added it.
      return x - np.asarray(c.norm_offset, dtype)
    heads = {"q_proj": c.heads, "k_proj": c.kv_heads}.get(name.split(".")[-2])
    if heads is None or c.architecture != "llama":
      return x
    # Pairs of a rotation are neighbours there, and halves of a head here.
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def _translate(name: str, names: dict[str, str]) -> str:
  match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
  if match is None or match[2] not in names:
    return name  # which the model will refuse
  layer = "" if match[1] is None else f"layers.{match[1]}."
  return f"{layer}{names[match[2]]}.{match[3]}"


def _config(file: gguf_file.File) -> config_lib.Config:
  architecture = file.metadata.get("general.architecture")

  def get(name: str, default: Any = None) -> Any:
    return file.metadata.get(f"{architecture}.{name}", default)

  heads = get("attention.head_count")
  features = get("embedding_length")
  values = {
    "model_type": architecture,
    "vocab_size": file.tensors["token_embd.weight"].shape[0],
    "hidden_size": features,
    "intermediate_size": get("feed_forward_length"),
    "num_hidden_layers": get("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": get("attention.head_count_kv", heads),
    "head_dim": get("attention.key_length"),
    "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
    "max_position_embeddings": get("context_length"),
    "sliding_window": get("attention.sliding_window"),
    "tie_word_embeddings": "output.weight" not in file.tensors,
    "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    "rope_theta": get("rope.freq_base", 10000.0),
  }
  if architecture == "gemma3":
    values["rope_local_base_freq"] = 10000.0
    # That of all but the largest, whose head is narrower than its share.
    dim = values["head_dim"]
    large = values["num_hidden_layers"] == 62
    values["query_pre_attn_scalar"] = features // heads if large else dim
  if get("rope.scaling.type", "none") != "none":
    values["rope_scaling"] = {
      "rope_type": get("rope.scaling.type"),
      "factor": get("rope.scaling.factor"),
      "original_max_position_embeddings": get(
        "rope.scaling.original_context_length"
      ),
    }
  config = config_lib.from_json(values)
  if _ROPE_FACTORS in file.tensors:
    factors = file.read(_ROPE_FACTORS, np.float64)
    rope = rotary.Rotary(tuple((config.rope.rates / factors).tolist()))
    config = dataclasses.replace(config, rope=rope, local_rope=rope)
  return config
