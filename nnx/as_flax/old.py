"""Names in modules of `flax.nnx` that only programs written for it use.

They are put in their places by `places`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
import functools
import inspect
import itertools
from types import EllipsisType
from typing import Any, NamedTuple, Protocol, cast
import warnings

import jax

import nnx
from nnx import filterlib, variablelib
from nnx.engine import jax_private
from nnx.graphlib import contexts, registry, traversal
from nnx.nn import conv

VariableMeta = type(nnx.Variable)


class _HijaxMeta(type):
  def __instancecheck__(cls, instance: Any) -> bool:
    return isinstance(instance, nnx.Variable) and instance.hijax


class HijaxVariable(metaclass=_HijaxMeta):
  """What `isinstance` says hijax Variables are; here any kind may be one.

  Example:

    >>> import nnx
    >>> from nnx.as_flax import old
    >>> isinstance(nnx.Param(1.0, hijax=True), old.HijaxVariable)
    True
  """


VariableTypeCache = variablelib._types_by_name
FilterLiteral = type | str | filterlib.Predicate | bool | EllipsisType | None
is_array_ref = variablelib.is_ref
canonicalize_padding = conv._canonical_padding


# flax.nnx.deprecations


def deprecated(new_fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes an alias of a function that warns when it is called.

  Example:

    >>> import warnings
    >>> from nnx.as_flax.old import deprecated
    >>> with warnings.catch_warnings(record=True) as caught:
    ...   warnings.simplefilter("always")
    ...   deprecated(abs)(-1)
    1
    >>> caught[0].category.__name__
    'DeprecationWarning'
  """

  @functools.wraps(new_fn)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    warnings.warn(
      f"This function is deprecated: call `{new_fn.__qualname__}`.",
      DeprecationWarning,
      stacklevel=2,
    )
    return new_fn(*args, **kwargs)

  return wrapper


# flax.nnx.ids


class UUID:
  """A number that no other has; a copy has another one.

  Example:

    >>> import copy
    >>> from nnx.as_flax import old
    >>> one = old.uuid()
    >>> one == one, copy.copy(one) == one
    (True, False)
  """

  def __init__(self, rawid: int):
    self.id = rawid

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, UUID) and other.id == self.id

  def __hash__(self) -> int:
    return hash(self.id)

  def __repr__(self) -> str:
    return f"UUID({self.id})"

  def __copy__(self) -> UUID:
    return uuid()

  def __deepcopy__(self, memo: Any) -> UUID:
    return uuid()


class UUIDManager:
  """Hands out `UUID`s."""

  def __init__(self):
    self._next = itertools.count(1)

  def __call__(self) -> UUID:
    return UUID(next(self._next))


uuid = UUIDManager()


# flax.nnx.module, pytreelib and object


class PytreeMeta(abc.ABCMeta):
  """A metaclass for classes of objects, with a hook around their `__init__`.

  Flax's own; here classes of objects need none. A metaclass that derives from
  it may override `_pytree_meta_construct`.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.old import PytreeMeta
    >>> class Meta(PytreeMeta):
    ...   def _pytree_meta_construct(cls, self, *args):
    ...     super()._pytree_meta_construct(self, *args)
    ...     self.made = True
    >>> class Model(nnx.Module, metaclass=Meta):
    ...   pass
    >>> Model().made
    True
  """

  def __call__(cls, *args: Any, **kwargs: Any) -> Any:
    node: Any = cast(Any, cls).__new__(cls, *args, **kwargs)
    cls._pytree_meta_construct(node, *args, **kwargs)
    return node

  def _pytree_meta_construct(cls, self: Any, *args: Any, **kwargs: Any) -> None:
    cls._object_meta_construct(self, *args, **kwargs)

  def _object_meta_construct(cls, self: Any, *args: Any, **kwargs: Any) -> None:
    self.__init__(*args, **kwargs)


ModuleMeta = ObjectMeta = PytreeMeta


def tuple_reduce(xs: tuple[Any, ...], x: Any) -> tuple[Any, ...]:
  """Returns the tuple with one more item, as `Module.sow` collects them."""
  return (*xs, x)


def tuple_init() -> tuple[Any, ...]:
  """Returns what `Module.sow` starts from."""
  return ()


# flax.nnx.helpers


class ModuleDefApply(Protocol):
  """The type of `graphdef.apply`."""

  def __call__(self, state: Any, *states: Any) -> Any: ...


def has_keyword_arg(func: Callable[..., Any], name: str) -> bool:
  """Tells whether a function has a parameter of a name that can be given by it.

  Example:

    >>> from nnx.as_flax.old import has_keyword_arg
    >>> has_keyword_arg(lambda x, *, rngs: x, "rngs")
    True
  """
  parameter = inspect.signature(func).parameters.get(name)
  return parameter is not None and parameter.kind in (
    parameter.KEYWORD_ONLY,
    parameter.POSITIONAL_OR_KEYWORD,
  )


# flax.nnx.filterlib and statelib


class HasTag(Protocol):
  """The type of what has a tag."""

  tag: str


def create_path_filters(state: Mapping[Any, Any]) -> dict[Any, Any]:
  """Filters that select the paths of each value that a state has.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.old import create_path_filters
    >>> create_path_filters(nnx.State({"a": 0, "b": 1}))
    {PathIn(('a',)): 0, PathIn(('b',)): 1}
  """
  paths: dict[Any, list[Any]] = {}
  for path, leaf in nnx.to_flat_state(state):
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    paths.setdefault(value, []).append(path)
  return {nnx.PathIn(*found): value for value, found in paths.items()}


# flax.nnx.graphlib


def is_node_leaf(x: Any) -> bool:
  """Tells whether something is a leaf of a graph: a Variable or an array.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.old import is_node_leaf
    >>> is_node_leaf(nnx.Param(1)), is_node_leaf("a")
    (True, False)
  """
  return nnx.is_data(x) and not traversal.is_graph_node(x)


def is_state_leaf(x: Any) -> bool:
  """Tells whether something is a leaf of a State, as Flax 0.10 made them."""
  return isinstance(x, nnx.Variable)


def is_node_type(x: type) -> bool:
  """Tells whether instances of a class are nodes of graphs or jax opens them.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.old import is_node_type
    >>> is_node_type(nnx.Linear), is_node_type(list), is_node_type(int)
    (True, True, False)
  """
  if issubclass(x, nnx.Variable):
    return False
  return (
    issubclass(x, nnx.Pytree)
    or x in registry.node_types
    or jax_private.is_pytree_type(x)
  )


def is_node_module(x: Any) -> bool:
  """Tells whether something has an identity in a graph and children."""
  return traversal.is_graph_node(x) and not isinstance(x, nnx.Variable)


def is_pytree_node(x: Any, *, check_graph_registry: bool = True) -> bool:
  """Tells whether something is a pytree of jax, and no node of graphs.

  Example:

    >>> from nnx.as_flax.old import is_pytree_node
    >>> is_pytree_node([1]), is_pytree_node(1)
    (True, False)
  """
  if isinstance(x, nnx.Variable):
    return False
  if check_graph_registry and is_node_module(x):
    return False
  return not jax.tree_util.all_leaves([x])


def jax_to_nnx_path(jax_path: tuple[Any, ...], /) -> tuple[Any, ...]:
  """Converts a path of `jax.tree_util` to a path of a State.

  Example:

    >>> import jax
    >>> from nnx.as_flax.old import jax_to_nnx_path
    >>> jax_to_nnx_path(
    ...   (jax.tree_util.DictKey("a"), jax.tree_util.SequenceKey(0))
    ... )
    ('a', 0)
  """
  names = ("key", "idx", "name")
  return tuple(
    next((getattr(part, n) for n in names if hasattr(part, n)), part)
    for part in jax_path
  )


# flax.nnx.extract


class GraphDefState(NamedTuple):
  """A graphdef and a state; as `nnx.GraphState`, but a pair."""

  graphdef: Any
  state: Any


jax.tree_util.register_pytree_with_keys(
  GraphDefState,
  lambda pair: (
    ((jax.tree_util.GetAttrKey("state"), pair.state),),
    pair.graphdef,
  ),
  lambda graphdef, children: GraphDefState(graphdef, *children),
)


def is_tree_node(x: Any) -> bool:
  """Tells whether `nnx.to_tree` put this in the place of an object.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.old import is_tree_node
    >>> is_tree_node(nnx.to_tree(nnx.Dict(a=nnx.Param(1))))
    True
  """
  return isinstance(x, nnx.NodeStates)


def default_split_fn(
  ctx: contexts.SplitContext, path: Any, prefix: Any, leaf: Any
) -> nnx.NodeStates:
  """Makes what `nnx.to_tree` makes of an object unless told otherwise."""
  return nnx.NodeStates.from_split(*ctx.split(leaf))


def merge_tree_node(
  ctx: contexts.MergeContext, path: Any, prefix: Any, leaf: Any
) -> Any:
  """Makes the object that `nnx.from_tree` makes unless told otherwise."""
  return ctx.merge(leaf.graphdef, *leaf.states)


def _is_object(x: Any) -> bool:
  return isinstance(x, nnx.Variable) or traversal.is_graph_node(x)


def clear_non_graph_nodes(tree: Any) -> Any:
  """Returns a pytree of objects with None for all else.

  Example:

    >>> from nnx.as_flax.old import clear_non_graph_nodes
    >>> clear_non_graph_nodes((nnx.Param(1), 2))[1] is None
    True
  """
  return jax.tree.map(
    lambda x: x if _is_object(x) else None, tree, is_leaf=_is_object
  )


def broadcast_prefix(
  prefix_tree: Any,
  full_tree: Any,
  prefix_is_leaf: Callable[[Any], bool] | None = None,
  tree_is_leaf: Callable[[Any], bool] | None = None,
) -> list[Any]:
  """Returns the leaf of a prefix for each leaf of a pytree.

  Example:

    >>> from nnx.as_flax.old import broadcast_prefix
    >>> broadcast_prefix((1, 2), ([0, 0], 0))
    [1, 1, 2]
  """
  result: list[Any] = []

  def repeat(leaf: Any, subtree: Any) -> None:
    count = len(jax.tree.leaves(subtree, is_leaf=tree_is_leaf))
    result.extend([leaf] * count)

  jax.tree.map(repeat, prefix_tree, full_tree, is_leaf=prefix_is_leaf)
  return result


def check_consistent_aliasing(
  node: Any,
  prefix: Any,
  /,
  *,
  node_prefixes: dict[int, list[tuple[Any, Any]]] | None = None,
) -> None:
  """Checks that a shared Variable is treated one way.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.old import check_consistent_aliasing
    >>> model, seen = nnx.Dict(a=nnx.Param(1)), {}
    >>> check_consistent_aliasing(model, 0, node_prefixes=seen)
    >>> check_consistent_aliasing(model, 0, node_prefixes=seen)

  Args:
    node: an object.
    prefix: how it is treated, such as an axis; or an object whose
      `map_prefix(path, variable)` tells.
    node_prefixes: what was found so far, by the identity of the Variables.

  Raises:
    ValueError: if a Variable is treated in two ways.
    nnx.TraceContextError: if one is not of the current trace.
  """
  seen = {} if node_prefixes is None else node_prefixes
  for path, value in nnx.iter_graph(node):
    if not isinstance(value, nnx.Variable):
      continue
    value._check_can_update()
    entry = prefix
    if hasattr(prefix, "map_prefix"):
      entry = prefix.map_prefix(path, value)
    found = seen.setdefault(id(value), [])
    found.append((path, entry))
    first_path, first = found[0]
    if first != entry:
      raise ValueError(
        "A shared Variable must have one prefix, but the one at"
        f" `{'/'.join(map(str, first_path))}` has `{first}`, and at"
        f" `{'/'.join(map(str, path))}` it has `{entry}`."
      )


# flax.nnx.transforms


def resolve_kwargs(
  fun: Any = None, args: Any = None, kwargs: Any = None
) -> Any:
  """Puts the arguments of a call in order, with defaults; or makes a decorator.

  Example:

    >>> from nnx.as_flax.old import resolve_kwargs
    >>> resolve_kwargs(lambda x, y, z=3: None, (1,), {"y": 2})
    (1, 2, 3)
    >>> resolve_kwargs()(lambda *args: args)(1)
    (1,)

  Raises:
    TypeError: if one can be given by its name alone.
  """
  if fun is None:

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
      @functools.wraps(f)
      def wrapper(*args: Any, **kwargs: Any) -> Any:
        return f(*resolve_kwargs(f, args, kwargs))

      return wrapper

    return decorate
  if isinstance(fun, functools.partial):
    # A partial function may be of any signature.
    fun = lambda *args, **kwargs: None  # noqa: E731
  bound = inspect.signature(fun).bind(*args, **kwargs)
  bound.apply_defaults()
  if bound.kwargs:
    raise TypeError(
      "Every argument must be one that can be given by position, but"
      f" {sorted(bound.kwargs)} cannot."
    )
  return bound.args


def split_inputs(f: Any = None, *, ctxtag: str = "split_merge_inputs") -> Any:
  """Gives a function pytrees of arrays for the objects that it is called with.

  With `merge_inputs` inside, a transform of jax can be put between.

  Example:

    >>> import jax, nnx
    >>> from nnx.as_flax.old import merge_inputs, split_inputs
    >>> @split_inputs
    ... @jax.jit
    ... @merge_inputs
    ... def increment(model):
    ...   model.a[...] += 1
    >>> model = nnx.Dict(a=nnx.Param(1))
    >>> increment(model)
    >>> int(model.a[...])
    2
  """
  if f is None:
    return functools.partial(split_inputs, ctxtag=ctxtag)

  @contexts.update_context(ctxtag)
  @functools.wraps(f)
  def wrapper(*args: Any) -> Any:
    pure = nnx.to_tree(args, ctxtag=ctxtag)
    _, out = nnx.from_tree(f(*pure), ctxtag=ctxtag, is_inner=False)
    return out

  return wrapper


def merge_inputs(f: Any = None, *, ctxtag: str = "split_merge_inputs") -> Any:
  """Merges the inputs inside of the function that `split_inputs` calls."""
  if f is None:
    return functools.partial(merge_inputs, ctxtag=ctxtag)

  @functools.wraps(f)
  def wrapper(*pure: Any) -> Any:
    args = nnx.from_tree(pure, ctxtag=ctxtag, is_inner=True)
    out = f(*args)
    return nnx.to_tree((clear_non_graph_nodes(args), out), ctxtag=ctxtag)

  return wrapper
