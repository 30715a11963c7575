"""Variables that hold mutable arrays, where hijax ones cannot do the same."""

import jax
import jax.numpy as jnp
import optax

from tests.nnx.hijax import cases

CASES = cases.Cases()


@CASES.in_modes
def ref_jit(nnx, **kw):
  v = nnx.Variable(jnp.array(1.0), ref=True)

  @nnx.jit(**kw)
  def f(v):
    v[...] += 1
    return v[...] * 2

  return [f(v), v[...], f(v), v[...]]


@CASES.in_modes
def ref_vmap(nnx, **kw):
  v = nnx.Variable(jnp.arange(3.0), ref=True)

  def f(v):
    v[...] += 1
    return v[...] * 2

  return [nnx.vmap(f, **kw)(v), v[...]]


@CASES.in_modes
def ref_scan_xs(nnx, **kw):
  v = nnx.Variable(jnp.arange(3.0), ref=True)

  def f(c, v):
    v[...] += 1
    return c + v[...], None

  c, _ = nnx.scan(f, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), **kw)(
    0.0, v
  )
  return [c, v[...]]


@CASES.in_modes
def ref_grad(nnx, **kw):
  v = nnx.Param(jnp.array(2.0), ref=True)
  g = nnx.grad(lambda v: v[...] ** 2, **kw)(v)
  return g[...]


@CASES.in_modes
def ref_grad_nondiff(nnx, **kw):
  v = nnx.Variable(jnp.array(2.0), ref=True)
  return [nnx.grad(cases.sum_loss, **kw)(jnp.array(3.0), v), v[...]]


@CASES.in_modes
def ref_split(nnx, **kw):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  g, s = nnx.split(m, graph=kw["graph"])
  m2 = nnx.merge(g, s)
  m2.a[...] += 1
  return [m.a[...], m2.a[...], m2.a.ref]


@CASES.in_modes
def ref_clone(nnx, **kw):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  m2 = nnx.clone(m, graph=kw["graph"])
  m2.a[...] += 1
  return [m.a[...], m2.a[...], m2.a.ref]


@CASES.add
def ref_update(nnx):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  r = m.a.get_raw_value()
  nnx.update(m, {"a": jnp.ones(3)})
  return [r[...], m.a[...], m.a.get_raw_value() is r]


@CASES.add
def ref_update_variable(nnx):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  nnx.update(m, nnx.State({"a": nnx.Param(jnp.ones(3))}))
  return [m.a[...], m.a.ref, isinstance(m.a.get_raw_value(), jax.Ref)]


@CASES.add
def ref_optimizer(nnx):
  with nnx.var_defaults(ref=True):
    m = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    opt = nnx.Optimizer(m, optax.adam(1e-1), wrt=nnx.Param)

  @jax.jit
  def step(m, opt, x):
    g, p, r = nnx.split(m, nnx.Param, ...)

    def loss(p):
      return nnx.merge(g, p, r)(x).sum()

    loss_value, gr = jax.value_and_grad(loss)(nnx.with_vars(p, ref=False))
    opt.update(m, gr)
    return loss_value

  return [
    step(m, opt, jnp.ones((1, 2))),
    step(m, opt, jnp.ones((1, 2))),
    m.kernel[...],
  ]


@CASES.add
def ref_jax_jit(nnx):
  v = nnx.Param(jnp.array(1.0), ref=True)
  jax.jit(cases.add)(v)
  return v[...]


@CASES.add
def ref_jax_closure(nnx):
  v = nnx.Param(jnp.array(1.0), ref=True)
  jax.jit(lambda: cases.add(v))()
  return v[...]


@CASES.add
def ref_jax_vmap(nnx):
  v = nnx.Param(jnp.arange(3.0), ref=True)
  jax.vmap(cases.add)(v)
  return v[...]


@CASES.add
def ref_jax_grad(nnx):
  v = nnx.Param(jnp.array(3.0), ref=True)
  return jax.grad(lambda v: v[...] ** 2)(v)


@CASES.add
def ref_jax_grad_closure(nnx):
  v = nnx.Param(jnp.array(3.0), ref=True)

  def loss(x):
    v[...] += 1
    return x * v[...]

  return [jax.grad(loss)(2.0), v[...]]


@CASES.add
def ref_jax_scan(nnx):
  v = nnx.Param(jnp.array(3.0), ref=True)
  return [jax.lax.scan(cases.add_each(v), 0.0, jnp.arange(3.0)), v[...]]
