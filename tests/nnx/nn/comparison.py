"""A layer of ours and the layer of flax.nnx, side by side."""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
import types
from typing import Any

from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx

# Compiles in half the time what runs once, on some numbers.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

# Things that are made anew by each library, and so never equal.
_OWN = object()


def rows(state: Any, library: Any) -> dict[tuple[Any, ...], Any]:
  """Maps paths to Variables."""
  return dict(library.to_flat_state(state))


def layout(state: Any, library: Any) -> dict[str, list[Any]]:
  """Maps paths to the type, shape and dtype of their Variables."""
  result = {}
  for path, leaf in rows(state, library).items():
    value = leaf[...]
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    result["/".join(map(str, path))] = [
      type(leaf).__name__ if isinstance(leaf, library.Variable) else "Array",
      list(value.shape),
      "key" if is_key else value.dtype.name,
    ]
  return result


def numbers(x: Any) -> np.ndarray:
  """Values as NumPy knows them."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  x = np.asarray(x)
  return x.astype(np.float64) if x.dtype.name == "bfloat16" else x


def assert_same_state(ours: Any, theirs: Any, rtol: float | None = None):
  """Checks paths, types, shapes, dtypes and values: to the bit without rtol."""
  mine, other = nnx.state(ours), flax_nnx.state(theirs)
  assert layout(mine, nnx) == layout(other, flax_nnx)
  other = rows(other, flax_nnx)
  for path, leaf in rows(mine, nnx).items():
    got, want = numbers(leaf[...]), numbers(other[path][...])
    if rtol is None or got.dtype.kind in "iub":
      np.testing.assert_array_equal(got, want, err_msg=str(path))
    else:
      np.testing.assert_allclose(
        got, want, rtol=rtol, atol=rtol, err_msg=str(path)
      )


def _arguments(library: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
  """Takes what is a function `library -> argument` at its word."""
  return {
    name: value(library) if isinstance(value, Own) else value
    for name, value in kwargs.items()
  }


class Own:
  """An argument that each library makes for itself.

  Attributes:
    make: `library -> argument`.
  """

  def __init__(self, make: Callable[[Any], Any]):
    self.make = make

  def __call__(self, library: Any) -> Any:
    return self.make(library)


RNGS = Own(lambda library: library.Rngs(0, params=1, dropout=2))


def pair(
  name: str, *args: Any, rngs: Any = RNGS, randomize: bool = True, **kwargs: Any
) -> tuple[Any, Any]:
  """Makes both layers, checks that they start the same, and shakes both.

  Args:
    name: of the class, in both libraries.
    *args: for both constructors; `Own` where each needs its own.
    rngs: None for layers without.
    randomize: whether to give the parameters other values, so that biases of
      0 and scales of 1 do not hide errors.
    **kwargs: for both constructors.

  Returns:
    Ours and theirs.
  """
  if rngs is not None:
    kwargs["rngs"] = rngs
  ours, theirs = (
    getattr(library, name)(
      *(arg(library) if isinstance(arg, Own) else arg for arg in args),
      **_arguments(library, kwargs),
    )
    for library in (nnx, flax_nnx)
  )
  assert_same_state(ours, theirs)
  if randomize:
    shake(ours, theirs)
  return ours, theirs


def with_param_scales(theirs: Any) -> Any:
  """Gives a `WeightNorm` of Flax up to 0.12.8 what those after it have.

  Its scales were arrays, which no optimizer trained.
  """
  for path, scale in (theirs.scales or {}).items():
    if not isinstance(scale, flax_nnx.Variable):
      theirs.scales[path] = flax_nnx.Param(scale)
  return theirs


def shake(ours: Any, theirs: Any) -> None:
  """Adds the same noise to the floating parameters of both."""
  rng = np.random.default_rng(0)
  other = rows(flax_nnx.state(theirs, flax_nnx.Param), flax_nnx)
  for path, leaf in rows(nnx.state(ours, nnx.Param), nnx).items():
    value = np.asarray(leaf[...])
    noise = rng.normal(size=leaf.shape, scale=0.1)
    value = jnp.asarray(value + noise.astype(value.dtype))
    leaf[...] = value
    other[path][...] = value


def _program(library, layer, inputs, call, grads):
  """A call of the layer, as one compiled program.

  That is many times faster than to compile each operation on its own. After a
  run, `layer` has the state that it would have after the call.

  Returns:
    `inputs -> (output, gradients)`, those of parameters and floating inputs or
    None. Of the inputs, only the floating ones may change between runs.
  """
  graphdef = library.graphdef(layer)
  moving = [
    i
    for i, x in enumerate(inputs)
    if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
  ]

  def loss(params, xs, rest):
    full = list(inputs)
    for i, x in zip(moving, xs):
      full[i] = x
    own = jax.tree.map(lambda x: x, rest)  # Variables of this trace
    model = library.merge(graphdef, params, own)
    y = call(model, *full)
    total = sum(
      jnp.sum(
        jnp.real(leaf).astype(jnp.float32)
        * jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape)
      )
      for leaf in jax.tree.leaves(y)
    )
    return total, (y, library.state(model))

  @jit
  def compiled(*args):
    if not grads:
      return None, loss(*args)[1]
    return jax.grad(loss, argnums=(0, 1), has_aux=True)(*args)

  def run(inputs):
    _, params, rest = library.split(layer, library.Param, ...)
    xs = [inputs[i] for i in moving]
    gradients, (y, state) = compiled(params, xs, rest)
    library.update(layer, state)
    return y, gradients

  return run


def assert_same(
  ours: Any,
  theirs: Any,
  *inputs: Any,
  rtol: float = 2e-5,
  grad_rtol: float | None = None,
  grads: bool = True,
  call: Callable[..., Any] | None = None,
  then: Sequence[tuple[Any, ...]] = (),
  **kwargs: Any,
) -> None:
  """Checks outputs, gradients and the state after the call.

  Args:
    ours: Our layer.
    theirs: Its counterpart.
    *inputs: of both calls.
    rtol: Relative and absolute tolerance.
    grad_rtol: That of the gradients; `rtol`, if None.
    grads: Whether to compare gradients.
    call: `(layer, *inputs) -> outputs`, in place of calling the layer.
    then: inputs of further calls, of the same shapes: nothing is compiled for
      those.
    **kwargs: of both calls; `Own` where each needs its own.
  """

  def calls(library):
    if call is not None:
      return call
    return lambda layer, *xs: layer(*xs, **_arguments(library, kwargs))

  programs = [
    _program(library, layer, inputs, calls(library), grads)
    for library, layer in ((nnx, ours), (flax_nnx, theirs))
  ]
  for each in (inputs, *then):
    (got, got_grads), (want, want_grads) = (run(each) for run in programs)
    if grads:
      _assert_same_gradients(
        got_grads, want_grads, rtol if grad_rtol is None else grad_rtol
      )
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      assert a.shape == b.shape and a.dtype == b.dtype, (a, b)
      np.testing.assert_allclose(numbers(a), numbers(b), rtol=rtol, atol=rtol)
    assert_same_state(ours, theirs, rtol)


def _assert_same_gradients(got, want, tolerance):
  other = rows(want[0], flax_nnx)
  pairs = [
    (str(path), leaf[...], other[path][...])
    for path, leaf in rows(got[0], nnx).items()
  ]
  pairs += [
    (f"input {i}", a, b) for i, (a, b) in enumerate(zip(got[1], want[1]))
  ]
  for what, a, b in pairs:
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    a, b = numbers(a), numbers(b)
    scale = max(1.0, float(np.max(np.abs(b), initial=0)))
    np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance * scale, err_msg=what
    )


def _simple(value: Any) -> Any:
  """What can be compared of a default."""
  if value is inspect.Parameter.empty or value is None:
    return value
  if isinstance(value, type) and not value.__module__.startswith("jax"):
    return value.__name__
  if isinstance(value, (bool, int, float, str, tuple, type)):
    return value
  if hasattr(value, "items"):
    return dict(value)
  if getattr(value, "__module__", "").startswith("jax"):
    # Initializers with settings are made anew.
    return getattr(value, "__qualname__", value)
  return getattr(value, "__name__", _OWN)


def assert_same_signature(
  ours: Any,
  theirs: Any,
  own: Sequence[str] = (),
  defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> None:
  """Checks names, order, kinds and defaults of parameters.

  Args:
    ours: Our function.
    theirs: Its counterpart.
    own: Names of what ours takes besides, after the rest and by name alone.
      Not every release of Flax need lack them.
    defaults: Defaults of ours that differ, by name.
  """

  def parameters(function):
    found = [
      (p.name, p.kind.name, _simple(p.default))
      for p in inspect.signature(function).parameters.values()
    ]
    # `**kwargs`, which Python has last, goes first: ours may have more before.
    return sorted(found, key=lambda p: p[1] != "VAR_KEYWORD")

  mine, other = parameters(ours), parameters(theirs)
  other = [(name, kind, defaults.get(name, x)) for name, kind, x in other]
  assert mine[: len(other)] == other, function_name(ours)
  more = [(name, kind) for name, kind, _ in mine[len(other) :]]
  has = {name for name, *_ in other}
  expected = [(name, "KEYWORD_ONLY") for name in own if name not in has]
  assert more == expected, function_name(ours)


def function_name(function: Any) -> str:
  """How messages call it."""
  return getattr(function, "__qualname__", repr(function))


def array(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
  """Normal random numbers."""
  rng = np.random.default_rng((seed, *shape))
  return jnp.asarray(rng.normal(size=shape), dtype)
