"""From a checkpoint to a model: the one place where weights become Params."""

from typing import Any, Protocol

import jax
from jax import numpy as jnp
import numpy as np

from examples.llm import config as config_lib
from examples.llm import model as model_lib
from examples.llm import rotary
import nnx

# What the last name of a Param is called in a checkpoint.
_SUFFIXES = {
  "kernel": "weight",
  "embedding": "weight",
  "scale": "weight",
  "bias": "bias",
}
# Params that are several tensors side by side, in the order of `model`.
JOINED = {
  "qkv_proj": ("q_proj", "k_proj", "v_proj"),
  "gate_up_proj": ("gate_proj", "up_proj"),
}
# What some files keep although it follows from the configuration.
_DERIVED = "rotary_emb.inv_freq"


class Checkpoint(Protocol):
  """Weights by name, wherever they come from."""

  config: config_lib.Config
  names: frozenset[str]

  def read(self, name: str, dtype: Any) -> np.ndarray:
    """Returns a weight, in a dtype."""


# How many numbers of a packed weight share a scale, where that divides them.
_GROUP = 32


def load(
  checkpoint: Checkpoint,
  positions: int,
  dtype: Any = jnp.float32,
  bits: int | None = None,
) -> model_lib.Model:
  """Makes a model with the weights of a checkpoint.

  Each weight is read, converted and put in its place before the next one is
  read.

  Args:
    checkpoint: from `load_gguf` or `load_safetensors`.
    positions: the longest text that the model will see.
    dtype: of the weights but for those of norms, which are float32.
    bits: 8 or 4, to pack matrices into, whole numbers with a scale for each 32
      of them; the table of tokens into 8, as what it loses every token does. If
      None, they stay as they are.

  Raises:
    ValueError: if weights are missing, are left over, or have other shapes.
  """
  config = checkpoint.config
  model = nnx.eval_shape(
    lambda: model_lib.Model(config, positions, dtype, rngs=nnx.Rngs(0))
  )
  model.tables = rotary.Tables(config.rope, config.local_rope, positions)
  params = nnx.to_flat_state(nnx.state(model, nnx.Param))
  names = {name for path, _ in params for name in _names(path)}
  _check_names(names, checkpoint)

  def loaded(path: tuple[Any, ...], param: nnx.Param, dtype: Any) -> nnx.Param:
    parts = []
    for name in _names(path):
      value = _as_param(str(path[-1]), checkpoint.read(name, dtype), config)
      shape = (*param.shape[:-1], _columns(name, param.shape[-1], config))
      if value.shape != shape:
        raise ValueError(
          f"`{name}` must become an array of the shape {shape}, but has the"
          f" shape {value.shape}."
        )
      parts.append(value)
    value = parts[0] if len(parts) == 1 else _joined(parts, config)
    return param.replace(jax.device_put(value))

  if bits is not None:

    def packed(path: tuple[Any, ...], layer: Any) -> Any:
      """Packs a layer, whose weights are read in full for that."""
      if isinstance(layer, nnx.Linear):
        layer.kernel = loaded((*path, "kernel"), layer.kernel, jnp.float32)
        return nnx.QuantizedLinear(
          layer, bits=bits, group=_group(layer.in_features)
        )
      if isinstance(layer, nnx.Embed):
        layer.embedding = loaded(
          (*path, "embedding"), layer.embedding, jnp.float32
        )
        return nnx.QuantizedEmbed(layer, bits=8, group=_group(layer.features))
      return layer

    model = nnx.recursive_map(packed, model)
  flat = []
  for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    flat.append((path, loaded(path, param, param.dtype)))
  nnx.update(model, nnx.from_flat_state(flat))
  return model


def _group(size: int) -> int | None:
  return _GROUP if size % _GROUP == 0 else None


def _names(path: tuple[Any, ...]) -> list[str]:
  """Returns the names of the tensors of a Param."""
  *module, last, kind = path
  return [
    ".".join(map(str, (*module, part, _SUFFIXES[kind])))
    for part in JOINED.get(last, (last,))
  ]


def _columns(name: str, all_columns: int, config: config_lib.Config) -> int:
  """Returns how many columns of a Param are those of one of its tensors."""
  return {
    "q_proj": config.heads * config.head_dim,
    "k_proj": config.kv_heads * config.head_dim,
    "v_proj": config.kv_heads * config.head_dim,
    "gate_proj": config.hidden,
    "up_proj": config.hidden,
  }.get(name.split(".")[-2], all_columns)


def _joined(parts: list[np.ndarray], config: config_lib.Config) -> np.ndarray:
  """Puts columns side by side: by head of keys, or one by one of an MLP.

  So what belongs together stays so where columns are split over devices.
  """
  rows = parts[0].shape[:-1]
  units = config.kv_heads if len(parts) == 3 else config.hidden
  together = [part.reshape(*rows, units, -1) for part in parts]
  return np.concatenate(together, -1).reshape(*rows, -1)


def _as_param(
  kind: str, value: np.ndarray, config: config_lib.Config
) -> np.ndarray:
  if kind == "kernel":  # which has the outputs last
    return np.ascontiguousarray(value.T)
  if kind == "scale":
    return value + np.asarray(config.norm_offset, value.dtype)
  return value


def _check_names(wanted: set[str], checkpoint: Checkpoint) -> None:
  missing = wanted - checkpoint.names
  spare = {
    name for name in checkpoint.names - wanted if _DERIVED not in name
  } - ({"lm_head.weight"} if checkpoint.config.tied else set())
  if missing or spare:
    raise ValueError(
      "A checkpoint must have the weights of its model, but"
      f" {len(missing)} are missing ({_some(missing)}) and {len(spare)} are"
      f" left over ({_some(spare)})."
    )


def _some(names: set[str]) -> str:
  return ", ".join(f"`{name}`" for name in sorted(names)[:3]) or "none"
