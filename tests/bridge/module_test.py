"""bridge.Module: setup and compact; flax.nnx.bridge is the oracle."""

import importlib
import inspect
import types

from absl.testing import absltest, parameterized
from flax import errors
from flax import linen as nn
from flax import nnx as fnnx
import jax
import jax.numpy as jnp
import numpy as np

import bridge
import nnx

X = jnp.arange(6.0).reshape(3, 2)


def define(library, bridge_):
  """The same program with either library."""

  class Linear(bridge_.Module):
    dout: int
    use_bias: bool = True

    @bridge_.compact
    def __call__(self, x):
      init = library.initializers.uniform()
      w = self.param("w", init, (x.shape[-1], self.dout))
      y = x @ w
      if self.use_bias:
        y += self.param("b", library.initializers.zeros_init(), (self.dout,))
      return y

  class Compact(bridge_.Module):
    @bridge_.compact
    def __call__(self, x):
      count = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
      count[...] += 1
      x = Linear(4)(x)
      x = Linear(5, name="named")(x)
      return Linear(3, use_bias=False)(x)

    def twice(self, x):
      return 2 * x

  class Setup(bridge_.Module):
    sizes: tuple[int, ...] = (4, 3)

    def setup(self):
      self.first = Linear(self.sizes[0])
      self.second = Linear(self.sizes[1])

    def __call__(self, x):
      return self.second(self.first(x))

  class Boxed(bridge_.Module):
    @bridge_.compact
    def __call__(self, x):
      init = bridge_.with_partitioning(
        library.initializers.ones_init(), ("in", "out")
      )
      return x @ self.param("w", init, (x.shape[-1], 2))

  class Nested(bridge_.Module):
    @bridge_.compact
    def __call__(self, x):
      x = bridge_.linen_in_bridge_mdl(nn.Dense(4))(x)
      x = bridge_.nnx_in_bridge_mdl(
        lambda rngs: library.Linear(4, 3, rngs=rngs), name="linear"
      )(x)
      return Setup(name="setup")(x)

  return {c.__name__: c for c in (Compact, Setup, Boxed, Nested, Linear)}


OURS = define(nnx, bridge)
THEIRS = define(fnnx, fnnx.bridge)


def shapes(tree):
  return jax.tree.map(jnp.shape, nn.meta.unbox(tree))


class OracleTest(parameterized.TestCase):
  @parameterized.parameters("Compact", "Setup", "Nested")
  def test_variables_and_values(self, name):
    ours, theirs = OURS[name](), THEIRS[name]()
    y, variables = ours.init_with_output(0, X)
    expected_y, expected = theirs.init_with_output(0, X)
    self.assertEqual(shapes(variables), shapes(expected))
    # Values are those of one set of weights; seeds are drawn differently.
    weights = nn.meta.unbox(expected)
    result = ours.apply(weights, X, rngs=0)
    np.testing.assert_allclose(
      result, theirs.apply(weights, X, rngs=0), rtol=1e-6
    )
    self.assertEqual(y.shape, expected_y.shape)

  def test_keywords_of_linen(self):
    for bridge_ in (bridge, fnnx.bridge):

      class Model(bridge_.Module):
        @bridge_.compact
        def __call__(self, x):
          w = self.param("w", jax.nn.initializers.ones, (2,), unbox=False)
          n = self.variable("counts", "n", jnp.zeros, (), unbox=False)
          return x * w[...] + n[...]

      y, variables = Model().init_with_output(0, X, mutable=["params"])
      np.testing.assert_array_equal(y, X)
      self.assertEqual(
        shapes(variables), {"params": {"w": (2,)}, "counts": {"n": ()}}
      )
    names = [
      list(inspect.signature(function).parameters)[:3]
      for function in (bridge.with_partitioning, fnnx.bridge.with_partitioning)
    ]
    self.assertEqual(*names)

  def test_all_public_names(self):
    modules = {"module", "interop", "wrappers"}
    theirs = {n for n in dir(fnnx.bridge) if not n.startswith("_")} - modules
    self.assertEmpty(theirs - set(dir(bridge)))

  def test_name_in_nnx(self):
    named = importlib.import_module("nnx.bridge")
    self.assertIs(nnx.bridge, named)
    for name in ("", ".module", ".variables"):
      named = importlib.import_module(f"nnx.bridge{name}")
      target = importlib.import_module(f"bridge{name}")
      for public in dir(target):
        value = getattr(target, public)
        if not public.startswith("_") and not isinstance(
          value, types.ModuleType
        ):
          self.assertIs(getattr(named, public), value)


class ModuleTest(absltest.TestCase):
  def test_module_stays_as_it_was(self):
    model = OURS["Setup"]()
    variables = model.init(0, X)
    model.apply(variables, X)
    self.assertEqual(vars(model), {"sizes": (4, 3)})
    self.assertIsNone(model.scope)

  def test_state_is_returned_if_asked_for(self):
    model = OURS["Compact"]()
    variables = model.init(0, X)
    self.assertEqual(variables["counts"]["calls"], 1)
    y = model.apply(variables, X)
    again, updated = model.apply(variables, X, mutable="counts")
    np.testing.assert_array_equal(y, again)
    self.assertEqual(updated["counts"]["calls"], 2)

  def test_metadata(self):
    # Flax needs a mesh for this one.
    y, variables = OURS["Boxed"]().init_with_output(0, X)
    w = variables["params"]["w"]
    self.assertIsInstance(w, nn.Partitioned)
    self.assertEqual(w.names, ("in", "out"))
    np.testing.assert_array_equal(OURS["Boxed"]().apply(variables, X), y)

  def test_jit_and_grad(self):
    model = OURS["Compact"]()
    variables = model.init(0, X)

    def loss(params):
      return model.apply({**variables, "params": params}, X).sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    self.assertEqual(shapes(grads), shapes(variables["params"]))
    np.testing.assert_allclose(
      grads["Linear_1"]["w"][:, 0], grads["Linear_1"]["w"][:, 1], rtol=1e-6
    )

  def test_methods(self):
    model = OURS["Compact"]()
    variables = model.init(0, X)
    for method in ("twice", OURS["Compact"].twice, model.twice):
      np.testing.assert_array_equal(
        model.apply(variables, X, method=method), 2 * X
      )
    model = OURS["Setup"]()
    variables = model.init(0, X)
    first = model.apply(variables, X, method="first")
    self.assertEqual(first.shape, (3, 4))

  def test_bind(self):
    model = OURS["Setup"]()
    variables = model.init(0, X)
    bound = model.bind(variables)
    np.testing.assert_array_equal(bound(X), model.apply(variables, X))
    self.assertEqual(bound.first.w.shape, (2, 4))
    self.assertEqual(shapes(dict(bound.variables)), shapes(variables))

  def test_a_method_called_twice_shares_its_parameters(self):
    class Twice(bridge.Module):
      def __call__(self, x):
        return self.inner(self.inner(x))

      @bridge.compact
      def inner(self, x):
        return OURS["Linear"](2)(x)

    y, variables = Twice().init_with_output(0, X)
    self.assertEqual(list(variables["params"]), ["Linear_0"])
    p = variables["params"]["Linear_0"]
    np.testing.assert_allclose(
      y, (X @ p["w"] + p["b"]) @ p["w"] + p["b"], rtol=1e-6
    )

  def test_attributes_in_compact_are_names_of_the_same(self):
    class Named(bridge.Module):
      @bridge.compact
      def __call__(self, x):
        self.a_name = OURS["Linear"](2)
        return self.a_name(x)

    variables = Named().init(0, X)
    self.assertEqual(list(variables["params"]), ["Linear_0"])
    self.assertEqual(Named().apply(variables, X).shape, (3, 2))

  def test_lists_of_submodules_in_setup(self):
    class Layers(bridge.Module):
      def setup(self):
        self.layers = [OURS["Linear"](2) for _ in range(2)]

      def __call__(self, x):
        for layer in self.layers:
          x = layer(x)
        return x

    y, variables = Layers().init_with_output(0, X)
    np.testing.assert_array_equal(Layers().apply(variables, X), y)

  def test_random_streams(self):
    class Draws(bridge.Module):
      def __call__(self):
        return jax.random.key_data(self.make_rng("noise"))

    a = Draws().apply({}, rngs={"noise": 0})
    np.testing.assert_array_equal(a, Draws().apply({}, rngs=nnx.Rngs(noise=0)))
    np.testing.assert_array_equal(a, Draws().apply({}, rngs=0))
    self.assertTrue(
      np.any(a != Draws().apply({}, rngs={"noise": jax.random.key(1)}))
    )

  def test_current_module(self):
    seen = []

    class Inner(bridge.Module):
      def __call__(self):
        seen.append(bridge.current_context().in_compact)

    class Outer(bridge.Module):
      def setup(self):
        seen.append(bridge.current_module() is self)
        self.inner = Inner()

      @bridge.compact
      def __call__(self):
        seen.append(bridge.current_context().in_compact)
        Inner(parent=None)
        self.inner()

    Outer().apply({})
    self.assertEqual(seen, [True, True, True])
    self.assertIsNone(bridge.current_module())

  def test_linen_modules_inside_write_their_state(self):
    class Model(bridge.Module):
      @bridge.compact
      def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=False)
        return bridge.linen_in_bridge_mdl(norm, name="norm")(x)

    variables = Model().init(0, X)
    before = variables["batch_stats"]["norm"]["mean"]
    _, updated = Model().apply(variables, X, mutable=["batch_stats"])
    self.assertFalse(
      np.array_equal(updated["batch_stats"]["norm"]["mean"], before)
    )


class MutableTest(parameterized.TestCase):
  """Linen modules inside write what `mutable` says, as with flax.nnx."""

  def result(self, wrap, train, mutable):
    class Model(wrap.Module):
      @wrap.compact
      def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=not train)
        return wrap.linen_in_bridge_mdl(norm, name="norm")(x)

    variables = Model().init(0, X)
    try:
      return Model().apply(variables, X, mutable=mutable)
    except errors.ModifyScopeVariableError as error:
      return str(error)

  @parameterized.product(
    train=(False, True),
    mutable=(
      False,
      True,
      [],
      ["cache"],
      "cache",
      "batch_stats",
      ["batch_stats"],
    ),
  )
  def test_collections(self, train, mutable):
    ours = self.result(bridge, train, mutable)
    theirs = self.result(fnnx.bridge, train, mutable)
    if isinstance(theirs, str):
      text = 'Cannot update variable "mean" in "/" because'
      self.assertStartsWith(theirs, text)
      self.assertStartsWith(ours, f"`ToNNX(BatchNorm)`: {text}")
    else:
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class ErrorsTest(absltest.TestCase):
  def test_unbound(self):
    class Model(bridge.Module):
      def __call__(self, x):
        return self.param("w", nnx.initializers.ones_init(), ())

    with self.assertRaisesRegex(
      ValueError,
      "`Model` must be bound to make the parameter `w`: do it in `setup` or",
    ):
      Model()(X)

  def test_wrong_shape(self):
    variables = {"params": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}}
    with self.assertRaisesRegex(
      ValueError,
      r"parameter `w` of `Linear` must have the shape \(2, 4\), as its"
      r" initializer says, but has \(3, 4\)",
    ):
      OURS["Linear"](4).apply(variables, X)

  def test_wrong_collection(self):
    with self.assertRaisesRegex(
      ValueError, "`w` of `Linear` must be a `Param`, of the collection"
    ):
      OURS["Linear"](4).apply({"cache": {"w": jnp.ones((2, 4))}}, X)

  def test_missing_stream(self):
    with self.assertRaisesRegex(
      ValueError,
      "`Linear` must have a key for the stream `params`, but has"
      r" \['dropout'\]. Pass `rngs=\{'params': key\}`",
    ):
      OURS["Linear"](4).init({"dropout": 0}, X)

  def test_missing_init_fn(self):
    class Model(bridge.Module):
      def __call__(self):
        return self.variable("cache", "k")

    with self.assertRaisesRegex(
      ValueError, "`init_fn` must be given for the variable `k` of `Model`"
    ):
      Model().apply({})

  def test_names_in_setup(self):
    class Layers(bridge.Module):
      def setup(self):
        self.layers = [
          *(OURS["Linear"](2, name=f"layer_{i}") for i in range(2)),
          bridge.linen_in_bridge_mdl(nn.Dense(3), name="last"),
        ]

      def __call__(self, x):
        for layer in self.layers:
          x = layer(x)
        return x

    variables = Layers().init(0, X)
    self.assertSameElements(variables["params"], ["layer_0", "layer_1", "last"])
    y = Layers().apply(variables, X)
    for i in range(2):
      variables["params"][f"layer_{i}"]["w"] *= 2
    np.testing.assert_allclose(Layers().apply(variables, X), 4 * y, rtol=1e-6)

  def test_what_a_linen_module_sows_is_kept(self):
    class Sower(nn.Module):
      @nn.compact
      def __call__(self, x):
        self.sow("intermediates", "x", x)
        return x

    class Model(bridge.Module):
      @bridge.compact
      def __call__(self, x):
        return bridge.linen_in_bridge_mdl(Sower(), name="sower")(x)

    variables = Model().init(0, X)
    _, updates = Model().apply({}, X, mutable=True)
    (sown,) = updates["intermediates"]["sower"]["x"]
    np.testing.assert_array_equal(sown, X)
    self.assertNotIn("sower", variables.get("params", {}))

  def test_names(self):
    class Twice(bridge.Module):
      @bridge.compact
      def __call__(self, x):
        OURS["Linear"](3, name="y")(x)
        OURS["Linear"](3, name="y")(x)

    class Number(bridge.Module):
      @bridge.compact
      def __call__(self, x):
        OURS["Linear"](3, name=3)(x)

    for cls, text in (
      (Twice, "`Twice` must differ, but `y` is given to two, the second a"),
      (Number, "`name` of `Linear` must be a string, but got 3"),
    ):
      with self.assertRaisesRegex(ValueError, text):
        cls().init(0, X)

  def test_parent(self):
    class Model(bridge.Module):
      @bridge.compact
      def __call__(self, x):
        OURS["Linear"](3, parent=self)(x)

    with self.assertRaisesRegex(
      ValueError, "`parent` of `Linear` must be left out or None inside of"
    ):
      Model().init(0, X)

  def test_methods(self):
    with self.assertRaisesRegex(TypeError, "submodule of `Setup` that can be"):
      OURS["Setup"]().apply({}, X, method="sizes")
    with self.assertRaisesRegex(TypeError, "must be a function of the Module"):
      OURS["Setup"]().apply({}, X, method=lambda: 1)

    class Other:
      @bridge.compact
      def call(self):
        pass

    with self.assertRaisesRegex(TypeError, "was called on a `Other`"):
      Other().call()
    for function in (bridge.linen_in_bridge_mdl, bridge.nnx_in_bridge_mdl):
      with self.assertRaisesRegex(ValueError, "must be called in `setup` or"):
        function(nn.Dense(3))

  def test_clashes(self):
    with self.assertRaisesRegex(
      ValueError, "`sizes` is a `tuple` there, and a `Param` is given"
    ):
      OURS["Setup"]().apply({"params": {"sizes": jnp.ones(2)}}, X)

    class Holds(bridge.Module):
      def setup(self):
        self.linear = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

      def __call__(self, x):
        return self.linear(x)

    with self.assertRaisesRegex(
      ValueError, "`linear/other` has no place in a `Linear`"
    ):
      Holds().apply({"params": {"linear": {"other": jnp.ones(2)}}}, X)


if __name__ == "__main__":
  absltest.main()
