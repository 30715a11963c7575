"""Displays: the documents' for States, flax.nnx's for the rest."""

import contextlib
import io

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope

import nnx
from nnx import reprlib


def define(lib):
  class Inner(lib.Module):
    def __init__(self):
      self.b = lib.BatchStat(jnp.float32(1.0))
      self.name = "inner"
      self.kind = int

  class Outer(lib.Module):
    def __init__(self):
      self.a = lib.Param(jnp.ones((2, 3)), axis=("x", None))
      self.inner = Inner()
      self.again = self.inner
      self.size = 3
      self._hidden = 4
      self._shown = lib.Param(jnp.zeros(2000))
      self.x = jnp.ones(3)
      self.scalar = jnp.float32(2.0)
      self.n = np.ones((2, 2))
      self.d = lib.Dict({"k": 1.5, "l": "text"})
      self.t = (1, "a", None, [2.5])
      self.r = lib.Rngs(params=0)
      self.me = self

  return Outer


class TextTest(parameterized.TestCase):
  def test_module_as_in_flax(self):
    self.assertEqual(str(define(nnx)()), str(define(flax_nnx)()))

  @parameterized.parameters(
    (lambda lib: lib.Param(1),),
    (lambda lib: lib.Param(jnp.ones(3), axis="embed", n=3),),
    (lambda lib: lib.Variable([1, "a"]),),
    (lambda lib: lib.Variable({"a": (jnp.ones(1), None)}),),
    (lambda lib: lib.Rngs(0),),
    (lambda lib: lib.List([1, "a"]),),
    (lambda lib: lib.List([]),),
    (lambda lib: lib.Dict({"a": 1}),),
    (lambda lib: lib.State({}),),
    (lambda lib: lib.State({"a": {0: 1, "b": {}}}),),
    (lambda lib: lib.FlatState([(("a", 0), 1)], sort=True),),
  )
  def test_others_as_in_flax(self, build):
    self.assertEqual(repr(build(nnx)), repr(build(flax_nnx)))

  def test_state_as_in_the_documents(self):
    state = nnx.State(
      {"b": {"x": nnx.Param(jnp.ones((2, 3)), n=1)}, "a": nnx.BatchStat((3,))}
    )
    self.assertEqual(
      str(jax.tree.map(jnp.shape, state.filter(nnx.Param))),
      """\
State({
  'b': {
    'x': VariableState(
      type=Param,
      value=(2, 3),
      n=1
    )
  }
})""",
    )
    self.assertEqual(
      repr(state.filter(nnx.BatchStat)),
      """\
State({
  'a': VariableState(
    type=BatchStat,
    value=(3,)
  )
})""",
    )

  def test_nothing_of_a_state_stays(self):
    str(nnx.State({"a": nnx.Param(1)}))
    self.assertEqual(repr(nnx.Param(1)), "Param(\n  value=1\n)")

  def test_plain_containers_of_objects(self):
    class Model(nnx.Module):
      def __init__(self):
        self.layers = [nnx.Param(1), {"a": nnx.Param(2)}]

    self.assertEqual(
      repr(Model()),
      """\
Model(
  layers=[
    Param(
      value=1
    ),
    {
      'a': Param(
        value=2
      )
    }
  ]
)""",
    )

  def test_shared_variables_count_once(self):
    class Model(nnx.Module):
      def __init__(self):
        self.a = nnx.Param(jnp.ones(3))
        self.b = [self.a]

    self.assertStartsWith(repr(Model()), "Model( # Param: 3 (12 B)\n")

  def test_abstract_values(self):
    p = nnx.Param(jax.ShapeDtypeStruct((2, 3), jnp.float32))
    self.assertStartsWith(
      repr(p), "Param( # 6 (24 B)\n  value=ShapeDtypeStruct("
    )

  def test_under_jit(self):
    texts = []

    @jax.jit
    def f(x):
      texts.append(repr(nnx.Param(x)))
      return x

    f(jnp.ones(3))
    self.assertIn("value=", texts[0])

  @parameterized.parameters(
    (999, "999 B"), (1001, "1.0 KB"), (2_500_000, "2.5 MB"), (3e9 + 1, "3.0 GB")
  )
  def test_size(self, n, text):
    n = int(n)
    self.assertEqual(repr(reprlib.Size(n, n)), f"{n:,} ({text})")


# treescope looks at all of numpy, names that numpy has deprecated too.
@pytest.mark.filterwarnings("ignore:.*chararray.*:DeprecationWarning")
class _Grows:
  """Adds to a dict each time that it is displayed."""

  def __init__(self, items):
    self.items = items

  def __repr__(self):
    self.items[f"key{len(self.items)}"] = 0
    return "grows"


class ChangeTest(absltest.TestCase):
  """A display may run anyone's code, which may change what is displayed."""

  def test_dict_that_grows(self):
    for holder in ({}, {"module": nnx.Dict()}):
      holder["a"], holder["b"] = _Grows(holder), 1
      self.assertIn("grows", reprlib.value_text(holder))

  def test_attributes_and_states_that_grow(self):
    module, state = nnx.Module(), nnx.State({})
    items = state.raw_mapping
    items["a"], items["b"] = _Grows(items), 1
    module.a, module.b = _Grows(vars(module)), 1
    for value in (module, state):
      self.assertIn("grows", repr(value))


class NotebookTest(parameterized.TestCase):
  def test_display_prints_outside_of_notebooks(self):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      nnx.display(nnx.Param(1), 3)
    self.assertEqual(out.getvalue(), "Param(\n  value=1\n)\n3\n")

  def test_treescope_text(self):
    model = define(nnx)()
    text = treescope.render_to_text(model)
    for part in ("Outer(", "a=", "Param(", "axis=('x', None)", "RngStream("):
      self.assertIn(part, text)
    state = treescope.render_to_text(nnx.State({"a": {"b": nnx.Param(1)}}))
    self.assertIn("'a'", state)
    self.assertIn("Param(value=1)", state)
    self.assertIn("List(", treescope.render_to_text(nnx.List([1, 2])))
    flat = nnx.FlatState([(("a",), 1)])
    self.assertIn("('a',)", treescope.render_to_text(flat))

  def test_treescope_html(self):
    html = treescope.render_to_html(define(nnx)(), compressed=False)
    self.assertIn("Outer", html)


if __name__ == "__main__":
  absltest.main()
