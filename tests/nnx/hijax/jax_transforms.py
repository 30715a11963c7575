"""hijax Variables under the transforms of jax."""

import jax
import jax.numpy as jnp

from tests.nnx.hijax import cases

CASES = cases.Cases()


def product_loss(x, v):
  v[...] = jax.lax.stop_gradient(x * 3)
  return x**2 * v[...]


@CASES.add
def jit_arg(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(v, a):
    v[...] = a
    v[...] += 5
    return v + 2

  return [f(v, 10.0), v[...], f(v, 11.0), v[...]]


@CASES.add
def jit_isinstance(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True, tag="x")
  out = []

  @jax.jit
  def f(v):
    out.append(
      [
        isinstance(v, nnx.Param),
        isinstance(v, nnx.BatchStat),
        v.hijax,
        v.tag,
        v.shape,
        v.dtype == jnp.float32,
        v.var_type is nnx.Param,
      ]
    )

  f(v)
  return out


@CASES.add
def jit_closure(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(a):
    v[...] += a
    return v[...]

  return [f(1.0), v[...], f(2.0), v[...]]


@CASES.add
def jit_read_only(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  return jax.jit(lambda v: v[...] * 2)(v)


@CASES.add
def jit_same_twice(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(a, b):
    a[...] += 1
    b[...] += 10
    return a[...], b[...]

  return [f(v, v)]


@CASES.add
def jit_return(nnx):
  return jax.jit(lambda: nnx.Param(1.0, hijax=True))()


@CASES.add
def jit_return_arg(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)
  return jax.jit(lambda v: v)(v)[...]


@CASES.add
def jit_make_inside(nnx):
  @jax.jit
  def f(x):
    v = nnx.Param(x, hijax=True)
    v[...] += 1
    return v[...]

  return f(jnp.arange(3.0))


@CASES.add
def jit_return_lowered(nnx):
  f = jax.jit(
    lambda: nnx.with_vars(nnx.Param(jnp.array(1.0), hijax=True), hijax=False)
  )
  v = nnx.with_vars(f(), hijax=True)
  return [v.hijax, v[...]]


@CASES.add
def jit_nested(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def g(v):
    v[...] *= 3

  @jax.jit
  def f(v):
    v[...] += 1
    g(v)
    v[...] += 1

  f(v)
  return v[...]


@CASES.add
def jit_nested_closure(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(v):
    v[...] += 1
    jax.jit(lambda: v.set_value(v[...] * 3))()

  f(v)
  return v[...]


@CASES.add
def grad_arg(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)
  return jax.grad(lambda v: v[...] ** 2)(v)[...]


@CASES.add
def grad_lowered(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)
  g = jax.grad(lambda v: v[...] ** 2)(nnx.with_vars(v, hijax=False))
  return [isinstance(g, nnx.Param), g[...], g.hijax]


@CASES.add
def grad_nondiff_arg(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)
  return [jax.grad(cases.sum_loss)(jnp.array(3.0), v), v[...]]


@CASES.add
def grad_closure(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def loss(x):
    v[...] = jax.lax.stop_gradient(x * 3)
    return x**2 + v[...]

  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@CASES.add
def grad_closure_multiplied(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def loss(x):
    v[...] += 1
    return x**2 * v[...]

  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@CASES.add
def grad_no_stop(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def loss(x):
    v[...] = x * 3
    return x**2 + v[...]

  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@CASES.add
def grad_made_inside(nnx):
  def loss(x):
    v = nnx.Variable(x * 2, hijax=True)
    return v[...] ** 2

  return jax.grad(loss)(jnp.array(4.0))


@CASES.add
def grad_in_jit(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  @jax.jit
  def f(x, v):
    return jax.grad(lambda x: product_loss(x, v))(x)

  return [f(jnp.array(4.0), v), v[...]]


@CASES.add
def jit_in_grad(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)
  loss = jax.jit(lambda x: product_loss(x, v))
  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@CASES.add
def jit_in_grad_arg(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)
  return [jax.grad(jax.jit(product_loss))(jnp.array(4.0), v), v[...]]


@CASES.add
def jvp_closure(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def f(x):
    v[...] += 1
    return x * v[...]

  return [jax.jvp(f, (jnp.array(4.0),), (jnp.array(1.0),)), v[...]]


@CASES.add
def vmap_arg(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  return jax.vmap(lambda v: v[...] * 2)(v)


@CASES.add
def vmap_closure_read(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)
  return jax.vmap(lambda x: x * v[...])(jnp.arange(3.0))


@CASES.add
def vmap_closure_write(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)

  def f(x):
    v[...] += 1
    return x * v[...]

  return [jax.vmap(f)(jnp.arange(3.0)), v[...]]


@CASES.add
def vmap_closure_write_batched(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)

  def f(x):
    v[...] = x
    return x

  return [jax.vmap(f)(jnp.arange(3.0)), v[...]]


@CASES.add
def vmap_none_arg(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)

  def f(x, v):
    v[...] += 1
    return x * v[...]

  return [jax.vmap(f, in_axes=(0, None))(jnp.arange(3.0), v), v[...]]


@CASES.add
def vmap_made_inside(nnx):
  def f(x):
    v = nnx.Variable(x, hijax=True)
    v[...] += 1
    return v[...]

  return jax.vmap(f)(jnp.arange(3.0))


@CASES.add
def scan_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(c, x):
    v[...] = v[...] + x
    return c + v[...], v[...]

  return [jax.lax.scan(body, 0.0, jnp.arange(3.0)), v[...]]


@CASES.add
def scan_carry(nnx):
  v = nnx.Variable(jnp.array(1.0), hijax=True)

  def body(v, _):
    v[...] = v[...] * 2
    return v, None

  v, _ = jax.lax.scan(body, v, None, length=3)
  return v[...]


@CASES.add
def scan_xs(nnx):
  v = nnx.Variable(jnp.arange(3.0), hijax=True)

  def body(c, v):
    return c + v[...], None

  return jax.lax.scan(body, 0.0, v)


@CASES.add
def scan_in_jit(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.jit
  def f(v):
    def body(c, x):
      v[...] = v[...] + x
      return c + v[...], v[...]

    return jax.lax.scan(body, 0.0, jnp.arange(3.0))

  return [f(v), v[...]]


@CASES.add
def scan_changes_structure(nnx):
  v = nnx.Variable({}, hijax=True)

  def body(c, x):
    v["a"] = x
    return c, None

  return [jax.lax.scan(body, 0.0, jnp.arange(3.0)), v.get_value()]


@CASES.add
def cond_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  choices = (lambda: cases.add(v)), (lambda: cases.subtract(v))
  jax.lax.cond(True, *choices)
  a = v[...]
  jax.lax.cond(False, *choices)
  jax.lax.cond(False, *choices)
  return [a, v[...]]


@CASES.add
def cond_arg(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  jax.lax.cond(True, cases.add, cases.subtract, v)
  return v[...]


@CASES.add
def cond_in_jit(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  f = jax.jit(lambda p, v: jax.lax.cond(p, cases.add, cases.subtract, v))
  f(True, v)
  f(True, v)
  f(False, v)
  return v[...]


@CASES.add
def cond_one_writes(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  f = jax.jit(lambda p, v: jax.lax.cond(p, cases.add, lambda v: None, v))
  f(True, v)
  f(True, v)
  f(False, v)
  return v[...]


@CASES.add
def switch_arg(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def double(v):
    v[...] *= 2

  jax.lax.switch(2, [cases.add, cases.subtract, double], v)
  return v[...]


@CASES.add
def while_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(i):
    v[...] *= 2
    return i + 1

  return [jax.lax.while_loop(lambda i: i < 3, body, 0), v[...]]


@CASES.add
def while_cond_reads(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(i):
    v[...] *= 2
    return i + 1

  return [jax.lax.while_loop(lambda i: v[...] < 20, body, 0), v[...]]


@CASES.add
def fori_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(i, c):
    v[...] += i
    return c

  return [jax.lax.fori_loop(0, 3, body, 0), v[...]]


@CASES.add
def remat_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.remat
  def f(x):
    return jnp.sin(x) * v[...]

  return [f(jnp.array(2.0)), jax.grad(f)(jnp.array(2.0))]


@CASES.add
def remat_write(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.remat
  def f(x):
    v[...] += 1
    return jnp.sin(x) * v[...]

  return [f(jnp.array(2.0)), v[...]]


@CASES.add
def remat_write_grad(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.remat
  def f(x):
    v[...] += 1
    return jnp.sin(x) * v[...]

  return [jax.grad(f)(jnp.array(2.0)), v[...]]


@CASES.add
def eval_shape(nnx):
  v = nnx.Param(jnp.zeros(3), hijax=True)
  return [jax.eval_shape(cases.add_and_read, v).shape, v[...]]


@CASES.add
def make_jaxpr(nnx):
  v = nnx.Param(jnp.zeros(3), hijax=True)
  text = str(jax.make_jaxpr(cases.add)(v))
  return ["Param()" in text, "get_variable" in text, "set_variable" in text]


@CASES.add
def make_jaxpr_new(nnx):
  return "new_variable" in str(
    jax.make_jaxpr(lambda x: nnx.Param(x, hijax=True)[...])(1.0)
  )


@CASES.add
def lower(nnx):
  v = nnx.Param(jnp.ones(3), hijax=True)
  jax.jit(cases.add_and_read).lower(v)
  return v[...]


@CASES.add
def lower_compile_call(nnx):
  v = nnx.Param(jnp.ones(3), hijax=True)
  return [jax.jit(cases.add_and_read).lower(v).compile()(v), v[...]]


@CASES.add
def custom_vjp(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.custom_vjp
  def f(x):
    return x * 2

  f.defvjp(lambda x: (x * 2, None), lambda r, g: (g * 5,))

  def loss(x):
    v[...] += 1
    return f(x) * v[...]

  return [jax.grad(loss)(1.0), v[...]]
