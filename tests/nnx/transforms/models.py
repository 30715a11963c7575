"""Modules, and a function that counts its traces, for the tests of nnx.jit."""

import jax.numpy as jnp

import nnx


class Dense(nnx.Module):
  def __init__(self, size=3):
    self.kernel = nnx.Param(jnp.ones((2, size)))
    self.bias = nnx.Param(jnp.zeros(size))
    self.size = size

  def __call__(self, x):
    return x @ self.kernel + self.bias


class Tower(nnx.Module):
  def __init__(self):
    self.layers = [Dense(), Dense()]
    self.tied = self.layers[0].kernel
    self.config = {"depth": 2, "names": ["a", "b"]}
    self.root = self


class Traced:
  """A function that counts how often it is traced."""

  def __init__(self, fun):
    self.fun = fun
    self.count = 0

  def __call__(self, *args, **kwargs):
    self.count += 1
    return self.fun(*args, **kwargs)
