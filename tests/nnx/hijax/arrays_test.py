"""Mutable arrays of jax in no Variable: they have an identity."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp

import nnx

GRAPH = {"graph": True, "graph_updates": True}
MODES = (GRAPH, {"graph": True, "graph_updates": False}, {"graph": False})


def shared():
  ref = jax.new_ref(jnp.array(1.0))
  return nnx.Dict(a=ref, b=ref, c=jax.new_ref(jnp.array(10.0)))


class GraphTest(parameterized.TestCase):
  def test_a_shared_one_is_one_leaf(self):
    model = shared()
    graphdef, state = nnx.split(model)
    self.assertEqual(list(state), ["a", "c"])
    self.assertIs(state["a"], model.a)
    again = nnx.merge(graphdef, state)
    self.assertIs(again.a, model.a)
    self.assertIs(again.b, model.a)
    self.assertIs(nnx.clone(model).b, model.a)
    self.assertIn("<shared #1>", str(graphdef))
    apart = nnx.Dict(a=model.a, b=model.c, c=jax.new_ref(jnp.array(1.0)))
    self.assertNotEqual(graphdef, nnx.graphdef(apart))

  def test_contexts_know_it_again(self):
    model = shared()
    with nnx.update_context("context"):
      with nnx.split_context("context") as context:
        parts = context.split(model), context.split(model)
      with nnx.merge_context("context", True) as context:
        one, two = (context.merge(*part) for part in parts)
    self.assertIs(one, two)
    self.assertIs(one.a, one.b)

  def test_trees_do_not_share(self):
    for function in (nnx.split, nnx.state, nnx.graphdef, nnx.clone):
      with self.assertRaisesRegex(
        ValueError, r"tree mode .*`node.a` and `node.b` are one `Ref`"
      ):
        function(shared(), graph=False)


class JitTest(parameterized.TestCase):
  @parameterized.parameters(*MODES[:2])
  def test_what_is_shared_outside_is_shared_inside(self, **mode):
    model, traces = shared(), []

    @nnx.jit(**mode)
    def f(model):
      traces.append(model)
      self.assertIs(model.a, model.b)
      self.assertIsNot(model.a, model.c)
      model.a[...] += 1
      model.b[...] += 1
      return model.c[...]

    self.assertEqual((f(model), f(model)), (10.0, 10.0))
    self.assertEqual((model.a[...], len(traces)), (5.0, 1))
    f(nnx.Dict(a=model.c, b=model.c, c=model.a))
    self.assertEqual((model.c[...], len(traces)), (12.0, 1))

  def test_another_sharing_is_another_structure(self):
    a, b = jax.new_ref(jnp.array(1.0)), jax.new_ref(jnp.array(2.0))
    f = nnx.jit(lambda pair: pair[0] is pair[1])
    self.assertEqual([f([a, b]), f([a, a]), f([b, b])], [False, True, True])
    self.assertTrue(jax.jit(lambda a: f([a, a]))(a))
    self.assertFalse(jax.jit(lambda a, b: f([a, b]))(a, b))

  def test_an_array_in_its_place_is_another_structure(self):
    f = nnx.jit(lambda x: isinstance(x, jax.Ref))
    ref = jax.new_ref(jnp.array(1.0))
    for _ in range(2):
      self.assertFalse(f(ref[...]))
      self.assertTrue(f(ref))
    self.assertTrue(jax.jit(f)(ref))
    self.assertFalse(jax.jit(f)(ref[...]))

  def test_those_that_are_given_come_back(self):
    ref = jax.new_ref(jnp.array(1.0))
    model = shared()
    f = nnx.jit(lambda ref, model: (ref, {"a": model.b, "again": ref}))
    for _ in range(2):
      result, more = f(ref, model)
      self.assertIs(result, ref)
      self.assertIs(more["again"], ref)
      self.assertIs(more["a"], model.a)

  @parameterized.parameters(*MODES)
  def test_new_ones_are_returned(self, **mode):
    @nnx.jit(**mode)
    def f(x):
      ref = jax.new_ref(x)
      ref[...] += 1
      return ref, nnx.Param(2 * x, ref=True), nnx.Param(3 * x, hijax=True)

    for x in (1.0, 2.0):
      ref, param, box = f(x)
      self.assertIsInstance(ref, jax.Ref)
      self.assertTrue(param.ref)
      self.assertTrue(box.hijax)
      ref[...] += 1
      param[...] += 1
      jax.jit(lambda box: box.set_value(box[...] + 1))(box)
      self.assertEqual(
        (ref[...], param[...], box[...]), (x + 2, 2 * x + 1, 3 * x + 1)
      )

  def test_new_ones_become_attributes(self):
    model = shared()

    @nnx.jit
    def f(model):
      model.a = model.new = jax.new_ref(model.b[...] + 1)

    f(model)
    self.assertIs(model.a, model.new)
    self.assertIsNot(model.a, model.b)
    self.assertEqual((model.a[...], model.b[...]), (2.0, 1.0))

  @parameterized.parameters(*MODES[:2])
  def test_loops_write_them_where_they_are(self, **mode):
    model = shared()

    def body(val):
      model, n = val
      model.a[...] *= 2
      return model, n - 1

    nnx.while_loop(lambda val: val[1] > 0, body, (model, 3), **mode)
    self.assertEqual(model.b[...], 8.0)
    nnx.while_loop(
      lambda val: val[0].b[...] < 100, body, (model, jnp.array(3)), **mode
    )
    self.assertEqual(model.b[...], 128.0)
    nnx.fori_loop(0, 2, lambda i, val: body(val), (model, 3), **mode)
    self.assertEqual(model.b[...], 512.0)


if __name__ == "__main__":
  absltest.main()
