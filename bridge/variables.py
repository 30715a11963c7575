"""Variables of `nnx` as those of Linen, and back.

Linen keeps arrays in nested dicts, the outermost key being the collection. A
collection corresponds to a kind of Variable, by `nnx.register_variable_name`,
and a Linen metadata box to the metadata of a Variable.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
from flax.core import meta
import jax

import nnx


class NNXMeta(struct.PyTreeNode, meta.AxisMetadata[Any]):
  """The Linen box of a Variable whose kind or metadata must not be lost.

  Example:
    >>> import bridge
    >>> import nnx
    >>> box = bridge.NNXMeta(nnx.Param, 1.0, {"unit": "m"})
    >>> box.unbox()
    1.0
    >>> box.to_nnx_variable().unit
    'm'

  Attributes:
    var_type: the kind of Variable.
    value: its value.
    metadata: its metadata; `metadata["sharding"]` of a Variable that came from
      `nnx` is its annotation, whichever of its names that was given by.
  """

  var_type: type[nnx.Variable[Any]] = struct.field(pytree_node=False)
  value: Any = struct.field(pytree_node=True)
  metadata: dict[str, Any] = struct.field(pytree_node=False)

  def unbox(self) -> Any:
    """Returns the value."""
    return self.value

  def replace_boxed(self, val: Any) -> "NNXMeta":
    """Returns the same box around `val`."""
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> "NNXMeta":
    """Returns the box of the Variable with one more axis.

    Args:
      index: where the new axis is.
      params: what the transform says of it; `nn.PARTITION_NAME` names it.
    """
    return self._with_axes(nnx.spmd.add_axis, index, params)

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "NNXMeta":
    """Returns the box of the Variable with one axis less.

    Args:
      index: where the axis was.
      params: what the transform says of it; `nn.PARTITION_NAME` names it.
    """
    return self._with_axes(nnx.spmd.remove_axis, index, params)

  def _with_axes(self, change, index: int, params: dict[Any, Any]) -> "NNXMeta":
    variable = self.to_nnx_variable()
    if variable.get_metadata("out_sharding", None) is None:
      # Without an annotation no name is needed; the hooks run all the same.
      params = {meta.PARTITION_NAME: None, **params}
    change(variable, index, params)
    metadata = variable.get_metadata(exclude_required=True)
    given = nnx.partitioning.sharding_key(self.metadata)
    if given is not None:  # so that the other way gives back this very box
      metadata[given] = metadata.pop("out_sharding")
    return self.replace(metadata=metadata)

  def get_partition_spec(self) -> jax.sharding.PartitionSpec:
    """Returns how the value is to be laid out on a mesh."""
    spec = nnx.get_partition_spec(self.to_nnx_variable())
    return spec.get_raw_value()

  def to_nnx_variable(self) -> nnx.Variable[Any]:
    """Returns the Variable of this kind, value and metadata."""
    # Past `__init__`: the value was created, and placed, long ago.
    return self.var_type.from_metadata(self.value, dict(self.metadata))


def needs_box(metadata: Mapping[str, Any]) -> bool:
  """Tells whether metadata of a Variable would be lost without a box."""
  return any(
    not (key.startswith("on_") and not value) for key, value in metadata.items()
  )


def to_linen_var(variable: nnx.Variable[Any]) -> Any:
  """Converts a Variable to what Linen keeps.

  Example:
    >>> import bridge
    >>> import nnx
    >>> bridge.to_linen_var(nnx.Param(1.0))
    1.0

  Args:
    variable: a Variable of any kind.

  Returns:
    Its value; in the Linen box it came from, if it did, or in an `NNXMeta`
    where it has metadata that would be lost.
  """
  # How a Variable is kept, as `eager_sharding`, is no property of its value.
  metadata = variable.get_metadata(exclude_required=True)
  value = variable.get_value()
  box = metadata.get("linen_meta_type")
  if box is None:
    if not needs_box(metadata):
      return value
    return NNXMeta(type(variable), value, metadata)
  if hasattr(box, "from_nnx_metadata"):
    return box.from_nnx_metadata({"value": value, **metadata})
  fields = {k: v for k, v in metadata.items() if k != "linen_meta_type"}
  return box(value, **fields)


def to_nnx_var(collection: str, value: Any) -> nnx.Variable[Any]:
  """Converts what Linen keeps in a collection to a Variable.

  Example:
    >>> import bridge
    >>> type(bridge.to_nnx_var("batch_stats", 1.0)).__name__
    'BatchStat'

  Args:
    collection: the collection's name; a kind of Variable is made for a new one.
    value: an array, or a Linen metadata box around one.

  Returns:
    The Variable, which remembers the box.

  Raises:
    ValueError: if an `NNXMeta` says another kind than the collection does.
  """
  kind = nnx.variable_type_from_name(collection, allow_register=True)
  if isinstance(value, NNXMeta):
    if value.var_type is not kind:
      raise ValueError(
        "The kind of Variable in an `NNXMeta` must be that of its collection,"
        f" but got `{value.var_type.__name__}` in `{collection}`, which is of"
        f" `{kind.__name__}`. Register the name by"
        " `nnx.register_variable_name`."
      )
    return value.to_nnx_variable()
  if isinstance(value, meta.AxisMetadata):
    to_metadata = getattr(value, "to_nnx_metadata", None)
    metadata = dict(to_metadata() if to_metadata else vars(value))
    inner = metadata.pop("value")
    return kind(inner, **metadata, linen_meta_type=type(value))
  return kind(value)


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, (*path, key))
    else:
      yield (*path, key), value


def put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
  """Puts a value into nested dicts, which are made on the way."""
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def linen_vars_to_nnx_attrs(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Converts Linen's variables to nested Variables, collections dissolved.

  Example:
    >>> import bridge
    >>> attrs = bridge.linen_vars_to_nnx_attrs(
    ...   {
    ...     "params": {"bn": {"scale": 1.0}},
    ...     "batch_stats": {"bn": {"mean": 0.0}},
    ...   }
    ... )
    >>> {name: type(v).__name__ for name, v in attrs["bn"].items()}
    {'scale': 'Param', 'mean': 'BatchStat'}

  Args:
    variables: collection to nested dicts of arrays or metadata boxes.

  Returns:
    Nested dicts by the path of attributes.

  Raises:
    ValueError: if two collections hold the same path.
  """
  owners: dict[tuple[str, ...], str] = {}
  above: dict[tuple[str, ...], str] = {}  # what has variables below it
  attributes: dict[str, Any] = {}
  for collection, tree in variables.items():
    for path, value in _flatten(tree):
      prefixes = [path[:i] for i in range(1, len(path))]
      for taken in (*prefixes, path):
        other = owners.get(taken) or (above.get(taken) if taken == path else "")
        if other:
          raise ValueError(
            "A path must be in one collection, since it names one attribute,"
            f" but `{'/'.join(map(str, taken))}` is in `{other}` and in"
            f" `{collection}`. Rename one of the two."
          )
      owners[path] = collection
      above.update(dict.fromkeys(prefixes, collection))
      put(attributes, path, to_nnx_var(collection, value))
  return attributes


def nnx_attrs_to_linen_vars(attributes: Mapping[str, Any]) -> dict[str, Any]:
  """Converts nested Variables to Linen's variables, a collection each kind.

  Example:
    >>> import bridge
    >>> import nnx
    >>> bridge.nnx_attrs_to_linen_vars({"bn": {"scale": nnx.Param(1.0)}})
    {'params': {'bn': {'scale': 1.0}}}

  Args:
    attributes: nested dicts by the path of attributes.

  Returns:
    Collection to nested dicts of arrays or metadata boxes.

  Raises:
    ValueError: if a leaf is no Variable, or its kind has no registered name.
  """
  variables: dict[str, Any] = {}
  for path, variable in _flatten(attributes):
    if not isinstance(variable, nnx.Variable):
      raise ValueError(
        "Every leaf must be a Variable, whose kind says the collection, but"
        f" `{'/'.join(map(str, path))}` is `{variable!r}`. Wrap it in a kind of"
        " Variable."
      )
    collection = nnx.variable_name_from_type(type(variable))
    put(variables, (collection, *path), to_linen_var(variable))
  return variables


def with_partitioning(
  fn: Callable[..., Any],
  names: Any,
  mesh: jax.sharding.Mesh | None = None,
  **metadata: Any,
) -> Callable[..., Any]:
  """Acts as `nnx.with_partitioning`; Linen gets its Variables `Partitioned`.

  Example:
    >>> import bridge
    >>> import jax
    >>> import nnx
    >>> init = bridge.with_partitioning(jax.nn.initializers.ones, ("a", None))
    >>> param = nnx.Param(init(jax.random.key(0), (2, 3)))
    >>> type(bridge.to_linen_var(param)).__name__
    'Partitioned'

  Args:
    fn: an initializer.
    names: the names of the axes.
    mesh: the mesh; by default the one that is active.
    **metadata: more metadata of the Variable.

  Returns:
    An initializer that returns a `VariableMetadata`.
  """
  return nnx.with_partitioning(
    fn, names, mesh, linen_meta_type=meta.Partitioned, **metadata
  )
