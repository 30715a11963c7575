"""Sharding annotations: what transforms do to them, and specs made of them."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nnx
from nnx import partitioning

NAMES = st.sampled_from(["a", "b", None])


class AxesTest(parameterized.TestCase):
  @hypothesis.settings(derandomize=True, deadline=None, max_examples=100)
  @hypothesis.given(
    st.lists(NAMES, min_size=1, max_size=3).map(tuple),
    st.integers(0, 4),
    st.sampled_from(["layers", None]),
    st.sampled_from(["sharding", "out_sharding", "sharding_names"]),
  )
  def test_add_and_remove(self, names, index, name, key):
    metadata = {nnx.PARTITION_NAME: name}
    p = nnx.Param(1, **{key: names})
    nnx.spmd.add_axis(p, index, metadata)
    theirs = flax_nnx.Param(jnp.ones(()), out_sharding=None)
    theirs.set_metadata(out_sharding=names)
    from flax.nnx import spmd as flax_spmd

    flax_spmd.add_axis(theirs, index, metadata)
    self.assertEqual(p.out_sharding, theirs.out_sharding)
    self.assertEqual(
      p.get_metadata(exclude_required=True),
      {"out_sharding": p.get_metadata(key)},
    )
    nnx.spmd.remove_axis(p, index, metadata)
    padding = (None,) * (index - len(names))
    self.assertEqual(p.out_sharding, names + padding)

  def test_hooks_run(self):
    seen = []
    p = nnx.Param(
      1,
      on_add_axis=lambda v, i, n: seen.append(("add", i, n)),
      remove_axis_hooks=lambda v, i, n: seen.append(("remove", i, n)),
    )
    state = nnx.State({"a": p})
    nnx.spmd.add_axis(state, 0, {"partition_name": "layers"})
    nnx.spmd.remove_axis(state, 0, {"partition_name": "layers"})
    self.assertEqual(seen, [("add", 0, "layers"), ("remove", 0, "layers")])

  def test_other_metadata(self):
    p = nnx.Param(1, axes=("x",), other="y")
    metadata = {"partition_name": "layers", "axes": "z", "other": "w"}
    nnx.spmd.add_axis(p, 1, metadata)
    self.assertEqual((p.axes, p.other), (("x", "z"), "y"))
    nnx.spmd.remove_axis(p, 1, metadata)
    self.assertEqual(p.axes, ("x",))

  def test_kinds_of_annotations(self):
    mesh = jax.make_mesh((1,), ("layers",))
    metadata = {"partition_name": "layers"}
    p = nnx.Param(1, out_sharding=P("a"))
    nnx.spmd.add_axis(p, 0, metadata)
    self.assertEqual(p.out_sharding, P("layers", "a"))
    p = nnx.Param(1, out_sharding=NamedSharding(mesh, P(None)))
    nnx.spmd.add_axis(p, 0, metadata)
    self.assertEqual(p.out_sharding.spec, P("layers", None))

  def test_negative_index(self):
    self.assertEqual(nnx.spmd.insert_name(("a",), -1, "b"), ("a", "b"))
    self.assertEqual(nnx.spmd.remove_name(("a", "b"), -1, "b"), ("a",))

  def test_errors(self):
    with self.assertRaisesRegex(
      ValueError, r"must have the key `partition_name` .* but got `{}`"
    ):
      nnx.spmd.add_axis(nnx.Param(1), 0, {})
    with self.assertRaisesRegex(
      ValueError, "must be named `'layers'`, but axis 0 of .* is `'a'`"
    ):
      nnx.spmd.remove_axis(
        nnx.Param(1, sharding=("a",)), 0, {"partition_name": "layers"}
      )


class SpecsTest(parameterized.TestCase):
  def test_partition_specs(self):
    state = nnx.State(
      {
        "a": nnx.Param(jnp.ones((2, 2)), sharding=("x", None)),
        "b": nnx.Param(jnp.ones(2)),
        "c": nnx.Param(
          jnp.ones(2), sharding=("l",), sharding_rules=[("l", "y")]
        ),
        "d": jnp.ones(2),
      }
    )
    with nnx.logical_axis_rules([("x", ("m", "n"))]):
      specs = nnx.get_partition_spec(state)
    self.assertEqual(specs.a.value, P(("m", "n"), None))
    self.assertEqual(specs.b.value, P())
    self.assertEqual(specs.c.value, P("y"))
    self.assertEqual(specs.d, P())
    self.assertIsInstance(specs.a, nnx.Param)

  def test_rules_that_contradict(self):
    with self.assertRaisesRegex(
      ValueError, "`a` is sent to `x` and to `y`. Drop one"
    ):
      partitioning.composite_rules([("a", "x")], [("a", "y")])

  def test_rules_end_with_their_block(self):
    with nnx.logical_axis_rules([("a", "b")]):
      pass
    self.assertEqual(partitioning.get_logical_axis_rules(), ())

  def test_with_partitioning(self):
    mesh = jax.make_mesh((1,), ("x",))
    init = nnx.with_partitioning(
      jax.nn.initializers.zeros, ("x",), mesh=mesh, other=1
    )
    p = nnx.Param(init(jax.random.key(0), (2,), jnp.float32))
    self.assertEqual((p.out_sharding, p.other), (("x",), 1))
    self.assertEqual(p.value.sharding, NamedSharding(mesh, P("x")))

  def test_named_sharding(self):
    mesh = jax.make_mesh((1,), ("x",))
    state = nnx.State({"a": nnx.Param(jnp.ones(2), out_sharding=("x",))})
    shardings = nnx.get_named_sharding(state, mesh)
    self.assertEqual(shardings.a.value, NamedSharding(mesh, P("x")))
    placed = jax.device_put(state, shardings)
    self.assertEqual(placed.a.value.sharding.spec, P("x"))

  def test_abstract_model(self):
    class Model(nnx.Module):
      def __init__(self):
        self.w = nnx.Param(jnp.ones((2, 2)), sharding=("x", None))
        self.size = 2

    mesh = jax.make_mesh((1,), ("x",))
    graphdef, state = nnx.get_abstract_model(Model, mesh)
    self.assertIsInstance(state.w.value, jax.ShapeDtypeStruct)
    self.assertEqual(state.w.value.sharding.spec, P("x", None))
    self.assertEqual(nnx.merge(graphdef, state).size, 2)


if __name__ == "__main__":
  absltest.main()
