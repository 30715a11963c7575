"""The graph functions on hijax Variables."""

import jax
import jax.numpy as jnp

from tests.nnx.hijax import cases

CASES = cases.Cases()


def linear(nnx):
  with nnx.var_defaults(hijax=True):
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def node(nnx):
  return nnx.Dict(a=nnx.Param(jnp.array(1.0), hijax=True))


@CASES.add
def split_merge(nnx):
  m = linear(nnx)
  g, s = nnx.split(m)
  m2 = nnx.merge(g, s)
  m2.kernel[...] = jnp.zeros((2, 3))
  return [m2.kernel.hijax, m.kernel[...].sum(), s["kernel"].hijax]


@CASES.add
def merge_seen(nnx):
  m = linear(nnx)

  @jax.jit
  def h(g, s):
    m = nnx.merge(g, s)
    m.kernel[...] = jnp.zeros((2, 3))

  h(*nnx.split(m))
  return m.kernel[...].sum()


@CASES.add
def shared_jit(nnx):
  with nnx.var_defaults(hijax=True):
    a = nnx.Variable(jnp.array(0))
    m = nnx.Dict(a=a, b=a)

  @jax.jit
  def h(g, s):
    m = nnx.merge(g, s)
    m.a[...] = 5

  h(*nnx.split(m))
  return [m.a[...], m.b[...]]


@CASES.add
def clone(nnx):
  m = linear(nnx)
  c = nnx.clone(m)
  c.kernel[...] = jnp.zeros((2, 3))
  return [c.kernel.hijax, bool(m.kernel[...].sum() == 0)]


@CASES.add
def update(nnx):
  m = linear(nnx)
  k = m.kernel
  s = jax.tree.map(jnp.zeros_like, nnx.with_vars(nnx.state(m), hijax=False))
  nnx.update(m, s)
  return [m.kernel.hijax, k[...].sum(), m.kernel is k]


@CASES.add
def update_jit(nnx):
  m = linear(nnx)

  @jax.jit
  def f(m):
    s = jax.tree.map(jnp.zeros_like, nnx.with_vars(nnx.state(m), hijax=False))
    nnx.update(m, s)

  f(m)
  return [m.kernel.hijax, m.kernel[...].sum()]


@CASES.add
def update_from_hijax(nnx):
  a = nnx.Dict(x=nnx.Param(jnp.array(1.0), hijax=True))
  b = nnx.Dict(x=nnx.Param(jnp.array(5.0), hijax=True))
  nnx.update(a, nnx.state(b))
  b.x[...] = 9.0
  return [a.x[...], a.x.hijax]


@CASES.add
def pop(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(
      a=nnx.Param(jnp.array(1.0)), b=nnx.Intermediate(jnp.array(2.0))
    )
  s = nnx.pop(m, nnx.Intermediate)
  return [s["b"][...], hasattr(m, "b")]


@CASES.add
def to_pure(nnx):
  m = node(nnx)
  return nnx.to_pure_dict(nnx.state(m))


@CASES.add
def as_pure(nnx):
  m = node(nnx)
  return nnx.as_pure(nnx.state(m))["a"]


@CASES.add
def set_metadata(nnx):
  m = node(nnx)
  nnx.set_metadata(m, foo=1)
  return m.a.foo


@CASES.add
def tree_map_leaves(nnx):
  m = node(nnx)
  return jnp.asarray(jax.tree.map(lambda x: x + 1, m).a)


@CASES.add
def tree_zeros_like(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(a=nnx.Param(jnp.ones(3)))
  zeros = jax.tree.map(jnp.zeros_like, m)
  return [jnp.asarray(leaf) for leaf in jax.tree.leaves(zeros)]


@CASES.add
def sow(nnx):
  class M(nnx.Module):
    def __call__(self, x):
      self.sow(nnx.Intermediate, "h", x)
      return x

  with nnx.var_defaults(hijax=True):
    m = M()
    y, inter = nnx.capture(m, nnx.Intermediate)(jnp.ones(2))
  return inter["h"].get_value()


@CASES.in_modes
def nnx_split(nnx, **kw):
  m = nnx.Dict(
    a=nnx.Param(jnp.zeros(3), hijax=True),
    b=nnx.BatchStat(jnp.array(1.0), hijax=True),
  )
  g, p, r = nnx.split(m, nnx.Param, ..., graph=kw["graph"])
  m = nnx.merge(g, p, r)
  return [m.a[...], m.b.hijax]
