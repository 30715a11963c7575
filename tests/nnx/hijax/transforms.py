"""The transforms of `nnx` on hijax Variables and on mutable arrays."""

import jax.numpy as jnp

from tests.nnx.hijax import cases

CASES = cases.Cases()


@CASES.either_in_modes
def either_jit_model(nnx, kind, **kw):
  with nnx.var_defaults(**{kind: True}):
    m = nnx.Dict(a=nnx.Param(jnp.array(1.0)), b=nnx.BatchStat(jnp.array(0.0)))

  @nnx.jit(**kw)
  def f(m, x):
    m.b[...] += x
    return m.a[...] * x

  return [f(m, 3.0), m.b[...], getattr(m.b, kind), f(m, 3.0), m.b[...]]


@CASES.either_in_modes
def either_jit_shared(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})

  @nnx.jit(**kw)
  def f(v, w):
    v[...] += 1
    return v[...] * 2

  return [f(v, v), v[...]]


@CASES.in_modes
def nnx_grad(nnx, **kw):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(a=nnx.Param(jnp.array(2.0)), b=nnx.BatchStat(jnp.array(0.0)))

  def loss(m):
    m.b[...] += 1
    return m.a[...] ** 2

  g = nnx.grad(loss, **kw)(m)
  return [g["a"][...], m.b[...]]


@CASES.in_modes
def nnx_vmap(nnx, **kw):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(a=nnx.Param(jnp.arange(3.0)))

  def f(m):
    m.a[...] += 1
    return m.a[...] * 2

  return [nnx.vmap(f, **kw)(m), m.a[...]]


@CASES.in_modes
def nnx_vmap_create(nnx, **kw):
  def f(x):
    return nnx.Dict(a=nnx.Param(x, hijax=True))

  m = nnx.vmap(f, **kw)(jnp.arange(3.0))
  return [m.a[...], m.a.hijax]


@CASES.either_in_modes
def either_scan_carry(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})

  def f(v, x):
    v[...] += x
    return v, v[...]

  c, ys = nnx.scan(f, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), **kw)(
    v, jnp.arange(3.0)
  )
  return [ys, v[...]]


@CASES.either_in_modes
def either_scan_closure(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})
  axes = (nnx.Carry, 0)
  f = nnx.scan(cases.add_each(v), in_axes=axes, out_axes=axes, **kw)
  c, ys = f(0.0, jnp.arange(3.0))
  return [ys, v[...]]


@CASES.either_in_modes
def either_cond(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})
  nnx.cond(True, cases.add, cases.subtract, v, **kw)
  return v[...]


@CASES.in_modes
def nnx_while(nnx, **kw):
  v = nnx.Variable(jnp.array(1.0), hijax=True)

  def body(c):
    v, i = c
    v[...] += 1
    return v, i + 1

  nnx.while_loop(lambda c: c[1] < 3, body, (v, jnp.array(0)), **kw)
  return v[...]


@CASES.either_in_modes
def either_remat(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(2.0), **{kind: True})
  return nnx.remat(lambda v, x: jnp.sin(x) * v[...], **kw)(v, 1.0)


@CASES.in_modes
def nnx_eval_shape(nnx, **kw):
  m = nnx.eval_shape(
    lambda: nnx.Dict(a=nnx.Param(jnp.zeros(3), hijax=True)), **kw
  )
  return m.a.get_value().shape


@CASES.either_in_modes
def either_jit_create(nnx, kind, **kw):
  f = nnx.jit(lambda: nnx.Dict(a=nnx.Param(jnp.zeros(3), **{kind: True})), **kw)
  m = f()
  return [m.a[...], getattr(m.a, kind)]


# What tree mode refuses.
del CASES["nnx_jit_shared_tree"], CASES["ref_jit_shared_tree"]
