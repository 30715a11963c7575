"""Programs of models, exported in one process and run in another.

  python programs.py write FOLDER
  python programs.py serve FOLDER

The other process makes its models anew, and traces none of the programs.
"""

import functools
import os
import pathlib
import pickle
import sys
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

# The device count is read when jax is imported.
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import nnx

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4)


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "m"))
    self.hidden = nnx.Linear(4, 8, kernel_init=init, rngs=rngs)
    self.norm = nnx.BatchNorm(8, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

  def __call__(self, x):
    x = self.drop(self.norm(self.hidden(x)))
    for block in self.blocks:
      x = block(x)
    return x


class Decoder(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(50, 32, rngs=rngs)
    self.attend = nnx.MultiHeadAttention(
      4, 32, num_kv_heads=2, decode=True, rngs=rngs
    )
    self.attend.init_cache((2, 16, 32))

  def __call__(self, tokens):
    x = self.embed(tokens)
    return self.embed.attend(x + self.attend(x))


class Counter(nnx.Variable):
  """A kind of Variable that a user has made."""


def mesh() -> jax.sharding.Mesh:
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((4,), ("d",), axis_types=auto)


def net() -> Net:
  return Net(nnx.Rngs(0))


def evaluated() -> Net:
  model = net()
  model.eval()
  return model


def decoder() -> Decoder:
  return Decoder(nnx.Rngs(1))


def trained() -> tuple[Net, nnx.Optimizer]:
  model = net()
  return model, nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
  optimizer.update(model, grads)
  return loss


@nnx.jit
def forward(model, x):
  return model(x)


@nnx.jit(donate_argnames="model")
def decode(model, tokens):
  return model(tokens)


@functools.partial(
  nnx.jit,
  in_shardings=(NamedSharding(mesh(), P()), NamedSharding(mesh(), P("d"))),
  static_argnames="scale",
)
def sharded_forward(model, x, scale):
  return scale * model(x)


def with_state(fun, make) -> tuple[Any, Any]:
  """Makes a pure function of a State, and the State."""
  graphdef, state = nnx.split(make())

  def pure(state, *args):
    model = nnx.merge(graphdef, state)
    nodes = model if isinstance(model, tuple) else (model,)
    out = fun(*nodes, *args)
    return out, nnx.state(model)

  return pure, state


def exports() -> dict[str, tuple[Any, Any]]:
  """Returns functions and their arguments."""
  graphdef, state = nnx.split(net())
  tokens = jnp.array([[3], [7]])
  train, train_state = with_state(train_step, trained)
  decode_step, cache = with_state(decode, decoder)

  def with_graphdef(graphdef, state, x):
    model = nnx.merge(graphdef, state)
    return model(x), nnx.split(model)

  def flat(leaves, x):
    model = nnx.merge(graphdef, nnx.from_flat_state(leaves))
    return model(x), nnx.to_flat_state(nnx.state(model))

  def packed(packed, x):
    return nnx.merge(packed)(x), packed

  def variables(counter, param):
    counter.value += 1
    return counter, nnx.Param(param.value * 2, tag="new")

  return {
    "train": (train, (train_state, X)),
    "decode": (decode_step, (cache, tokens)),
    "graphdef": (with_graphdef, (graphdef, state, X)),
    "flat": (flat, (nnx.to_flat_state(state), X)),
    "packed": (packed, (nnx.unpack(net()), X)),
    "module": (lambda model, x: model(x), (evaluated(), X)),
    "variables": (
      variables,
      (Counter(jnp.zeros(())), nnx.Param(jnp.ones(3), tag=("a", 1))),
    ),
  }


def compiled() -> dict[str, tuple[Any, Any, Any]]:
  """Returns compiled functions, makers of their models and other arguments."""
  placed = jax.device_put(X, NamedSharding(mesh(), P("d")))
  tokens = jnp.array([[3], [7]])
  return {
    "forward": (forward, net, (X,), {}),
    "decode": (decode, decoder, (tokens,), {}),
    "sharded": (sharded_forward, net, (placed,), {"scale": 2.0}),
  }


def numbers(tree: Any) -> list[np.ndarray]:
  """Returns the numbers of a tree, those behind keys of random numbers too."""
  leaves = []
  for leaf in jax.tree.leaves(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    leaves.append(np.asarray(leaf))
  return leaves


def write(folder: pathlib.Path) -> None:
  for name, (fun, args) in exports().items():
    fun = jax.jit(fun)
    (folder / f"{name}.exported").write_bytes(
      export.export(fun)(*args).serialize()
    )
    expected = numbers(fun(*args))
    (folder / f"{name}.expected").write_bytes(pickle.dumps(expected))
  for name, (fun, make, args, options) in compiled().items():
    aot = fun.lower(make(), *args, **options).compile()
    (folder / f"{name}.compiled").write_bytes(pickle.dumps(aot))
  aot = nnx.jit_partial(forward, net()).lower(X).compile()
  (folder / "partial.compiled").write_bytes(pickle.dumps(aot))


def serve(folder: pathlib.Path) -> None:
  nnx.kernels.register()
  for name, (_, args) in exports().items():
    program = export.deserialize((folder / f"{name}.exported").read_bytes())
    out = program.call(*args)
    expected = pickle.loads((folder / f"{name}.expected").read_bytes())
    for a, b in zip(numbers(out), expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    if name == "train":
      assert isinstance(out[1], nnx.State)
    if name == "graphdef":
      assert out[1][0] == args[0]
    if name == "variables":
      counter, param = out
      assert type(counter) is Counter and param.tag == "new"
    print(name, "is right")
  for name, (fun, make, args, options) in compiled().items():
    program = pickle.loads((folder / f"{name}.compiled").read_bytes())
    model, other = make(), make()
    out, want = program(model, *args, **options), fun(other, *args, **options)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(numbers(model), numbers(other), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    print("compiled", name, "is right")
  program = pickle.loads((folder / "partial.compiled").read_bytes())
  np.testing.assert_allclose(program(X), forward(net(), X), rtol=1e-5)
  try:
    program(X, X)
  except ValueError as error:
    assert "of the structure" in str(error)
  else:
    raise AssertionError


if __name__ == "__main__":
  # The classes must have names that another process knows as well.
  from tests.nnx.export import programs

  mode, where = sys.argv[1:]
  getattr(programs, mode)(pathlib.Path(where))
