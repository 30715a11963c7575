"""The decoder of suite `llm` in PyTorch."""

from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from examples.llm import config as config_lib
from examples.llm import model as model_lib


class Step:
  """Appends tokens to texts; each call appends the same ones at one place.

  Args:
    dtype: of weights, caches and what is computed.
    config: sizes; of a Llama with tied embeddings.
    arrays: weights by their names in a checkpoint.
    cache: our keys and values.
    tokens: `[texts, t]`, to append.
    index: how many tokens the caches have.
  """

  def __init__(
    self,
    dtype: str,
    config: config_lib.Config,
    arrays: dict[str, np.ndarray],
    cache: model_lib.KVCache,
    tokens: np.ndarray,
    index: int,
  ):
    self._config = config
    self._first = index
    self._given = torch.from_numpy(tokens.astype(np.int64))
    own = getattr(torch, dtype)
    self._weights = {
      name.removesuffix(".weight"): _tensor(array, own)
      for name, array in arrays.items()
    }
    self._caches = [
      tuple(
        _tensor(each[...], own).transpose(1, 2).contiguous() for each in pair
      )
      for pair in zip(cache.keys, cache.values, strict=True)
    ]
    length = self._caches[0][0].shape[2]
    table = torch.from_numpy(config.rope.table(length))
    self._table = torch.cat([table, table], -1).to(own)

  def __call__(self) -> np.ndarray:
    """Returns the logits after the last token, `[texts, vocabulary]`."""
    return self._logits(self._given, self._first).numpy()

  def write(self, count: int) -> np.ndarray:
    """Returns the likeliest tokens after the given ones, `[texts, count]`.

    Args:
      count: how many of each text.
    """
    text = [self._given]
    for i in range(count):
      logits = self._logits(text[-1], self._first + i)
      text.append(logits.argmax(-1, keepdim=True))
    return torch.cat(text[1:], -1).numpy()

  @torch.inference_mode()
  def _logits(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
    self._index = index
    self._cos, self._sin = self._table[:, index : index + tokens.shape[1]]
    table = self._weights["embed_tokens"]
    x = functional.embedding(tokens, table)
    for layer in range(self._config.layers):
      x = x + self._attention(layer, x)
      x = x + self._mlp(f"layers.{layer}", x)
    x = self._norm("norm", x[:, -1])
    return functional.linear(x, table).float()

  def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
    scale = self._weights[name]
    return functional.rms_norm(x, scale.shape, scale, self._config.epsilon)

  def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, self._weights[name])

  def _mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
    x = self._norm(f"{name}.post_attention_layernorm", x)
    gate = functional.silu(self._linear(f"{name}.mlp.gate_proj", x))
    up = self._linear(f"{name}.mlp.up_proj", x)
    return self._linear(f"{name}.mlp.down_proj", gate * up)

  def _attention(self, layer: int, x: torch.Tensor) -> torch.Tensor:
    name = f"layers.{layer}.self_attn"
    x = self._norm(f"layers.{layer}.input_layernorm", x)
    q, k, v = (
      self._linear(f"{name}.{part}_proj", x)
      .unflatten(-1, (-1, self._config.head_dim))
      .transpose(1, 2)
      for part in "qkv"
    )
    keys, values = self._caches[layer]
    count = x.shape[1]
    end = self._index + count
    keys[:, :, self._index : end] = self._rotate(k)
    values[:, :, self._index : end] = v
    y = functional.scaled_dot_product_attention(
      self._rotate(q),
      keys[:, :, :end],
      values[:, :, :end],
      is_causal=count > 1,
      enable_gqa=True,
    )
    return self._linear(f"{name}.o_proj", y.transpose(1, 2).flatten(2))

  def _rotate(self, x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * self._cos + torch.cat([-second, first], -1) * self._sin


def _tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
  values = np.array(array, np.float32)  # which torch may write
  return torch.from_numpy(values).to(dtype).contiguous()
