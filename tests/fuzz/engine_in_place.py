"""Programs that hold arrays by every route between calls of `nnx.jit`.

The oracle is the same program with updates in place switched off: all that it
sees must be equal bit by bit, and nothing may ever be deleted.
"""

from collections.abc import Callable
import copy
import functools
import gc
import pickle
import threading
from typing import Any
import weakref

import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.transforms import in_place_programs
from tests.fuzz import worker
from tests.testing import threads as threads_lib

_SIZE = 64


def _double(variable, value):
  return value * 2


class Model(nnx.Module):
  def __init__(self, seed):
    rng = np.random.default_rng(seed)

    def array():
      return jnp.asarray(rng.standard_normal(_SIZE), jnp.float32)

    self.a = nnx.Param(array())
    self.b = nnx.Param(array())
    self.hooked = nnx.Param(array(), on_get_value=_double)
    self.cache = nnx.Cache(jnp.zeros((8, _SIZE)))
    self.at = nnx.Cache(jnp.zeros((), jnp.int32))
    self.shared = self.a
    self.deep = nnx.List([nnx.Param(array()), nnx.Param(array())])

  def variables(self):
    return [self.a, self.b, self.hooked, self.cache, *self.deep]


class Fails(Exception):
  pass


def _step(model, x):
  model.a[...] += x * model.b
  model.hooked.value = jnp.sin(model.hooked.value) + x
  return model.a.sum()


def _swap(model, x):
  model.a.value, model.b.value = model.b.value + x, model.a.value * 2
  for p in model.deep:
    p.value = p.value + model.a


def _append(model, x):
  at = model.at.value % 8
  model.cache.value = jax.lax.dynamic_update_slice(
    model.cache.value, jnp.full((1, _SIZE), x), (at, 0)
  )
  model.at.value = at + 1
  return model.cache.value[at]


def _old(model, x):
  old = model.a.value
  model.a.value = old + x
  return old


def _both(model, x):
  model.b.value = model.b.value * x
  return model.b.value


def _forward(model, x):
  model.deep[0].value = model.b.value
  model.deep[1].value = model.deep[1].value - x


def _rotate(model, x):
  model.a.value, model.b.value = model.b.value, model.a.value
  model.cache.value = model.cache.value + x


def _read(model, x):
  return model.a + model.b * x, model.cache.value


def _give(model, x):
  return model.a.value, model.deep[1].value


def _fail(model, x):
  model.a.value = model.a.value + x
  raise Fails


def _callback(model, x):
  more = jax.pure_callback(
    lambda y: np.asarray(y) * 2, jax.ShapeDtypeStruct((), jnp.float32), x
  )
  model.a.value = model.a.value + more


_FUNCTIONS = [
  _step, _swap, _append, _old, _both, _forward, _rotate, _read, _give, _fail,
  _callback,
]  # fmt: skip


class Run:
  """One run of a program: what it holds, and what it has seen."""

  def __init__(self, functions, seed):
    self.functions = functions
    self.model = Model(seed)
    self.other = Model(seed + 1)
    self.held: list[Any] = []
    self.seen: list[bytes] = []

  def see(self, value):
    for leaf in jax.tree.leaves(value):
      self.seen.append(np.asarray(leaf).tobytes())

  def hold(self, value):
    self.held.append(value)

  def look(self):
    """Looks at all that is held, but not at the Variables."""
    gc.collect()  # cycles keep arrays that weak references find
    for value in self.held:
      if isinstance(value, bytes):
        self.seen.append(value)
      elif isinstance(value, weakref.ref):
        array = value()
        if array is not None:
          self.see(array)
      elif isinstance(value, functools.partial):
        self.see(value())
      else:
        self.see(value)


def _shard(array):
  return array.addressable_shards[0].data


def _thread(run, function):
  results: list[Any] = []
  thread = threading.Thread(target=lambda: results.append(function()))
  thread.start()
  thread.join()
  run.hold(results)


def _closure(run, variable):
  array = variable.value
  run.hold(functools.partial(lambda: array * 2))


def _compiled_closure(run, variable):
  array = variable.value
  run.hold(functools.partial(jax.jit(lambda: array * 2)))


def _jaxpr(run, x):
  run.hold(
    jax.jit(lambda y: run.functions["_read"](run.model, y))
    .trace(x)
    .jaxpr.consts
  )


def _without_jit(run, name, x):
  with jax.disable_jit():
    run.hold(run.functions[name](run.model, x))


def _with_nans(run, name, x):
  with jax.debug_nans(True):
    run.hold(run.functions[name](run.model, x))


def _in_a_trace(run, name, x):
  @nnx.jit
  def outer(model, x):
    return run.functions[name](model, x)

  run.hold(outer(run.model, x))


def _gradient(run, x):
  run.hold(nnx.grad(lambda m: (m.a.value * m.b.value).sum() * x)(run.model))


def _graph(run):
  graphdef, state = nnx.split(run.model)
  run.hold(state)
  return nnx.merge(graphdef, state)


# What a program does with a Variable, by every route that there is.
_ROUTES: list[Callable[[Run, Any], Any]] = [
  lambda run, v: run.hold(v.value),
  lambda run, v: run.hold(v[...]),
  lambda run, v: run.hold(v.raw_value),
  lambda run, v: run.hold(v.get_value()),
  lambda run, v: run.hold(v[0]),
  lambda run, v: run.hold(np.asarray(v.raw_value)),
  lambda run, v: run.hold(np.asarray(v)),
  lambda run, v: run.hold(np.from_dlpack(v.raw_value)),
  lambda run, v: run.hold(jnp.from_dlpack(v.raw_value)),
  lambda run, v: run.hold(memoryview(np.asarray(v.raw_value)).tobytes()),
  lambda run, v: run.hold(_shard(v.raw_value)),
  lambda run, v: run.hold(jax.device_put(v.raw_value)),
  lambda run, v: run.hold(jax.device_put(v.raw_value, jax.devices()[0])),
  lambda run, v: run.hold(jnp.asarray(v.raw_value).reshape(v.shape)),
  lambda run, v: run.hold(jnp.sin(v.raw_value)),
  lambda run, v: run.hold(weakref.ref(v.raw_value)),
  lambda run, v: run.hold(jax.tree.leaves(v)),
  lambda run, v: run.hold(v.copy().raw_value),
  lambda run, v: run.hold(copy.copy(v)),
  lambda run, v: run.hold(copy.deepcopy(v)),
  lambda run, v: run.hold(v.replace(v.raw_value * 1)),
  lambda run, v: run.hold(pickle.loads(pickle.dumps(v)).raw_value),
  lambda run, v: run.hold(repr(v).encode()),
  lambda run, v: run.hold(v + 0),
  lambda run, v: run.hold(jax.block_until_ready(v)),
  _closure,
  _compiled_closure,
  lambda run, v: _thread(run, lambda: v.value),
  lambda run, v: setattr(v, "value", v.raw_value),
  lambda run, v: setattr(v, "value", jnp.ones(v.shape)),
  lambda run, v: setattr(v, "value", _shard(v.raw_value)),
  lambda run, v: (
    setattr(v, "raw_value", run.other.a.raw_value)
    if v.shape == (_SIZE,)
    else None
  ),
  lambda run, v: (
    setattr(run.other.b, "raw_value", v.raw_value)
    if v.shape == (_SIZE,)
    else None
  ),
  lambda run, v: (
    v.copy_from(nnx.Param(v.raw_value)) if type(v) is nnx.Param else None
  ),
]

# What it does with the whole.
_DEEDS: list[Callable[[Run, float], Any]] = [
  lambda run, x: run.hold(nnx.state(run.model)),
  lambda run, x: run.hold(nnx.split(run.model)[1]),
  lambda run, x: run.hold(nnx.to_pure_dict(nnx.state(run.model))),
  lambda run, x: run.hold(nnx.clone(run.model)),
  lambda run, x: run.hold(copy.deepcopy(run.model)),
  lambda run, x: run.hold(jax.tree.leaves(run.model)),
  lambda run, x: run.hold(jax.tree.map(lambda y: y, run.model)),
  lambda run, x: setattr(run, "model", _graph(run)),
  lambda run, x: nnx.update(run.model, nnx.state(run.other)),
  lambda run, x: nnx.update(run.model, nnx.state(run.model)),
  _gradient,
  _jaxpr,
  lambda run, x: _without_jit(run, "_step", x),
  lambda run, x: _without_jit(run, "_give", x),
  lambda run, x: _with_nans(run, "_swap", x),
  lambda run, x: _with_nans(run, "_read", x),
  lambda run, x: _in_a_trace(run, "_step", x),
  lambda run, x: _in_a_trace(run, "_give", x),
  lambda run, x: run.held.clear(),
  lambda run, x: run.look(),
  lambda run, x: setattr(run, "model", run.other),
]


def _go(functions, rng, seed):
  run = Run(functions, seed)
  for _ in range(int(rng.integers(4, 30))):
    what, x = rng.random(), np.float32(rng.integers(1, 4))
    if what < 0.6:
      name = _FUNCTIONS[int(rng.integers(len(_FUNCTIONS)))].__name__
      for _ in range(int(rng.integers(1, 4))):
        try:
          result = functions[name](run.model, x)
        except Fails:
          continue
        if rng.random() < 0.3:
          run.hold(result)
        elif rng.random() < 0.3:
          run.see(result)
    elif what < 0.85:
      variables = run.model.variables()
      variable = variables[int(rng.integers(len(variables)))]
      _ROUTES[int(rng.integers(len(_ROUTES)))](run, variable)
    else:
      _DEEDS[int(rng.integers(len(_DEEDS)))](run, x)
    if run.held and rng.random() < 0.2:
      del run.held[int(rng.integers(len(run.held)))]
  run.look()
  run.see(nnx.state(run.model))
  run.see(nnx.state(run.other))
  return run.seen


def _compile_all():
  return {f.__name__: nnx.jit(f) for f in _FUNCTIONS}


def _make_small() -> None:
  in_place_programs.LEAST_ARRAY = in_place_programs.LEAST_TOTAL = 0
  in_place_programs.LEAST_FLOPS = 0


def programs(rng: np.random.Generator) -> worker.Case:
  """Compares with the switch off."""
  _make_small()
  here, there = _compile_all(), _compile_all()

  def case(rng):
    number = int(rng.integers(1 << 30))
    seen = _go(here, np.random.default_rng(number), number)
    with nnx.use_updates_in_place(False):
      expected = _go(there, np.random.default_rng(number), number)
    assert len(seen) == len(expected), (len(seen), len(expected))
    for i, (a, b) in enumerate(zip(seen, expected)):
      assert a == b, f"what was seen as the {i}-th differs"

  return case


def threads(rng: np.random.Generator) -> worker.Case:
  """Threads call, read, copy and write what others update in place."""
  _make_small()

  @nnx.jit
  def add(model, x):
    for variable in model.variables():
      # All elements are the same, and whole: torn reads show.
      variable.raw_value = variable.raw_value + x
    return model.a.sum()

  def case(rng):
    model = Model(0)
    for variable in model.variables():
      variable.raw_value = jnp.zeros(variable.shape, jnp.float32)

    def work(seed):
      inner = np.random.default_rng(seed)
      held = []
      for _ in range(30):
        variables = model.variables()
        variable = variables[int(inner.integers(len(variables)))]
        what = int(inner.integers(8))
        if what < 4:
          add(model, np.float32(1))
        elif what == 4:
          held.append(variable.raw_value)
        elif what == 5:
          held.append(np.asarray(variable.raw_value))
        elif what == 6:
          held.extend(jax.tree.leaves(nnx.state(model)))
        else:
          held.append(jnp.sin(variable.raw_value) * 0)
      for value in held:
        value = np.asarray(value)
        assert (value == value.flat[0]).all()
        assert value.flat[0] == np.round(value.flat[0])

    threads_lib.race(work, [int(rng.integers(1 << 30)) for _ in range(3)])

  return case
