"""The registry of programs with hijax Variables and mutable arrays.

Each takes the module that is to be `nnx`, and returns what can be compared.
"""

# The programs are those of users, who name what they make once and let be.

import functools

import jax
import pytest

from nnx.engine import boxes

# Later versions of jax have no mutable types, and Flax for them no such
# Variables.
needs_mutable_types = pytest.mark.skipif(
  not boxes.CHANGES_STRUCTURE, reason="this jax has no mutable types"
)


class Cases(dict):
  """Programs by name; its methods are decorators that add one."""

  def add(self, f):
    self[f.__name__] = f
    return f

  def in_modes(self, f, name=None, **options):
    for graph, updates in ((True, True), (True, False), (False, False)):
      mode = "tree" if not graph else "graph" if updates else "values"
      self[f"{name or f.__name__}_{mode}"] = functools.partial(
        f, **options, graph=graph, graph_updates=updates
      )
    return f

  def either_in_modes(self, f):
    """For both kinds of Variables; `nnx_...` are the hijax ones."""
    name = f.__name__.removeprefix("either_")
    self.in_modes(f, f"nnx_{name}", kind="hijax")
    self.in_modes(f, f"ref_{name}", kind="ref")
    return f


# What programs do with a Variable that they are given or close over.


def add(v):
  v[...] += 1


def subtract(v):
  v[...] -= 1


def add_and_read(v):
  v[...] += 1
  return v[...]


def add_each(v):
  """Makes the body of a scan that closes over a Variable."""

  def body(c, x):
    v[...] += x
    return c, v[...]

  return body


def sum_loss(x, v):
  v[...] = jax.lax.stop_gradient(x * 2)
  return x**2 + v[...]
