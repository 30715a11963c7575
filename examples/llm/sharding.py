"""A model and its pool over several devices.

Each device has some of the heads and of the MLP's features, and so of every
weight and of every token's keys and values. XLA adds up what they compute.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from examples.llm import model as model_lib
import nnx

_AXIS = "model"
# Which axis of a kernel is split; norms and embeddings are on every device.
_SPLIT = {
  "qkv_proj": 1,
  "o_proj": 0,
  "gate_up_proj": 1,
  "down_proj": 0,
}


def shard(
  model: model_lib.Model, cache: model_lib.KVCache, devices: int
) -> None:
  """Puts a model and a cache on several devices, in place.

  Args:
    model: of one device.
    cache: of the model.
    devices: how many, a divisor of the numbers of heads of keys and of features
      of the MLP.

  Raises:
    ValueError: if there are fewer, or they divide what must be divided.
  """
  config = model.config
  if devices > jax.device_count():
    raise ValueError(
      f"`devices` must be at most {jax.device_count()}, but got {devices}."
    )
  if config.kv_heads % devices or config.hidden % devices:
    raise ValueError(
      f"`devices` must divide the {config.kv_heads} heads of keys and the"
      f" {config.hidden} features of the MLP, but got {devices}."
    )
  mesh = jax.sharding.Mesh(jax.devices()[:devices], (_AXIS,))

  heads = PartitionSpec(None, None, _AXIS, None)
  for module, spec in ((model, _spec), (cache, lambda path: heads)):
    flat = []
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
      sharding = NamedSharding(mesh, spec(path))
      flat.append((path, leaf.replace(jax.device_put(leaf[...], sharding))))
    nnx.update(module, nnx.from_flat_state(flat))


def _spec(path: tuple[Any, ...]) -> PartitionSpec:
  axis = _SPLIT.get(path[-2])
  if axis is None:
    return PartitionSpec()
  if path[-1] == "bias":  # of the outputs
    return PartitionSpec(_AXIS) if axis == 1 else PartitionSpec()
  return PartitionSpec(*(_AXIS if i == axis else None for i in range(2)))
