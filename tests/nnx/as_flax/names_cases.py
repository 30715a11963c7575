"""What only programs written for flax.nnx reach for does what it does there.

A program of its own, which `names_test` runs: `nnx.as_flax` is for a process.
"""

import copy
import importlib
import pickle

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
import nnx.as_flax
from nnx.as_flax import linen_names, old, places, proxies

flax_nnx = nnx.as_flax.flax_nnx()
flax_extract = importlib.import_module("_flax_nnx.extract")
flax_general = importlib.import_module("_flax_nnx.transforms.general")
flax_tracers = importlib.import_module("_flax_nnx.tracers")
flax_transforms = importlib.import_module("_flax_nnx.transforms.transforms")

BOTH = (("ours", nnx), ("flax", flax_nnx))


def _tracers(lib):
  return nnx.tracers if lib is nnx else flax_tracers


class StateBehindTest(parameterized.TestCase):
  @parameterized.named_parameters(*BOTH)
  def test_raw_value_goes_past_hooks_and_trace(self, lib):
    p = lib.Param(1.0, on_set_value=lambda v, x: x + 1)
    p.set_value(1.0)
    self.assertEqual(p._raw_value, 2.0)
    object.__setattr__(p, "_raw_value", 5.0)
    self.assertEqual((p.get_raw_value(), p._raw_value), (5.0, 5.0))
    jax.jit(lambda: object.__setattr__(p, "_raw_value", 7.0))()
    self.assertEqual(p.get_raw_value(), 7.0)

  @parameterized.named_parameters(*BOTH)
  def test_metadata_is_live(self, lib):
    p = lib.Param(1.0, tag="a")
    view = p._var_metadata
    self.assertEqual(view["tag"], "a")
    p.set_metadata("tag", "b")
    self.assertEqual(p._var_metadata["tag"], "b")
    self.assertIn("tag", p._var_metadata)
    p._var_metadata["tag"] = "c"
    self.assertEqual(p.tag, "c")
    del p._var_metadata["tag"]
    self.assertFalse(p.has_metadata("tag"))
    self.assertEqual(p._var_metadata, dict(p._var_metadata))
    p._var_metadata["on_get_value"] = lambda v, x: x + 1
    self.assertEqual(p.get_value(), 2.0)

  @parameterized.named_parameters(*BOTH)
  def test_trace_state(self, lib):
    p, model = lib.Param(1.0), lib.Module()
    outside = _tracers(lib).TraceState()

    def check(valid):
      for state in (p._trace_state, model._pytree__state.trace_state):
        self.assertEqual(state.is_valid(), valid)
        self.assertEqual(state, outside)
        self.assertEqual(state.jax_trace, outside.jax_trace)

    check(True)
    jax.jit(lambda: check(False))()
    self.assertIs(type(copy.deepcopy(outside)), type(outside))
    inside = []
    jax.jit(lambda: inside.append(pickle.loads(pickle.dumps(outside))))()
    self.assertNotEqual(inside[0], outside)

  @parameterized.named_parameters(*BOTH)
  def test_objects_are_given_to_another_trace(self, lib):
    tracers = _tracers(lib)
    outer = tracers.current_jax_trace()
    made = []

    def make():
      p, model = lib.Param(1.0), lib.Module()
      for state in (p._trace_state, model._pytree__state._trace_state):
        object.__setattr__(state, "_jax_trace", outer)
      made.extend([p, model])

    jax.jit(make)()
    p, model = made
    p.set_value(2.0)
    model.x = 3
    self.assertEqual((p.get_value(), model.x), (2.0, 3))

  @parameterized.named_parameters(*BOTH)
  def test_state_put_among_the_attributes(self, lib):
    state = lib.pytreelib.PytreeState

    class Model(lib.Module, pytree=False):
      def __new__(cls):
        self = super().__new__(cls)
        vars(self)["_pytree__state"] = state()
        return self

      def __init__(self):
        self.w = lib.Param(jnp.ones(2))

    model = Model()
    outer = _tracers(lib).current_jax_trace()
    made = []

    def make():
      made.append(Model())
      for value in vars(made[0]).values():
        trace = getattr(value, "_trace_state", None)
        if trace is not None:
          object.__setattr__(trace, "_jax_trace", outer)
          break

    jax.jit(make)()
    made[0].x = 3
    self.assertEqual(made[0].x, 3)
    self.assertLen(jax.tree.leaves(lib.state(model)), 1)
    merged = lib.merge(*lib.split(model))
    self.assertFalse(merged._pytree__state.initializing)
    lib.jit(lambda m: m.w.set_value(m.w[...] + 1))(model)
    np.testing.assert_array_equal(model.w[...], [2, 2])

  @parameterized.named_parameters(*BOTH)
  def test_check_valid_context_is_overridden(self, lib):
    class Model(lib.Module):
      allowed = False

      def _check_valid_context(self, error_msg):
        if not self.allowed:
          super()._check_valid_context(error_msg)

    model = Model()
    errors = nnx.TraceContextError, flax_nnx.pytreelib.errors.TraceContextError
    with self.assertRaises(errors):
      jax.jit(lambda: setattr(model, "x", 1))()
    Model.allowed = True
    jax.jit(lambda: setattr(model, "x", 1))()
    self.assertEqual(model.x, 1)

  @parameterized.named_parameters(*BOTH)
  def test_nodes(self, lib):
    class Model(lib.Module):
      def __init__(self):
        self.w, self.n = lib.Param(1.0), 3
        self.count = lib.data(1)

    nodes = Model()._pytree__nodes
    self.assertEqual(
      {name: nodes[name] for name in ("w", "n", "count")},
      {"w": True, "n": False, "count": True},
    )

  @parameterized.named_parameters(*BOTH)
  def test_flags_are_no_items(self, lib):
    model = lib.Dict(a=lib.List([lib.Param(1), lib.data(2)]), b=lib.Rngs(0))
    for part in (model, model.a, model.b):
      part._pytree__state._initializing = True
    for other in (model, lib.clone(model), lib.merge(*lib.split(model))):
      self.assertEqual((list(other), len(other.a)), (["a", "b"], 2))
      for part in (other, other.a, other.b):
        self.assertTrue(part._pytree__state.initializing)
      other.a.append(lib.Param(3))
      self.assertTrue(other.a._pytree__state.initializing)
      other.a.pop()

  @parameterized.named_parameters(*BOTH)
  def test_lazy_init_says_so(self, lib):
    seen = []

    class Model(lib.Module):
      def __init__(self):
        self.part = lib.Dict(a=lib.Param(1))

      def __call__(self):
        merged = lib.merge(*lib.split(self))
        for model in (self, merged):
          seen.append(model._pytree__state.initializing)
          seen.append(model.part._pytree__state.initializing)

    model = Model()
    lib.bridge.lazy_init(model)
    self.assertEqual(seen, [True] * 4)
    self.assertFalse(model.part._pytree__state.initializing)

  @parameterized.named_parameters(*BOTH)
  def test_nodes_are_set(self, lib):
    model = lib.Module()
    model.n = 3
    nodes = model._pytree__nodes.update({"n": True, "later": True})
    object.__setattr__(model, "_pytree__nodes", nodes)
    model.later = 4
    self.assertEqual(jax.tree.leaves(model), [4, 3])
    copied = lib.clone(model)._pytree__nodes
    self.assertTrue(copied["n"] and copied["later"])

  @parameterized.named_parameters(*BOTH)
  def test_initializing(self, lib):
    state = lib.Module()._pytree__state
    self.assertFalse(state.initializing or state.is_setup)
    model = lib.Module()
    model._pytree__state._initializing = True
    self.assertTrue(model._pytree__state.initializing)

  @parameterized.named_parameters(*BOTH)
  def test_flags_go_where_the_object_goes(self, lib):
    model = lib.Module()
    model.part = lib.Linear(2, 2, rngs=lib.Rngs(0))
    plain = lib.graphdef(model)
    model._pytree__state._initializing = True
    model.part._pytree__state._is_setup = True
    for other in (
      lib.merge(*lib.split(model)),
      lib.clone(model),
      copy.deepcopy(model),
      pickle.loads(pickle.dumps(model)),
      lib.jit(lambda m: m)(model),
    ):
      state, of_part = other._pytree__state, other.part._pytree__state
      self.assertTrue(state.initializing and of_part.is_setup)
      self.assertFalse(state.is_setup or of_part.initializing)
    self.assertNotEqual(lib.graphdef(model), plain)
    other = lib.merge(*lib.split(model))
    other._pytree__state._initializing = False
    other.part._pytree__state._is_setup = False
    self.assertEqual(lib.graphdef(other), plain)
    self.assertLen(jax.tree.leaves(lib.state(other)), 2)

  @parameterized.product(lib=(nnx, flax_nnx), mark=("none", "static", "data"))
  def test_state_of_what_is_no_data(self, lib, mark):
    marked = (lambda x: x) if mark == "none" else getattr(lib, mark)
    inner = {"c": "x", "d": [np.dtype("i1")]}
    model = lib.Module()
    model.dtypes = marked(lib.State({"a": jnp.float32, "b": inner}))
    model.w = lib.Param(jnp.ones(2))
    self.assertLen(lib.to_flat_state(lib.state(model)), 1)
    for other in (lib.clone(model), lib.merge(*lib.split(model))):
      self.assertEqual(other.dtypes["b"]["c"], "x")
      self.assertEqual(other.dtypes["b"]["d"], [np.dtype("i1")])
    traced = []

    @lib.jit
    def f(model):
      traced.append(model.dtypes["a"])
      return model.w.astype(model.dtypes["a"])

    f(model), f(lib.clone(model))
    self.assertEqual(traced, [jnp.float32])
    model.dtypes = marked(lib.State({"a": jnp.bfloat16, "b": inner}))
    self.assertEqual(f(model).dtype, jnp.bfloat16)

  @parameterized.named_parameters(*BOTH)
  def test_state_among_the_attributes(self, lib):
    model = lib.Module()
    model.state = lib.data(
      lib.State({"a": jnp.ones(2), "b": lib.Param(jnp.ones(2)), "c": 3})
    )

    @lib.jit
    def f(model):
      assert model.state["c"] == 3  # static
      model.state["b"][...] += model.state["a"] * model.state["c"]

    f(model)
    np.testing.assert_array_equal(model.state["b"][...], [4, 4])
    paths = [path for path, _ in lib.to_flat_state(lib.state(model))]
    self.assertEqual(paths, [("state", "a"), ("state", "b")])

  @parameterized.named_parameters(*BOTH)
  def test_jitted_function(self, lib):
    def f(x):
      return 2 * x

    jitted = lib.jit(f)
    self.assertEqual((jitted(1), jitted(2)), (2, 4))
    self.assertEqual(jitted.jitted_fn._cache_size(), 1)
    self.assertIs(jitted.fun, f)
    self.assertIs(jitted.__wrapped__, f)

  @parameterized.named_parameters(*BOTH)
  def test_variable_state(self, lib):
    state = lib.Variable.__getstate__(lib.Param(1.0, tag="a"))
    self.assertEqual(state["_raw_value"], 1.0)
    self.assertEqual(state["_var_metadata"]["tag"], "a")
    self.assertTrue(state["_trace_state"].is_valid())
    p = pickle.loads(pickle.dumps(lib.Param(jnp.ones(2), tag="a")))
    self.assertEqual((type(p), p.tag, p.shape), (lib.Param, "a", (2,)))


class NamesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    places.complete()

  def test_every_place_has_its_names(self):
    for name, sources in places.NAMES.items():
      module = places.module(f"flax.{name}")
      for names in sources.values():
        for item in names.split():
          self.assertTrue(hasattr(module, item), (name, item))

  def test_fork(self):
    state = nnx.state(nnx.Rngs(params=0, dropout=1))
    forked = nnx.fork(state, "params", (None, 4))
    self.assertIsInstance(forked, nnx.ForkStates)
    expected = jax.random.split(jax.random.key(0), (1, 4))
    self.assertTrue((forked.split_keys.params.key[...] == expected).all())
    self.assertEqual(list(forked.broadcast_counts), ["dropout"])

  def test_pmap(self):
    model = nnx.Pmap(
      nnx.Linear, axis_size=1, module_init_args=(2, 3),
      module_init_kwargs={"rngs": nnx.Rngs(0)},
    )  # fmt: skip
    x = jnp.ones((1, 4, 2))
    kernel = model.pmap_module.kernel[...]
    np.testing.assert_allclose(model(x), x @ kernel, rtol=1e-6)
    with self.assertRaisesRegex(ValueError, "`donate_argnums` must be left"):
      nnx.Pmap(nnx.Linear, donate_argnums=(1,))

  @parameterized.named_parameters(
    ("ours", nnx, old), ("flax", flax_nnx, flax_general)
  )
  def test_split_and_merge_inputs(self, lib, general):
    model = lib.Dict(a=lib.Param(jnp.ones(2)), n=3)

    @general.split_inputs
    @jax.jit
    @general.merge_inputs
    def f(model, x):
      model.a[...] += x
      return model, model.a * 2

    same, y = f(model, 1.0)
    self.assertIs(same, model)
    np.testing.assert_array_equal(model.a[...], [2, 2])
    np.testing.assert_array_equal(y, [4, 4])

  @parameterized.named_parameters(
    ("ours", nnx, old), ("flax", flax_nnx, flax_extract)
  )
  def test_extract(self, lib, extract):
    p = lib.Param(1)
    self.assertEqual(
      extract.clear_non_graph_nodes({"a": p, "b": [2]}), {"a": p, "b": [None]}
    )
    self.assertEqual(
      extract.broadcast_prefix({"a": 1, "b": None}, {"a": [0, 0], "b": 1},
                               lambda x: x is None), [1, 1, None]
    )  # fmt: skip
    self.assertTrue(extract.is_tree_node(lib.to_tree(p)))
    seen = {}
    model = lib.Dict(a=p, b=p)
    extract.check_consistent_aliasing(model, 0, node_prefixes=seen)
    with self.assertRaises(ValueError):
      extract.check_consistent_aliasing(model, 1, node_prefixes=seen)

  @parameterized.named_parameters(("ours", old), ("flax", flax_transforms))
  def test_resolve_kwargs(self, transforms):
    self.assertEqual(
      transforms.resolve_kwargs(lambda x, y=2, *z: 0, (1,), {"y": 3}), (1, 3)
    )
    with self.assertRaises(TypeError):
      transforms.resolve_kwargs(lambda x, *, y: 0, (1,), {"y": 3})

  @parameterized.named_parameters(
    ("ours", nnx, old), ("flax", flax_nnx, flax_nnx.graphlib)
  )
  def test_kinds_of_nodes(self, lib, graphlib):
    model = lib.Dict(a=lib.Param(1))
    values = [model, model.a, jnp.ones(1), [1], (), {}, None, 1, "a"]
    self.assertEqual(
      [graphlib.is_node_leaf(x) for x in values],
      [False, True, True, False, False, False, False, False, False],
    )
    self.assertEqual(
      [graphlib.is_pytree_node(x) for x in values],
      [False, False, False, True, True, True, True, False, False],
    )
    self.assertEqual(
      [graphlib.is_node_type(x) for x in (lib.Linear, list, int, lib.Param)],
      [True, True, False, False],
    )
    path = jax.tree_util.tree_leaves_with_path({"a": [1]})[0][0]
    self.assertEqual(graphlib.jax_to_nnx_path(path), ("a", 0))

  @parameterized.named_parameters(
    ("ours", nnx, old.ModuleMeta),
    ("flax", flax_nnx, flax_nnx.module.ModuleMeta),
  )
  def test_metaclass(self, lib, meta):
    class Meta(meta):
      def _pytree_meta_construct(cls, self, *args):
        super()._pytree_meta_construct(self, *args)
        self.made = True

    class Model(lib.Module, metaclass=Meta):
      def __init__(self, w):
        self.w = lib.Param(w)

    self.assertTrue(Model(1.0).made)
    self.assertTrue(lib.merge(*lib.split(Model(1.0))).made)

  def test_proxies(self):
    accessor = proxies.DelayedAccessor()["a"].real
    self.assertEqual(accessor, proxies.DelayedAccessor()["a"].real)
    self.assertEqual(accessor({"a": 1 + 2j}), 1)
    proxy = proxies.CallableProxy(lambda get, x, n: get(x).__add__(n))
    self.assertEqual(proxy["a"].real({"a": 1 + 2j}, n=2), 3)

  def test_create_path_filters(self):
    for lib, function in (
      (nnx, old.create_path_filters),
      (flax_nnx, flax_nnx.statelib.create_path_filters),
    ):
      filters = function(lib.State({"a": 0, "b": {"c": 1}, "d": 0}))
      self.assertEqual(list(filters.values()), [0, 1])
      zeros, ones = filters
      self.assertTrue(zeros(("d",), None))
      self.assertFalse(ones(("d",), None))

  def test_linen_names(self):
    theirs = flax_nnx.bridge.variables
    self.assertEqual(
      linen_names.sort_variable_types([nnx.Variable, nnx.Param])[0], nnx.Param
    )
    for lib, module in ((nnx, linen_names), (flax_nnx, theirs)):
      self.assertTrue(module.is_vanilla_variable(lib.Param(1)))
      self.assertFalse(module.is_vanilla_variable(lib.Param(1, a=2)))


if __name__ == "__main__":
  absltest.main()
