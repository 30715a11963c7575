"""jit."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from nnx.graph import _engine
from nnx.transforms import lift


class JitWrapped(_engine.JitFunction):
  """A function compiled by `nnx.jit`."""


def jit(fun: Callable[..., Any]) -> Any:
  def make_entry(structure, leaves, names):
    del leaves
    return jax.jit(lift.Lifted(fun, structure, names)), None

  wrapped = JitWrapped(make_entry, jnp.copy, frozenset())
  return functools.update_wrapper(wrapped, fun)
