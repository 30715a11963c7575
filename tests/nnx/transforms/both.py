"""Runs one program with `nnx` and with `flax.nnx`, and compares the results."""

import os

# Before jax makes its backend, which the tests' first array does.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from collections.abc import Callable, Mapping
import functools
import types
from typing import Any

from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx


@functools.cache
def models(lib: types.ModuleType) -> types.SimpleNamespace:
  """The same classes on one of the libraries."""

  class Dense(lib.Module):
    """A layer with parameters, statistics, a counter and a static attribute."""

    def __init__(self, size: int = 3, seed: int = 0):
      key = jax.random.key(seed)
      self.kernel = lib.Param(jax.random.normal(key, (size, size)))
      self.bias = lib.Param(jnp.linspace(0.0, 1.0, size))
      self.mean = lib.BatchStat(jnp.zeros(size))
      self.calls = lib.Variable(jnp.array(0))
      self.size = size

    def __call__(self, x):
      y = jnp.tanh(x @ self.kernel[...] + self.bias[...])
      self.mean[...] = 0.9 * self.mean[...] + 0.1 * y
      self.calls[...] += 1
      return y

  class Tied(lib.Module):
    """Two layers that share a Variable, and one layer in two places."""

    def __init__(self):
      self.first = Dense(seed=1)
      self.second = Dense(seed=2)
      self.second.bias = self.first.bias
      self.again = self.first

    def __call__(self, x):
      return self.again(self.second(self.first(x)))

  class Stack(lib.Module):
    """Layers stacked on a leading axis, and a count that is not."""

    def __init__(self, layers: int = 4, size: int = 3):
      key = jax.random.key(3)
      self.w = lib.Param(jax.random.normal(key, (layers, size, size)))
      self.mean = lib.BatchStat(jnp.zeros((layers, size)))
      self.calls = lib.Variable(jnp.array(0))

    def __call__(self, x):
      y = jnp.tanh(x @ self.w[...])
      self.mean[...] = 0.5 * self.mean[...] + y
      self.calls[...] += 1
      return y

  return types.SimpleNamespace(Dense=Dense, Tied=Tied, Stack=Stack)


def plain(lib: types.ModuleType, value: Any) -> Any:
  """A value as nested dicts and tuples of arrays."""
  if isinstance(value, lib.State):
    return plain(lib, lib.to_pure_dict(value))
  if isinstance(value, lib.Variable):
    return plain(lib, value.get_value())
  if isinstance(value, lib.Module):
    return plain(lib, lib.state(value))
  if isinstance(value, Mapping):
    return {str(k): plain(lib, v) for k, v in value.items()}
  if isinstance(value, (tuple, list)):
    return tuple(plain(lib, item) for item in value)
  if hasattr(value, "dtype") and jnp.issubdtype(
    value.dtype, jax.dtypes.prng_key
  ):
    return np.asarray(jax.random.key_data(value))
  return value


def same(program: Callable[[types.ModuleType], Any]) -> Any:
  """Runs a program with both libraries and compares what it returns.

  Returns:
    What it returned with `nnx`.
  """
  ours = plain(nnx, program(nnx))
  theirs = plain(flax_nnx, program(flax_nnx))
  assert_same(ours, theirs)
  return ours


def assert_same(ours: Any, theirs: Any) -> None:
  """Compares nested dicts and tuples of arrays."""
  one, two = jax.tree.structure(ours), jax.tree.structure(theirs)
  assert one == two, f"\n{one}\n{two}"
  for (path, a), b in zip(
    jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs)
  ):
    if not hasattr(a, "shape") and not isinstance(a, (int, float)):
      assert a == b, (path, a, b)
      continue
    np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol=2e-5, atol=1e-5, err_msg=str(path)
    )
    assert np.shape(a) == np.shape(b), (path, np.shape(a), np.shape(b))
