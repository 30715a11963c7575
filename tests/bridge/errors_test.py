"""Errors of the bridge name the module, the path and the fix."""

import subprocess
import sys
from typing import Any

from absl.testing import absltest, parameterized
from flax import errors, struct
from flax import linen as nn
from flax import nnx as flax_nnx
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


class ArgumentsTest(parameterized.TestCase):
  """What is no class, no instance, or of the other side: one sentence each."""

  def check(self, kind, make, text):
    with self.assertRaises(kind) as caught:
      make()
    self.assertEqual(str(caught.exception), text)

  @parameterized.parameters(
    (
      lambda: bridge.ToLinen(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
      "`nnx_class` must be a class of Modules, but got an instance of `Linear`:"
      " pass `ToLinen(Linear, args=...)`.",
    ),
    (
      lambda: bridge.to_linen(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 4),
      "`nnx_class` must be a class of Modules, but got an instance of `Linear`:"
      " pass `ToLinen(Linear, args=...)`.",
    ),
    (
      lambda: bridge.ToLinen(nn.Dense, args=(3,)),
      "`nnx_class` must be a class of `nnx`, but got `Dense` of Linen: it needs"
      " no bridge, use it as it is.",
    ),
    (
      lambda: bridge.ToLinen(nn.Dense(3)),
      "`nnx_class` must be a class of `nnx`, but got `Dense` of Linen: it needs"
      " no bridge, use it as it is.",
    ),
    (
      lambda: bridge.ToLinen(flax_nnx.Linear, args=(2, 3)),
      "`nnx_class` must be a class of `nnx`, but got `Linear` of `flax.nnx`:"
      " pass a function that returns `nnx.bridge.from_flax_nnx(...)` of an"
      " object of it.",
    ),
    (
      lambda: bridge.ToLinen("Linear"),
      "`nnx_class` must be a class of Modules or a function that makes one, but"
      " got 'Linear'.",
    ),
    (
      lambda: bridge.ToLinen(nnx.Linear, 32),
      "`args` must be a tuple of arguments of the Module, but got 32: write"
      " `args=(...,)`, or use `to_linen`.",
    ),
    (
      lambda: bridge.ToLinen(nnx.Linear, (2, 3), 4),
      "`kwargs` must map names to arguments of the Module, but got 4.",
    ),
    (
      lambda: bridge.to_linen(nnx.Linear, 2, 3, metadata_type=3),
      "`metadata_type` must be a class or function, or None, but got 3.",
    ),
    (
      lambda: bridge.to_linen(nnx.Linear, 2, 3, metadata_fn="bare"),
      "`metadata_fn` must be a class or function, or None, but got 'bare'.",
    ),
    (
      lambda: bridge.to_linen(nnx.Linear, 2, 3, metadata_type=nn.Partitioned),
      "`metadata_type` must take the type, value and metadata of a Variable,"
      " but got `Partitioned`: pass a function of the Variable as"
      " `metadata_fn` instead.",
    ),
    (
      lambda: bridge.ToLinen(lambda rngs: 3).init(jax.random.key(0), X),
      "`nnx_class` of `ToLinen(<lambda>)` must make a Module of `nnx`, but made"
      " an object of type `builtins.int`.",
    ),
    (
      lambda: bridge.ToNNX(nn.Dense, rngs=nnx.Rngs(0)),
      "`module` must be an instance of a Linen module, but got the class"
      " `Dense`. Make one: `ToNNX(Dense(...), rngs=...)`.",
    ),
    (
      lambda: bridge.ToNNX(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
      "`module` must be an instance of a Linen module, but got an object of"
      " type `Linear`. It is a Module of `nnx` already: use it as it is.",
    ),
    (
      lambda: bridge.ToNNX(flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))),
      "`module` must be an instance of a Linen module, but got an object of"
      " type `Linear`. Convert it by `nnx.bridge.from_flax_nnx`.",
    ),
    (
      lambda: bridge.ToNNX(3),
      "`module` must be an instance of a Linen module, but got an object of"
      " type `int`. Pass one, as in `ToNNX(linen.Dense(4), rngs=nnx.Rngs(0))`.",
    ),
  )
  def test_types(self, make, text):
    self.check(TypeError, make, text)

  def test_rngs_among_the_arguments(self):
    self.check(
      ValueError,
      lambda: bridge.to_linen(nnx.Linear, 2, 3, rngs=nnx.Rngs(0)),
      "`kwargs` must not have `rngs`, since the keys given to `init` make them:"
      " leave it out, or pass `skip_rng=True` to keep yours.",
    )
    kept = bridge.to_linen(nnx.Linear, 4, 3, rngs=nnx.Rngs(7), skip_rng=True)
    kernel = kept.init(jax.random.key(0), X)["params"]["kernel"]
    expected = nnx.Linear(4, 3, rngs=nnx.Rngs(7)).kernel
    self.assertTrue((kernel == expected[...]).all())

  def test_a_box_of_something_else(self):
    class Wrong(struct.PyTreeNode, nn.meta.AxisMetadata):
      type: Any = struct.field(pytree_node=False)
      value: Any
      metadata: Any = struct.field(pytree_node=False)

      def unbox(self):
        return self.value * 2

      def replace_boxed(self, val):
        return self.replace(value=val)

      add_axis = remove_axis = replace_boxed

    class Named(nnx.Module):
      def __init__(self, *, rngs):
        self.w = nnx.Param(jnp.ones(4), unit="m")

      def __call__(self, x):
        return x * self.w

    self.check(
      ValueError,
      lambda: bridge.ToLinen(Named, metadata_type=Wrong).init(
        jax.random.key(0), X
      ),
      "`metadata_type` of `ToLinen(Named)` must make a box whose `unbox()` is"
      " the second of its arguments `(type, value, metadata)`, but `Wrong` does"
      " not. Use `metadata_fn` to store a Variable in a box of another kind.",
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


class BridgedTest(parameterized.TestCase):
  @parameterized.parameters(
    lambda: bridge.linen_variables(nn.Dense(3)),
    lambda: bridge.load_linen_variables(nn.Dense(3), {}),
  )
  def test_no_bridged_module(self, call):
    with self.assertRaisesRegex(
      TypeError,
      "`model` must be a `ToNNX`, but got an object of type `Dense`. Pass the"
      " attribute that holds the Linen module",
    ):
      call()

  @parameterized.parameters(
    ([1], "an object of type `list`"),
    ({"params": None}, "a `NoneType` for `params`"),
    ({"params": X, "cache": {}}, "a `ArrayImpl` for `params`"),
  )
  def test_no_variables(self, variables, got):
    with self.assertRaisesRegex(
      TypeError,
      r"`variables` must map collections to nested mappings, as in"
      rf' `\{{"params": .*, but got {got}\.',
    ):
      bridge.load_linen_variables(bridge.ToNNX(nn.Dense(3)), variables)


class ImportErrorsTest(absltest.TestCase):
  def test_without_flax_it_says_what_to_install(self):
    program = (
      f"import sys; sys.path[:] = {sys.path!r}\n"
      "sys.modules['flax'] = None\n"
      "import nnx.bridge"
    )
    done = subprocess.run(
      [sys.executable, "-c", program], capture_output=True, text=True
    )
    self.assertEqual(
      done.stderr.strip().splitlines()[-1],
      "ModuleNotFoundError: `nnx.bridge` must have the package `flax`, but it"
      " is not installed. Install it: `pip install flax`.",
    )


if __name__ == "__main__":
  absltest.main()
