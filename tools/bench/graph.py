"""Suite `graph`: what the object graph costs in Python, against flax.nnx.

Both sides run the same program on the same model, made with `nnx` and with
`flax.nnx`; times are CPU time of the calling thread. Rows that end in `_tree`
are in tree mode, those that end in `_values` in graph mode without updates;
those of `jit` have as another baseline Flax's `jit_partial`, which opens the
model once. The numbered cases are models of that many Variables (or that many
accesses); `real_layers` has its static attributes, dtypes, initialisers and RNG
streams where real layers have them. The floor of the `jit` rows is `jax.jit` on
the flat tuple of arrays.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx as flax_nnx
import jax
from jax import numpy as jnp

from tools.bench import (
  graph_access,
  graph_in_place,
  graph_models,
  harness,
  models,
)

NAME = "graph"
_SIZES = (10, 100, 1000)
_QUICK_SIZES = (100,)
_LAYER_COUNT = 45  # 991 Variables
_ROUND_ROBIN = (60, 150)
_QUICK_ROUND_ROBIN = (10,)

Library = models.Library
MakeModel = Callable[[Library], Any]


def _model_values(library: Library, model: Any) -> dict[str, Any]:
  # RNG keys are compared as plain numbers.
  values = models.arrays(library, library.state(model))
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
  return models.comparison(
    make,
    floor_side=floor_side,
    floor_name="jax.jit on the flat tuple" if floor_side else "",
    clock=harness.THREAD_CPU,
  )


def _floats(model: Any, library: Library) -> tuple[jax.Array, ...]:
  return tuple(jax.tree.leaves(library.state(model, graph_models.is_float)))


def _with_partial(
  comparison: harness.Comparison,
  make_model: MakeModel,
  make: Callable[..., harness.Side],
) -> harness.Comparison:
  """Adds `jit_partial` of `flax.nnx` in the same mode as a baseline."""
  model = make_model(flax_nnx)

  def jit(function: Callable[..., Any], **mode: Any) -> Callable[..., Any]:
    step = flax_nnx.jit_partial(function, model, **mode)
    return lambda _: step()

  side = make(flax_nnx, "flax.nnx", jit=jit, model=model)
  side = dataclasses.replace(side, name="flax.nnx.jit_partial")
  baselines = [*comparison.baselines, side]
  return dataclasses.replace(comparison, baselines=baselines)


def _build_jit_noop(make_model: MakeModel, **mode: bool) -> harness.Comparison:
  """Builds the row of `nnx.jit` of a body that touches nothing."""

  def make(
    library: Library, name: str, jit: Any = None, model: Any = None
  ) -> harness.Side:
    model = model or make_model(library)
    jit = jit or library.jit

    def step(model):
      del model

    return harness.Side(
      name=f"{name}.jit",
      fresh=lambda: model,
      call=jit(step, **mode),
      observe=lambda state, _: _model_values(library, state),
    )

  arrays = tuple(jax.tree.leaves(flax_nnx.state(make_model(flax_nnx))))

  @jax.jit
  def flat_step(arrays):
    del arrays

  floor = harness.Side(
    name="flat jax.jit", fresh=lambda: arrays, call=flat_step
  )
  both = _compare(make, floor)
  return _with_partial(both, make_model, make) if mode else both


def _build_jit_write_all(
  make_model: MakeModel, **mode: bool
) -> harness.Comparison:
  """Builds the row of `nnx.jit` of a body that writes every float Variable."""

  def make(
    library: Library, name: str, jit: Any = None, model: Any = None
  ) -> harness.Side:
    model = model or make_model(library)
    jit = jit or library.jit

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
      call=jit(step, **mode),
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
  both = _compare(make, floor)
  return _with_partial(both, make_model, make) if mode else both


def _build_hijax_write_all(size: int) -> harness.Comparison:
  """Builds the row of `jax.jit` of a body that writes every hijax Variable."""

  def make(library: Library, name: str) -> harness.Side:
    with library.var_defaults(hijax=True):
      model = graph_models.make_blocks(library, size)
    variables = list(graph_models.float_variables(library, model))

    @jax.jit
    def step(model):
      # Of Flax's traced ones no filter knows the dtype.
      for leaf in jax.tree.leaves(model):
        leaf[...] = leaf[...] + 1

    def fresh() -> Any:
      for variable in variables:
        variable[...] = jnp.zeros_like(variable[...])
      return model

    return harness.Side(
      name=f"{name}.hijax",
      fresh=fresh,
      call=step,
      observe=lambda state, _: [variable[...] for variable in variables],
    )

  return _compare(make)


def _build_round_robin(count: int) -> harness.Comparison:
  """Builds the row of one function called with many models in turn.

  They differ in a static number, and each has a compiled program of its own, as
  each value of a static argument of `jax.jit` has.

  Args:
    count: of the models, of ten Variables each.
  """
  # Multiples of a power of two: sums are exact.
  rates = [index / 256 for index in range(1, count + 1)]

  def make(library: Library, name: str) -> harness.Side:
    members = [graph_models.make_blocks(library, 10) for _ in rates]
    for model, rate in zip(members, rates, strict=True):
      model.rate = rate

    @library.jit
    def step(model):
      for variable in graph_models.float_variables(library, model):
        variable[...] = variable[...] + model.rate

    def fresh() -> Any:
      for model in members:
        for variable in graph_models.float_variables(library, model):
          variable[...] = jnp.zeros_like(variable[...])
      return members

    def call(members: list[Any]) -> None:
      for model in members:
        step(model)

    return harness.Side(
      name=f"{name}.jit",
      fresh=fresh,
      call=call,
      observe=lambda members, _: [_floats(model, library) for model in members],
    )

  @functools.partial(jax.jit, static_argnums=0)
  def flat_step(rate, arrays):
    return tuple(array + rate for array in arrays)

  arrays = _floats(graph_models.make_blocks(flax_nnx, 10), flax_nnx)
  zeros = tuple(map(jnp.zeros_like, arrays))
  static = harness.Side(
    name="jax.jit, static argument",
    fresh=lambda: [zeros for _ in rates],
    call=lambda state: [
      flat_step(rate, arrays) for rate, arrays in zip(rates, state, strict=True)
    ],
    advance=lambda _, result: result,
  )
  both = _compare(make)
  return dataclasses.replace(both, baselines=[*both.baselines, static])


def _build_split(make_model: MakeModel, **mode: bool) -> harness.Comparison:
  """Builds the row of `nnx.split(model)`."""

  def make(library: Library, name: str) -> harness.Side:
    model = make_model(library)
    return harness.Side(
      name=f"{name}.split",
      fresh=lambda: model,
      call=functools.partial(library.split, **mode),
      observe=lambda _, result: (
        _model_values(library, model)
        | {"split": sorted(models.arrays(library, result[1]))}
      ),
    )

  return _compare(make)


def _build_state(make_model: MakeModel) -> harness.Comparison:
  """Builds the row of `nnx.state(model)`."""

  def make(library: Library, name: str) -> harness.Side:
    model = make_model(library)
    return harness.Side(
      name=f"{name}.state",
      fresh=lambda: model,
      call=library.state,
      observe=lambda _, result: sorted(models.arrays(library, result)),
    )

  return _compare(make)


def _build_update(make_model: MakeModel) -> harness.Comparison:
  """Builds the row of `nnx.update` with the state of another such model."""

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
  """Builds the row of `nnx.merge(graphdef, state)`."""

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
  """Builds the row of `nnx.clone(model)`."""

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
  """Builds the row of `jax.tree.flatten` of a State."""

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
  """Builds the row of `nnx.filter_state` by Variable type."""

  def make(library: Library, name: str) -> harness.Side:
    state = library.state(make_model(library))
    return harness.Side(
      name=f"{name}.filter_state",
      fresh=lambda: state,
      call=lambda state: library.filter_state(state, library.Param),
      observe=lambda _, result: sorted(models.arrays(library, result)),
    )

  return _compare(make)


def _build_state_split(make_model: MakeModel) -> harness.Comparison:
  """Builds the row of `nnx.split_state` into parameters and the rest."""

  def make(library: Library, name: str) -> harness.Side:
    state = library.state(make_model(library))
    return harness.Side(
      name=f"{name}.split_state",
      fresh=lambda: state,
      call=lambda state: library.split_state(state, library.Param, ...),
      observe=lambda _, result: [
        sorted(models.arrays(library, part)) for part in result
      ],
    )

  return _compare(make)


def _build_state_merge(make_model: MakeModel) -> harness.Comparison:
  """Builds the row of `nnx.merge_state` of parameters and the rest."""

  def make(library: Library, name: str) -> harness.Side:
    state = library.state(make_model(library))
    parts = library.split_state(state, library.Param, ...)
    return harness.Side(
      name=f"{name}.merge_state",
      fresh=lambda: parts,
      call=lambda parts: library.merge_state(*parts),
      observe=lambda _, result: sorted(models.arrays(library, result)),
    )

  return _compare(make)


_MODEL_OPS: dict[str, Callable[[MakeModel], harness.Comparison]] = {
  "jit_noop": _build_jit_noop,
  "jit_write_all": _build_jit_write_all,
  "split": _build_split,
  "jit_noop_tree": functools.partial(_build_jit_noop, graph=False),
  "jit_write_all_tree": functools.partial(_build_jit_write_all, graph=False),
  "split_tree": functools.partial(_build_split, graph=False),
  "jit_noop_values": functools.partial(
    _build_jit_noop, graph=True, graph_updates=False
  ),
  "jit_write_all_values": functools.partial(
    _build_jit_write_all, graph=True, graph_updates=False
  ),
  "state": _build_state,
  "update": _build_update,
  "merge": _build_merge,
  "clone": _build_clone,
  "tree_flatten": _build_tree_flatten,
  "state_filter": _build_state_filter,
  "state_split": _build_state_split,
  "state_merge": _build_state_merge,
}


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every op at every size, and those of another kind."""
  sizes = _QUICK_SIZES if settings.quick else _SIZES
  makers: dict[str, MakeModel] = {
    str(size): functools.partial(graph_models.make_blocks, variables=size)
    for size in sizes
  }
  if not settings.quick:
    makers["real_layers"] = functools.partial(
      graph_models.make_real_layers, layers=_LAYER_COUNT
    )
  rows = [
    harness.Case(NAME, op, case, "", functools.partial(build, make_model))
    for op, build in _MODEL_OPS.items()
    for case, make_model in makers.items()
    # Its head is its embedding: no tree.
    if not (op.endswith("_tree") and case == "real_layers")
  ]
  by_size = {**graph_access.OPS, "hijax_write_all": _build_hijax_write_all}
  rows += [
    harness.Case(NAME, op, str(size), "", functools.partial(build, size))
    for op, build in by_size.items()
    for size in sizes
  ]
  rows += [
    harness.Case(
      NAME,
      "jit_write_large",
      case,
      "",
      functools.partial(graph_in_place.build, case),
    )
    for case in graph_in_place.WRITES
  ]
  rows += [
    harness.Case(
      NAME,
      "jit_round_robin",
      f"{count}_models",
      "",
      functools.partial(_build_round_robin, count),
    )
    for count in (_QUICK_ROUND_ROBIN if settings.quick else _ROUND_ROBIN)
  ]
  if not settings.quick:
    rows.append(
      harness.Case(
        NAME, "import_time", "process", "", graph_access.build_import_time
      )
    )
  return rows
