"""Transforms composed at random, against the same program in pure functions.

The object program keeps its state in Variables of a Module; the oracle is plain
jax on a tuple of arrays, composed the same way. Every program returns its
output, and leaves state behind that must be that of the oracle.
"""

from absl.testing import absltest
import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np

import nnx

SIZE = 3


class Cell(nnx.Module):
  """State `w`, `mean` and `calls`; `tied` is `w` again."""

  def __init__(self, w, mean, calls):
    self.w = nnx.Param(w)
    self.mean = nnx.BatchStat(mean)
    self.inner = nnx.Dict(tied=self.w, calls=nnx.Variable(calls))


def initial():
  key = jax.random.key(0)
  return (
    jax.random.normal(key, (SIZE, SIZE)) * 0.3,
    jnp.linspace(-1.0, 1.0, SIZE),
    jnp.array(0.0),
  )


def state_of(cell):
  return cell.w.value, cell.mean.value, cell.inner.calls.value


# The innermost step: (cell, x) -> y, and (state, x) -> (state, y).


def step(cell, x):
  y = jnp.tanh(x @ cell.w.value)
  cell.mean.value = 0.5 * cell.mean.value + 0.1 * y
  cell.inner.tied.value = cell.inner.tied.value * 0.9
  cell.inner.calls.value = cell.inner.calls.value + 1.0
  return y + cell.mean.value


def pure_step(state, x):
  w, mean, calls = state
  y = jnp.tanh(x @ w)
  mean = 0.5 * mean + 0.1 * y
  return (w * 0.9, mean, calls + 1.0), y + mean


# Transforms of a function (cell, x) -> y of arrays of one shape, each with its
# oracle on (state, x) -> (state, y).


def wrap_jit(f):
  return nnx.jit(f)


def pure_jit(f):
  return jax.jit(f)


def wrap_remat(f):
  return nnx.remat(f)


def pure_remat(f):
  return jax.checkpoint(f)


def wrap_grad(f):
  """The gradient by x of a loss, and state of the forward pass."""

  def g(cell, x):
    def loss(cell, x):
      return (f(cell, x) ** 2).sum()

    return nnx.grad(loss, argnums=1)(cell, x)

  return g


def pure_grad(f):
  def g(state, x):
    def loss(x):
      new, y = f(state, x)
      return (y**2).sum(), new

    slope, new = jax.grad(loss, has_aux=True)(x)
    return new, slope

  return g


def wrap_train(f):
  """A step of gradient descent on the parameters."""

  def g(cell, x):
    def loss(cell, x):
      return (f(cell, x) ** 2).mean()

    value, grads = nnx.value_and_grad(loss)(cell, x)
    (slope,) = jax.tree.leaves(grads)
    cell.w.value = cell.w.value - 0.1 * slope
    return x * value

  return g


def pure_train(f):
  def g(state, x):
    def loss(w, rest):
      new, y = f((w, *rest), x)
      return (y**2).mean(), new

    (value, new), slope = jax.value_and_grad(loss, has_aux=True)(
      state[0], state[1:]
    )
    return (new[0] - 0.1 * slope, *new[1:]), x * value

  return g


def wrap_scan(f):
  return nnx.scan(
    lambda cell, x: (cell, f(cell, x)),
    in_axes=(nnx.Carry, None),
    out_axes=(nnx.Carry, 0),
    length=2,
  )


def wrap_scan_sum(f):
  scanned = wrap_scan(f)
  return lambda cell, x: scanned(cell, x)[1].sum(0)


def wrap_scan_broadcast(f):
  """State that is not marked as carried, but is written."""
  scanned = nnx.scan(f, in_axes=(None, None), out_axes=0, length=2)
  return lambda cell, x: scanned(cell, x).sum(0)


def pure_scan(f):
  def g(state, x):
    state, ys = jax.lax.scan(lambda s, _: f(s, x), state, length=2)
    return state, ys.sum(0)

  return g


def wrap_fori(f):
  def g(cell, x):
    def body(i, val):
      return (val[0], f(val[0], val[1]) + i)

    return nnx.fori_loop(0, 2, body, (cell, x))[1]

  return g


def pure_fori(f):
  def g(state, x):
    def body(i, val):
      state, y = f(*val)
      return state, y + i

    return jax.lax.fori_loop(0, 2, body, (state, x))

  return g


def wrap_cond(f):
  """One branch runs the function, the other writes other state."""

  def other(cell, x):
    cell.inner.calls.value = cell.inner.calls.value + 10.0
    return x

  def g(cell, x):
    return nnx.cond(x.sum() > 0, f, other, cell, x)

  return g


def pure_cond(f):
  def g(state, x):
    def other(s, x):
      return ((s[0], s[1], s[2] + 10.0), x)

    return jax.lax.cond(x.sum() > 0, f, other, state, x)

  return g


def wrap_vmap(f):
  """The state mapped over copies of it; the first element is kept."""

  def g(cell, x):
    many = nnx.clone(cell)
    for v in (many.w, many.mean, many.inner.calls):
      v.value = jnp.stack([v.value, 2 * v.value])
    ys = nnx.vmap(f, in_axes=(0, 0), out_axes=1)(many, jnp.stack([x, -x]))
    nnx.update(cell, jax.tree.map(lambda a: a.sum(0), nnx.state(many)))
    return ys.sum(1)

  return g


def pure_vmap(f):
  def g(state, x):
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), state)
    many, ys = jax.vmap(f)(many, jnp.stack([x, -x]))
    return jax.tree.map(lambda a: a.sum(0), many), ys.sum(0)

  return g


def wrap_vjp(f):
  def g(cell, x):
    y, pull_back = nnx.vjp(lambda x: f(nnx.clone(cell), x), x)
    (slope,) = pull_back(y)
    return slope + f(cell, x)

  return g


def pure_vjp(f):
  def g(state, x):
    y, pull_back = jax.vjp(lambda x: f(state, x)[1], x)
    (slope,) = pull_back(y)
    state, z = f(state, x)
    return state, slope + z

  return g


def wrap_jvp(f):
  def g(cell, x):
    y, slope = nnx.jvp(lambda x: f(nnx.clone(cell), x), (x,), (x,))
    return y + slope + f(cell, x)

  return g


def pure_jvp(f):
  def g(state, x):
    y, slope = jax.jvp(lambda x: f(state, x)[1], (x,), (x,))
    state, z = f(state, x)
    return state, y + slope + z

  return g


def wrap_switch(f):
  def g(cell, x):
    def twice(cell, x):
      return f(cell, f(cell, x))

    index = jnp.argmax(x) % 3
    return nnx.switch(index, [lambda cell, x: x, f, twice], cell, x)

  return g


def pure_switch(f):
  def g(state, x):
    def twice(state, x):
      return f(*f(state, x))

    index = jnp.argmax(x) % 3
    return jax.lax.switch(index, [lambda s, x: (s, x), f, twice], state, x)

  return g


def wrap_checkify(f):
  return lambda cell, x: nnx.checkify(f)(cell, x)[1]


def pure_checkify(f):
  return lambda state, x: checkify.checkify(f)(state, x)[1]


FORWARD = {
  "jit": (wrap_jit, pure_jit),
  "remat": (wrap_remat, pure_remat),
  "grad": (wrap_grad, pure_grad),
  "train": (wrap_train, pure_train),
  "scan": (wrap_scan_sum, pure_scan),
  "scan_broadcast": (wrap_scan_broadcast, pure_scan),
  "fori": (wrap_fori, pure_fori),
  "cond": (wrap_cond, pure_cond),
  "vmap": (wrap_vmap, pure_vmap),
  "vjp": (wrap_vjp, pure_vjp),
  "jvp": (wrap_jvp, pure_jvp),
  "switch": (wrap_switch, pure_switch),
  "checkify": (wrap_checkify, pure_checkify),
}


def check(names, sign=1.0):
  ours, pure = step, pure_step
  for name in names:
    wrap, pure_wrap = FORWARD[name]
    ours, pure = wrap(ours), pure_wrap(pure)
  x = sign * jnp.array([0.5, -0.2, 0.9])
  cell = Cell(*initial())
  y = ours(cell, x)
  state, expected = pure(initial(), x)
  np.testing.assert_allclose(y, expected, rtol=2e-4, atol=1e-5)
  for one, two in zip(state_of(cell), state):
    np.testing.assert_allclose(one, two, rtol=2e-4, atol=1e-5)
  assert cell.inner.tied is cell.w


class CompositionTest(absltest.TestCase):
  @hypothesis.settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(
    st.lists(st.sampled_from(sorted(FORWARD)), min_size=1, max_size=4),
    st.sampled_from([1.0, -1.0]),
  )
  def test_random_compositions(self, names, sign):
    check(names, sign)

  def test_every_pair(self):
    for outer in FORWARD:
      for inner in ("train", "cond", "vmap"):
        with self.subTest(f"{outer}({inner})"):
          check([inner, outer])


if __name__ == "__main__":
  absltest.main()
