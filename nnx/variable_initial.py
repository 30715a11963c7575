"""What an initializer says of the Variable that is to hold its value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import operator
from typing import Any, Generic, TypeVar, cast

from nnx.variable_metadata import (
  HOOK_ALIASES,
  HOOK_NAMES,
  Hooks,
  as_hooks,
  normalize_metadata,
)

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])


def _second_name(field: str) -> Any:
  def set_field(self: Any, hooks: Any) -> None:
    setattr(self, field, as_hooks(hooks))

  return property(operator.attrgetter(field), set_field)


# The constructor takes either names of hooks, and equality and text say all the
# metadata alike; so these are not what a dataclass has by default.
@dataclasses.dataclass(init=False, repr=False, eq=False)
class VariableMetadata(Generic[A]):
  """A value together with the metadata of the Variable that is to hold it.

  Initializers wrapped by `with_metadata` return it; a Variable made from it
  takes the value, the hooks and the metadata. A dataclass; the hooks can also
  be read and set by the names `on_set_value` and so on.

  Example:

    >>> import dataclasses
    >>> import nnx
    >>> box = nnx.VariableMetadata(1.0, metadata={"axis": "embed"})
    >>> nnx.Param(box).axis
    'embed'
    >>> dataclasses.replace(box, raw_value=2.0)
    VariableMetadata(2.0, metadata={'axis': 'embed'})

  Args:
    raw_value: the value.
    set_value_hooks: hooks run on values before they are stored.
    get_value_hooks: hooks run on values when they are read.
    create_value_hooks: hooks run on the first value.
    add_axis_hooks: hooks run when a transform adds an axis.
    remove_axis_hooks: hooks run when a transform removes an axis.
    metadata: further metadata.
    **hooks: the same hooks by the names `on_set_value` and so on.
  """

  raw_value: A
  set_value_hooks: Hooks = ()
  get_value_hooks: Hooks = ()
  create_value_hooks: Hooks = ()
  add_axis_hooks: Hooks = ()
  remove_axis_hooks: Hooks = ()
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  on_set_value = _second_name("set_value_hooks")
  on_get_value = _second_name("get_value_hooks")
  on_create_value = _second_name("create_value_hooks")
  on_add_axis = _second_name("add_axis_hooks")
  on_remove_axis = _second_name("remove_axis_hooks")

  def __init__(
    self,
    raw_value: A,
    set_value_hooks: Any = (),
    get_value_hooks: Any = (),
    create_value_hooks: Any = (),
    add_axis_hooks: Any = (),
    remove_axis_hooks: Any = (),
    metadata: Mapping[str, Any] | None = None,
    **hooks: Any,
  ):
    for name in hooks:
      if name not in HOOK_NAMES:
        raise TypeError(
          "`VariableMetadata` takes hooks by the names"
          f" {sorted(HOOK_NAMES)}, but got `{name}`. Other metadata goes into"
          " `metadata`."
        )
    self.raw_value = raw_value
    # Hooks may also come inside `metadata`, where they must not stay.
    everything = normalize_metadata(
      {
        **(metadata or {}),
        **{k: v for k, v in hooks.items() if as_hooks(v)},
        **{
          name: value
          for name, value in (
            ("set_value_hooks", set_value_hooks),
            ("get_value_hooks", get_value_hooks),
            ("create_value_hooks", create_value_hooks),
            ("add_axis_hooks", add_axis_hooks),
            ("remove_axis_hooks", remove_axis_hooks),
          )
          if as_hooks(value)
        },
      }
    )
    for field, name in HOOK_ALIASES.items():
      setattr(self, field, everything.pop(name, ()))
    self.metadata = everything

  def __getattr__(self, name: str) -> Any:
    raise AttributeError(
      f"`{type(self).__name__}` has no attribute `{name}`.", name=name, obj=self
    )

  def _all(self) -> dict[str, Any]:
    hooks = {name: getattr(self, name) for name in sorted(HOOK_NAMES)}
    return {**self.metadata, **{k: v for k, v in hooks.items() if v}}

  def __eq__(self, other) -> bool:
    if not isinstance(other, VariableMetadata):
      return NotImplemented
    return (self.raw_value, self._all()) == (other.raw_value, other._all())

  def __repr__(self) -> str:
    return f"VariableMetadata({self.raw_value!r}, metadata={self._all()!r})"


def with_metadata(
  initializer: F,
  set_value_hooks: Any = (),
  get_value_hooks: Any = (),
  create_value_hooks: Any = (),
  add_axis_hooks: Any = (),
  remove_axis_hooks: Any = (),
  **metadata: Any,
) -> F:
  """Wraps an initializer so that its Variable gets hooks and metadata.

  Example:

    >>> import jax, nnx
    >>> init = nnx.with_metadata(
    ...   jax.nn.initializers.zeros, get_value_hooks=lambda v, x: x + 1, axis=0
    ... )
    >>> p = nnx.Param(init(jax.random.key(0), (2,)))
    >>> p.value, p.raw_value, p.axis
    (Array([1., 1.], dtype=float32), Array([0., 0.], dtype=float32), 0)

  Args:
    initializer: a function that returns a value.
    set_value_hooks: one hook or several, run on values before they are stored.
    get_value_hooks: the same, run on values when they are read.
    create_value_hooks: the same, run on the first value.
    add_axis_hooks: the same, run when a transform adds an axis.
    remove_axis_hooks: the same, run when a transform removes an axis.
    **metadata: further metadata; hooks by the names `on_set_value` and so on
      are hooks here too.

  Returns:
    A function of the same arguments that returns a `VariableMetadata`.
  """
  hooks = {name: metadata.pop(name) for name in HOOK_NAMES if name in metadata}
  template = VariableMetadata(
    None,
    set_value_hooks,
    get_value_hooks,
    create_value_hooks,
    add_axis_hooks,
    remove_axis_hooks,
    metadata,
    **hooks,
  )

  @functools.wraps(initializer)
  def wrapper(*args, **kwargs):
    return VariableMetadata(
      initializer(*args, **kwargs), metadata=template._all()
    )

  return cast(F, wrapper)


VariableMetadata.__module__ = "nnx.variablelib"
