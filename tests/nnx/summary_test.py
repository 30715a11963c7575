"""Tables are those of flax.nnx, and nothing is left behind on the classes."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx

PLAIN = {"force_terminal": False, "width": 300}


def make_model(library):
  class Block(library.Module):
    def __init__(self, din, dout, rngs):
      self.linear = library.Linear(din, dout, rngs=rngs)
      self.bn = library.BatchNorm(dout, rngs=rngs)
      self.dropout = library.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
      return library.relu(self.dropout(self.bn(self.linear(x))))

  class Foo(library.Module):
    def __init__(self, rngs):
      self.block1 = Block(32, 128, rngs=rngs)
      self.block2 = Block(128, 10, rngs=rngs)
      self.blocks = library.List([Block(4, 4, rngs), Block(4, 4, rngs)])

    def __call__(self, x):
      return self.block2(self.block1(x))

    def features(self, x, *, scale, options=None):
      y = self.block1(x) * scale
      return {"y": y, "parts": [y.sum(), (x, x)]}

    def through(self, pair, name="a"):
      x, _ = pair
      for block in self.blocks:
        x = block(x)
      return x

  return Foo(library.Rngs(0))


class Sown(nnx.Module):
  """Writes to itself while it is called."""

  def __init__(self):
    self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

  @nnx.jit
  def __call__(self, x):
    self.calls[...] += 1
    self.sow(nnx.Intermediate, "x", x)
    return self.half(x) + self.half(x)

  def half(self, x):
    return self.linear(x) / 2


class OracleTest(parameterized.TestCase):
  def compare(self, make, *args, **kwargs):
    kwargs = {"console_kwargs": PLAIN, **kwargs}
    ours = nnx.tabulate(make(nnx), *args, **kwargs)
    theirs = flax_nnx.tabulate(make(flax_nnx), *args, **kwargs)
    self.assertEqual(ours, theirs)
    return ours

  def test_the_documented_table(self):
    text = self.compare(make_model, jnp.ones((1, 32)))
    self.assertIn("block1/linear", text)
    self.assertIn("Foo Summary", text)

  def test_depth(self):
    self.compare(make_model, jnp.ones((1, 32)), depth=1)
    self.compare(make_model, jnp.ones((1, 32)), depth=0)

  def test_keyword_arguments_and_another_method(self):
    self.compare(
      make_model,
      jnp.ones((1, 32), jnp.bfloat16),
      method="features",
      scale=2.0,
      options={"a": (1, "b"), "c": [None, jnp.ones(2)]},
    )

  def test_containers_and_nested_arguments(self):
    x = jnp.ones((2, 4))
    self.compare(make_model, [x, {"a": x}], "b", method="through")

  def test_rows_of_streams(self):
    self.compare(
      make_model, jnp.ones((1, 32)), row_filter=lambda row: len(row.path) > 1
    )

  def test_widths_titles_and_colours(self):
    self.compare(
      make_model,
      jnp.ones((1, 32)),
      depth=1,
      table_kwargs={"title_style": "red"},
      column_kwargs={"justify": "right", "overflow": "fold"},
      console_kwargs={"force_terminal": True, "width": 80},
    )

  def test_metadata(self):
    self.compare(
      lambda library: library.Linear(
        2, 3, kernel_metadata={"note": (None, "a")}, rngs=library.Rngs(0)
      ),
      jnp.ones((1, 2)),
    )

  @parameterized.parameters(
    lambda library: library.Linear(8, 4, rngs=library.Rngs(0)),
    lambda library: library.Sequential(
      library.Linear(8, 16, rngs=library.Rngs(0)),
      library.Linear(16, 4, rngs=library.Rngs(0)),
    ),
  )
  def test_flops(self, make):
    self.compare(
      make, jnp.ones((2, 8)), compute_flops=True, compute_vjp_flops=True
    )


class TabulateTest(absltest.TestCase):
  def test_flops_are_those_of_the_product(self):
    rows = []
    nnx.tabulate(
      nnx.Linear(8, 4, use_bias=False, rngs=nnx.Rngs(0)),
      jnp.ones((2, 8)),
      row_filter=lambda row: not rows.append(row),
      compute_flops=True,
      compute_vjp_flops=True,
    )
    self.assertEqual(rows[0].flops, 2 * 2 * 8 * 4)
    self.assertGreaterEqual(rows[0].vjp_flops, 2 * rows[0].flops)

  def test_fused_kernels_count_as_what_they_compute(self):
    attention = nnx.MultiHeadAttention(2, 64, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((3, 32, 64))
    norm = nnx.BatchNorm(16, use_running_average=False, rngs=nnx.Rngs(0))
    rows = []
    for model, shape in ((attention, (3, 1, 64)), (norm, (32, 16))):
      nnx.tabulate(
        model,
        jnp.ones(shape),
        row_filter=lambda row: not rows.append(row),
        compute_flops=True,
        compute_vjp_flops=isinstance(model, nnx.BatchNorm),
      )
    projections = sum(
      row.flops
      for row in rows
      if row.path in [(name,) for name in ("query", "key", "value", "out")]
    )
    # Products with all keys, and with all values, of the cache.
    products = 2 * (2 * 3 * 32 * 64)
    own = [row for row in rows if row.path == ()]
    self.assertGreaterEqual(own[0].flops, projections + products)
    self.assertLess(own[0].flops, projections + 2 * products)
    # Of each element: added to two sums, squared, shifted and scaled.
    self.assertGreaterEqual(own[1].flops, 5 * 32 * 16)
    self.assertGreater(own[1].vjp_flops, own[1].flops)

  def test_model_and_classes_stay_as_they_are(self):
    model = Sown()
    before = nnx.to_pure_dict(nnx.state(model))
    attributes = {name: vars(type(model))[name] for name in vars(type(model))}
    text = nnx.tabulate(model, jnp.ones((1, 2)), console_kwargs=PLAIN)
    self.assertIn("half", text)
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    self.assertIs(type(model), Sown)
    self.assertEqual(list(vars(model)), ["linear", "calls"])
    for name, value in attributes.items():
      self.assertIs(vars(type(model))[name], value)

  def test_a_failed_call_leaves_nothing_behind(self):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(ValueError, "last axis of `inputs` must be 2"):
      nnx.tabulate(model, jnp.ones((1, 5)))
    rows = []
    nnx.tabulate(
      model, jnp.ones(2), row_filter=lambda row: not rows.append(row)
    )
    self.assertLen(rows, 1)

  def test_a_method_and_what_it_calls_with_the_same_arguments(self):
    rows = []
    nnx.tabulate(
      Sown(), jnp.ones((1, 2)), row_filter=lambda row: not rows.append(row)
    )
    self.assertEqual([row.path for row in rows], [(), ("half",), ("linear",)])

  def test_shapes_in_place_of_arrays(self):
    shape = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    model = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    text = nnx.tabulate(model, shape, console_kwargs=PLAIN)
    self.assertIn("float32[1,3]", text)

  def test_layers_under_scan(self):
    class Stack(nnx.Module):
      def __init__(self):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
          return nnx.Linear(3, 3, rngs=nnx.Rngs(key))

        self.layers = make(jax.random.split(jax.random.key(0), 4))

      def __call__(self, x):
        return nnx.scan(
          lambda x, layer: layer(x),
          in_axes=(nnx.Carry, 0),
          out_axes=nnx.Carry,
        )(x, self.layers)

    text = nnx.tabulate(Stack(), jnp.ones((1, 3)), console_kwargs=PLAIN)
    self.assertIn("kernel: float32[4,3,3]", text)
    self.assertIn("48 (192 B)", text)

  def test_containers_show_none_of_it(self):
    class Model(nnx.Module):
      def __init__(self):
        self.named = nnx.Dict(a=make(), b=make())
        self.listed = nnx.List([make()])
        self.plain = {"x": make()}

      def __call__(self, x):
        for name in self.named:
          x = self.named[name](x)
        self.listed.append(nnx.clone(self.listed[0]))
        for layer in self.listed:
          x = layer(x)
        return self.plain["x"](x), len(self.named), len(self.listed)

    def make():
      return nnx.Linear(2, 2, rngs=nnx.Rngs(0))

    rows = []
    nnx.tabulate(
      Model(), jnp.ones((1, 2)), row_filter=lambda row: not rows.append(row)
    )
    self.assertEqual(rows[0].outputs[1:], (2, 2))
    self.assertEqual(
      [row.path for row in rows[1:]],
      [("named", "a"), ("named", "b"), ("listed", 0), ("plain", "x")],
    )

  def test_a_dict_that_is_called(self):
    class Both(nnx.Dict):
      def __call__(self, x):
        return {name: layer(x) for name, layer in self.items()}

    model = Both(a=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    text = nnx.tabulate(model, jnp.ones((1, 2)), console_kwargs=PLAIN)
    self.assertIn("a: float32[1,3]", text)

  def test_shared_variables_count_once(self):
    class Tied(nnx.Module):
      def __init__(self):
        self.a = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.b.kernel = self.a.kernel

      def __call__(self, x):
        return self.b(self.a(x))

    text = nnx.tabulate(Tied(), jnp.ones((1, 2)), console_kwargs=PLAIN)
    self.assertIn("Total Parameters: 4 (16 B)", text)

  def test_errors(self):
    with self.assertRaisesRegex(
      TypeError, "`obj` must be a Module or another `nnx.Pytree`, but got a `in"
    ):
      nnx.tabulate(3)
    with self.assertRaisesRegex(
      ValueError, "but a `Linear` has no method `forward`"
    ):
      nnx.tabulate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), method="forward")


if __name__ == "__main__":
  absltest.main()
