"""Exported programs that are kept: how they are made, and how they are run.

    PYTHONPATH=. JAX_PLATFORMS=cpu python tests/golden/exported.py make NAME

writes `tests/golden/NAME.npz`: artifacts of `jax.export`, with their arguments
and with what NumPy says that they return. Files are added and never made again:
they are what users have on their disks. With `run NAME`, this file runs a file
in a process that has traced none of it.
"""

from collections.abc import Callable, Iterator
import os
import pathlib
import sys
from typing import Any, NamedTuple

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

# The device count is read when jax is imported.
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import kernels

FOLDER = pathlib.Path(__file__).parent


class Program(NamedTuple):
  """A program to export.

  Attributes:
    name: Of it.
    fn: It.
    args: Its arguments.
    want: What it returns, from NumPy.
    split: Over how many devices its arguments are split, along their first
      axes.
  """

  name: str
  fn: Callable[..., Any]
  args: tuple[Any, ...]
  want: Any
  split: int = 1


def programs_of_kernels() -> Iterator[Program]:
  """Yields a program for each handler, and some that the compiler splits."""
  from kernels import batch_stat, decode_attention, kv_cache
  from tests.kernels.decode_attention import oracle as attention_oracle
  from tests.kernels.kv_cache import oracle as cache_oracle
  from tests.testing import oracles

  rng = np.random.default_rng(0)

  def random(*shape):
    return rng.normal(size=shape).astype(np.float32)

  x, dy = random(2, 8, 6, 3)
  scale, bias, mean = random(3, 3)
  var = random(3) ** 2

  def averages(x, mean, var):
    batch = oracles.batch_norm(x)
    return (
      0.9 * mean + 0.1 * batch.mean,
      0.9 * var + 0.1 * batch.var,
      batch.mean,
      batch.var,
    )

  def update(x, mean, var):
    return tuple(batch_stat.update(x, mean, var, 0.9, implementation="cpu"))

  def train(x, dy, scale, bias):
    def loss(x, scale, bias):
      out = batch_stat.batch_norm(
        x, scale, bias, bias, scale, activation="relu", implementation="cpu"
      )
      return jnp.vdot(out.y, dy)

    return jax.grad(loss, (0, 1, 2))(x, scale, bias)

  def moments(x):
    def part(x):
      out = batch_stat.batch_norm(
        x, scale, bias, mean, var, axis_name="d", implementation="cpu"
      )
      return out.y

    return jax.shard_map(
      part, mesh=_mesh(4), in_specs=P("d"), out_specs=P("d")
    )(x)

  grads = oracles.batch_norm_grad(x, dy, scale, bias, relu=True)
  yield Program("update", update, (x, mean, var), averages(x, mean, var))
  yield Program("train", train, (x, dy, scale, bias), tuple(grads))
  split = x.reshape(4, 12, 3)
  want = averages(split, mean, var)
  yield Program("update_split", update, (split, mean, var), want, split=4)
  want = oracles.batch_norm(split, scale, bias).y
  yield Program("moments", moments, (split,), want, split=4)

  k, v = random(2, 4, 16, 2, 4)
  q = random(4, 1, 4, 4)
  new_k, new_v = random(2, 4, 1, 2, 4)
  index = np.array([3, 9, 14, 6], np.int32)
  ones = np.ones(4, int)

  def write(*args):
    return kv_cache.update(*args, implementation="cpu")

  def append(*args):
    return decode_attention.decode_attention(
      *args, window=8, implementation="cpu"
    )

  def attend(*args):
    return decode_attention.attend(*args, softcap=20.0, implementation="cpu")

  rows = (k, v, new_k, new_v, index)
  caches = tuple(cache_oracle.update(*rows))
  yield Program("write", write, rows, caches)
  out = attention_oracle.attend(*caches, q, index, ones, window=8)[0]
  args = (k, v, q, new_k, new_v, index)
  yield Program("append", append, args, (*caches, out))
  yield Program("append_split", append, args, (*caches, out), split=4)
  out = attention_oracle.attend(k, v, q, index - 1, ones, softcap=20.0)[0]
  yield Program("attend", attend, (k, v, q, index), out)

  small = (rng.integers(-9, 9, k.shape).astype(np.int8),) * 2
  scales = {"k_scale": 0.05, "v_scale": 0.1}
  rows = (*small, new_k, new_v, index + 16)

  def write_ring(*args):
    return kv_cache.update(*args, ring=True, implementation="cpu", **scales)

  want = tuple(cache_oracle.update(*rows, ring=True, **scales))
  yield Program("write_ring_int8", write_ring, rows, want)


def programs_of_matmul() -> Iterator[Program]:
  """Yields a program for each way in which weights are given."""
  rng = np.random.default_rng(2)
  x = rng.normal(size=(3, 64)).astype(np.float32)
  w = rng.normal(size=(64, 40)).astype(np.float32)
  bias = rng.normal(size=40).astype(np.float32)
  want = x.astype(np.float64) @ w + bias

  def product(*args, **options):
    return kernels.matmul(*args, implementation="cpu", **options)

  def transposed(*args):
    return product(*args, transposed=True)

  yield Program("product", product, (x, w, bias), want)
  yield Program("transposed", transposed, (x, w.T, bias), want)
  for bits in (8, 4):
    packed = kernels.matmul.quantize(w, bits, group=32)
    unpacked = np.asarray(kernels.matmul.dequantize(packed), np.float64)

    # NumPy's files hold no bfloat16: the weights are constants.
    def product_of_packed(x, bias, packed=packed):
      return product(x, packed, bias)

    want = x.astype(np.float64) @ unpacked + bias
    yield Program(f"packed_{bits}", product_of_packed, (x, bias), want)


def programs_of_nnx() -> Iterator[Program]:
  """Yields programs with States and Variables in their trees."""
  import nnx
  from tests.testing import oracles

  rng = np.random.default_rng(1)
  x = rng.normal(size=(16, 4)).astype(np.float32)

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.layers = [nnx.Linear(4, 4, rngs=rngs) for _ in range(2)]
      self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
      for layer in self.layers:
        x = layer(x)
      return self.norm(x)

  graphdef, state = nnx.split(Net(nnx.Rngs(0)))

  def train(state, x):
    model = nnx.merge(graphdef, state)
    y = model(x)
    return y, nnx.state(model)

  y = x.astype(np.float64)
  for layer in state["layers"].values():
    y = y @ np.asarray(layer["kernel"].value) + np.asarray(layer["bias"].value)
  y = oracles.batch_norm(y)
  after = jax.tree.map(np.asarray, state)
  after["norm"]["mean"].value = (0.01 * y.mean).astype(np.float32)
  after["norm"]["var"].value = (0.99 + 0.01 * y.var).astype(np.float32)
  yield Program("train", train, (state, x), (y.y, after))

  param = nnx.Param(x, tag=("a", 1), sharding_names=("b", None))

  def variables(param, flat):
    return nnx.BatchStat(2 * param.value), flat

  flat = nnx.to_flat_state(state)
  yield Program("variables", variables, (param, flat), (2 * x, flat))


def _mesh(count: int) -> jax.sharding.Mesh:
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((count,), ("d",), axis_types=auto)


def _place(leaves: list[Any], count: int) -> list[Any]:
  """Splits arrays along their first axes, where these are long enough."""
  if count == 1:
    return leaves
  mesh = _mesh(count)
  return [
    jax.device_put(
      leaf,
      NamedSharding(
        mesh, P("d") if leaf.ndim and leaf.shape[0] == count else P()
      ),
    )
    for leaf in map(jnp.asarray, leaves)
  ]


def make(name: str, programs: Iterator[Program]) -> None:
  """Writes a file of artifacts; refuses to write one again."""
  # Files of whoever runs this are nobody's business.
  jax.config.update("jax_traceback_in_locations_limit", 0)
  contents: dict[str, Any] = {}
  for program in programs:
    leaves, tree = jax.tree.flatten(program.args)
    args = jax.tree.unflatten(tree, _place(leaves, program.split))
    exported = jax.export.export(jax.jit(program.fn))(*args)
    blob = np.frombuffer(exported.serialize(), np.uint8)
    contents[f"{program.name}/artifact"] = blob
    contents[f"{program.name}/split"] = np.int32(program.split)
    for i, leaf in enumerate(leaves):
      contents[f"{program.name}/args/{i}"] = np.asarray(leaf)
    for i, leaf in enumerate(jax.tree.leaves(program.want)):
      contents[f"{program.name}/want/{i}"] = np.asarray(leaf)
  with (FOLDER / f"{name}.npz").open("xb") as file:
    np.savez_compressed(file, **contents)


def run(name: str) -> None:
  """Runs the artifacts of a file and compares; raises if one is wrong."""
  kernels.register()
  contents = np.load(FOLDER / f"{name}.npz")
  programs = dict.fromkeys(key.split("/")[0] for key in contents)

  def several(program, what):
    count = sum(key.startswith(f"{program}/{what}/") for key in contents)
    return [contents[f"{program}/{what}/{i}"] for i in range(count)]

  for program in programs:
    blob = bytearray(contents[f"{program}/artifact"].tobytes())
    exported = jax.export.deserialize(blob)
    split = int(contents[f"{program}/split"])
    leaves = _place(several(program, "args"), split)
    args, kwargs = jax.tree.unflatten(exported.in_tree, leaves)
    got = jax.tree.leaves(exported.call(*args, **kwargs))
    for a, b in zip(got, several(program, "want"), strict=True):
      np.testing.assert_allclose(
        np.asarray(a), b, rtol=1e-4, atol=1e-5, err_msg=program
      )
    print(program, "is right")


# By what a file's name has before its number.
_PROGRAMS = {
  "kernels": programs_of_kernels,
  "matmul": programs_of_matmul,
  "nnx": programs_of_nnx,
}


if __name__ == "__main__":
  mode, file_name = sys.argv[1:]
  kind = file_name.partition("_")[0]
  if kind == "nnx":
    import nnx  # noqa: F401, which makes its types known to jax
  if mode == "make":
    make(file_name, _PROGRAMS[kind]())
  else:
    run(file_name)
