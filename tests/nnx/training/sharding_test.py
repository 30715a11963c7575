"""Models and optimizers made and trained on a mesh of 8 virtual devices."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import nnx
from nnx.engine import jax_private
from tests.testing import devices

devices.use_cpu_devices(8)

X = np.random.RandomState(0).normal(size=(16, 8)).astype(np.float32)
Y = np.random.RandomState(1).normal(size=(16, 4)).astype(np.float32)
RULES = (("embed", None), ("hidden", "model"))


def make_model(library):
  """A model with logical names of axes, and a Variable without any."""
  init = jax.nn.initializers.lecun_normal()

  class Model(library.Module):
    def __init__(self, rngs):
      self.up = library.Linear(
        8,
        16,
        kernel_init=library.with_partitioning(init, ("embed", "hidden")),
        bias_init=library.with_partitioning(
          jax.nn.initializers.zeros, ("hidden",)
        ),
        rngs=rngs,
      )
      self.down = library.Linear(
        16,
        4,
        kernel_init=library.with_partitioning(init, ("hidden", "embed")),
        rngs=rngs,
      )
      self.steps = library.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
      return self.down(jnp.tanh(self.up(x)))

  return Model(library.Rngs(0))


SPECS = {
  ("down", "bias"): P(),
  ("down", "kernel"): P("model", None),
  ("steps",): P(),
  ("up", "bias"): P("model"),
  ("up", "kernel"): P(None, "model"),
}


def make_mesh(explicit=False):
  kind = jax.sharding.AxisType.Explicit if explicit else None
  kind = kind or jax.sharding.AxisType.Auto
  return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def specs_of(library, node):
  """The specs of the arrays, without what jax leaves out at the end."""
  return {
    path: tuple(leaf[...].sharding.spec)
    for path, leaf in library.to_flat_state(library.state(node))
  }


def padded(specs, node):
  ranks = {p: leaf.ndim for p, leaf in nnx.to_flat_state(nnx.state(node))}
  return {
    path: (*spec, *[None] * (ranks[path] - len(spec)))
    for path, spec in specs.items()
  }


def values(node):
  return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(node)))


class InitializationTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  @parameterized.product(jitted=(False, True), explicit=(False, True))
  def test_on_a_mesh(self, jitted, explicit):
    make = nnx.jit(lambda: make_model(nnx)) if jitted else None
    with jax.set_mesh(make_mesh(explicit)), nnx.logical_axis_rules(RULES):
      model = make() if jitted else make_model(nnx)
    found = {
      path: leaf.value.sharding
      for path, leaf in nnx.to_flat_state(nnx.state(model))
      if leaf.has_metadata("out_sharding")
    }
    self.assertLen(found, 3)
    for path, sharding in found.items():
      ndim = 1 if path[-1] == "bias" else 2
      want = NamedSharding(make_mesh(explicit), SPECS[path])
      self.assertTrue(sharding.is_equivalent_to(want, ndim), path)
    self.assertLen(model.up.kernel.value.addressable_shards, 8)
    self.assertEqual(
      model.up.kernel.value.addressable_shards[0].data.shape, (8, 4)
    )

  def test_values_do_not_depend_on_the_mesh(self):
    with jax.set_mesh(make_mesh()), nnx.logical_axis_rules(RULES):
      sharded = nnx.jit(lambda: make_model(nnx))()
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      values(sharded),
      values(make_model(nnx)),
    )

  @parameterized.parameters(False, True)
  def test_no_mesh_no_error(self, jitted):
    def make():
      return make_model(nnx)

    model = (nnx.jit(make) if jitted else make)()
    self.assertEqual(model.up.kernel.out_sharding, ("embed", "hidden"))
    self.assertLen(model.up.kernel.value.sharding.device_set, 1)
    self.assertEqual(model(X).shape, (16, 4))

  def test_abstract_model_then_arrays(self):
    mesh = make_mesh()
    with nnx.logical_axis_rules(RULES):
      graphdef, abstract = nnx.get_abstract_model(lambda: make_model(nnx), mesh)
      shardings = nnx.get_named_sharding(abstract, mesh)
    for path, leaf in nnx.to_flat_state(abstract):
      self.assertIsInstance(leaf.value, jax.ShapeDtypeStruct)
      self.assertEqual(leaf.value.sharding, NamedSharding(mesh, SPECS[path]))
    make = jax.jit(lambda: nnx.state(make_model(nnx)), out_shardings=shardings)
    model = nnx.merge(graphdef, make())
    self.assertEqual(
      padded(specs_of(nnx, model), model),
      padded({path: tuple(s) for path, s in SPECS.items()}, model),
    )

  def test_abstract_model_is_that_of_flax(self):
    results = []
    for library in (nnx, flax_nnx):
      with library.logical_axis_rules(RULES):
        _, abstract = library.get_abstract_model(
          lambda library=library: make_model(library), make_mesh()
        )
      results.append(
        {
          path: (leaf.get_raw_value().shape, leaf.get_raw_value().sharding)
          for path, leaf in library.to_flat_state(abstract)
          if leaf.has_metadata("out_sharding")
        }
      )
    self.assertEqual(*results)


class TrainingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def train(self, model, optimizer, x, y):
    @nnx.jit
    def step(model, optimizer, x, y):
      def loss(model):
        return ((model(x) - y) ** 2).mean()

      optimizer.update(model, nnx.grad(loss)(model))
      model.steps[...] += 1

    for _ in range(3):
      step(model, optimizer, x, y)
    return values((model, optimizer))

  def test_optimizer_follows_the_shardings_of_the_parameters(self):
    mesh = make_mesh()
    tx = optax.adam(0.1)
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):

      @nnx.jit
      def make():
        model = make_model(nnx)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

      model, optimizer = make()
      x, y = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
      for moment in (optimizer.opt_state[0].mu, optimizer.opt_state[0].nu):
        self.assertEqual(moment.up.kernel.out_sharding, ("embed", "hidden"))
        for layer in ("up", "down"):
          self.assertTrue(
            moment[layer].kernel.value.sharding.is_equivalent_to(
              model.__dict__[layer].kernel.value.sharding, 2
            )
          )
      found = self.train(model, optimizer, x, y)
    spec = optimizer.opt_state[0].mu.up.kernel.value.sharding.spec
    self.assertEqual(tuple(spec), (None, "model"))
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
      found,
      self.train(model, optimizer, X, Y),
    )

  def test_state_of_fewer_axes_than_its_parameter(self):
    # Adafactor keeps a sum for each row and each column.
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    with jax.set_mesh(make_mesh()), nnx.logical_axis_rules(RULES):
      model = make_model(nnx)
      optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      self.train(model, optimizer, X, Y)
    self.assertEqual(int(optimizer.step.value), 3)

  def test_an_optimizer_sharding_of_its_own(self):
    mesh = make_mesh()
    with jax.set_mesh(mesh):
      model = nnx.Dict(
        w=nnx.Param(
          jnp.ones((8, 4)),
          sharding=(None, "model"),
          optimizer_sharding=("data", "model"),
        )
      )
      optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    mean = optimizer.opt_state[0].mu.w
    self.assertEqual(mean.get_metadata("out_sharding"), ("data", "model"))
    self.assertEqual(
      mean.value.sharding, NamedSharding(mesh, P("data", "model"))
    )


class BatchNormTest(parameterized.TestCase):
  @parameterized.parameters(
    (None,),
    ([[0, 1, 2, 3], [4, 5, 6, 7]],),
    ([[0, 7], [1, 6], [2, 5], [3, 4]],),
  )
  def test_statistics_of_groups_of_devices(self, groups):
    devices.need_devices(8)
    mesh = devices.auto_mesh((8,), ("data",))
    x = np.random.RandomState(2).normal(size=(16, 3)).astype(np.float32)
    layer = nnx.BatchNorm(
      3, axis_name="data", axis_index_groups=groups, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(layer)

    def call(x):
      layer = nnx.merge(graphdef, state, copy=True)
      y = layer(x)
      return y, layer.mean.value[None], layer.var.value[None]

    y, mean, var = jax.jit(
      jax.shard_map(
        call,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
      )
    )(x)
    parts = x.reshape(8, 2, 3)
    for group in groups or [list(range(8))]:
      alone = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      want = alone(parts[group].reshape(-1, 3))
      np.testing.assert_allclose(
        y.reshape(8, 2, 3)[np.array(group)].reshape(-1, 3),
        want,
        rtol=1e-4,
        atol=1e-5,
      )
      for device in group:
        np.testing.assert_allclose(
          mean[device], alone.mean.value, rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(var[device], alone.var.value, rtol=1e-5)


class StackedTest(parameterized.TestCase):
  """Optimizers of layers that a transform has stacked."""

  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def make(self, mesh, tx, jitted, metadata, library=nnx):
    init = library.with_partitioning(
      jax.nn.initializers.lecun_normal(), ("d", "m")
    )

    class Layer(library.Module):
      def __init__(self, rngs):
        self.kernel = library.Param(init(rngs.params(), (8, 4)))

    stacked = library.split_rngs(splits=4)(library.vmap(Layer, **metadata))

    class Model(library.Module):
      def __init__(self):
        self.layers = stacked(library.Rngs(0))

    def build():
      model = Model()
      return model, library.Optimizer(model, tx, wrt=library.Param)

    with jax.set_mesh(mesh):
      return (library.jit(build) if jitted else build)()

  def meshes(self):
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
      yield jax.make_mesh(
        (2, 2, 2), ("layers", "d", "m"), axis_types=(kind,) * 3
      )

  @parameterized.product(
    jitted=(False, True),
    tx=(
      optax.adam(1e-3),
      optax.MultiSteps(optax.adam(1e-3), 2),
      optax.masked(optax.sgd(1e-3, momentum=0.9), True),
      optax.chain(optax.ema(0.9), optax.trace(0.9)),
    ),
  )
  def test_state_is_where_its_parameter_is(self, jitted, tx):
    for mesh in self.meshes():
      model, optimizer = self.make(mesh, tx, jitted, {})
      kernel = model.layers.kernel.value
      want = NamedSharding(mesh, P(None, "d", "m"))
      self.assertTrue(kernel.sharding.is_equivalent_to(want, 3))
      found = [
        leaf
        for _, leaf in nnx.to_flat_state(nnx.state(optimizer))
        if leaf.ndim == 3
      ]
      self.assertNotEmpty(found)
      for leaf in found:
        self.assertTrue(
          leaf.value.sharding.is_equivalent_to(want, 3), leaf.value.sharding
        )
        self.assertEqual(leaf.out_sharding, model.layers.kernel.out_sharding)

  def test_traced_state_is_where_its_parameter_is(self):
    mesh = next(self.meshes())
    model, _ = self.make(mesh, optax.sgd(1e-3), False, {})
    graphdef, state = nnx.split(model)

    def text():
      def init(state):
        model = nnx.merge(graphdef, state)
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        return nnx.state(optimizer, nnx.OptState)

      return jax.jit(init).lower(state)

    with jax.set_mesh(mesh):
      first, second = text(), text()
      moments = first.compile()(state)
      several = jax.jit(jax.vmap(lambda x: jax_private.sharded_alike(x, x)))(
        state.layers.kernel[...]
      )
      (gradient,) = jax.grad(
        lambda x: jnp.sum(jax_private.sharded_alike(x * x, x)[0]), (0,)
      )(jnp.ones((2, 3)))
    # Compilation caches rely on it.
    self.assertEqual(first.as_text(), second.as_text())
    want = NamedSharding(mesh, P(None, "d", "m"))
    found = [leaf for leaf in jax.tree.leaves(moments) if leaf.ndim == 3]
    self.assertLen(found, 2)
    for leaf in found:
      self.assertTrue(leaf.sharding.is_equivalent_to(want, 3), leaf.sharding)
    np.testing.assert_array_equal(several, state.layers.kernel[...])
    np.testing.assert_array_equal(gradient, [[2, 2, 2], [0, 0, 0]])

  @parameterized.parameters(False, True)
  def test_factors_have_no_annotation(self, jitted):
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    for mesh in self.meshes():
      _, optimizer = self.make(mesh, tx, jitted, {})
      for path, leaf in nnx.to_flat_state(nnx.state(optimizer)):
        self.assertFalse(leaf.has_metadata("out_sharding"), path)

  @parameterized.parameters(None, "layers")
  def test_names_of_all_axes_say_where_state_is_as_in_flax(self, name):
    metadata = {"transform_metadata": {nnx.PARTITION_NAME: name}}
    mesh = next(self.meshes())
    specs = []
    for library in (nnx, flax_nnx):
      _, optimizer = self.make(mesh, optax.adam(1e-3), False, metadata, library)
      mean = optimizer.opt_state[0].mu["layers"]["kernel"]
      specs.append(mean[...].sharding.spec)
    self.assertEqual(specs, [P(name, "d", "m")] * 2)

  def test_averages_are_where_the_parameters_are(self):
    for mesh in self.meshes():
      model, _ = self.make(mesh, optax.sgd(1e-3), False, {})
      average = nnx.EMA(model, decay=0.9).params.layers.kernel.value
      self.assertTrue(
        average.sharding.is_equivalent_to(
          NamedSharding(mesh, P(None, "d", "m")), 3
        )
      )

  def test_a_step_keeps_them_there(self):
    mesh = next(self.meshes())
    model, optimizer = self.make(mesh, optax.adam(1e-3), False, {})

    @nnx.jit
    def step(model, optimizer):
      grads = nnx.grad(lambda m: (m.layers.kernel[...] ** 2).sum())(model)
      optimizer.update(model, grads)

    with jax.set_mesh(mesh):
      step(model, optimizer)
    mean = optimizer.opt_state[0].mu.layers.kernel.value
    self.assertTrue(
      mean.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "d", "m")), 3)
    )


if __name__ == "__main__":
  absltest.main()
