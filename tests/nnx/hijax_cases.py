"""Programs with hijax Variables and mutable arrays, for any `nnx`.

Each takes the module that is to be `nnx`, and returns what can be compared.
"""

# The programs are those of users, who name what they make once and let be.

import functools

import jax
import jax.numpy as jnp
import optax

CASES = {}


def case(f):
  CASES[f.__name__] = f
  return f


def in_modes(f, name=None, **options):
  for graph, updates in ((True, True), (True, False), (False, False)):
    mode = "tree" if not graph else "graph" if updates else "values"
    CASES[f"{name or f.__name__}_{mode}"] = functools.partial(
      f, **options, graph=graph, graph_updates=updates
    )
  return f


def either_in_modes(f):
  """For both kinds of Variables; `nnx_...` are the hijax ones."""
  name = f.__name__.removeprefix("either_")
  in_modes(f, f"nnx_{name}", kind="hijax")
  in_modes(f, f"ref_{name}", kind="ref")
  return f


# What programs do with a Variable that they are given or close over.


def add(v):
  v[...] += 1


def subtract(v):
  v[...] -= 1


def add_and_read(v):
  v[...] += 1
  return v[...]


def add_each(v):
  """Makes the body of a scan that closes over a Variable."""

  def body(c, x):
    v[...] += x
    return c, v[...]

  return body


def sum_loss(x, v):
  v[...] = jax.lax.stop_gradient(x * 2)
  return x**2 + v[...]


def product_loss(x, v):
  v[...] = jax.lax.stop_gradient(x * 3)
  return x**2 * v[...]


def linear(nnx):
  with nnx.var_defaults(hijax=True):
    return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def node(nnx):
  return nnx.Dict(a=nnx.Param(jnp.array(1.0), hijax=True))


@case
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


@case
def write(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  v[...] = v[...] * 2
  v[0] = 7.0
  a = v[1]
  v.set_value(v.get_value() + 1)
  return [v[...], a, v + 1, 2 * v, -v, v.sum()]


@case
def write_metadata(nnx):
  v = nnx.Param(1.0, hijax=True)
  v.set_metadata(a=3)
  return [v.a, v.get_metadata("a"), v.get_metadata("hijax")]


@case
def change_hijax(nnx):
  v = nnx.Param(1.0, hijax=True)
  v.set_metadata(hijax=False)


@case
def del_hijax(nnx):
  v = nnx.Param(1.0, hijax=True)
  v.del_metadata("hijax")


@case
def copy(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  w = v.copy()
  w[...] = jnp.zeros(3)
  u = v.replace(jnp.ones(3))
  low = v.copy(hijax=False)
  return [v[...], w[...], w.hijax, u[...], u.hijax, low.hijax, low[...]]


@case
def pytree_value(nnx):
  v = nnx.Variable({"a": jnp.array(0), "b": jnp.array(2)}, hijax=True)

  @jax.jit
  def f(v):
    v["a"] += 1
    v["b"] *= 2

  f(v)
  f(v)
  return [v["a"], v["b"], v.get_value()]


@case
def dynamic_structure(nnx):
  v = nnx.Variable({}, hijax=True)

  @jax.jit
  def f(v, x):
    v["s"] = jnp.sum(x)

  f(v, jnp.ones(3))
  return v.get_value()


@case
def dtype_changes_inside(nnx):
  v = nnx.Variable(jnp.arange(3), hijax=True)

  @jax.jit
  def f(v):
    v.set_value(jnp.ones((2, 2)))
    return v.get_value().shape

  r = f(v)
  return [r, v[...], f(v)]


@case
def metadata_inside(nnx):
  v = nnx.Variable(jnp.arange(3), hijax=True, a=1)

  @jax.jit
  def f(v):
    r = v.a
    v.set_metadata(a=r + 1, b="new")
    v[...] += 1
    return r

  return [f(v), v.a, v.b, f(v), v.a, v[...]]


# Of jax transforms.
@case
def jit_arg(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(v, a):
    v[...] = a
    v[...] += 5
    return v + 2

  return [f(v, 10.0), v[...], f(v, 11.0), v[...]]


@case
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


@case
def jit_closure(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(a):
    v[...] += a
    return v[...]

  return [f(1.0), v[...], f(2.0), v[...]]


@case
def jit_read_only(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  return jax.jit(lambda v: v[...] * 2)(v)


@case
def jit_same_twice(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(a, b):
    a[...] += 1
    b[...] += 10
    return a[...], b[...]

  return [f(v, v)]


@case
def jit_return(nnx):
  return jax.jit(lambda: nnx.Param(1.0, hijax=True))()


@case
def jit_return_arg(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)
  return jax.jit(lambda v: v)(v)[...]


@case
def jit_make_inside(nnx):
  @jax.jit
  def f(x):
    v = nnx.Param(x, hijax=True)
    v[...] += 1
    return v[...]

  return f(jnp.arange(3.0))


@case
def jit_return_lowered(nnx):
  f = jax.jit(
    lambda: nnx.with_vars(nnx.Param(jnp.array(1.0), hijax=True), hijax=False)
  )
  v = nnx.with_vars(f(), hijax=True)
  return [v.hijax, v[...]]


@case
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


@case
def jit_nested_closure(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)

  @jax.jit
  def f(v):
    v[...] += 1
    jax.jit(lambda: v.set_value(v[...] * 3))()

  f(v)
  return v[...]


@case
def grad_arg(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)
  return jax.grad(lambda v: v[...] ** 2)(v)[...]


@case
def grad_lowered(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)
  g = jax.grad(lambda v: v[...] ** 2)(nnx.with_vars(v, hijax=False))
  return [isinstance(g, nnx.Param), g[...], g.hijax]


@case
def grad_nondiff_arg(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)
  return [jax.grad(sum_loss)(jnp.array(3.0), v), v[...]]


@case
def grad_closure(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def loss(x):
    v[...] = jax.lax.stop_gradient(x * 3)
    return x**2 + v[...]

  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@case
def grad_closure_multiplied(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def loss(x):
    v[...] += 1
    return x**2 * v[...]

  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@case
def grad_no_stop(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def loss(x):
    v[...] = x * 3
    return x**2 + v[...]

  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@case
def grad_made_inside(nnx):
  def loss(x):
    v = nnx.Variable(x * 2, hijax=True)
    return v[...] ** 2

  return jax.grad(loss)(jnp.array(4.0))


@case
def grad_in_jit(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  @jax.jit
  def f(x, v):
    return jax.grad(lambda x: product_loss(x, v))(x)

  return [f(jnp.array(4.0), v), v[...]]


@case
def jit_in_grad(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)
  loss = jax.jit(lambda x: product_loss(x, v))
  return [jax.grad(loss)(jnp.array(4.0)), v[...]]


@case
def jit_in_grad_arg(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)
  return [jax.grad(jax.jit(product_loss))(jnp.array(4.0), v), v[...]]


@case
def jvp_closure(nnx):
  v = nnx.Variable(jnp.array(2.0), hijax=True)

  def f(x):
    v[...] += 1
    return x * v[...]

  return [jax.jvp(f, (jnp.array(4.0),), (jnp.array(1.0),)), v[...]]


@case
def vmap_arg(nnx):
  v = nnx.Param(jnp.arange(3.0), hijax=True)
  return jax.vmap(lambda v: v[...] * 2)(v)


@case
def vmap_closure_read(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)
  return jax.vmap(lambda x: x * v[...])(jnp.arange(3.0))


@case
def vmap_closure_write(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)

  def f(x):
    v[...] += 1
    return x * v[...]

  return [jax.vmap(f)(jnp.arange(3.0)), v[...]]


@case
def vmap_closure_write_batched(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)

  def f(x):
    v[...] = x
    return x

  return [jax.vmap(f)(jnp.arange(3.0)), v[...]]


@case
def vmap_none_arg(nnx):
  v = nnx.Param(jnp.array(2.0), hijax=True)

  def f(x, v):
    v[...] += 1
    return x * v[...]

  return [jax.vmap(f, in_axes=(0, None))(jnp.arange(3.0), v), v[...]]


@case
def vmap_made_inside(nnx):
  def f(x):
    v = nnx.Variable(x, hijax=True)
    v[...] += 1
    return v[...]

  return jax.vmap(f)(jnp.arange(3.0))


@case
def scan_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(c, x):
    v[...] = v[...] + x
    return c + v[...], v[...]

  return [jax.lax.scan(body, 0.0, jnp.arange(3.0)), v[...]]


@case
def scan_carry(nnx):
  v = nnx.Variable(jnp.array(1.0), hijax=True)

  def body(v, _):
    v[...] = v[...] * 2
    return v, None

  v, _ = jax.lax.scan(body, v, None, length=3)
  return v[...]


@case
def scan_xs(nnx):
  v = nnx.Variable(jnp.arange(3.0), hijax=True)

  def body(c, v):
    return c + v[...], None

  return jax.lax.scan(body, 0.0, v)


@case
def scan_in_jit(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.jit
  def f(v):
    def body(c, x):
      v[...] = v[...] + x
      return c + v[...], v[...]

    return jax.lax.scan(body, 0.0, jnp.arange(3.0))

  return [f(v), v[...]]


@case
def scan_changes_structure(nnx):
  v = nnx.Variable({}, hijax=True)

  def body(c, x):
    v["a"] = x
    return c, None

  return [jax.lax.scan(body, 0.0, jnp.arange(3.0)), v.get_value()]


@case
def cond_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  choices = (lambda: add(v)), (lambda: subtract(v))
  jax.lax.cond(True, *choices)
  a = v[...]
  jax.lax.cond(False, *choices)
  jax.lax.cond(False, *choices)
  return [a, v[...]]


@case
def cond_arg(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  jax.lax.cond(True, add, subtract, v)
  return v[...]


@case
def cond_in_jit(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  f = jax.jit(lambda p, v: jax.lax.cond(p, add, subtract, v))
  f(True, v)
  f(True, v)
  f(False, v)
  return v[...]


@case
def cond_one_writes(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)
  f = jax.jit(lambda p, v: jax.lax.cond(p, add, lambda v: None, v))
  f(True, v)
  f(True, v)
  f(False, v)
  return v[...]


@case
def switch_arg(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def double(v):
    v[...] *= 2

  jax.lax.switch(2, [add, subtract, double], v)
  return v[...]


@case
def while_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(i):
    v[...] *= 2
    return i + 1

  return [jax.lax.while_loop(lambda i: i < 3, body, 0), v[...]]


@case
def while_cond_reads(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(i):
    v[...] *= 2
    return i + 1

  return [jax.lax.while_loop(lambda i: v[...] < 20, body, 0), v[...]]


@case
def fori_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  def body(i, c):
    v[...] += i
    return c

  return [jax.lax.fori_loop(0, 3, body, 0), v[...]]


@case
def remat_closure(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.remat
  def f(x):
    return jnp.sin(x) * v[...]

  return [f(jnp.array(2.0)), jax.grad(f)(jnp.array(2.0))]


@case
def remat_write(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.remat
  def f(x):
    v[...] += 1
    return jnp.sin(x) * v[...]

  return [f(jnp.array(2.0)), v[...]]


@case
def remat_write_grad(nnx):
  v = nnx.Variable(jnp.array(3.0), hijax=True)

  @jax.remat
  def f(x):
    v[...] += 1
    return jnp.sin(x) * v[...]

  return [jax.grad(f)(jnp.array(2.0)), v[...]]


@case
def eval_shape(nnx):
  v = nnx.Param(jnp.zeros(3), hijax=True)
  return [jax.eval_shape(add_and_read, v).shape, v[...]]


@case
def make_jaxpr(nnx):
  v = nnx.Param(jnp.zeros(3), hijax=True)
  text = str(jax.make_jaxpr(add)(v))
  return ["Param()" in text, "get_variable" in text, "set_variable" in text]


@case
def make_jaxpr_new(nnx):
  return "new_variable" in str(
    jax.make_jaxpr(lambda x: nnx.Param(x, hijax=True)[...])(1.0)
  )


@case
def lower(nnx):
  v = nnx.Param(jnp.ones(3), hijax=True)
  jax.jit(add_and_read).lower(v)
  return v[...]


@case
def lower_compile_call(nnx):
  v = nnx.Param(jnp.ones(3), hijax=True)
  return [jax.jit(add_and_read).lower(v).compile()(v), v[...]]


@case
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


# Of defaults.
@case
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


@case
def defaults_decorator(nnx):
  @nnx.var_defaults(hijax=True, ref=True)
  def f():
    return dict(nnx.var_defaults())

  return [f(), dict(nnx.var_defaults())]


@case
def defaults_from_call(nnx):
  before = nnx.var_defaults().hijax
  nnx.var_defaults(hijax=True)
  a = nnx.Param(1.0).hijax
  nnx.var_defaults(hijax=before)
  return [a, nnx.Param(1.0).hijax]


# Of with_vars.
@case
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


@case
def with_vars_only(nnx):
  m = nnx.Dict(a=nnx.Param(jnp.array(1.0)), b=nnx.BatchStat(jnp.array(2.0)))
  h = nnx.with_vars(m, hijax=True, only=nnx.Param)
  r = nnx.with_vars(h, ref=True, only=nnx.BatchStat)
  return [h.a.hijax, h.b.hijax, r.a.hijax, r.b.ref, r.a.ref]


@case
def with_vars_duplicates(nnx):
  s = nnx.Param(jnp.array(1.0))
  nnx.with_vars([s, s], hijax=True)


@case
def with_vars_duplicates_allowed(nnx):
  s = nnx.Param(jnp.array(1.0))
  a, b = nnx.with_vars([s, s], hijax=True, allow_duplicates=True)
  return a.hijax, b.hijax, a is b


@case
def hijax_and_ref(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True, ref=True)
  result = jax.jit(add_and_read)(v)
  return [
    v.hijax,
    v.ref,
    result,
    v[...],
    isinstance(v.get_raw_value(), jax.Ref),
  ]


@case
def from_metadata(nnx):
  v = nnx.Param.from_metadata(
    jnp.array(1.0), {"a": "hi", "hijax": True, "ref": False}
  )
  v[...] += 1
  return [v.hijax, v.a, v[...]]


# Of models.
def model(nnx):
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(2, 8, rngs=rngs)
      self.norm = nnx.BatchNorm(8, use_running_average=False, rngs=rngs)
      self.drop = nnx.Dropout(0.5, deterministic=False, rngs=rngs)
      self.down = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
      return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))

  return Net(nnx.Rngs(0))


@case
def forward(nnx, hijax=True):
  with nnx.var_defaults(hijax=hijax):
    net = model(nnx)
  f = (jax.jit if hijax else nnx.jit)(lambda net, x: net(x))
  x = jax.random.normal(jax.random.key(0), (10, 2))
  return [f(net, x), f(net, x), net.norm.mean[...], net.drop.rngs.count[...]]


@case
def train_step(nnx, hijax=True):
  with nnx.var_defaults(hijax=hijax):
    net = model(nnx)
    tx = optax.sgd(1e-2, momentum=0.9)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

    def loss_of(net, x):
      return jnp.square(net(x) - 1).sum()

    def derive(net, x):
      if not hijax:
        return nnx.value_and_grad(loss_of)(net, x)
      graphdef, params, rest = nnx.split(net, nnx.Param, ...)

      def loss(params):
        return loss_of(nnx.merge(graphdef, params, rest), x)

      return jax.value_and_grad(loss)(nnx.with_vars(params, hijax=False))

    @(jax.jit if hijax else nnx.jit)
    def step(net, optimizer, x):
      value, grads = derive(net, x)
      optimizer.update(net, grads)
      return value

    x = jax.random.normal(jax.random.key(1), (6, 2))
    values = [step(net, optimizer, x) for _ in range(3)]
  return [
    values,
    net.up.kernel[...],
    net.norm.mean[...],
    net.drop.rngs.count[...],
    optimizer.step[...],
    optimizer.opt_state[0].trace["up"]["kernel"][...],
  ]


@case
def train_step_of_a_closure(nnx):
  with nnx.var_defaults(hijax=True):
    net = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

  @jax.jit
  def step(x):
    def loss(net):
      return jnp.square(net(x)).sum()

    value, grads = jax.value_and_grad(loss)(nnx.with_vars(net, hijax=False))
    optimizer.update(net, grads)
    return value

  return [[step(jnp.ones((4, 2))) for _ in range(3)], net.kernel[...]]


@case
def rngs_jit(nnx):
  with nnx.var_defaults(hijax=True):
    r = nnx.Rngs(0)
  f = jax.jit(lambda r: jax.random.uniform(r()))
  return [f(r), f(r), r.default.count[...]]


@case
def kv_cache(nnx, hijax=True):
  with nnx.var_defaults(hijax=hijax):
    layer = nnx.MultiHeadAttention(
      num_heads=2,
      in_features=4,
      decode=True,
      rngs=nnx.Rngs(0),
    )
    layer.init_cache((1, 5, 4))
  f = (jax.jit if hijax else nnx.jit)(lambda layer, x: layer(x))
  x = jax.random.normal(jax.random.key(0), (1, 1, 4))
  return [
    f(layer, x),
    f(layer, x * 2),
    layer.cache_index[...],
    layer.cached_key[...],
  ]


@case
def optimizer_eager(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    opt = nnx.Optimizer(m, optax.adam(1e-1), wrt=nnx.Param)
  g = jax.tree.map(
    jnp.ones_like, nnx.with_vars(nnx.state(m, nnx.Param), hijax=False)
  )
  opt.update(m, g)
  return [m.kernel[...], opt.step[...], m.kernel.hijax]


@case
def metrics_jit(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.metrics.Average()
  f = jax.jit(lambda m, x: m.update(values=x))
  f(m, jnp.arange(4.0))
  f(m, jnp.ones(2))
  return m.compute()


# Of graph functions.
@case
def split_merge(nnx):
  m = linear(nnx)
  g, s = nnx.split(m)
  m2 = nnx.merge(g, s)
  m2.kernel[...] = jnp.zeros((2, 3))
  return [m2.kernel.hijax, m.kernel[...].sum(), s["kernel"].hijax]


@case
def merge_seen(nnx):
  m = linear(nnx)

  @jax.jit
  def h(g, s):
    m = nnx.merge(g, s)
    m.kernel[...] = jnp.zeros((2, 3))

  h(*nnx.split(m))
  return m.kernel[...].sum()


@case
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


@case
def clone(nnx):
  m = linear(nnx)
  c = nnx.clone(m)
  c.kernel[...] = jnp.zeros((2, 3))
  return [c.kernel.hijax, bool(m.kernel[...].sum() == 0)]


@case
def update(nnx):
  m = linear(nnx)
  k = m.kernel
  s = jax.tree.map(jnp.zeros_like, nnx.with_vars(nnx.state(m), hijax=False))
  nnx.update(m, s)
  return [m.kernel.hijax, k[...].sum(), m.kernel is k]


@case
def update_jit(nnx):
  m = linear(nnx)

  @jax.jit
  def f(m):
    s = jax.tree.map(jnp.zeros_like, nnx.with_vars(nnx.state(m), hijax=False))
    nnx.update(m, s)

  f(m)
  return [m.kernel.hijax, m.kernel[...].sum()]


@case
def update_from_hijax(nnx):
  a = nnx.Dict(x=nnx.Param(jnp.array(1.0), hijax=True))
  b = nnx.Dict(x=nnx.Param(jnp.array(5.0), hijax=True))
  nnx.update(a, nnx.state(b))
  b.x[...] = 9.0
  return [a.x[...], a.x.hijax]


@case
def pop(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(
      a=nnx.Param(jnp.array(1.0)), b=nnx.Intermediate(jnp.array(2.0))
    )
  s = nnx.pop(m, nnx.Intermediate)
  return [s["b"][...], hasattr(m, "b")]


@case
def to_pure(nnx):
  m = node(nnx)
  return nnx.to_pure_dict(nnx.state(m))


@case
def as_pure(nnx):
  m = node(nnx)
  return nnx.as_pure(nnx.state(m))["a"]


@case
def set_metadata(nnx):
  m = node(nnx)
  nnx.set_metadata(m, foo=1)
  return m.a.foo


@case
def tree_map_leaves(nnx):
  m = node(nnx)
  return jnp.asarray(jax.tree.map(lambda x: x + 1, m).a)


@case
def tree_zeros_like(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(a=nnx.Param(jnp.ones(3)))
  zeros = jax.tree.map(jnp.zeros_like, m)
  return [jnp.asarray(leaf) for leaf in jax.tree.leaves(zeros)]


@case
def sow(nnx):
  class M(nnx.Module):
    def __call__(self, x):
      self.sow(nnx.Intermediate, "h", x)
      return x

  with nnx.var_defaults(hijax=True):
    m = M()
    y, inter = nnx.capture(m, nnx.Intermediate)(jnp.ones(2))
  return inter["h"].get_value()


@case
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


@case
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


@case
def copy_from(nnx):
  a, b = (
    nnx.Param(jnp.array(1.0), hijax=True),
    nnx.Param(jnp.array(2.0), hijax=True, t=1),
  )
  a.copy_from(b)
  b[...] = jnp.array(9.0)
  return [a[...], a.t]


@case
def update_from_state(nnx):
  a, b = nnx.Param(jnp.array(1.0), hijax=True), nnx.Param(jnp.array(2.0), t=1)
  a.update_from_state(b)
  return [a[...], a.t, a.hijax]


@case
def iadd(nnx):
  v = nnx.Param(jnp.array(1.0), hijax=True)
  v[...] += v
  return v[...]


@case
def call_len_iter(nnx):
  v = nnx.Variable([1, 2, 3], hijax=True)
  return [len(v), list(v), 2 in v]


@either_in_modes
def either_jit_model(nnx, kind, **kw):
  with nnx.var_defaults(**{kind: True}):
    m = nnx.Dict(a=nnx.Param(jnp.array(1.0)), b=nnx.BatchStat(jnp.array(0.0)))

  @nnx.jit(**kw)
  def f(m, x):
    m.b[...] += x
    return m.a[...] * x

  return [f(m, 3.0), m.b[...], getattr(m.b, kind), f(m, 3.0), m.b[...]]


@either_in_modes
def either_jit_shared(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})

  @nnx.jit(**kw)
  def f(v, w):
    v[...] += 1
    return v[...] * 2

  return [f(v, v), v[...]]


@in_modes
def nnx_grad(nnx, **kw):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(a=nnx.Param(jnp.array(2.0)), b=nnx.BatchStat(jnp.array(0.0)))

  def loss(m):
    m.b[...] += 1
    return m.a[...] ** 2

  g = nnx.grad(loss, **kw)(m)
  return [g["a"][...], m.b[...]]


@in_modes
def nnx_vmap(nnx, **kw):
  with nnx.var_defaults(hijax=True):
    m = nnx.Dict(a=nnx.Param(jnp.arange(3.0)))

  def f(m):
    m.a[...] += 1
    return m.a[...] * 2

  return [nnx.vmap(f, **kw)(m), m.a[...]]


@in_modes
def nnx_vmap_create(nnx, **kw):
  def f(x):
    return nnx.Dict(a=nnx.Param(x, hijax=True))

  m = nnx.vmap(f, **kw)(jnp.arange(3.0))
  return [m.a[...], m.a.hijax]


@either_in_modes
def either_scan_carry(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})

  def f(v, x):
    v[...] += x
    return v, v[...]

  c, ys = nnx.scan(f, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), **kw)(
    v, jnp.arange(3.0)
  )
  return [ys, v[...]]


@either_in_modes
def either_scan_closure(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})
  axes = (nnx.Carry, 0)
  f = nnx.scan(add_each(v), in_axes=axes, out_axes=axes, **kw)
  c, ys = f(0.0, jnp.arange(3.0))
  return [ys, v[...]]


@either_in_modes
def either_cond(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(1.0), **{kind: True})
  nnx.cond(True, add, subtract, v, **kw)
  return v[...]


@in_modes
def nnx_while(nnx, **kw):
  v = nnx.Variable(jnp.array(1.0), hijax=True)

  def body(c):
    v, i = c
    v[...] += 1
    return v, i + 1

  nnx.while_loop(lambda c: c[1] < 3, body, (v, jnp.array(0)), **kw)
  return v[...]


@either_in_modes
def either_remat(nnx, kind, **kw):
  v = nnx.Variable(jnp.array(2.0), **{kind: True})
  return nnx.remat(lambda v, x: jnp.sin(x) * v[...], **kw)(v, 1.0)


@in_modes
def nnx_eval_shape(nnx, **kw):
  m = nnx.eval_shape(
    lambda: nnx.Dict(a=nnx.Param(jnp.zeros(3), hijax=True)), **kw
  )
  return m.a.get_value().shape


@either_in_modes
def either_jit_create(nnx, kind, **kw):
  f = nnx.jit(lambda: nnx.Dict(a=nnx.Param(jnp.zeros(3), **{kind: True})), **kw)
  m = f()
  return [m.a[...], getattr(m.a, kind)]


@in_modes
def nnx_split(nnx, **kw):
  m = nnx.Dict(
    a=nnx.Param(jnp.zeros(3), hijax=True),
    b=nnx.BatchStat(jnp.array(1.0), hijax=True),
  )
  g, p, r = nnx.split(m, nnx.Param, ..., graph=kw["graph"])
  m = nnx.merge(g, p, r)
  return [m.a[...], m.b.hijax]


@in_modes
def ref_jit(nnx, **kw):
  v = nnx.Variable(jnp.array(1.0), ref=True)

  @nnx.jit(**kw)
  def f(v):
    v[...] += 1
    return v[...] * 2

  return [f(v), v[...], f(v), v[...]]


@in_modes
def ref_vmap(nnx, **kw):
  v = nnx.Variable(jnp.arange(3.0), ref=True)

  def f(v):
    v[...] += 1
    return v[...] * 2

  return [nnx.vmap(f, **kw)(v), v[...]]


@in_modes
def ref_scan_xs(nnx, **kw):
  v = nnx.Variable(jnp.arange(3.0), ref=True)

  def f(c, v):
    v[...] += 1
    return c + v[...], None

  c, _ = nnx.scan(f, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), **kw)(
    0.0, v
  )
  return [c, v[...]]


@in_modes
def ref_grad(nnx, **kw):
  v = nnx.Param(jnp.array(2.0), ref=True)
  g = nnx.grad(lambda v: v[...] ** 2, **kw)(v)
  return g[...]


@in_modes
def ref_grad_nondiff(nnx, **kw):
  v = nnx.Variable(jnp.array(2.0), ref=True)
  return [nnx.grad(sum_loss, **kw)(jnp.array(3.0), v), v[...]]


@in_modes
def ref_split(nnx, **kw):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  g, s = nnx.split(m, graph=kw["graph"])
  m2 = nnx.merge(g, s)
  m2.a[...] += 1
  return [m.a[...], m2.a[...], m2.a.ref]


@in_modes
def ref_clone(nnx, **kw):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  m2 = nnx.clone(m, graph=kw["graph"])
  m2.a[...] += 1
  return [m.a[...], m2.a[...], m2.a.ref]


# What tree mode refuses.
del CASES["nnx_jit_shared_tree"], CASES["ref_jit_shared_tree"]


@case
def ref_update(nnx):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  r = m.a.get_raw_value()
  nnx.update(m, {"a": jnp.ones(3)})
  return [r[...], m.a[...], m.a.get_raw_value() is r]


@case
def ref_update_variable(nnx):
  m = nnx.Dict(a=nnx.Param(jnp.zeros(3), ref=True))
  nnx.update(m, nnx.State({"a": nnx.Param(jnp.ones(3))}))
  return [m.a[...], m.a.ref, isinstance(m.a.get_raw_value(), jax.Ref)]


@case
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


@case
def ref_jax_jit(nnx):
  v = nnx.Param(jnp.array(1.0), ref=True)
  jax.jit(add)(v)
  return v[...]


@case
def ref_jax_closure(nnx):
  v = nnx.Param(jnp.array(1.0), ref=True)
  jax.jit(lambda: add(v))()
  return v[...]


@case
def ref_jax_vmap(nnx):
  v = nnx.Param(jnp.arange(3.0), ref=True)
  jax.vmap(add)(v)
  return v[...]


@case
def ref_jax_grad(nnx):
  v = nnx.Param(jnp.array(3.0), ref=True)
  return jax.grad(lambda v: v[...] ** 2)(v)


@case
def ref_jax_grad_closure(nnx):
  v = nnx.Param(jnp.array(3.0), ref=True)

  def loss(x):
    v[...] += 1
    return x * v[...]

  return [jax.grad(loss)(2.0), v[...]]


@case
def ref_jax_scan(nnx):
  v = nnx.Param(jnp.array(3.0), ref=True)
  return [jax.lax.scan(add_each(v), 0.0, jnp.arange(3.0)), v[...]]
