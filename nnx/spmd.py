"""Sharding of Variables: annotations, and what transforms do to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from nnx import partitioning
from nnx.engine import jax_private
from nnx.graphlib import functional, leaves
from nnx.partitioning import (
  composite_rules,
  get_logical_axis_rules,
  logical_axis_rules,
  set_logical_axis_rules,
)
from nnx.variablelib import Variable, with_metadata

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])

PARTITION_NAME = "partition_name"

__all__ = [
  "PARTITION_NAME",
  "abstract_with_sharding",
  "add_axis",
  "as_abstract",
  "composite_rules",
  "get_abstract_model",
  "get_logical_axis_rules",
  "get_named_sharding",
  "get_partition_spec",
  "get_var_pspec",
  "logical_axis_rules",
  "remove_axis",
  "set_logical_axis_rules",
  "with_partitioning",
  "with_sharding_constraint",
]


def _is_variable(value: Any) -> bool:
  return isinstance(value, Variable)


def with_sharding_constraint(
  x: A, axis_resources: Any, mesh: jax.sharding.Mesh | None = None
) -> A:
  """Says how arrays are to be sharded; without a mesh it does nothing.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from jax.sharding import PartitionSpec as P
    >>> nnx.with_sharding_constraint(jnp.ones(2), P("data"))  # there is no mesh
    Array([1., 1.], dtype=float32)

  Args:
    x: an array, or a pytree of them.
    axis_resources: a `PartitionSpec`, or a pytree of them like `x`; None for no
      constraint.
    mesh: the mesh; the active one, if None, also that of `with mesh:`.

  Returns:
    `x`, constrained if there is a mesh.
  """
  if axis_resources is None:
    return x
  if mesh is None and partitioning.active_mesh() is None:
    mesh = jax_private.context_mesh()
    if mesh is None:
      return x

  def constrain(spec, leaves):
    if spec is None:
      return leaves
    sharding = spec if mesh is None else jax.sharding.NamedSharding(mesh, spec)
    return jax.tree.map(
      lambda leaf: jax.lax.with_sharding_constraint(leaf, sharding), leaves
    )

  return jax.tree.map(
    constrain,
    axis_resources,
    x,
    is_leaf=lambda s: s is None or isinstance(s, jax.sharding.PartitionSpec),
  )


def with_partitioning(
  initializer: F,
  sharding: Any,
  mesh: jax.sharding.Mesh | None = None,
  **metadata: Any,
) -> F:
  """Wraps an initializer so that its Variable gets a sharding annotation.

  Example:

    >>> import jax, nnx
    >>> init = nnx.with_partitioning(jax.nn.initializers.zeros, ("a", None))
    >>> nnx.Param(init(jax.random.key(0), (2, 2))).out_sharding
    ('a', None)

  Args:
    initializer: a function that returns an array.
    sharding: the axis name, or `None`, of each axis of the array.
    mesh: the mesh to place it on; by default the active one, if any.
    **metadata: further metadata.

  Returns:
    A function of the same arguments that returns a `VariableMetadata`.
  """
  if mesh is not None:
    metadata["mesh"] = mesh
  return with_metadata(initializer, out_sharding=sharding, **metadata)


def insert_name(
  names: tuple[Any, ...], index: int, name: Any
) -> tuple[Any, ...]:
  """Inserts the name of a new array axis.

  Example:

    >>> from nnx.spmd import insert_name
    >>> insert_name(("a",), 2, "layers")
    ('a', None, 'layers')

  Args:
    names: the names of the axes so far; a missing one counts as `None`.
    index: where the axis is inserted.
    name: its name.

  Returns:
    The names, of the same type.
  """
  fields = list(names)
  if index < 0:
    index += len(fields) + 1
  fields += [None] * (index - len(fields))
  fields.insert(index, name)
  return _names_like(names, fields)


def remove_name(
  names: tuple[Any, ...], index: int, name: Any
) -> tuple[Any, ...]:
  """Removes the name of an array axis, the inverse of `insert_name`.

  Example:

    >>> from nnx.spmd import remove_name
    >>> remove_name(("layers", "a"), 0, "layers")
    ('a',)

  Args:
    names: the names of the axes.
    index: which axis is removed.
    name: its name.

  Returns:
    The names, of the same type.

  Raises:
    ValueError: if the axis has another name.
  """
  fields = list(names)
  if index < 0:
    index += len(fields)
  removed = fields.pop(index) if 0 <= index < len(fields) else None
  if removed != name:
    raise ValueError(
      f"The axis to remove must be named `{name!r}`, but axis {index} of"
      f" `{names!r}` is `{removed!r}`. Use the `transform_metadata` with which"
      " the axis was added."
    )
  return _names_like(names, fields)


def _names_like(names: Any, fields: list[Any]) -> Any:
  if isinstance(names, PartitionSpec):
    return PartitionSpec(*fields)
  return tuple(fields)


def _change_axis(
  tree: A,
  index: int,
  transform_metadata: Mapping[str, Any],
  change: Callable[[Any, int, Any], Any],
  notify: Callable[[Variable[Any], int, Any], None],
) -> A:
  if PARTITION_NAME not in transform_metadata:
    raise ValueError(
      "`transform_metadata` must have the key `partition_name` for a transform"
      " to change the axes of annotated Variables, but got"
      f" `{dict(transform_metadata)}`."
    )
  others = dict(transform_metadata)
  axis_name = others.pop(PARTITION_NAME)

  def visit(variable):
    if not _is_variable(variable):
      return variable
    names = variable.get_metadata("out_sharding", None)
    if isinstance(names, NamedSharding):
      spec = change(names.spec, index, axis_name)
      variable.set_metadata(out_sharding=NamedSharding(names.mesh, spec))
    elif names is not None:  # that of a scalar is empty
      variable.set_metadata(out_sharding=change(names, index, axis_name))
    for key, value in others.items():
      fields = variable.get_metadata(key, None)
      if isinstance(fields, tuple):
        variable.set_metadata(key, change(fields, index, value))
    notify(variable, index, axis_name)
    return variable

  return jax.tree.map(visit, tree, is_leaf=_is_variable)


def add_axis(tree: A, index: int, transform_metadata: Mapping[str, Any]) -> A:
  """Enters a new array axis into the annotations of Variables, in place.

  Example:

    >>> import nnx
    >>> p = nnx.Param(1, out_sharding=("a",))
    >>> nnx.spmd.add_axis(p, 0, {nnx.PARTITION_NAME: "layers"}).out_sharding
    ('layers', 'a')

  Args:
    tree: a pytree of Variables.
    index: where the axis is inserted.
    transform_metadata: the axis's name under `partition_name`, and values to
      insert into other metadata that are tuples.

  Returns:
    The tree. The Variables' hooks for added axes have run.

  Raises:
    ValueError: if `partition_name` is missing.
  """
  return _change_axis(
    tree,
    index,
    transform_metadata,
    insert_name,
    lambda variable, *args: variable.add_axis(*args),
  )


def remove_axis(
  tree: A, index: int, transform_metadata: Mapping[str, Any]
) -> A:
  """Takes an array axis out of the annotations of Variables, in place.

  Example:

    >>> import nnx
    >>> p = nnx.Param(1, out_sharding=("layers", "a"))
    >>> nnx.spmd.remove_axis(p, 0, {nnx.PARTITION_NAME: "layers"}).out_sharding
    ('a',)

  Args:
    tree: a pytree of Variables.
    index: which axis is removed.
    transform_metadata: the axis's name under `partition_name`, and the values
      to remove from other metadata that are tuples.

  Returns:
    The tree. The Variables' hooks for removed axes have run.

  Raises:
    ValueError: if `partition_name` is missing or is not the axis's name.
  """
  return _change_axis(
    tree,
    index,
    transform_metadata,
    remove_name,
    lambda variable, *args: variable.remove_axis(*args),
  )


def get_var_pspec(variable: Variable[Any]) -> PartitionSpec | None:
  """Makes a Variable's `PartitionSpec` by its annotation and the axis rules.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> p = nnx.Param(jnp.zeros(2), sharding=("a",))
    >>> nnx.spmd.get_var_pspec(p) == jax.P("a")
    True

  Args:
    variable: a Variable.

  Returns:
    The spec; an empty one for an array without an annotation, `None` for
    other values without one.
  """
  annotation = variable.get_metadata("out_sharding", None)
  if annotation:
    if isinstance(annotation, jax.sharding.NamedSharding):
      return annotation.spec
    rules = variable.get_metadata("sharding_rules", None) or ()
    return partitioning.partition_spec(annotation, rules)
  return PartitionSpec() if hasattr(variable.raw_value, "shape") else None


def get_partition_spec(tree: A) -> A:
  """Replaces the values of Variables by their `PartitionSpec`s.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> state = nnx.State({"w": nnx.Param(jnp.zeros(2), out_sharding=("a",))})
    >>> nnx.get_partition_spec(state).w.value == jax.P("a")
    True

  Args:
    tree: a pytree of Variables and arrays.

  Returns:
    A tree of the same structure; arrays outside of Variables get empty specs.
  """

  def visit(value):
    if _is_variable(value):
      return value.replace(get_var_pspec(value))
    return PartitionSpec() if hasattr(value, "shape") else None

  return jax.tree.map(visit, tree, is_leaf=_is_variable)


def get_named_sharding(tree: A, mesh: jax.sharding.Mesh) -> A:
  """Replaces the values of Variables by their `NamedSharding`s on a mesh.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> mesh = jax.make_mesh((1,), ("a",))
    >>> state = nnx.State({"w": nnx.Param(jnp.zeros(2), out_sharding=("a",))})
    >>> nnx.get_named_sharding(state, mesh).w.value.spec == jax.P("a")
    True

  Args:
    tree: a pytree of Variables and arrays.
    mesh: the mesh.

  Returns:
    A tree of the same structure.
  """
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    get_partition_spec(tree),
    is_leaf=lambda value: isinstance(value, PartitionSpec),
  )


def get_abstract_model(
  init_fn: Callable[[], Any],
  mesh: jax.sharding.Mesh,
  *,
  graph: bool | None = None,
) -> tuple[Any, Any]:
  """Finds the GraphDef and abstract State of a model without computing it.

  Example:

    >>> import jax, nnx
    >>> mesh = jax.make_mesh((1,), ("a",))
    >>> class Model(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(jax.numpy.ones((2, 3)), out_sharding=("a",))
    >>> graphdef, state = nnx.get_abstract_model(Model, mesh)
    >>> state.w.shape, state.w.value.sharding.spec == jax.P("a")
    ((2, 3), True)

  Args:
    init_fn: makes the model.
    mesh: the mesh that the shardings are on.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.

  Returns:
    The GraphDef, and a State of `jax.ShapeDtypeStruct`s with shardings.
  """
  graphdefs = []

  def init():
    graphdef, state = functional.split(init_fn(), graph=graph)
    graphdefs.append(graphdef)
    return state

  with jax.set_mesh(mesh):
    state = jax.eval_shape(init)
  shardings = get_named_sharding(state, mesh)
  state = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    state,
    shardings,
  )
  return graphdefs[-1], state


def as_abstract(tree: A, graph: bool | None = None) -> A:
  """Gives abstract Variables the shardings that their annotations ask for.

  Example:

    >>> import jax, nnx
    >>> mesh = jax.make_mesh((1,), ("a",))
    >>> shape = jax.ShapeDtypeStruct((2,), "float32")
    >>> with jax.set_mesh(mesh):
    ...   p = nnx.as_abstract(
    ...     nnx.State({"w": nnx.Param(shape, sharding=("a",))})
    ...   )
    >>> p.w.value.sharding.spec == jax.P("a")
    True

  Args:
    tree: an object, a State, or a pytree of them.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.

  Returns:
    A copy in which `jax.ShapeDtypeStruct`s of annotated Variables have a
    sharding, on the Variable's `mesh` or on the active one.
  """

  def visit(path, variable):
    del path
    if not _is_variable(variable) or not variable.has_metadata("out_sharding"):
      return variable
    value = variable.raw_value
    if (
      not isinstance(value, jax.ShapeDtypeStruct) or value.sharding is not None
    ):
      return variable
    mesh = variable.get_metadata("mesh", None) or partitioning.active_mesh()
    spec = get_var_pspec(variable)
    if mesh is None or spec is None:
      return variable
    sharding = NamedSharding(mesh, spec)
    return variable.replace(
      jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    )

  return leaves.map(visit, tree, graph=graph)


abstract_with_sharding = as_abstract
