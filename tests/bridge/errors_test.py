"""Errors of the bridge name the module, the path and the fix."""

from absl.testing import absltest
from flax import errors
from flax import linen as nn
import jax
import jax.numpy as jnp

import bridge
import nnx

X = jnp.ones((3, 4))


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4, name="dense")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    return nn.Dropout(0.5, deterministic=not train, name="drop")(x)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return Block(name="block")(x, train)


class Outer(nnx.Module):
  def __init__(self, rngs=None):
    self.net = bridge.ToNNX(Net(), rngs=rngs)

  def __call__(self, x, **kwargs):
    return self.net(x, **kwargs)


class ToNNXErrorsTest(absltest.TestCase):
  def check(self, call, *texts, kind=ValueError):
    with self.assertRaises(kind) as caught:
      call()
    for text in texts:
      self.assertIn(text, str(caught.exception))

  def test_before_lazy_init(self):
    model = Outer(nnx.Rngs(0))
    self.check(
      lambda: model(X),
      "`ToNNX(Net)` must be initialised before it is called",
      "`bridge.lazy_init` on the Module that it is part of",
    )
    self.check(
      lambda: model.net.block,
      "`ToNNX(Net)` has no attribute `block`: it has no variables yet",
      "Call `lazy_init` with samples of its arguments first",
      kind=AttributeError,
    )
    self.check(
      lambda: bridge.lazy_init(Outer(), X),
      "`ToNNX(Net)` must have random streams to be initialised: pass",
    )

  def test_missing_key(self):
    model = bridge.ToNNX(Net(), rngs=nnx.Rngs(params=0)).lazy_init(X)
    model.to_nnx__rngs = None
    self.check(
      lambda: model(X, train=True),
      "`ToNNX(Net)` (at `block/drop`): ",
      'needs PRNG for "dropout"',
      "`ToNNX(module, rngs=nnx.Rngs(0, dropout=1))`",
      "`rngs={'dropout': key}`",
    )
    with self.assertRaises(errors.InvalidRngError):  # still Linen's
      model(X, train=True)

  def test_missing_variables(self):
    model = bridge.ToNNX(Net())
    bridge.load_linen_variables(
      model, {"params": {"block": {"dense": {"kernel": jnp.ones((4, 4))}}}}
    )
    self.check(
      lambda: model(X),
      '`ToNNX(Net)`: Could not find parameter named "bias" in scope'
      ' "/block/dense".',
      "load variables that have it by `bridge.load_linen_variables`.",
    )

  def test_wrong_collections(self):
    model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
    self.check(
      lambda: model(X, train=True, mutable=["cache"]),
      '`ToNNX(Net)`: Cannot update variable "mean" in "/block/norm" because'
      ' collection "batch_stats" is immutable.',
      "Pass `mutable=['batch_stats']`",
    )

  def test_wrong_shapes(self):
    model = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(X)
    self.check(
      lambda: model(jnp.ones((3, 5))),
      '`ToNNX(Net)`: For parameter "kernel" in "/block/dense"',
      "arguments of the shapes that it was initialised with",
    )

  def test_clashes(self):
    class Reserved(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2, name="rngs")(x)

    self.check(
      lambda: bridge.ToNNX(Reserved(), rngs=nnx.Rngs(0)).lazy_init(X),
      "submodules of `ToNNX(Reserved)` must not be called `rngs`",
      "Rename it in the Linen module",
    )

    class Twice(nn.Module):
      @nn.compact
      def __call__(self, x):
        nn.Dense(2, name="a")(x)
        return nn.Dense(2, name="a")(x)

    self.check(
      lambda: bridge.ToNNX(Twice(), rngs=nnx.Rngs(0)).lazy_init(X),
      '`ToNNX(Twice)`: Could not create submodule "a" in Module Twice',
      "Rename one of the two in the Linen module.",
    )
    model = bridge.ToNNX(Net())
    self.check(
      lambda: bridge.load_linen_variables(
        model, {"params": {"a": {"w": X}}, "cache": {"a": {"w": X}}}
      ),
      "`ToNNX(Net)`: A path must be in one collection, since it names one",
      "but `a/w` is in `params` and in `cache`. Rename one of the two.",
    )

    class Sows(nn.Module):
      @nn.compact
      def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)
        self.sow("intermediates", "dense", x)
        return x

    model = bridge.ToNNX(Sows(), rngs=nnx.Rngs(0)).lazy_init(X)
    self.check(
      lambda: model(X, mutable=["intermediates"]),
      '`ToNNX(Sows)`: Duplicate use of scope name: "dense". Rename one of the',
    )
    model = bridge.ToNNX(Sows())
    self.check(
      lambda: bridge.load_linen_variables(
        model, {"params": {"dense": {"kernel": X}}, "cache": {"dense": X}}
      ),
      "but `dense` is in `params` and in `cache`. Rename one of the two.",
    )
    bridge.load_linen_variables(model, {"cache": {"dense": X}})
    self.check(
      lambda: bridge.to_nnx._write(model, {"params": {"dense": {"w": X}}}),
      "Variables of `ToNNX(Sows)` must have different paths, but `dense` is"
      " both a `Cache` and a submodule. Rename one of them in the Linen",
    )


class ToLinenErrorsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()

    class Middle(nn.Module):
      @nn.compact
      def __call__(self, x):
        return bridge.to_linen(nnx.BatchNorm, 4, name="norm")(x)

    self.model = Middle()
    self.variables = self.model.init(jax.random.key(0), X)

  def check(self, variables, text):
    with self.assertRaisesRegex(ValueError, text):
      self.model.apply(variables, X, mutable=["batch_stats"])

  def test_missing_collection(self):
    variables = {k: v for k, v in self.variables.items() if k != "batch_stats"}
    self.check(
      variables,
      r"`ToLinen\(BatchNorm\)` at `norm` needs the variable `mean` in the"
      r" collection `batch_stats`, .*Pass all the variables that `init`",
    )

  def test_variables_that_have_no_place(self):
    params = {"norm": {**self.variables["params"]["norm"], "other": {"w": X}}}
    self.check(
      {**self.variables, "params": params},
      r"given to `ToLinen\(BatchNorm\)` at `norm` must be its own, but"
      r" `other/w` in the collection `params` has no place in it. Leave it",
    )

  def test_missing_key(self):
    model = bridge.to_linen(nnx.Dropout, 0.5)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(keys, X)
    with self.assertRaisesRegex(
      ValueError,
      r"`ToLinen\(Dropout\)` drew random numbers from the stream `dropout`, but"
      r" no key was given for it: pass `rngs=\{'dropout': key\}` to `apply`",
    ):
      model.apply(variables, X)
    # Made of one key, it takes one for any stream.
    variables = model.init(jax.random.key(0), X)
    y = model.apply(variables, X, rngs={"dropout": jax.random.key(1)})
    self.assertTrue((y == 0).any())


if __name__ == "__main__":
  absltest.main()
