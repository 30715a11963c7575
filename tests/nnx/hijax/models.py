"""Models, optimizers and metrics of hijax Variables."""

import jax
import jax.numpy as jnp
import optax

from tests.nnx.hijax import cases

CASES = cases.Cases()


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


@CASES.add
def forward(nnx, hijax=True):
  with nnx.var_defaults(hijax=hijax):
    net = model(nnx)
  f = (jax.jit if hijax else nnx.jit)(lambda net, x: net(x))
  x = jax.random.normal(jax.random.key(0), (10, 2))
  return [f(net, x), f(net, x), net.norm.mean[...], net.drop.rngs.count[...]]


@CASES.add
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


@CASES.add
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


@CASES.add
def rngs_jit(nnx):
  with nnx.var_defaults(hijax=True):
    r = nnx.Rngs(0)
  f = jax.jit(lambda r: jax.random.uniform(r()))
  return [f(r), f(r), r.default.count[...]]


@CASES.add
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


@CASES.add
def optimizer_eager(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    opt = nnx.Optimizer(m, optax.adam(1e-1), wrt=nnx.Param)
  g = jax.tree.map(
    jnp.ones_like, nnx.with_vars(nnx.state(m, nnx.Param), hijax=False)
  )
  opt.update(m, g)
  return [m.kernel[...], opt.step[...], m.kernel.hijax]


@CASES.add
def metrics_jit(nnx):
  with nnx.var_defaults(hijax=True):
    m = nnx.metrics.Average()
  f = jax.jit(lambda m, x: m.update(values=x))
  f(m, jnp.arange(4.0))
  f(m, jnp.ones(2))
  return m.compute()
