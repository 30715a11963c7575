"""Programs that are run in each mode with `nnx` and with `flax.nnx`."""

import os

# Before jax makes its backend, which the tests' first array does.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

from collections.abc import Callable, Mapping, Sequence
import functools
import types
from typing import Any
import warnings

from flax import nnx as flax_nnx
import jax
from jax.experimental import checkify as checkify_lib
import jax.numpy as jnp
import numpy as np

import nnx

Library = types.ModuleType
LIBRARIES = (nnx, flax_nnx)
MODES: dict[str, dict[str, bool]] = {
  "graph": {"graph": True, "graph_updates": True},
  "values": {"graph": True, "graph_updates": False},
  "tree": {"graph": False},
}


@functools.cache
def classes(lib: Library) -> types.SimpleNamespace:
  """Returns the same classes on one of the libraries."""

  class Plain(lib.Module):
    """A Module without Variables."""

    def __init__(self):
      self.size = 3
      self.table = lib.data(jnp.arange(2.0))

  class Model(lib.Module):
    """A Module with Variables, a static attribute, and one without Variables.

    Its arrays are floats, so that all of it can be differentiated.
    """

    def __init__(self, seed: float = 0.0):
      self.w = lib.Param(jnp.array([1.0, 2.0]) + seed)
      self.mean = lib.BatchStat(jnp.array([3.0, 4.0]))
      self.plain = Plain()
      self.size = 5

    def __call__(self, x):
      return (self.w[...] * x + self.plain.table).sum()

  return types.SimpleNamespace(Plain=Plain, Model=Model)


# Arguments: of a library, whatever the functions below take as their first.


def tree(lib: Library) -> Any:
  return classes(lib).Model()


def shared_variable(lib: Library) -> Any:
  model = classes(lib).Model()
  model.again = model.w
  return model


def shared_module(lib: Library) -> Any:
  model = classes(lib).Model()
  model.child = classes(lib).Model(1.0)
  model.again = model.child
  return model


def shared_plain(lib: Library) -> Any:
  model = classes(lib).Model()
  model.again = model.plain
  return model


def cycle(lib: Library) -> Any:
  model = classes(lib).Model()
  model.plain.parent = model
  return model


ARGUMENTS = (tree, shared_variable, shared_module, shared_plain, cycle)


# What a function does: of a library, its first argument and a number.


def reads(lib, model, x):
  del lib
  return model(x)


def writes(lib, model, x):
  del lib
  model.mean[...] = model.mean[...] + x
  return model(x)


def adds_a_variable(lib, model, x):
  model.new = lib.Param(x * jnp.ones(2))
  return model(x)


def removes_an_attribute(lib, model, x):
  del lib
  y = model(x)
  del model.size
  return y


def replaces_a_variable(lib, model, x):
  model.mean = lib.BatchStat(model.mean[...] + x)
  return model(x)


def changes_a_static(lib, model, x):
  del lib
  model.size = 7
  return model(x)


def changes_an_array(lib, model, x):
  del lib
  model.plain.table = model.plain.table + x
  return model(x)


def changes_metadata(lib, model, x):
  del lib
  model.w.set_metadata("note", "changed")
  return model(x)


def updates_to_another_shape(lib, model, x):
  state = lib.state(model, lib.BatchStat)
  lib.update(model, jax.tree.map(lambda mean: jnp.pad(mean * x, 1), state))
  return model(x)


def makes_a_model(lib, model, x):
  return model(x), classes(lib).Model(x)


def returns_the_model(lib, model, x):
  del lib
  return model(x), model


def returns_a_variable(lib, model, x):
  del lib
  return model(x), {"w": model.w}


def returns_a_value(lib, model, x):
  del lib
  return model(x), {"w": model.w[...]}


def returns_what_has_no_variables(lib, model, x):
  del lib
  model.plain.table = model.plain.table + x
  return model(x), model.plain


def returns_a_copy(lib, model, x):
  return model(x), lib.clone(model)


def returns_a_variable_twice(lib, model, x):
  new = lib.Param(x * jnp.ones(2))
  return model(x), [new, {"again": new}]


EFFECTS = (
  reads,
  writes,
  adds_a_variable,
  removes_an_attribute,
  replaces_a_variable,
  changes_a_static,
  changes_an_array,
  changes_metadata,
  updates_to_another_shape,
  makes_a_model,
  returns_the_model,
  returns_a_variable,
  returns_a_value,
  returns_what_has_no_variables,
  returns_a_copy,
  returns_a_variable_twice,
)

# Transforms: a library, a function of a model and a number that returns a
# scalar or a pair of one and something else, and the arguments that say the
# mode. They return what is called with the model and the number.


def jit(lib, f, **mode):
  return lib.jit(f, **mode)


def remat(lib, f, **mode):
  return lib.remat(f, **mode)


def checkify(lib, f, **mode):
  def checked(model, x):
    checkify_lib.check(x > 0, "not positive")
    return f(model, x)

  run = lib.checkify(checked, **mode)

  def call(model, x):
    error, result = run(model, x)
    return error.get(), result

  return call


def eval_shape(lib, f, **mode):
  return lambda model, x: lib.eval_shape(f, model, x, **mode)


def make_jaxpr(lib, f, **mode):
  mode = {"graph_updates": False, **mode}  # Flax insists, in tree mode too

  def call(model, x):
    jaxpr = lib.make_jaxpr(f, **mode)(model, x)
    return [str(value.aval) for value in jaxpr.jaxpr.outvars]

  return call


def cond(lib, f, **mode):
  return lambda model, x: lib.cond(x > 0, f, f, model, x, **mode)


def cond_reads(lib, f, **mode):
  """A branch that only reads beside one that does something."""

  def other(model, x):
    del x
    return jax.tree.map(jnp.zeros_like, f(tree(lib), 1.0))

  return lambda model, x: lib.cond(x < 0, f, other, model, x, **mode)


def switch(lib, f, **mode):
  return lambda model, x: lib.switch(1, [f, f], model, x, **mode)


def vmap(lib, f, **mode):
  run = lib.vmap(f, in_axes=(None, 0), **mode)
  return lambda model, x: run(model, x * jnp.array([1.0, 2.0]))


def vmap_mapped(lib, f, **mode):
  run = lib.vmap(f, in_axes=(0, None), **mode)

  def call(model, x):
    for _, value in lib.iter_graph(model, graph=True):
      if isinstance(value, lib.Variable):
        value.set_value(jnp.stack([value[...], 2 * value[...]]))
      elif isinstance(value, classes(lib).Plain):
        value.table = jnp.stack([value.table, 2 * value.table])
    return run(model, x)

  return call


def pmap(lib, f, **mode):
  run = lib.pmap(f, in_axes=(None, 0), axis_size=1, **mode)
  return lambda model, x: run(model, x * jnp.ones(1))


def shard_map(lib, f, **mode):
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
  spec = jax.sharding.PartitionSpec()
  return lib.shard_map(
    f, mesh=mesh, in_specs=(spec, spec), out_specs=spec, **mode
  )


def has_aux(lib, f) -> bool:
  return isinstance(f(tree(lib), 1.0), tuple)


def grad(lib, f, **mode):
  return lib.grad(f, has_aux=has_aux(lib, f), **mode)


def value_and_grad(lib, f, **mode):
  return lib.value_and_grad(f, argnums=1, has_aux=has_aux(lib, f), **mode)


def grad_of_both(lib, f, **mode):
  return lib.grad(f, argnums=(0, 1), has_aux=has_aux(lib, f), **mode)


def vjp(lib, f, **mode):
  def call(model, x):
    out, pull_back, *aux = lib.vjp(f, model, x, has_aux=has_aux(lib, f), **mode)
    return out, pull_back(jnp.ones(())), aux

  return call


def jvp(lib, f, **mode):
  def call(model, x):
    tangent = lib.clone(model, graph=True)
    out, *rest = lib.jvp(
      f, (model, x), (tangent, 1.0), has_aux=has_aux(lib, f), **mode
    )
    return out, rest

  return call


def custom_vjp(lib, f, **mode):
  rule = lib.custom_vjp(f, **mode)

  def forward(model, x):
    residual = lib.clone(model, graph=True), x
    return f(model, x), residual

  def backward(residual, cotangent):
    model, x = residual
    if mode == MODES["graph"]:
      return (jax.tree.map(jnp.ones_like, cotangent[0][0]), x)
    return (jax.tree.map(jnp.ones_like, model), x)

  rule.defvjp(forward, backward)

  def loss(model, x):
    out = rule(model, x)
    return out if isinstance(out, jax.Array) else out[0]

  return lib.grad(loss, argnums=(0, 1), **mode)


def transform_metadata(lib, f, **mode):
  with lib.set_graph_updates(mode.get("graph_updates", True)):
    return lib.transform_metadata(
      f, in_axes=(None, 0), partition="layers", graph=mode["graph"]
    )


def scan_carried(lib, f, **mode):
  """The model is carried; what the function returns is the output."""

  def body(model, x):
    return model, f(model, x)

  run = lib.scan(body, in_axes=(lib.Carry, 0), out_axes=(lib.Carry, 0), **mode)
  return lambda model, x: run(model, x * jnp.array([1.0, 2.0]))


def scan_same(lib, f, **mode):
  """The model is the same for all iterations, or not quite."""

  def body(total, model, x):
    out = f(model, x)
    first = out if isinstance(out, jax.Array) else out[0]
    return total + first, out

  run = lib.scan(
    body, in_axes=(lib.Carry, None, 0), out_axes=(lib.Carry, 0), **mode
  )
  return lambda model, x: run(0.0, model, x * jnp.array([1.0, 2.0]))


def while_loop(lib, f, **mode):
  def body(value):
    model, x = value
    f(model, x)
    return model, x + 1

  return lambda model, x: lib.while_loop(
    lambda value: value[1] < 4, body, (model, x), **mode
  )


def fori_loop(lib, f, **mode):
  def body(i, value):
    model, x = value
    f(model, x + i)
    return model, x

  return lambda model, x: lib.fori_loop(0, 2, body, (model, x), **mode)


TRANSFORMS = (
  jit,
  remat,
  checkify,
  eval_shape,
  make_jaxpr,
  cond,
  cond_reads,
  switch,
  vmap,
  vmap_mapped,
  pmap,
  shard_map,
  grad,
  value_and_grad,
  grad_of_both,
  vjp,
  jvp,
  custom_vjp,
  transform_metadata,
  scan_carried,
  scan_same,
  while_loop,
  fori_loop,
)


class Observer:
  """Turns results into what can be compared across libraries.

  Objects are numbered as they are met, so that what is shared shows.
  """

  def __init__(self, lib: Library):
    self.lib = lib
    self.numbers: dict[int, int] = {}
    self.kept: list[Any] = []

  def see(self, value: Any) -> Any:
    lib = self.lib
    if isinstance(value, lib.Variable):
      return self.once(
        value,
        lambda: (
          self.see(value.get_raw_value()),
          sorted(
            (name, item)
            for name, item in value.get_metadata().items()
            if name in ("note", "out_sharding")
          ),
        ),
      )
    if isinstance(value, lib.State):
      return "State", [(key, self.see(value[key])) for key in sorted(value)]
    if isinstance(value, lib.Pytree):
      attributes = {
        name: item
        for name, item in vars(value).items()
        if not name.startswith("_")
      }
      return self.once(value, lambda: self.see(attributes))
    if isinstance(value, Mapping):
      return "dict", [
        (key, self.see(value[key])) for key in sorted(value, key=str)
      ]
    if isinstance(value, Sequence) and not isinstance(value, str):
      return type(value).__name__, [self.see(item) for item in value]
    if isinstance(value, jax.ShapeDtypeStruct):
      return "abstract", value.shape, str(value.dtype)
    if isinstance(value, jax.Array):
      if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
      rounded = np.round(np.asarray(value, np.float64), 4) + 0.0
      return "array", str(value.dtype), rounded.tolist()
    if isinstance(value, (np.ndarray, np.generic)):
      return "array", str(value.dtype), np.asarray(value).tolist()
    if isinstance(value, (bool, int, float, str, type(None))):
      return value
    return type(value).__name__

  def once(self, value: Any, contents: Callable[[], Any]) -> Any:
    if id(value) in self.numbers:
      return f"#{self.numbers[id(value)]}"
    self.numbers[id(value)] = len(self.numbers)
    self.kept.append(value)
    return type(value).__name__, contents()


def outcome(lib: Library, run: Callable[[], Any]) -> tuple[Any, Any]:
  """Runs a program: what was observed, or None and the exception."""
  flax_nnx.graphlib.GRAPH_CONTEXT.__init__()  # an error leaves it in a mess
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # what Flax has deprecated
      result = run()
  except Exception as error:  # whatever either library raises
    return None, error
  return Observer(lib).see(result), None
