"""Suite `graph`: what the object graph costs in Python, against flax.nnx.

Both sides run the same program on the same model, made with `nnx` and with
`flax.nnx`; times are CPU time of the calling thread. The numbered cases are
models of that many Variables (or that many accesses); `real_layers` has its
static attributes, dtypes, initialisers and RNG streams where real layers have
them. The floor of the `jit` rows is `jax.jit` on the flat tuple of arrays.
"""

from collections.abc import Callable, Sequence
import functools
import os
import subprocess
import sys
from typing import Any

from flax import nnx as flax_nnx
import jax
from jax import numpy as jnp

import nnx
from tools.bench import graph_models, harness

NAME = "graph"
_SIZES = (10, 100, 1000)
_QUICK_SIZES = (100,)
_LAYER_COUNT = 45  # 991 Variables

# `nnx` or `flax.nnx`: the programs below use only what both have.
Library = Any
MakeModel = Callable[[Library], Any]
_LIBRARIES: tuple[tuple[str, Library], ...] = (
  ("nnx", nnx),
  ("flax.nnx", flax_nnx),
)


def _values(library: Library, state: Any) -> dict[str, Any]:
  """Returns the arrays of a State by path, to compare the two libraries."""
  return {
    "/".join(map(str, path)): leaf[...] if hasattr(leaf, "get_value") else leaf
    for path, leaf in library.to_flat_state(state)
  }


def _model_values(library: Library, model: Any) -> dict[str, Any]:
  # RNG keys are compared as plain numbers.
  values = _values(library, library.state(model))
  return {
    path: jax.random.key_data(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    else value
    for path, value in values.items()
  }


def _compare(
  make: Callable[[Library, str], harness.Side],
  floor_side: harness.Side | None = None,
) -> harness.Comparison:
  """Makes the same side with both libraries."""
  ours, theirs = (make(library, name) for name, library in _LIBRARIES)
  return harness.Comparison(
    ours=ours,
    baselines=[theirs],
    floor_side=floor_side,
    floor_name="jax.jit on the flat tuple" if floor_side else "",
    clock=harness.THREAD_CPU,
  )


def _floats(model: Any, library: Library) -> tuple[jax.Array, ...]:
  return tuple(jax.tree.leaves(library.state(model, graph_models.is_float)))


def _build_jit_noop(make_model: MakeModel) -> harness.Comparison:
  """`nnx.jit` of a body that touches nothing."""

  def make(library: Library, name: str) -> harness.Side:
    model = make_model(library)

    @library.jit
    def step(model):
      del model

    return harness.Side(
      name=f"{name}.jit",
      fresh=lambda: model,
      call=step,
      observe=lambda state, _: _model_values(library, state),
    )

  arrays = tuple(jax.tree.leaves(flax_nnx.state(make_model(flax_nnx))))

  @jax.jit
  def flat_step(arrays):
    del arrays

  floor = harness.Side(
    name="flat jax.jit", fresh=lambda: arrays, call=flat_step
  )
  return _compare(make, floor)


def _build_jit_write_all(make_model: MakeModel) -> harness.Comparison:
  """`nnx.jit` of a body that writes every floating-point Variable."""

  def make(library: Library, name: str) -> harness.Side:
    model = make_model(library)

    @library.jit
    def step(model):
      for variable in graph_models.float_variables(library, model):
        variable[...] = variable[...] + 1

    def fresh() -> Any:
      # Written values stay small enough for exact sums in float32.
      for variable in graph_models.float_variables(library, model):
        variable[...] = jnp.zeros_like(variable[...])
      return model

    return harness.Side(
      name=f"{name}.jit",
      fresh=fresh,
      call=step,
      observe=lambda state, _: _model_values(library, state),
    )

  arrays = _floats(make_model(flax_nnx), flax_nnx)

  @jax.jit
  def flat_step(arrays):
    return tuple(array + 1 for array in arrays)

  floor = harness.Side(
    name="flat jax.jit",
    fresh=lambda: arrays,
    call=flat_step,
    advance=lambda state, result: result,
  )
  return _compare(make, floor)


def _build_split(make_model: MakeModel) -> harness.Comparison:
  """`nnx.split(model)`."""

  def make(library: Library, name: str) -> harness.Side:
    model = make_model(library)
    return harness.Side(
      name=f"{name}.split",
      fresh=lambda: model,
      call=library.split,
      observe=lambda _, result: (
        _model_values(library, model)
        | {"split": sorted(_values(library, result[1]))}
      ),
    )

  return _compare(make)


def _build_state(make_model: MakeModel) -> harness.Comparison:
  """`nnx.state(model)`."""

  def make(library: Library, name: str) -> harness.Side:
    model = make_model(library)
    return harness.Side(
      name=f"{name}.state",
      fresh=lambda: model,
      call=library.state,
      observe=lambda _, result: sorted(_values(library, result)),
    )

  return _compare(make)


def _build_update(make_model: MakeModel) -> harness.Comparison:
  """`nnx.update(model, state)` with the state of another such model."""

  def make(library: Library, name: str) -> harness.Side:
    model, other = make_model(library), make_model(library)
    for variable in graph_models.float_variables(library, other):
      variable[...] = variable[...] + 3
    state = library.state(other)
    return harness.Side(
      name=f"{name}.update",
      fresh=lambda: model,
      call=lambda model: library.update(model, state),
      observe=lambda model, _: _model_values(library, model),
    )

  return _compare(make)


def _build_merge(make_model: MakeModel) -> harness.Comparison:
  """`nnx.merge(graphdef, state)`."""

  def make(library: Library, name: str) -> harness.Side:
    graphdef, state = library.split(make_model(library))
    return harness.Side(
      name=f"{name}.merge",
      fresh=lambda: (graphdef, state),
      call=lambda pair: library.merge(*pair),
      observe=lambda _, model: _model_values(library, model),
    )

  return _compare(make)


def _build_clone(make_model: MakeModel) -> harness.Comparison:
  """`nnx.clone(model)`."""

  def make(library: Library, name: str) -> harness.Side:
    model = make_model(library)
    return harness.Side(
      name=f"{name}.clone",
      fresh=lambda: model,
      call=library.clone,
      observe=lambda _, copy: _model_values(library, copy),
    )

  return _compare(make)


def _build_tree_flatten(make_model: MakeModel) -> harness.Comparison:
  """`jax.tree.flatten` of a State."""

  def make(library: Library, name: str) -> harness.Side:
    state = library.state(make_model(library))
    return harness.Side(
      name=f"{name}.State, jax.tree.flatten",
      fresh=lambda: state,
      call=jax.tree.flatten,
      observe=lambda _, result: len(result[0]),
    )

  return _compare(make)


def _build_state_filter(make_model: MakeModel) -> harness.Comparison:
  """`nnx.filter_state` by Variable type."""

  def make(library: Library, name: str) -> harness.Side:
    state = library.state(make_model(library))
    return harness.Side(
      name=f"{name}.filter_state",
      fresh=lambda: state,
      call=lambda state: library.filter_state(state, library.Param),
      observe=lambda _, result: sorted(_values(library, result)),
    )

  return _compare(make)


def _build_state_split(make_model: MakeModel) -> harness.Comparison:
  """`nnx.split_state` into parameters and the rest."""

  def make(library: Library, name: str) -> harness.Side:
    state = library.state(make_model(library))
    return harness.Side(
      name=f"{name}.split_state",
      fresh=lambda: state,
      call=lambda state: library.split_state(state, library.Param, ...),
      observe=lambda _, result: [
        sorted(_values(library, part)) for part in result
      ],
    )

  return _compare(make)


def _build_state_merge(make_model: MakeModel) -> harness.Comparison:
  """`nnx.merge_state` of parameters and the rest."""

  def make(library: Library, name: str) -> harness.Side:
    state = library.state(make_model(library))
    parts = library.split_state(state, library.Param, ...)
    return harness.Side(
      name=f"{name}.merge_state",
      fresh=lambda: parts,
      call=lambda parts: library.merge_state(*parts),
      observe=lambda _, result: sorted(_values(library, result)),
    )

  return _compare(make)


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
  """`variable[...]`, once for each Variable."""

  def make(library: Library, name: str) -> harness.Side:
    def read(variables: list[Any]) -> None:
      for variable in variables:
        variable[...]

    return _micro_side(
      f"{name} variable[...]",
      [library.Param(jnp.ones(4)) for _ in range(count)],
      read,
      lambda variables: [variable[...] for variable in variables],
    )

  return _compare(make)


def _build_var_write(count: int) -> harness.Comparison:
  """`variable[...] = array`, once for each Variable."""
  array = jnp.full(4, 2.0)

  def make(library: Library, name: str) -> harness.Side:
    def write(variables: list[Any]) -> None:
      for variable in variables:
        variable[...] = array

    return _micro_side(
      f"{name} variable[...] = a",
      [library.Param(jnp.ones(4)) for _ in range(count)],
      write,
      lambda variables: [variable[...] for variable in variables],
    )

  return _compare(make)


def _build_param_new(count: int) -> harness.Comparison:
  """`nnx.Param(array)`, so many times."""
  array = jnp.ones(4)

  def make(library: Library, name: str) -> harness.Side:
    def create(param_type: Any) -> None:
      for _ in range(count):
        param_type(array)

    return _micro_side(
      f"{name}.Param(a)",
      library.Param,
      create,
      lambda param_type: param_type(array)[...],
    )

  return _compare(make)


def _build_setattr(count: int) -> harness.Comparison:
  """`module.x = 1`, so many times."""

  def make(library: Library, name: str) -> harness.Side:
    def write(module: Any) -> None:
      for _ in range(count):
        module.x = 1

    return _micro_side(
      f"{name} module.x = 1",
      graph_models.make_blocks(library, 10),
      write,
      lambda module: module.x,
    )

  return _compare(make)


def _build_rngs_params(count: int) -> harness.Comparison:
  """`rngs.params()`, so many times."""

  def make(library: Library, name: str) -> harness.Side:
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

  return _compare(make)


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


def _build_import_time() -> harness.Comparison:
  """`import nnx`, with `import jax` as the floor."""

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


_MODEL_OPS = {
  "jit_noop": _build_jit_noop,
  "jit_write_all": _build_jit_write_all,
  "split": _build_split,
  "state": _build_state,
  "update": _build_update,
  "merge": _build_merge,
  "clone": _build_clone,
  "tree_flatten": _build_tree_flatten,
  "state_filter": _build_state_filter,
  "state_split": _build_state_split,
  "state_merge": _build_state_merge,
}
_ACCESS_OPS = {
  "var_read": _build_var_read,
  "var_write": _build_var_write,
  "param_new": _build_param_new,
  "setattr": _build_setattr,
  "rngs_params": _build_rngs_params,
}


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every op at every size, and the time of the import."""
  sizes = _QUICK_SIZES if settings.quick else _SIZES
  models: dict[str, MakeModel] = {
    str(size): functools.partial(graph_models.make_blocks, variables=size)
    for size in sizes
  }
  if not settings.quick:
    models["real_layers"] = functools.partial(
      graph_models.make_real_layers, layers=_LAYER_COUNT
    )
  rows = [
    harness.Case(NAME, op, case, "", functools.partial(build, make_model))
    for op, build in _MODEL_OPS.items()
    for case, make_model in models.items()
  ]
  rows += [
    harness.Case(NAME, op, str(size), "", functools.partial(build, size))
    for op, build in _ACCESS_OPS.items()
    for size in sizes
  ]
  if not settings.quick:
    rows.append(
      harness.Case(NAME, "import_time", "process", "", _build_import_time)
    )
  return rows
