"""Boxes: values of jax that hold a pytree, and that any trace can write.

A hijax Variable keeps its value in one, as one with `ref=True` keeps it in a
mutable array. What jax has for it is an experiment that changes from release to
release, and so all of it is here. There are two kinds:

- jax up to 0.11 has mutable types, whose values may change their structure:
  `Box` is one, with three primitives;
- later ones have none. There a pytree of mutable arrays, `jax.Ref`, is the box:
  its structure, shapes and dtypes stay while a trace is active.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from typing import Any, NoReturn

import jax
from jax import core, experimental
from jax.interpreters import batching

from nnx.engine import jax_private

# The metadata in a box: pairs by name, as a Variable has them in a treedef.
Metadata = tuple[tuple[str, Any], ...]

hijax: Any = jax_private.hijax()

# Whether the structure of what is in a box may change under a trace.
CHANGES_STRUCTURE = hijax is not None


class Box:
  """A mutable value of jax, outside of all traces.

  Arithmetic and functions of `jax.numpy` work on what it holds.

  Example:

    >>> import jax, jax.numpy as jnp
    >>> from nnx.engine import boxes
    >>> box = boxes.new(float, jnp.ones(2), ())
    >>> jax.jit(lambda box: boxes.write(box, boxes.read(box) + 1, ()))(box)
    >>> boxes.read(box)
    Array([2., 2.], dtype=float32)

  Attributes:
    kind: what jax's texts call it by: the class of the Variable.
    leaves: the leaves of the value.
    treedef: its structure.
    metadata: what is kept along with it.
  """

  __slots__ = ("__weakref__", "kind", "leaves", "metadata", "treedef")
  __hash__ = object.__hash__

  kind: type
  leaves: tuple[Any, ...]
  treedef: Any
  metadata: Metadata

  def cur_qdd(self) -> Any:
    """Returns the type of the contents; jax asks for it under this name."""
    avals = tuple(map(jax.typeof, self.leaves))
    return Contents(avals, self.treedef, self.metadata)

  def __jax_array__(self) -> Any:
    return jax.numpy.asarray(read(self))

  def __getitem__(self, index: Any) -> Any:
    return read(self)[index]

  def __setitem__(self, index: Any, value: Any) -> None:
    _set_item(self, index, value)

  def __repr__(self) -> str:
    # Errors of jax show it.
    return f"<value of a hijax {self.kind.__name__}: {read(self)!r}>"


def _set_item(box: Any, index: Any, value: Any) -> None:
  old = read(box)
  if isinstance(old, jax.Array):
    old = old.at[index].set(value)
  else:
    old[index] = value
  write(box, old, metadata(box))


if hijax is not None:
  _Type: Any = hijax.MutableHiType
  _EffectBase: Any = jax_private.effect_type()
  _PrimitiveBase: Any = hijax.HiPrimitive

  @dataclasses.dataclass(frozen=True)
  class Contents:
    """The type of what is in a box at some time."""

    avals: tuple[Any, ...]
    treedef: Any
    metadata: Metadata

    def to_tangent_qdd(self) -> Contents:
      """Returns the type of tangents; jax asks for it under this name."""
      avals = tuple(aval.to_tangent_aval() for aval in self.avals)
      return dataclasses.replace(self, avals=avals)

    def normalize(self) -> Contents:
      """Returns the type as jax compares it."""
      avals = tuple(aval.normalize() for aval in self.avals)
      return dataclasses.replace(self, avals=avals)

  class _BoxType(_Type):
    """The type of boxes of a kind."""

    def __init__(self, kind: type):
      self.kind = kind

    def __hash__(self) -> int:
      return hash((_BoxType, self.kind))

    def __eq__(self, other: Any) -> bool:
      return isinstance(other, _BoxType) and self.kind is other.kind

    def str_short(self, short_dtypes: bool = False, **_: Any) -> str:
      del short_dtypes
      return f"{self.kind.__name__}()"

    __repr__ = __str__ = str_short

    def lo_ty(self) -> list[Any]:
      """Raises: only outputs are lowered like this."""
      raise TypeError(
        f"A hijax Variable, here of type `{self.kind.__name__}`, must not be"
        " returned from a function that jax traces, nor be used in a branch"
        " that jax differentiates as a whole: jax has no mutable outputs."
        " Return `nnx.with_vars(x, hijax=False)`, and make of it what you want"
        " outside, by `nnx.with_vars(y, hijax=True)`."
      )

    @property
    def mutable_qdd(self) -> NoReturn:
      """Raises: jax asks for it where it cannot follow what is written."""
      raise TypeError(
        "jax does not differentiate branches and loops that write to hijax"
        f" Variables, here one of type `{self.kind.__name__}`, what depends on"
        " the argument, not even by `stop_gradient`. Differentiate inside, or"
        " pass `nnx.with_vars(x, hijax=False)` and write back what is returned."
      )

    def lower_val(self, value: Any) -> list[Any]:
      """Raises likewise."""
      del value
      return self.lo_ty()

    @property
    def shape(self) -> tuple[int, ...]:
      raise AttributeError(
        f"A hijax Variable, here of type `{self.kind.__name__}`, has no axis"
        " that `jax.vmap` and `jax.lax.scan` can map over. Let the function"
        " close over it, give it `None` in `in_axes`, or map over"
        " `nnx.with_vars(x, hijax=False)` and write back what is returned."
      )

    # What jax asks for between its high and its low types: the values of the
    # leaves, in the order of the leaves.

    def lo_ty_qdd(self, contents: Contents) -> list[Any]:
      return [low for aval in contents.avals for low in aval.lo_ty()]

    def _raised(self, contents: Contents, values: Any) -> tuple[Any, ...]:
      rest = iter(values)
      return tuple(
        aval.raise_val(*itertools.islice(rest, len(aval.lo_ty())))
        for aval in contents.avals
      )

    def new_from_loval(self, contents: Contents, *values: Any) -> Box:
      leaves = self._raised(contents, values)
      return _make(self.kind, leaves, contents.treedef, contents.metadata)

    def read_loval(self, contents: Any, box: Any = None) -> list[Any]:
      if not isinstance(contents, Contents):
        # jax asks for the values of a box alone, which it cannot do without.
        _refuse_argument(self)
      leaves = get_p.bind(box, avals=contents.avals)
      return [
        low
        for aval, leaf in zip(contents.avals, leaves)
        for low in aval.lower_val(leaf)
      ]

    def update_from_loval(
      self, contents: Contents, box: Any, *values: Any
    ) -> None:
      set_p.bind(
        box,
        *self._raised(contents, values),
        treedef=contents.treedef,
        metadata=contents.metadata,
      )

    def to_tangent_aval(self) -> _BoxType:
      return self

    # What programs do with a leaf of a model that holds hijax Variables.
    __jax_array__ = hijax.aval_method(Box.__jax_array__)

    def _getitem(self, box: Any, index: Any) -> Any:
      return read(box)[index]

    def _setitem(self, box: Any, index: Any, value: Any) -> None:
      _set_item(box, index, value)

  class _Effect(_EffectBase):
    pass

  _effect = _Effect()
  hijax.control_flow_allowed_effects.add_type(_Effect)

  class _Primitive(_PrimitiveBase):
    """What the three have in common."""

    def impl(self, *args: Any, **params: Any) -> Any:
      return self.to_lojax(*args, **params)

    def is_high(self, *args: Any, **params: Any) -> bool:
      return True

    def transpose(self, *args: Any, **params: Any) -> Any:
      raise TypeError(_NOT_DIFFERENTIATED)

  class _New(_Primitive):
    def abstract_eval(self, *avals, kind, treedef, metadata):
      contents = Contents(avals, treedef, metadata)
      return hijax.AvalQDD(_BoxType(kind), contents), {_effect}

    def to_lojax(self, *leaves, kind, treedef, metadata):
      return _make(kind, leaves, treedef, metadata)

    def jvp(self, primals, tangents, **params):
      raise TypeError(_NOT_DIFFERENTIATED)

  class _Get(_Primitive):
    multiple_results = True

    def abstract_eval(self, box, *, avals):
      return avals, {_effect}

    def to_lojax(self, box, *, avals):
      return list(box.leaves)

    def jvp(self, primals, tangents, **params):
      raise TypeError(_NOT_DIFFERENTIATED)

  class _Set(_Primitive):
    multiple_results = True

    def abstract_eval(self, box, *avals, treedef, metadata):
      box.mutable_qdd.update(Contents(avals, treedef, metadata))
      return [], {_effect}

    def to_lojax(self, box, *leaves, treedef, metadata):
      box.leaves, box.treedef, box.metadata = leaves, treedef, metadata
      return []

    def jvp(self, primals, tangents, **params):
      raise TypeError(_NOT_DIFFERENTIATED)

  _NOT_DIFFERENTIATED = (
    "jax does not differentiate what is in a hijax Variable, but a derivative"
    " was asked for with respect to one, or of a value that was written into"
    " one. Differentiate with respect to `nnx.with_vars(params, hijax=False)`,"
    " and write `jax.lax.stop_gradient(value)`."
  )

  new_p = _New("new_variable")
  get_p = _Get("get_variable")
  set_p = _Set("set_variable")

  def _unmapped(primitive: Any, args: Any, dims: Any, **params: Any) -> Any:
    if any(dim is not None for dim in dims):
      raise TypeError(
        "A hijax Variable must not hold values with an axis of `jax.vmap`, but"
        " was to be made with one or written with one. Return the value from"
        " the mapped function, and write it outside; or make the Variable with"
        " `hijax=False`."
      )
    result = primitive.bind(*args, **params)
    return result, ([] if primitive.multiple_results else None)

  for _primitive in (new_p, set_p):
    batching.primitive_batchers[_primitive] = functools.partial(
      _unmapped, _primitive
    )

  def _make(kind: type, leaves: Any, treedef: Any, metadata: Metadata) -> Box:
    box = Box()
    box.kind, box.metadata = kind, metadata
    box.leaves, box.treedef = tuple(leaves), treedef
    return box

  hijax.register_hitype(Box, lambda box: _BoxType(box.kind))

  def new(kind: type, value: Any, metadata: Metadata) -> Any:
    """Puts a value into a new box of the current trace.

    Args:
      kind: the class of the Variable.
      value: a pytree.
      metadata: what to keep along with it.
    """
    leaves, treedef = jax.tree.flatten(value)
    if jax_private.outside_of_traces():
      return _make(kind, leaves, treedef, metadata)
    return new_p.bind(*leaves, kind=kind, treedef=treedef, metadata=metadata)

  def is_box(value: Any) -> bool:
    """Tells whether a value is a box, or a trace of one."""
    if type(value) is Box:
      return True
    return isinstance(value, core.Tracer) and isinstance(value.aval, _BoxType)

  def read(box: Any) -> Any:
    """Copies the value in a box.

    Raises:
      TypeError: if jax does not follow the box under this trace.
    """
    if type(box) is Box and jax_private.outside_of_traces():
      return jax.tree.unflatten(box.treedef, box.leaves)
    _check_condition(box)
    contents = experimental.cur_qdd(box)
    if contents is None:
      _refuse_argument(jax.typeof(box))
    leaves = get_p.bind(box, avals=contents.avals)
    return jax.tree.unflatten(contents.treedef, leaves)

  def _refuse_argument(box_type: Any) -> NoReturn:
    raise TypeError(
      "jax does not follow a hijax Variable, here one of type"
      f" `{box_type.kind.__name__}`, that is an argument of this transform. Let"
      " a branch of `jax.lax.switch` or the body of a loop close over it, which"
      " a function given to `jax.remat` cannot do either: to that pass"
      " `nnx.with_vars(x, hijax=False)`, and write back what it returns."
    )

  def _check_condition(box: Any) -> None:
    """Refuses what jax cannot do, and says nothing of.

    Raises:
      TypeError: if the box is from outside of a condition that is traced.
    """
    made_in = getattr(box, "_trace", None)
    if jax_private.in_condition_of(
      jax_private.trace_context().trace
    ) and not jax_private.in_condition_of(made_in):
      raise TypeError(
        "The `cond_fun` of `jax.lax.while_loop` must not read a hijax Variable,"
        f" but reads one of type `{jax.typeof(box).kind.__name__}`. Have"
        " `body_fun` return the condition as a part of the loop's value, or"
        " give the Variable to `nnx.while_loop` in its `init_val`."
      )

  def metadata(box: Any) -> Metadata | None:
    """Returns the metadata in a box; None where jax keeps none."""
    if type(box) is Box and jax_private.outside_of_traces():
      return box.metadata
    contents = experimental.cur_qdd(box)
    return None if contents is None else contents.metadata

  def write(box: Any, value: Any, metadata: Metadata | None) -> None:
    """Replaces what is in a box."""
    leaves, treedef = jax.tree.flatten(value)
    set_p.bind(box, *leaves, treedef=treedef, metadata=metadata)

else:

  def new(kind: type, value: Any, metadata: Metadata) -> Any:
    """Puts the leaves of a value into new mutable arrays."""
    del kind, metadata
    return jax.tree.map(jax.new_ref, value)

  def is_box(value: Any) -> bool:
    """Tells whether a value is in mutable arrays."""
    if isinstance(value, (jax.Ref, jax.Array)):
      return isinstance(value, jax.Ref)
    return any(isinstance(leaf, jax.Ref) for leaf in jax.tree.leaves(value))

  def read(box: Any) -> Any:
    """Copies the value in a box."""
    return jax.tree.map(lambda ref: ref[...], box)

  def metadata(box: Any) -> Metadata | None:
    """Returns None: there is no place for metadata."""
    return None

  def write(box: Any, value: Any, metadata: Metadata | None) -> None:
    """Replaces the values in a box, which must be alike."""
    del metadata
    refs, structure = jax.tree.flatten(box)
    leaves, given = jax.tree.flatten(value)
    leaves = [
      jax.numpy.asarray(leaf, ref.dtype if jax.numpy.ndim(leaf) == 0 else None)
      for ref, leaf in zip(refs, leaves)
    ]
    if given != structure or any(
      (leaf.shape, leaf.dtype) != (ref.shape, ref.dtype)
      for ref, leaf in zip(refs, leaves)
    ):
      refuse_structure(jax.tree.map(jax.typeof, box), value)
    for ref, leaf in zip(refs, leaves):
      ref[...] = leaf


def refuse_structure(old: Any, new: Any) -> NoReturn:
  """Raises the error for what mutable arrays cannot do.

  Args:
    old: what is in a box.
    new: what it was to be.
  """
  raise TypeError(
    "With this version of jax, a hijax Variable must keep the structure, shapes"
    f" and dtypes of its value, {old}, but was to be set to {new}."
  )


def opened(value: Any) -> Any:
  """Returns the value in a box, and any other value as it is."""
  return read(value) if is_box(value) else value


def _give_operators() -> None:
  """Has boxes, also traced ones, behave like their value in arithmetic."""
  names = "add sub mul matmul truediv floordiv mod pow".split()
  for name in names:
    forward: Any = getattr(operator, name)

    def method(self, other, _operation=forward):
      return _operation(read(self), opened(other))

    def reflected(self, other, _operation=forward):
      return _operation(opened(other), read(self))

    setattr(Box, f"__{name}__", method)
    setattr(Box, f"__r{name}__", reflected)
    if hijax is not None:  # `(type, tracer, other)`
      setattr(_BoxType, f"_{name}", lambda _, a, b, _m=method: _m(a, b))
      setattr(_BoxType, f"_r{name}", lambda _, a, b, _m=reflected: _m(a, b))


_give_operators()
