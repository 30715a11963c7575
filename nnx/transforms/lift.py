"""The one mechanism under all transforms: flat functions of leaves.

A transform of jax takes and returns arrays. A function of Modules reads and
writes objects. `Call` opens the arguments into a structure and a flat tuple of
leaves; `Lifted` is the function of those leaves: it builds copies of the
arguments, runs the user's function on the copies, and packs what changed.
Applying the packed result does to the originals what was done to the copies.

So nothing the function does under a trace touches the originals, and an
exception leaves them as they were.

A mode (`graphlib.modes`) is what is checked and what is given back, in `Lifted`
alone. Without updates the Variables of the copies are compared alone: whatever
else the function did to them stays with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import inspect
from typing import Any, NamedTuple, NoReturn
import weakref

import jax
import numpy as np

from nnx import errors
from nnx.engine import _engine, jax_private, preorder, pytrees
from nnx.graphlib import modes, trees
from nnx.transforms import callables

_SCALARS = (bool, int, float, complex, np.generic)


class _LeafNames(Sequence[str]):
  """Names of leaves, found out when somebody asks: jax, in an error.

  They are kept by jax's caches, so they must not keep the user's function.
  """

  def __init__(self, lifted: Lifted, numbers: Sequence[int], first: int):
    self._lifted = weakref.ref(lifted)
    self._numbers = numbers
    self._first = first
    self._names: list[str] | None = None

  def __len__(self) -> int:
    return self._first + len(self._numbers)

  def __getitem__(self, index: Any) -> Any:
    if self._names is None:
      lifted, first, names = self._lifted(), [""] * self._first, {}
      if lifted is not None:
        roots = lifted.root_names(self._first)
        first = roots[: self._first]
        names = preorder.leaf_names(lifted.structure, roots[self._first :])
      self._names = [*first, *(names.get(n, "") for n in self._numbers)]
    return self._names[index]

  def __reduce__(self):
    return tuple, (list(self),)  # jax pickles it with what it has compiled

  def __radd__(self, before: tuple[str, ...]) -> tuple[str, ...]:
    # jax 0.12 puts the names of constants in front of a tuple.
    return (*before, *self)


class Policy(NamedTuple):
  """The mode that a function is lifted in, and the transform it is lifted by.

  Attributes:
    mode: what is checked and what is given back.
    transform: its name in `nnx`, for errors.
  """

  mode: modes.Mode
  transform: str

  def bind(
    self,
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    option: Any = None,
  ) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Does what `bind` does; without updates, keywords stay so, as in jax."""
    if self.mode.updates:
      return callables.bind(fun, args, kwargs, option)
    return tuple(args), callables.with_owner(fun, kwargs)

  def leaves(self, value: Any) -> tuple[Any, ...]:
    """Returns the leaves of a value in the form of an argument or result."""
    if not self.mode.graph:
      value = trees.copied(value)
    return _engine.flatten((value,)).leaves

  def refuse(self, problem: str) -> NoReturn:
    """Raises the error for what the mode does not allow."""
    self.mode.refuse(self.transform, problem, updates=True)


class Lifted:
  """A user's function as a function of the leaves of one structure.

  Args:
    fun: the function.
    structure: of its arguments.
    names: those of the keyword arguments, which are the last roots.
    policy: the mode.

  Raises:
    ValueError: in tree mode, if the structure is no tree.
  """

  __slots__ = ("fun", "structure", "names", "policy", "shares", "__weakref__")

  def __init__(
    self,
    fun: Callable[..., Any],
    structure: Any,
    names: Sequence[str],
    policy: Policy,
  ):
    self.fun = fun
    self.structure = structure
    self.names = names
    self.policy = policy
    # Whether objects without Variables are shared; in tree mode alone.
    self.shares = not policy.mode.graph and self._check_tree(structure)

  def _check_tree(
    self, structure: Any, names: Sequence[str] | None = None
  ) -> bool:
    if structure._is_tree:  # The names would take time.
      return False
    transform = self.policy.transform
    return trees.check(
      structure, names or self.root_names(), transform, updates=True
    )

  def of(self, fun: Callable[..., Any]) -> Lifted:
    """Returns another function of the same arguments."""
    return Lifted(fun, self.structure, self.names, self.policy)

  def __call__(self, leaves: tuple[Any, ...]) -> Any:
    """Runs the function on copies; returns the engine's `Packed`."""
    values, objects = self.open(leaves)
    result = self.call(values)
    return self.pack(objects, leaves, result)

  def open(self, leaves: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Makes the copies.

    Returns:
      The arguments of the function, and the objects for `pack`.
    """
    return _engine.unflatten(self.structure, leaves)

  def pack(
    self,
    objects: tuple[Any, ...],
    leaves: tuple[Any, ...],
    result: Any,
    new: Any = None,
    written: frozenset[int] = frozenset(),
  ) -> Any:
    """Returns what the function did, as a `Packed`.

    Args:
      objects: what `open` returned.
      leaves: what it was given.
      result: what is returned to the caller.
      new: without updates, what may hold no Variable of the arguments; the
        result, if None.
      written: leaves that count as written in any case.
    """
    before = leaves
    if written:
      # No value is identical to these.
      before = tuple(
        None if i in written else leaf for i, leaf in enumerate(leaves)
      )
    given = None if self.policy.mode.updates else leaves
    if not self.policy.mode.updates:
      self.check_new(objects, result if new is None else new)
    if not self.policy.mode.graph:
      result = trees.copied(result)
    return _engine.pack(self.structure, objects, before, result, given)

  def check_new(self, objects: Sequence[Any], result: Any) -> None:
    """Refuses Variables in a result that are not new.

    With updates, those of the arguments may be in it.

    Raises:
      ValueError: if there is one of the arguments or of another trace; in tree
        mode also if one is there twice.
    """
    structure, _, found = _engine.flatten((result,))
    if not self.policy.mode.graph:
      self._check_tree(structure, ["result"])
    variables = [
      (index, value)
      for index, value in enumerate(found)
      if isinstance(value, _engine.VariableBase)
    ]
    if not variables:
      return
    given = {
      id(value): index
      for index, value in enumerate(objects)
      if isinstance(value, _engine.VariableBase)
    }
    for index, value in variables:
      known = id(value) in given
      if self.policy.mode.updates if known else value._can_update:
        continue
      where = _path_of_node(structure, ["result"], index)
      problem = f"`{where}` is a `{type(value).__name__}` from outside of it"
      if known:
        names, origin = self.root_names(), given[id(value)]
        path = _path_of_node(self.structure, names, origin)
        problem = f"`{where}` is the `{type(value).__name__}` at `{path}`"
      if self.policy.mode.updates:
        raise ValueError(
          f"What a function given to `nnx.{self.policy.transform}` returns must"
          f" hold no Variable that it was not given, but {problem}. Pass it as"
          " an argument, or return its value or a copy (`nnx.clone`)."
        )
      self.policy.refuse(
        "the result must hold no Variable that the function did not make, but"
        f" {problem}. Return its value or a copy (`nnx.clone`)"
      )

  def debug_info(
    self, transform: str, numbers: Sequence[int], first: int = 0
  ) -> Any:
    """Returns what errors of jax say of it as a function of some of the leaves.

    Args:
      transform: what traces it.
      numbers: the leaves.
      first: the number of arguments that come before those of the structure.
    """
    names = self.leaf_names(numbers, first)
    return jax_private.debug_info(transform, self.fun, names)

  def leaf_names(self, numbers: Sequence[int], first: int = 0) -> Sequence[str]:
    """Returns the names of its first arguments and of some leaves."""
    return _LeafNames(self, numbers, first)

  def root_names(self, first: int = 0) -> list[str]:
    """Returns the names of its first arguments and of each root."""
    count = first + self.structure._num_roots - len(self.names)
    try:
      parameters = list(inspect.signature(self.fun).parameters.values())
    except (TypeError, ValueError):
      parameters = []
    single = [
      p.name
      for p in parameters
      if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ][:count]
    rest = next(
      (p.name for p in parameters if p.kind == p.VAR_POSITIONAL), "args"
    )
    more = [f"{rest}[{i}]" for i in range(count - len(single))]
    return [*single, *more, *self.names]

  def call(self, values: Sequence[Any], *first: Any) -> Any:
    """Runs the user's function on the roots of the structure, after `first`."""
    count = len(values) - len(self.names)
    kwargs = dict(zip(self.names, values[count:]))
    fun, args = self.fun, (*first, *values[:count])
    if args and callable(args[0]) and type(args[0]).__call__ is fun:
      fun, args = args[0], args[1:]  # through the object, which names the call
    try:
      return fun(*args, **kwargs)
    except Exception as error:
      errors.note_module(error)
      raise
    finally:
      _engine.forget_copies(self.structure)


def _path_of_node(structure: Any, names: Sequence[str], index: int) -> str:
  """Returns the path to a node with an identity."""
  records = structure._records
  return next(
    preorder.path_text(path[1:], path[0])
    for position, path in preorder.walk_roots(structure, names)
    if records[position].index == index
  )


class Call:
  """The arguments of one call, opened: what every transform starts from.

  Args:
    policy: the mode.
    fun: the user's function.
    args: its positional arguments.
    kwargs: its keyword arguments.
    static: positions of arguments that are part of the structure.
  """

  __slots__ = (
    "lifted",
    "structure",
    "leaves",
    "objects",
    "num_args",
    "_described",
  )

  def __init__(
    self,
    policy: Policy,
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    static: Iterable[int] = (),
  ):
    kwargs = kwargs or {}
    names = sorted(kwargs)
    values = (*args, *(kwargs[name] for name in names))
    static = frozenset(static)
    marks = tuple(i in static for i in range(len(args))) if static else ()
    self.structure, self.leaves, self.objects = _engine.flatten(values, marks)
    self.lifted = Lifted(fun, self.structure, names, policy)
    if self.lifted.shares:
      values = tuple(
        value if i in static else trees.copied(value)
        for i, value in enumerate(values)
      )
      self.structure, self.leaves, self.objects = _engine.flatten(values, marks)
      self.lifted = Lifted(fun, self.structure, names, policy)
    self.num_args = len(args)
    self._described: list[tuple[Callable[..., Any], Any]] = []

  def framed(self, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a transformed function; copies know where originals were made.

    An error of jax's that no line of a user's function raised gets a note that
    says which function was transformed.
    """
    try:
      return _engine.framed(self.structure, self.objects, function, *args)
    except Exception as error:
      if not any(_has_run(fun, error) for fun, _ in self._described):
        transform = self.lifted.policy.transform
        places = {
          f"`nnx.{transform}` was given {info.func_src_info}."
          for _, info in self._described
        }
        for note in sorted(places):
          error.add_note(note)
      raise

  def described(
    self,
    function: Callable[..., Any],
    transform: str,
    numbers: Sequence[int] | None = None,
    lifted: Lifted | None = None,
    first: int = 0,
  ) -> Callable[..., Any]:
    """Lets errors of jax name the user's function and arguments.

    Args:
      function: a function of some of the leaves, made for this call.
      transform: what traces it.
      numbers: which leaves its arguments are, in order; all, if None.
      lifted: the user's function, if it is not that of the call.
      first: the number of its arguments that come before those of the call.
    """
    if numbers is None:
      numbers = range(len(self.leaves))
    lifted = lifted or self.lifted
    info = lifted.debug_info(transform, numbers, first)
    setattr(function, jax_private.DEBUG_INFO, info)
    self._described.append((lifted.fun, info))
    return function

  def path(self, leaf: int) -> str:
    """Returns what the user's function calls a leaf."""
    return self.lifted.leaf_names([leaf])[0]

  def with_leaves(
    self, positions: Sequence[int], values: Sequence[Any]
  ) -> tuple[Any, ...]:
    """Returns the leaves with some of them replaced."""
    leaves = list(self.leaves)
    for position, value in zip(positions, values):
      leaves[position] = value
    return tuple(leaves)

  def pick(self, positions: Sequence[int]) -> tuple[Any, ...]:
    """Picks some of the leaves."""
    return tuple(self.leaves[position] for position in positions)

  def apply(self, packed: Any) -> Any:
    """Does to the originals what the function did; returns its result."""
    return _engine.apply(packed, self.objects, self.leaves)

  def apply_outputs(self, plan: Any, outputs: Sequence[Any]) -> Any:
    """Does what `apply` does, for outputs that a transform has regrouped."""
    return self.apply(_engine.packed_unflatten(plan, tuple(outputs)))


def _has_run(fun: Callable[..., Any], error: BaseException) -> bool:
  """Tells whether an error came through the code of a function."""
  while isinstance(fun, functools.partial):
    fun = fun.func
  code = getattr(inspect.unwrap(fun), "__code__", None)
  traceback = error.__traceback__
  while traceback is not None and traceback.tb_frame.f_code is not code:
    traceback = traceback.tb_next
  return traceback is not None


def check_statics(lifted: Lifted) -> None:
  """Refuses static arguments with state, as a program would keep its values.

  Raises:
    TypeError: if a static argument is a Module that holds data.
  """
  records = lifted.structure._records
  for name, (start, _) in zip(
    lifted.root_names(), preorder.roots(lifted.structure)
  ):
    value = records[start].aux
    if (
      records[start].kind is _engine.NodeKind.STATIC
      and isinstance(value, _engine.ObjectBase)
      and _engine.flatten((value,))[1]
    ):
      raise TypeError(
        "Static arguments must hold no data, whose later values a compiled"
        f" function would not see, but `{name}` is a `{type(value).__name__}`"
        " with Variables or arrays. Do not make it static: what is static in"
        " it is anyway."
      )


class Static:
  """A value that travels through a transform of jax outside of the arrays."""

  __slots__ = ("value",)

  def __init__(self, value: Any):
    self.value = value


pytrees.register_static_type(Static)


def is_array(value: Any) -> bool:
  """Tells whether a leaf is something that jax can trace."""
  return isinstance(value, (jax.Array, np.ndarray, *_SCALARS)) or (
    hasattr(value, "shape") and hasattr(value, "dtype")
  )


def leaves_of_roots(structure: Any, roots: Iterable[int]) -> tuple[int, ...]:
  """Returns the leaves that are reached first from some of the roots."""
  wanted, records = frozenset(roots), structure._records
  return tuple(
    leaf
    for root, (start, end) in enumerate(preorder.roots(structure))
    if root in wanted
    for leaf in preorder.leaves(records, start, end)
  )


def run_jaxpr(jaxpr: Any, *values: Any) -> list[Any]:
  """Evaluates a closed jaxpr, under whatever trace is current.

  Args:
    jaxpr: the closed jaxpr.
    *values: its arguments.

  Returns:
    Its outputs.
  """
  return list(jax_private.run_jaxpr(jaxpr, values))
