"""What says how new Variables and those of a copy keep their value."""

import jax.numpy as jnp

from tests.nnx.hijax import cases

CASES = cases.Cases()


@CASES.add
def defaults(nnx):
  out = [dict(nnx.var_defaults())]
  with nnx.var_defaults(hijax=True):
    out += [
      dict(nnx.var_defaults()),
      nnx.Param(1.0).hijax,
      nnx.Param(1.0, hijax=False).hijax,
    ]
    with nnx.var_defaults(ref=True):
      out += [dict(nnx.var_defaults())]
      with nnx.var_defaults(hijax=False):
        out += [dict(nnx.var_defaults())]
    out += [dict(nnx.var_defaults())]
  return out + [dict(nnx.var_defaults()), nnx.Param(1.0).hijax]


@CASES.add
def defaults_decorator(nnx):
  @nnx.var_defaults(hijax=True, ref=True)
  def f():
    return dict(nnx.var_defaults())

  return [f(), dict(nnx.var_defaults())]


@CASES.add
def defaults_from_call(nnx):
  before = nnx.var_defaults().hijax
  nnx.var_defaults(hijax=True)
  a = nnx.Param(1.0).hijax
  nnx.var_defaults(hijax=before)
  return [a, nnx.Param(1.0).hijax]


@CASES.add
def with_vars(nnx):
  v = nnx.Param(jnp.array(1.0), a="hi")
  h = nnx.with_vars(v, hijax=True)
  h[...] = 2.0
  low = nnx.with_vars(h, hijax=False)
  return [
    h.hijax,
    h.a,
    v[...],
    h[...],
    low.hijax,
    low[...],
    nnx.with_vars(h, hijax=True) is h,
  ]


@CASES.add
def with_vars_only(nnx):
  m = nnx.Dict(a=nnx.Param(jnp.array(1.0)), b=nnx.BatchStat(jnp.array(2.0)))
  h = nnx.with_vars(m, hijax=True, only=nnx.Param)
  r = nnx.with_vars(h, ref=True, only=nnx.BatchStat)
  return [h.a.hijax, h.b.hijax, r.a.hijax, r.b.ref, r.a.ref]


@CASES.add
def with_vars_duplicates(nnx):
  s = nnx.Param(jnp.array(1.0))
  nnx.with_vars([s, s], hijax=True)


@CASES.add
def with_vars_duplicates_allowed(nnx):
  s = nnx.Param(jnp.array(1.0))
  a, b = nnx.with_vars([s, s], hijax=True, allow_duplicates=True)
  return a.hijax, b.hijax, a is b
