"""Ops without `jit`: with `jit` switched off, and what is kept of them."""

import gc

from absl.testing import absltest, parameterized
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from kernels import batch_stat, decode_attention, kv_cache
from kernels.common import arrays, dispatch
import nnx

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 6, 8)).astype(np.float32)
K, V = RNG.normal(size=(2, 2, 8, 2, 4)).astype(np.float32)
Q = RNG.normal(size=(2, 1, 4, 4)).astype(np.float32)
NEW = RNG.normal(size=(2, 1, 2, 4)).astype(np.float32)
ZEROS, ONES = np.zeros(8, np.float32), np.ones(8, np.float32)


def update_statistics(x):
  out = batch_stat.update(x, ZEROS, ONES, 0.5, implementation="cpu")
  return out.mean, out.batch_var


def normalise(x, scale):
  return batch_stat.batch_norm(
    x, scale, ZEROS, ZEROS, ONES, 0.5, activation="relu", implementation="cpu"
  ).y


def update_cache(k, v, new):
  return kv_cache.update(k, v, new, new, jnp.int32(3), implementation="cpu")


def decode(k, v, q, new):
  return decode_attention.decode_attention(
    k, v, q, new, new, 3, softcap=2.0, implementation="cpu"
  )


def attend(k, v, q):
  return decode_attention.attend(k, v, q, 3, implementation="cpu")


OPS = {
  "update_statistics": (update_statistics, (X,)),
  "normalise": (normalise, (X, ONES)),
  "update_cache": (update_cache, (K, V, NEW)),
  "decode": (decode, (K, V, Q, NEW)),
  "attend": (attend, (K, V, Q)),
}


def total(fn):
  return lambda *args: sum(
    jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(fn(*args))
  )


def gradient(fn, args):
  return jax.grad(total(fn), argnums=tuple(range(len(args))))(*args)


def mapped(fn, args):
  return jax.vmap(fn)(*(np.stack([arg, 2 * arg]) for arg in args))


def gradient_in_jit(fn, args):
  return jax.jit(jax.grad(total(fn)))(*args)


def in_a_loop(fn, args):
  return lax.map(lambda i: fn(args[0] * i, *args[1:]), jnp.arange(2.0))


def second_derivative(fn, args):
  return jax.jvp(jax.grad(total(fn)), args, args)


def layers(x):
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(
    nnx.Linear(8, 8, rngs=rngs),
    nnx.BatchNorm(8, rngs=rngs),
    nnx.Dropout(0.5, rngs=rngs),
    nnx.LayerNorm(8, rngs=rngs),
  )
  attention = nnx.MultiHeadAttention(
    num_heads=2, in_features=8, decode=False, rngs=rngs
  )

  @nnx.jit
  def run(model, attention, x):
    return attention(model(x))

  def loss(model):
    return jnp.sum(run(model, attention, x) ** 2)

  value, grads = nnx.value_and_grad(loss)(model)
  steps = nnx.MultiHeadAttention(
    num_heads=2, in_features=8, decode=True, rngs=nnx.Rngs(1)
  )
  steps.init_cache(x.shape)
  decoded = [steps(x[:, i : i + 1]) for i in range(2)]
  return value, nnx.state(grads), nnx.state(model, nnx.BatchStat), decoded


class DisabledJitTest(parameterized.TestCase):
  def check(self, got, want):
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(want))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      if jax.dtypes.issubdtype(g.dtype, jax.dtypes.prng_key):
        g, w = jax.random.key_data(g), jax.random.key_data(w)
      np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)

  @parameterized.product(
    op=tuple(OPS),
    use=(
      lambda fn, args: fn(*args),
      lambda fn, args: jax.jit(fn)(*args),
      gradient,
      gradient_in_jit,
      mapped,
      in_a_loop,
      second_derivative,
    ),
  )
  def test_ops(self, op, use):
    fn, args = OPS[op]
    want = use(fn, args)
    with jax.disable_jit():
      got = use(fn, args)
      self.assertTrue(jax.config.jax_disable_jit)
    self.check(got, want)

  def test_layers(self):
    want = layers(X)
    with jax.disable_jit():
      got = layers(X)
    self.check(got, want)


class ProgramsTest(absltest.TestCase):
  def kept(self):
    gc.collect()
    return len(jax.devices()[0].client.live_executables())

  def test_programs_go_with_the_caches(self):
    before = self.kept()
    for i in range(12):
      batch_stat.batch_norm(
        X, ONES, ZEROS, ZEROS, ONES, epsilon=1e-3 + i, implementation="cpu"
      )
    self.assertGreaterEqual(self.kept() - before, 12)
    jax.clear_caches()
    self.assertLess(self.kept(), 12)

  def test_programs_are_bounded(self):
    op = dispatch.Op(
      "eager_test_scaled",
      abstract_eval=lambda x, k: (arrays.out_aval(x.shape, x.dtype, x),),
      reference=lambda x, k: (x * k,),
    )
    # Neither compiled nor run: a program of `jit` for each float.
    for i in range(dispatch.PROGRAMS + 20):
      dispatch._jitted(op.primitive, (("k", float(i)),), False)
    size = dispatch._jitted.cache_info().currsize
    self.assertEqual(size, dispatch.PROGRAMS)

  def test_every_float_has_its_own_numbers(self):
    for epsilon in (1e-5, 0.5, 4.0, 0.5):
      y = batch_stat.batch_norm(
        X, ONES, ZEROS, ZEROS, ONES, epsilon=epsilon, implementation="cpu"
      ).y
      x = X.astype(np.float64)
      want = (x - x.mean((0, 1))) / np.sqrt(x.var((0, 1)) + epsilon)
      np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
