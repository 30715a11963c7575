"""Builds the rows of suite `graph` that need no model."""

from collections.abc import Callable
import os
import subprocess
import sys
from typing import Any

import jax
from jax import numpy as jnp

from tools.bench import graph_models, harness, models


def _micro_side(
  name: str,
  state: Any,
  once: Callable[[Any], None],
  observe: Callable[[Any], Any],
) -> harness.Side:
  """Makes a side of an access so short that a call to it would show.

  Args:
    name: the side's name.
    state: what `once` works on.
    once: does all of the row's accesses in a loop of its own.
    observe: what to compare after `once`.
  """

  def loop(state: Any, count: int) -> None:
    for _ in range(count):
      once(state)

  return harness.Side(
    name=name,
    fresh=lambda: state,
    call=once,
    loop=loop,
    observe=lambda state, _: observe(state),
  )


def _build_var_read(count: int) -> harness.Comparison:
  """Builds the row of `variable[...]`, once for each Variable."""

  def make(library: models.Library, name: str) -> harness.Side:
    def read(variables: list[Any]) -> None:
      for variable in variables:
        variable[...]

    return _micro_side(
      f"{name} variable[...]",
      [library.Param(jnp.ones(4)) for _ in range(count)],
      read,
      lambda variables: [variable[...] for variable in variables],
    )

  return models.comparison(make, clock=harness.THREAD_CPU)


def _build_var_write(count: int) -> harness.Comparison:
  """Builds the row of `variable[...] = array`, once for each Variable."""
  array = jnp.full(4, 2.0)

  def make(library: models.Library, name: str) -> harness.Side:
    def write(variables: list[Any]) -> None:
      for variable in variables:
        variable[...] = array

    return _micro_side(
      f"{name} variable[...] = a",
      [library.Param(jnp.ones(4)) for _ in range(count)],
      write,
      lambda variables: [variable[...] for variable in variables],
    )

  return models.comparison(make, clock=harness.THREAD_CPU)


def _build_param_new(count: int) -> harness.Comparison:
  """Builds the row of `nnx.Param(array)`, so many times."""
  array = jnp.ones(4)

  def make(library: models.Library, name: str) -> harness.Side:
    def create(param_type: Any) -> None:
      for _ in range(count):
        param_type(array)

    return _micro_side(
      f"{name}.Param(a)",
      library.Param,
      create,
      lambda param_type: param_type(array)[...],
    )

  return models.comparison(make, clock=harness.THREAD_CPU)


def _build_setattr(count: int) -> harness.Comparison:
  """Builds the row of `module.x = 1`, so many times."""

  def make(library: models.Library, name: str) -> harness.Side:
    def write(module: Any) -> None:
      for _ in range(count):
        module.x = 1

    return _micro_side(
      f"{name} module.x = 1",
      graph_models.make_blocks(library, 10),
      write,
      lambda module: module.x,
    )

  return models.comparison(make, clock=harness.THREAD_CPU)


def _build_rngs_params(count: int) -> harness.Comparison:
  """Builds the row of `rngs.params()`, so many times."""

  def make(library: models.Library, name: str) -> harness.Side:
    def draw(rngs: Any) -> None:
      for _ in range(count):
        rngs.params()

    # A fresh stream each time, so that both sides are compared at one count.
    return harness.Side(
      name=f"{name} rngs.params()",
      fresh=lambda: library.Rngs(0, params=1),
      call=draw,
      observe=lambda rngs, _: jax.random.key_data(rngs.params()),
    )

  return models.comparison(make, clock=harness.THREAD_CPU)


_IMPORT = """
import time
start = time.thread_time()
import {module}
print(time.thread_time() - start)
"""


def _import_seconds(module: str) -> float:
  """Returns the CPU time of `import module` in a new interpreter."""
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
  done = subprocess.run(
    [sys.executable, "-c", _IMPORT.format(module=module)],
    env=environment,
    capture_output=True,
    check=False,
    text=True,
  )
  if done.returncode != 0:
    raise RuntimeError(f"`import {module}` must succeed, but: {done.stderr}")
  return float(done.stdout)


def build_import_time() -> harness.Comparison:
  """Builds the row of `import nnx`, with `import jax` as the floor."""

  def side(module: str) -> harness.Side:
    return harness.Side(
      name=f"import {module}",
      fresh=lambda: None,
      call=lambda state: state,
      stopwatch=lambda _: _import_seconds(module),
    )

  return harness.Comparison(
    ours=side("nnx"),
    baselines=[side("flax.nnx")],
    floor_side=side("jax"),
    floor_name="import jax",
    clock=harness.THREAD_CPU,
  )


# By op: builds the row of so many accesses.
OPS: dict[str, Callable[[int], harness.Comparison]] = {
  "var_read": _build_var_read,
  "var_write": _build_var_write,
  "param_new": _build_param_new,
  "setattr": _build_setattr,
  "rngs_params": _build_rngs_params,
}
