"""What hijax Variables are and hold, written outside and under `jax.jit`."""

import jax
import jax.numpy as jnp

from tests.nnx.hijax import cases

CASES = cases.Cases()


@CASES.add
def make(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True, tag="t")
  return [
    isinstance(v, nnx.Param),
    v.hijax,
    v.ref,
    v[...],
    v.tag,
    v.get_metadata("tag"),
    v.shape,
    v.dtype,
    v.get_value(),
    v.get_raw_value(),
  ]


@CASES.add
def write(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  v[...] = v[...] * 2
  v[0] = 7.0
  a = v[1]
  v.set_value(v.get_value() + 1)
  return [v[...], a, v + 1, 2 * v, -v, v.sum()]


@CASES.add
def write_metadata(nnx):
  v = nnx.Param(1.0, hijax=True)
  v.set_metadata(a=3)
  return [v.a, v.get_metadata("a"), v.get_metadata("hijax")]


@CASES.add
def change_hijax(nnx):
  v = nnx.Param(1.0, hijax=True)
  v.set_metadata(hijax=False)


@CASES.add
def del_hijax(nnx):
  v = nnx.Param(1.0, hijax=True)
  v.del_metadata("hijax")


@CASES.add
def copy(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  w = v.copy()
  w[...] = jnp.zeros(3)
  u = v.replace(jnp.ones(3))
  low = v.copy(hijax=False)
  return [v[...], w[...], w.hijax, u[...], u.hijax, low.hijax, low[...]]


@CASES.add
def pytree_value(nnx):
  v = nnx.Variable({"a": jnp.array(0), "b": jnp.array(2)}, hijax=True)

  @jax.jit
  def f(v):
    v["a"] += 1
    v["b"] *= 2

  f(v)
  f(v)
  return [v["a"], v["b"], v.get_value()]


@CASES.add
def dynamic_structure(nnx):
  v = nnx.Variable({}, hijax=True)

  @jax.jit
  def f(v, x):
    v["s"] = jnp.sum(x)

  f(v, jnp.ones(3))
  return v.get_value()


@CASES.add
def dtype_changes_inside(nnx):
  v = nnx.Variable(jnp.arange(3), hijax=True)

  @jax.jit
  def f(v):
    v.set_value(jnp.ones((2, 2)))
    return v.get_value().shape

  r = f(v)
  return [r, v[...], f(v)]


@CASES.add
def metadata_inside(nnx):
  v = nnx.Variable(jnp.arange(3), hijax=True, a=1)

  @jax.jit
  def f(v):
    r = v.a
    v.set_metadata(a=r + 1, b="new")
    v[...] += 1
    return r

  return [f(v), v.a, v.b, f(v), v.a, v[...]]


@CASES.add
def hijax_and_ref(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True, ref=True)
  result = jax.jit(cases.add_and_read)(v)
  return [
    v.hijax,
    v.ref,
    result,
    v[...],
    isinstance(v.get_raw_value(), jax.Ref),
  ]


@CASES.add
def from_metadata(nnx):
  v = nnx.Param.from_metadata(
    jnp.array(1.0), {"a": "hi", "hijax": True, "ref": False}
  )
  v[...] += 1
  return [v.hijax, v.a, v[...]]


@CASES.add
def create_hook(nnx):
  v = nnx.Param(
    jnp.array(1.0),
    hijax=True,
    on_create_value=lambda v, x: x + 1,
    on_get_value=lambda v, x: x * 10,
    on_set_value=lambda v, x: x + 100,
  )
  a = v[...]
  v[...] = jnp.array(1.0)
  return [a, v[...], v.get_raw_value()]


@CASES.add
def hook_in_jit(nnx):
  v = nnx.Param(
    jnp.array(1.0),
    hijax=True,
    on_get_value=lambda v, x: x * 10,
    on_set_value=lambda v, x: x + 100,
  )

  @jax.jit
  def f(v):
    r = v[...]
    v[...] = jnp.array(1.0)
    return r

  return [f(v), v.get_raw_value()]


@CASES.add
def copy_from(nnx):
  a, b = (
    nnx.Param(jnp.array(1.0), hijax=True),
    nnx.Param(jnp.array(2.0), hijax=True, t=1),
  )
  a.copy_from(b)
  b[...] = jnp.array(9.0)
  return [a[...], a.t]


@CASES.add
def update_from_state(nnx):
  a, b = nnx.Param(jnp.array(1.0), hijax=True), nnx.Param(jnp.array(2.0), t=1)
  a.update_from_state(b)
  return [a[...], a.t, a.hijax]


@CASES.add
def iadd(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)
  v[...] += v
  return v[...]


@CASES.add
def call_len_iter(nnx):
  v = nnx.Variable([1, 2, 3], hijax=True)
  return [len(v), list(v), 2 in v]
