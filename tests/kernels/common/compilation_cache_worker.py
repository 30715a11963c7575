"""A process with a persistent compilation cache; prints what it saw as JSON.

Every function has the same name, so that programs differ in nothing but their
options. Numbers are compared with float64 NumPy.

  compilation_cache_worker.py sweep DIRECTORY
  compilation_cache_worker.py loop DIRECTORY
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
import functools
import gc
import hashlib
import json
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import kernels
from kernels import batch_stat, decode_attention, kv_cache
from kernels.common import dispatch, libraries
import nnx
from tests.kernels.decode_attention import oracle as attention_oracle
from tests.kernels.kv_cache import oracle as cache_oracle
from tests.testing import oracles

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6, 4)).astype(np.float32)
K, V = RNG.normal(size=(2, 4, 16, 2, 4)).astype(np.float32)
Q = RNG.normal(size=(4, 1, 4, 4)).astype(np.float32)
NEW_K, NEW_V = RNG.normal(size=(2, 4, 1, 2, 4)).astype(np.float32)
INDEX = np.array([3, 9, 14, 6], np.int32)
ONES, ZEROS = np.ones(4, np.float32), np.zeros(4, np.float32)

Case = tuple[Callable[..., Any], tuple[Any, ...], Any]


def norm_case(**options: Any) -> Case:
  def fn(x):
    return batch_stat.batch_norm(
      x, ONES, ZEROS, ZEROS, ONES, implementation="cpu", **options
    ).y

  relu = options.pop("relu", False)
  want = oracles.batch_norm(X, relu=relu, **options).y
  if relu:
    options["activation"] = "relu"
  return fn, (X,), (want,)


def norm_grad_case(**options: Any) -> Case:
  dy = np.cos(np.arange(X.size, dtype=np.float32)).reshape(X.shape)

  def fn(x):
    def loss(x):
      y = batch_stat.batch_norm(
        x, ONES, ZEROS, ZEROS, ONES, implementation="cpu", **options
      ).y
      return jnp.vdot(y, dy)

    return jax.grad(loss)(x)

  want = oracles.batch_norm_grad(X, dy, ONES, ZEROS, **options)
  return fn, (X,), (want.dx,)


def stat_case(**options: Any) -> Case:
  def fn(x):
    out = batch_stat.update(
      x, np.zeros(4), np.ones(4), implementation="cpu", **options
    )
    return out.batch_mean, out.batch_var

  want = oracles.batch_norm(X)
  return fn, (X,), (want.mean, want.var)


def update_case(**options: Any) -> Case:
  def fn(k, v, new_k, new_v, index):
    return kv_cache.update(
      k, v, new_k, new_v, index, implementation="cpu", **options
    )

  index = INDEX + (16 if options.get("ring") else 0)
  args = (K, V, NEW_K, NEW_V, index)
  return fn, args, cache_oracle.update(*args, **options)


def attend_case(**options: Any) -> Case:
  def fn(k, v, q, index):
    return decode_attention.attend(
      k, v, q, index, implementation="cpu", **options
    )

  want, *_ = attention_oracle.attend(
    K, V, Q, INDEX - 1, np.ones(4, int), **options
  )
  return fn, (K, V, Q, INDEX), (want,)


def decode_case(**options: Any) -> Case:
  def fn(k, v, q, new_k, new_v, index):
    return decode_attention.decode_attention(
      k, v, q, new_k, new_v, index, implementation="cpu", **options
    )

  caches = cache_oracle.update(K, V, NEW_K, NEW_V, INDEX)
  want, *_ = attention_oracle.attend(
    *caches, Q, INDEX, np.ones(4, int), **options
  )
  return fn, (K, V, Q, NEW_K, NEW_V, INDEX), (*caches, want)


def matmul_case(**options: Any) -> Case:
  w = np.cos(np.arange(4 * 8, dtype=np.float32)).reshape(4, 8)

  def fn(x):
    y = kernels.matmul(x, w, implementation="cpu", **options)
    return (y.astype(jnp.float32),)

  want = np.float64(X) @ np.float64(w)
  kind = jnp.dtype(options.get("preferred_element_type", "float32"))
  return fn, (X,), (want.astype(np.float32).astype(kind).astype(np.float32),)


def cases() -> list[Case]:
  return [
    *(norm_case(epsilon=e) for e in (1e-5, 0.5, 2.0)),
    norm_case(epsilon=0.5, relu=True),
    *(norm_grad_case(epsilon=e) for e in (0.5, 2.0)),
    stat_case(),
    stat_case(use_fast_variance=False),
    update_case(),
    update_case(ring=True),
    *(attend_case(softcap=c) for c in (None, 0.5, 2.0)),
    *(attend_case(window=w) for w in (1, 3, (2, 0))),
    *(attend_case(scale=s) for s in (0.25, 3.0)),
    attend_case(chunk=4),
    *(decode_case(softcap=c) for c in (0.5, 2.0)),
    decode_case(window=2),
  ]


def cpu_cases() -> list[Case]:
  """Of what has no kernel but for the CPU."""
  return [
    matmul_case(preferred_element_type=dtype)
    for dtype in ("float32", "float16")
  ]


def _mesh(kind):
  return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)


def _placed(mesh, args):
  return [jax.device_put(arg, NamedSharding(mesh, P("a"))) for arg in args]


def single(jit, case):
  fn, args, _ = case
  return jit(fn)(*args)


def auto(jit, case):
  fn, args, _ = case
  return jit(fn)(*_placed(_mesh(AxisType.Auto), args))


def explicit(jit, case):
  fn, args, _ = case
  mesh = _mesh(AxisType.Explicit)
  with jax.set_mesh(mesh):
    return jit(fn)(*_placed(mesh, args))


def partial(jit, case):
  fn, args, _ = case
  mesh = _mesh(AxisType.Auto)
  mapped = jax.shard_map(
    fn, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"b"}
  )
  return jit(mapped)(*_placed(mesh, args))


def whole(jit, case):
  fn, args, _ = case
  mesh = _mesh(AxisType.Auto)
  mapped = jax.shard_map(
    fn, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
  )
  return jit(mapped)(*_placed(mesh, args))


ROUTES = (single, auto, explicit, partial, whole)


class Model(nnx.Module):
  """A bit of all kernels: it normalises, attends, and keeps a cache."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.attend = nnx.MultiHeadAttention(
      2,
      4,
      decode=False,
      rngs=rngs,
      kernel_metadata={"out_sharding": (None, "b", None)},
    )

  def __call__(self, x):
    return self.attend(self.norm(x))


def models() -> Iterator[tuple[str, bool]]:
  """Yields whether training and decoding do the same by every kind of jit."""
  wanted: dict[str, Any] = {}
  for where in ("one", "mesh"):
    mesh = _mesh(AxisType.Auto)
    context = jax.set_mesh(mesh) if where == "mesh" else nullcontext()
    x = _placed(mesh, (X,))[0] if where == "mesh" else X
    for jit in (nnx.jit, jax.jit):
      with context:
        for task, got in (
          ("train", _train(jit, x)),
          ("decode", _decode(jit, x)),
        ):
          got = [np.asarray(a) for a in got]
          right = check(got, wanted.setdefault(task, got))
          yield f"{task} {where} {jit.__module__}", right


def _train(jit, x):
  model = Model()
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

  def step(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
    optimizer.update(model, grads)
    return model.attend.out.kernel[...]

  return [_call(jit, step, (model, optimizer), x) for _ in range(2)]


def _decode(jit, x):
  model = Model()
  model.eval()
  model.attend.decode = True
  model.attend.init_cache(X.shape)

  def step(model, x):
    return model(x)

  return [_call(jit, step, (model,), x[:, i : i + 1]) for i in range(2)]


def _call(jit, step, objects, x):
  """Calls a step of objects, which plain jax has as their State."""
  if jit is nnx.jit:
    return jit(step)(*objects, x)
  graphdef, state = nnx.split(objects)

  @jax.jit
  def pure(state, x):
    objects = nnx.merge(graphdef, state)
    result = step(*objects, x)
    return result, nnx.state(objects)

  result, state = pure(state, x)
  nnx.update(objects, state)
  return result


def check(got: Any, want: Any) -> bool:
  return all(
    np.allclose(g, w, rtol=1e-4, atol=1e-4)
    for g, w in zip(jax.tree.leaves(got), want, strict=True)
  )


def texts() -> Iterator[tuple[str, str]]:
  """Yields what is compiled for other platforms, on one device and on eight."""
  mesh = _mesh(AxisType.Auto)
  with mock.patch.object(libraries.Library, "missing", lambda self: None):
    for i, (fn, args, _) in enumerate(cases()):
      for platform, implementation in (("cuda", "cuda"), ("tpu", "auto")):
        run = functools.partial(_run_as, implementation, fn)
        for where, placed in (("one", args), ("eight", _placed(mesh, args))):
          traced = jax.jit(run).trace(*placed)
          lowered = traced.lower(lowering_platforms=(platform,)).as_text()
          digest = hashlib.sha256(lowered.encode()).hexdigest()
          yield f"{i} {platform} {where}", digest


def _run_as(implementation, fn, *args):
  """Runs a case by another implementation than it asks for."""

  def call(op, *args, **params):
    return op.primitive.bind(
      *args, **params | {"implementation": implementation}
    )

  with mock.patch.object(dispatch.Op, "__call__", call):
    return fn(*args)


def batch_norm_modules() -> Iterator[bool]:
  """Yields whether Modules that differ in a number are told apart."""
  mesh = _mesh(AxisType.Auto)
  (x,) = _placed(mesh, (X,))
  for epsilon in (0.25, 0.75, 4.0):
    norm = nnx.BatchNorm(
      4, use_running_average=False, epsilon=epsilon, rngs=nnx.Rngs(0)
    )
    y = nnx.jit(lambda norm, x: norm(x))(norm, x)
    yield check(y, (oracles.batch_norm(X, epsilon=epsilon).y,))


def sweep() -> dict[str, Any]:
  right = {
    f"{route.__name__} {jit.__module__} {i}": check(route(jit, case), case[2])
    for route in ROUTES
    for jit in (jax.jit, nnx.jit)
    for i, case in enumerate(cases() + cpu_cases())
    if jit is jax.jit or route in (single, auto) or i % 4 == 0
  }
  right |= {f"module {i}": ok for i, ok in enumerate(batch_norm_modules())}
  right |= dict(models())
  return {"right": right, "texts": dict(texts())}


def loop() -> dict[str, Any]:
  """A new program at every turn, each gone before the next is made."""
  right = {}
  for i in range(60):
    case = attend_case(softcap=0.2 + 0.05 * i)
    right[str(i)] = check(auto(jax.jit, case), case[2])
    del case
    jax.clear_caches()
    gc.collect()
  return {"right": right}


def main() -> None:
  mode, directory = sys.argv[1:]
  jax.config.update("jax_num_cpu_devices", 8)
  jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  events: dict[str, int] = {}

  def count(event: str, **_: Any) -> None:
    events[event] = events.get(event, 0) + 1

  jax.monitoring.register_event_listener(count)
  gc.freeze()  # the collector, called at every turn, need not look at jax
  seen = {"sweep": sweep, "loop": loop}[mode]()
  for name in ("hits", "misses"):
    seen[name] = events.get(f"/jax/compilation_cache/cache_{name}", 0)
  print(json.dumps(seen))


if __name__ == "__main__":
  main()
