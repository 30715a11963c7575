"""Optimizers take the steps that those of flax.nnx take, in both eras."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx

X = np.random.RandomState(0).normal(size=(8, 3)).astype(np.float32)
Y = np.random.RandomState(1).normal(size=(8, 2)).astype(np.float32)

TRANSFORMATIONS = {
  "sgd": lambda: optax.sgd(0.1),
  "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
  "adam": lambda: optax.adam(0.05),
  "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
  "schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 4)),
  "chain": lambda: optax.chain(
    optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.1), optax.sgd(1)
  ),
  "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), every_k_schedule=2),
  "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
  "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
  "multi_transform": lambda: optax.multi_transform(
    {"a": optax.adam(0.1), "b": optax.set_to_zero()},
    lambda params: jax.tree.map_with_path(
      lambda path, _: "b" if "scale" in str(path) else "a", params
    ),
  ),
}


def make_model(library):
  """A model with two kinds of Variables, nested, and one shared Parameter."""

  class Model(library.Module):
    def __init__(self):
      rngs = library.Rngs(0)
      self.first = library.Linear(3, 4, rngs=rngs)
      self.second = library.Linear(4, 2, rngs=rngs)
      self.scale = library.Param(jnp.ones(2))
      self.offset = library.BatchStat(jnp.zeros(2))
      self.same = self.scale

    def __call__(self, x):
      y = self.second(jnp.tanh(self.first(x)))
      return y * self.scale[...] + self.offset[...]

  return Model()


def loss_of(model):
  return ((model(X) - Y) ** 2).mean()


def values(library, node):
  return {
    "/".join(map(str, path)): np.asarray(leaf[...])
    for path, leaf in library.to_flat_state(library.state(node))
  }


def assert_same(ours, theirs, rtol=1e-5):
  assert set(ours) == set(theirs), set(ours) ^ set(theirs)
  for path, value in ours.items():
    np.testing.assert_allclose(
      value, theirs[path], rtol=rtol, atol=1e-6, err_msg=path
    )
    assert value.dtype == theirs[path].dtype, path


def train(library, optimizer, model, steps=3, wrt=None, jitted=True):
  """Takes steps and returns the updates of the last one."""
  wrt = library.Param if wrt is None else wrt

  def step(model, optimizer):
    of = library.DiffState(0, wrt)
    _, grads = library.value_and_grad(loss_of, argnums=of)(model)
    return optimizer.update(model, grads)

  if jitted:
    step = library.jit(step)
  for _ in range(steps):
    updates = step(model, optimizer)
  return updates


class OracleTest(parameterized.TestCase):
  @parameterized.parameters(*TRANSFORMATIONS)
  def test_steps_are_those_of_flax(self, name):
    results = []
    for library in (nnx, flax_nnx):
      model = make_model(library)
      tx = TRANSFORMATIONS[name]()
      optimizer = library.Optimizer(model, tx, wrt=library.Param)
      updates = train(library, optimizer, model)
      results.append(
        (
          values(library, model),
          values(library, optimizer),
          {
            "/".join(str(k.key) for k in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
          },
        )
      )
    for ours, theirs in zip(*results):
      assert_same(ours, theirs)

  @parameterized.product(
    jitted=(False, True), wrt=("BatchStat", "path", "both")
  )
  def test_filters(self, jitted, wrt):
    results = []
    for library in (nnx, flax_nnx):
      filters = {
        "BatchStat": library.BatchStat,
        "path": library.PathContains("first"),
        "both": (library.BatchStat, library.PathContains("second")),
      }
      model = make_model(library)
      optimizer = library.Optimizer(model, optax.adam(0.1), wrt=filters[wrt])
      train(library, optimizer, model, 2, filters[wrt], jitted)
      results.append((values(library, model), values(library, optimizer)))
    for ours, theirs in zip(*results):
      assert_same(ours, theirs)

  def test_model_and_optimizer(self):
    results = []
    for library in (nnx, flax_nnx):
      state = library.ModelAndOptimizer(make_model(library), optax.adam(0.1))

      @library.jit
      def step(state, library=library):
        state.update(library.grad(loss_of)(state.model))

      step(state)
      step(state)
      results.append(values(library, state))
    assert_same(*results)

  def test_extra_arguments(self):
    results = []
    for library in (nnx, flax_nnx):
      model = make_model(library)
      tx = optax.contrib.reduce_on_plateau(patience=1)
      tx = optax.chain(optax.sgd(0.1), tx)
      optimizer = library.Optimizer(model, tx, wrt=library.Param)
      for _ in range(4):
        grads = library.grad(loss_of)(model)
        optimizer.update(model, grads, value=jnp.float32(1.0))
      results.append((values(library, model), values(library, optimizer)))
    for ours, theirs in zip(*results):
      assert_same(ours, theirs)

  def test_line_search(self):
    results = []
    for library in (nnx, flax_nnx):
      model = make_model(library)
      tx = optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)
      )
      optimizer = library.Optimizer(model, tx, wrt=library.Param)
      graphdef, _, rest = library.split(model, library.Param, ...)

      def loss_of_params(params, library=library, graphdef=graphdef, rest=rest):
        return loss_of(library.merge(graphdef, params, rest))

      for _ in range(2):
        loss, grads = library.value_and_grad(loss_of)(model)
        optimizer.update(
          model, grads, grad=grads, value=loss, value_fn=loss_of_params
        )
      results.append((values(library, model), values(library, optimizer)))
    for ours, theirs in zip(*results):
      assert_same(ours, theirs)

  def test_kinds_and_metadata_of_the_state(self):
    kinds = []
    for library in (nnx, flax_nnx):
      model = library.Linear(
        2,
        3,
        kernel_metadata={"note": "x"},
        bias_metadata={"optimizer_sharding": None},
        rngs=library.Rngs(0),
      )
      tx = optax.adam(0.1)
      state = library.Optimizer(model, tx, wrt=library.Param).opt_state[0]
      self.assertIs(type(state.count), library.OptArray)
      self.assertIs(type(state.mu["kernel"]), library.OptVariable)
      self.assertTrue(issubclass(library.OptVariable, library.OptState))
      kinds.append(
        (
          state.mu["kernel"].get_metadata("note"),
          state.nu["bias"].has_metadata("optimizer_sharding"),
        )
      )
    self.assertEqual(kinds[0], kinds[1])

  def test_display_counts_all_of_the_state(self):
    found = []
    for library in (nnx, flax_nnx):
      model = library.Linear(2, 3, rngs=library.Rngs(0))
      optimizer = library.Optimizer(model, optax.adam(1), wrt=library.Param)
      found.append(sorted(str(optimizer).split("\n")[0][13:].split(", ")))
    self.assertEqual(*found)
    self.assertIn("OptVariable: 18 (72 B)", found[0])

  def test_shardings_of_the_state(self):
    model = nnx.Linear(
      2,
      3,
      kernel_metadata={"sharding": ("a", None)},
      bias_metadata={"optimizer_sharding": ("b",), "sharding": ("a",)},
      rngs=nnx.Rngs(0),
    )
    mean = nnx.Optimizer(model, optax.adam(0.1)).opt_state[0].mu
    self.assertEqual(
      mean.kernel.get_metadata(exclude_required=True),
      {"out_sharding": ("a", None)},
    )
    self.assertEqual(
      mean.bias.get_metadata(exclude_required=True), {"out_sharding": ("b",)}
    )


class ErasTest(absltest.TestCase):
  def test_both_eras_take_the_same_steps(self):
    old, new = make_model(nnx), make_model(nnx)
    keeping = nnx.Optimizer(old, optax.adam(0.1))
    bare = nnx.Optimizer(new, optax.adam(0.1), wrt=nnx.Param)
    self.assertIs(keeping.model, old)
    self.assertEqual(list(vars(bare)), ["step", "tx", "opt_state", "wrt"])

    @nnx.jit
    def old_step(optimizer):
      optimizer.update(nnx.grad(loss_of)(optimizer.model))

    for _ in range(3):
      old_step(keeping)
      bare.update(grads=nnx.grad(loss_of)(new), model=new)
    assert_same(values(nnx, old), values(nnx, new))
    self.assertEqual(int(keeping.step.value), 3)

  def test_model_beside_the_optimizer_that_keeps_it(self):
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1))

    @nnx.jit
    def step(model, optimizer):
      loss, grads = nnx.value_and_grad(loss_of)(model)
      optimizer.update(grads)
      return loss

    self.assertGreater(step(model, optimizer), step(model, optimizer))
    self.assertIs(optimizer.model, model)
    optimizer.update(model, nnx.grad(loss_of)(model))
    self.assertEqual(int(optimizer.step.value), 3)

  def test_wrt_by_position(self):
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), nnx.BatchStat)
    self.assertIs(optimizer.model, model)
    self.assertEqual(list(optimizer.opt_state[0].mu), ["offset"])
    of = nnx.DiffState(0, nnx.BatchStat)
    optimizer.update(nnx.grad(loss_of, argnums=of)(model))
    self.assertNotEqual(model.offset.value[0], 0)

  def test_derived_class(self):
    class TrainState(nnx.Optimizer):
      def __init__(self, model, tx, metrics):
        super().__init__(model, tx)
        self.metrics = metrics

      def update(self, *, grads, loss):
        self.metrics.update(values=loss)
        super().update(grads)

    state = TrainState(make_model(nnx), optax.sgd(0.1), nnx.metrics.Average())

    @nnx.jit
    def step(state):
      loss, grads = nnx.value_and_grad(loss_of)(state.model)
      state.update(grads=grads, loss=loss)

    step(state)
    step(state)
    self.assertEqual(int(state.metrics.count.value), 2)


class StateTest(parameterized.TestCase):
  def test_split_and_merge(self):
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state):
      model, optimizer = nnx.merge(graphdef, state)
      optimizer.update(model, nnx.grad(loss_of)(model))
      return nnx.state((model, optimizer))

    for _ in range(2):
      state = step(state)
      optimizer.update(model, nnx.grad(loss_of)(model))
    nnx_model, nnx_optimizer = nnx.merge(graphdef, state)
    assert_same(values(nnx, nnx_model), values(nnx, model))
    assert_same(values(nnx, nnx_optimizer), values(nnx, optimizer))

  def test_pure_dict_restores(self):
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    train(nnx, optimizer, model, 2)
    pure = nnx.to_pure_dict(nnx.state(optimizer))
    other = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(other, state)
    assert_same(values(nnx, other), values(nnx, optimizer))

  def test_donated(self):
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer):
      optimizer.update(model, nnx.grad(loss_of)(model))

    step(model, optimizer)
    before = model.first.kernel.value
    step(model, optimizer)
    self.assertTrue(before.is_deleted())
    other = make_model(nnx)
    train(nnx, nnx.Optimizer(other, optax.adam(0.1), wrt=nnx.Param), other, 2)
    assert_same(values(nnx, model), values(nnx, other))

  def test_hooks_on_values_stay_with_the_parameter(self):
    model = nnx.Dict(w=nnx.Param(jnp.ones(2), on_get_value=lambda v, x: 2 * x))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5, 0.9), wrt=nnx.Param)
    optimizer.update(model, nnx.State({"w": nnx.Param(jnp.ones(2))}))
    np.testing.assert_allclose(model.w.raw_value, 0.5)
    np.testing.assert_allclose(optimizer.opt_state[0].trace.w.value, 1.0)

  def test_parameters_keep_their_dtype(self):
    model = nnx.Dict(w=nnx.Param(jnp.ones(2, jnp.bfloat16)))
    optimizer = nnx.Optimizer(model, optax.adam(0.5), wrt=nnx.Param)
    optimizer.update(model, {"w": jnp.ones(2)})
    self.assertEqual(model.w.dtype, jnp.bfloat16)

  def test_mutable_arrays(self):
    model = nnx.Dict(w=nnx.Param(jnp.ones(2), ref=True))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5, 0.9), wrt=nnx.Param)
    self.assertTrue(optimizer.opt_state[0].trace.w.ref)
    optimizer.update(model, {"w": jnp.ones(2)})
    np.testing.assert_allclose(model.w.value, 0.5)
    np.testing.assert_allclose(optimizer.opt_state[0].trace.w.value, 1.0)

  def test_several_models(self):
    models = (nnx.Dict(w=nnx.Param(1.0)), nnx.Dict(w=nnx.Param(2.0)))
    optimizer = nnx.Optimizer(models, optax.sgd(0.5), wrt=nnx.Param)
    grads = nnx.grad(lambda a, b: a.w * b.w, argnums=(0, 1))(*models)
    optimizer.update(models, grads)
    self.assertEqual([float(m.w.value) for m in models], [0.0, 1.5])

  def test_a_single_variable(self):
    w = nnx.Param(jnp.float32(3.0))
    optimizer = nnx.Optimizer(w, optax.adam(0.5), wrt=nnx.Param)
    optimizer.update(w, nnx.grad(lambda w: w**2)(w))
    self.assertAlmostEqual(float(w.value), 2.5, places=5)

  def test_modules_as_gradients(self):
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with self.assertRaisesRegex(ValueError, "`model.same` and `model.scale`"):
      nnx.grad(loss_of, graph=False)(model)
    grads = nnx.grad(loss_of, graph_updates=False)(model)
    optimizer.update(model, grads)
    other = make_model(nnx)
    train(nnx, nnx.Optimizer(other, optax.sgd(0.1), wrt=nnx.Param), other, 1)
    assert_same(values(nnx, model), values(nnx, other))

  def test_steps_in_a_scan(self):
    model = make_model(nnx)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    metrics = nnx.metrics.Average()

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(carry, scale):
      model, optimizer, metrics = carry
      loss, grads = nnx.value_and_grad(lambda m: scale * loss_of(m))(model)
      optimizer.update(model, grads)
      metrics.update(values=loss)
      return carry, loss

    _, losses = steps((model, optimizer, metrics), jnp.ones(3))
    other = make_model(nnx)
    train(nnx, nnx.Optimizer(other, optax.adam(0.1), wrt=nnx.Param), other, 3)
    assert_same(values(nnx, model), values(nnx, other))
    self.assertEqual(int(optimizer.step.value), 3)
    np.testing.assert_allclose(metrics.compute(), losses.mean(), rtol=1e-6)

  def test_many_models_by_vmap(self):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
      model = nnx.Linear(3, 2, rngs=nnx.Rngs(key))
      return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    @nnx.vmap(in_axes=0)
    def step(model, optimizer):
      optimizer.update(model, nnx.grad(loss_of)(model))

    model, optimizer = make(jax.random.split(jax.random.key(0), 3))
    before = model.kernel.value
    step(model, optimizer)
    self.assertEqual(optimizer.opt_state[0].mu.kernel.shape, (3, 3, 2))
    self.assertEqual(optimizer.step.shape, (3,))
    self.assertFalse(np.allclose(before, model.kernel.value))


class ErrorsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.model = make_model(nnx)
    self.grads = nnx.grad(loss_of)(self.model)
    self.optimizer = nnx.Optimizer(self.model, optax.sgd(0.1), wrt=nnx.Param)

  def test_no_transformation(self):
    with self.assertRaisesRegex(
      TypeError, "`tx` must be a transformation of optax.* but got `0.1`"
    ):
      nnx.Optimizer(self.model, 0.1, wrt=nnx.Param)

  def test_two_filters(self):
    with self.assertRaisesRegex(
      TypeError, "at most one filter, but got 3 arguments and `wrt=.*Param"
    ):
      nnx.Optimizer(self.model, optax.sgd(1), nnx.Param, wrt=nnx.Param)

  def test_wrt_that_selects_nothing(self):
    with self.assertRaisesRegex(
      ValueError, "`wrt` must select Variables of the model, but .*Cache"
    ):
      nnx.Optimizer(self.model, optax.sgd(0.1), wrt=nnx.Cache)

  def test_missing_model(self):
    with self.assertRaisesRegex(
      TypeError, r"must be given the model and the gradients, but got one"
    ):
      self.optimizer.update(self.grads)

  def test_missing_gradients(self):
    with self.assertRaisesRegex(
      TypeError, "`Optimizer.update` must be given the gradients, but got none"
    ):
      self.optimizer.update()

  def test_model_is_not_kept(self):
    with self.assertRaisesRegex(
      AttributeError, "made with `wrt` does not keep its model. .*ModelAndOpt"
    ):
      _ = self.optimizer.model
    with self.assertRaisesRegex(AttributeError, "no attribute `other`"):
      _ = self.optimizer.other

  def test_the_model_comes_first(self):
    with self.assertRaisesRegex(
      TypeError, "must be given the model first, but got a `State` and a"
    ):
      self.optimizer.update(self.grads, self.model)

  def test_what_cannot_hold_variables_is_no_model(self):
    for model in (3, type(self.model)):
      with self.assertRaisesRegex(TypeError, "`model` must be a Module or"):
        nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

  def test_gradients_of_other_variables(self):
    of = nnx.DiffState(0, nnx.PathContains("first"))
    grads = nnx.grad(loss_of, argnums=of)(self.model)
    with self.assertRaisesRegex(
      ValueError,
      "model, but there is none for .*`second/bias`, `second/kernel`. Give",
    ):
      self.optimizer.update(self.model, grads)

  def test_gradients_that_are_too_many(self):
    grads = nnx.merge_state(
      self.grads, nnx.State({"third": {"kernel": nnx.Param(1.0)}})
    )
    with self.assertRaisesRegex(
      ValueError, "model, but too many: `third/kernel`. Give"
    ):
      self.optimizer.update(self.model, grads)

  def test_gradients_that_are_none_at_all(self):
    with self.assertRaisesRegex(
      TypeError, "`grads` must be what `nnx.grad` returns for the model, but"
    ):
      self.optimizer.update(self.model, jnp.ones(3))
    with self.assertRaisesRegex(ValueError, "there is none for `first/bias`"):
      self.optimizer.update(self.model, None)

  def test_gradients_of_another_shape(self):
    grads = nnx.map_state(lambda path, g: g.replace(jnp.ones(7)), self.grads)
    with self.assertRaisesRegex(
      ValueError, r"at `first/bias` the gradient has `\(7,\)` and .*`\(4,\)`"
    ):
      self.optimizer.update(self.model, grads)

  def test_a_failed_update_changes_nothing(self):
    optimizer = nnx.Optimizer(self.model, optax.adam(0.1), wrt=nnx.Param)
    before = values(nnx, (self.model, optimizer))
    other = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with self.assertRaises(ValueError):
      optimizer.update(other, nnx.state(other))
    assert_same(values(nnx, (self.model, optimizer)), before)


if __name__ == "__main__":
  absltest.main()
