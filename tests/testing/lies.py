"""Calls of XLA FFI handlers that lie about one thing at a time.

A handler is called by programs, and a program need not come from our Python
layer. So each is called as our layer would call it, but for one operand, result
or attribute, and must answer with a sentence that names the liar:

    for call in lies.recorded(my_op, x):
      lies.check(call, operands=("x",), results=("y",), values={"n": (-1,)})

Under AddressSanitizer, what a handler reads or writes in vain is seen as well.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Type:
  """Shape and dtype of an array."""

  shape: tuple[int, ...]
  dtype: Any

  @classmethod
  def of(cls, array: Any) -> "Type":
    return cls(tuple(array.shape), jnp.dtype(array.dtype))

  def struct(self) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(self.shape, self.dtype)

  def filled(self) -> np.ndarray:
    """An array of ones, or of zeros if it holds integers."""
    fill = 0 if jnp.issubdtype(self.dtype, jnp.integer) else 1
    return np.full(self.shape, fill, self.dtype)


@dataclasses.dataclass(frozen=True)
class Call:
  """One call of a handler."""

  target: str
  operands: tuple[Type, ...]
  results: tuple[Type, ...]
  attributes: dict[str, Any]

  def make(self, arrays: dict[Type, jax.Array]) -> None:
    """Makes the call, in a program that has arrays of each type."""
    # An effect, so that it is made though nobody reads what it returns.
    call = jax.ffi.ffi_call(
      self.target, [r.struct() for r in self.results], has_side_effect=True
    )
    call(*(arrays[operand] for operand in self.operands), **self.attributes)


# To compile a program costs more than a call in it, up to about so many.
_CALLS_OF_A_PROGRAM = 64


def _programs(calls: Sequence[Call]) -> list[list[int]]:
  """Shares out the calls, by number, among programs.

  No two of a program are equal: jax would take one for the other, even where an
  attribute is 0 in one and 0.0 in the other.
  """
  programs: list[list[int]] = []
  for i, call in enumerate(calls):
    for program in programs:
      if len(program) < _CALLS_OF_A_PROGRAM and not any(
        calls[j] == call for j in program
      ):
        program.append(i)
        break
    else:
      programs.append([i])
  return programs


def _answers(calls: Sequence[Call]) -> list[str | None]:
  """Makes each call, on ones; returns the errors' texts, None without one."""
  answers: list[str | None] = [None] * len(calls)
  for program in _programs(calls):
    types = sorted({t for i in program for t in calls[i].operands}, key=repr)
    arrays = [jax.device_put(t.filled()) for t in types]

    def chosen(n, *arrays, program=program, types=types):
      there = dict(zip(types, arrays, strict=True))
      makers = [functools.partial(calls[i].make, there) for i in program]
      jax.lax.switch(n, makers)
      return n + 1

    compiled = jax.jit(chosen).lower(np.int32(0), *arrays).compile()
    for n, i in enumerate(program):
      try:
        jax.block_until_ready(compiled(np.int32(n), *arrays))
      except jax.errors.JaxRuntimeError as error:
        answers[i] = str(error)
  return answers


def recorded(fn: Callable[..., Any], *args: Any) -> list[Call]:
  """Returns the calls of handlers that `fn` makes, as it makes them.

  Args:
    fn: Is lowered, not run.
    *args: Of it.
  """
  calls = []
  original = jax.ffi.ffi_call

  def record(target, results, **options):
    call = original(target, results, **options)

    def run(*operands, **attributes):
      calls.append(
        Call(
          target,
          tuple(map(Type.of, operands)),
          tuple(map(Type.of, results)),
          attributes,
        )
      )
      return call(*operands, **attributes)

    return run

  with mock.patch.object(jax.ffi, "ffi_call", record):
    jax.jit(lambda *arrays: fn(*arrays)).lower(*args)
  return calls


def wrong_types(right: Type) -> Iterator[Type]:
  """Yields types that differ from `right` in the dtype, a size or the rank."""
  for dtype in ("int16", "float32", "complex64"):
    if jnp.dtype(dtype) != right.dtype:
      yield Type(right.shape, jnp.dtype(dtype))
  shapes = [(1, *right.shape), (*right.shape, 1)]
  if right.shape:
    shapes += [right.shape[1:], right.shape[:-1]]
  for axis, size in enumerate(right.shape):
    for other in {0, size - 1, 9 * size + 1} - {size, -1}:
      shapes.append((*right.shape[:axis], other, *right.shape[axis + 1 :]))
  for shape in shapes:
    yield Type(shape, right.dtype)


def _wrong_attributes(
  attributes: dict[str, Any], values: dict[str, Sequence[Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
  for name, right in attributes.items():
    rest = {k: v for k, v in attributes.items() if k != name}
    yield name, rest
    for wrong in (np.float32(0.25), np.float64(0.25), np.int32(1)):
      if type(wrong) is not type(right):
        yield name, rest | {name: wrong}
    for value in values[name]:
      yield name, rest | {name: type(right)(value)}
  yield "of_nothing", attributes | {"of_nothing": np.int64(1)}


def check(
  call: Call,
  *,
  operands: Sequence[str],
  results: Sequence[str],
  values: dict[str, Sequence[Any]],
  fits: Callable[[str, Type], bool] = lambda name, wrong: False,
  optional: int = 0,
) -> int:
  """Checks that a handler refuses each lie, and the truth not.

  Args:
    call: The truth.
    operands: Their names.
    results: Their names.
    values: For each attribute, values of its dtype that it must not have.
    fits: `fits(name, wrong)` says whether an array may be of that type too.
    optional: How many of the last operands may be left out.

  Returns:
    How many lies were told.
  """
  assert len(operands) == len(call.operands), (operands, call.operands)
  assert len(results) == len(call.results), (results, call.results)
  assert values.keys() == call.attributes.keys(), call.attributes
  # Calls, whom they lie about (None where XLA says so itself), and how.
  told: list[tuple[Call, str | None, str]] = []
  # A call whose only result is empty is no call.
  alone = len(results) == 1
  for field, names in (("operands", operands), ("results", results)):
    types = getattr(call, field)
    for i, (name, right) in enumerate(zip(names, types)):
      for wrong in wrong_types(right):
        empty = field == "results" and alone and 0 in wrong.shape
        if fits(name, wrong) or empty:
          continue
        lying = (*types[:i], wrong, *types[i + 1 :])
        liar = dataclasses.replace(call, **{field: lying})
        told.append((liar, name, f"{name} {wrong}"))
    more = (*types, Type((3,), jnp.dtype("float32")))
    for other in (more, types[: -1 - (optional if field == "operands" else 0)]):
      lie = f"{len(other)} {field}"
      if field == "results" and not other:
        continue
      told.append((dataclasses.replace(call, **{field: other}), None, lie))
  for name, attributes in _wrong_attributes(call.attributes, values):
    lie = f"{name} = {attributes.get(name)!r}"
    liar = dataclasses.replace(call, attributes=attributes)
    told.append((liar, name, lie))
  truth, *answers = _answers([call, *(liar for liar, *_ in told)])
  assert truth is None, truth
  for (_, name, lie), said in zip(told, answers, strict=True):
    assert said is not None, f"{call.target} does not refuse {lie}"
    if name is not None:
      assert f"`{name}`" in said, f"{call.target} does not name {lie}: {said}"
  return len(told)
