"""Filters select what flax.nnx's filters of the same words select."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import hypothesis
from hypothesis import strategies as st

import nnx

PATHS = [(), ("a",), ("a", 0, "kernel"), (0,), ("encoder", "bias")]


def leaves(lib):
  return [
    lib.Param(1),
    lib.BatchStat(2, tag="frozen"),
    lib.Intermediate(3),
    lib.Perturbation(4, tag="other"),
    "text",
    7,
    None,
  ]


# Each builds one filter for the given library out of those for its parts.
def _atoms():
  return st.sampled_from(
    [
      lambda lib: lib.Param,
      lambda lib: lib.Intermediate,
      lambda lib: int,
      lambda lib: "frozen",
      lambda lib: ...,
      lambda lib: None,
      lambda lib: True,
      lambda lib: False,
      lambda lib: lambda path, value: len(path) > 1,
      lambda lib: lib.PathContains("a"),
      lambda lib: lib.PathContains(0),
      lambda lib: lib.PathContains("enc", exact=False),
      lambda lib: lib.OfType(lib.BatchStat),
      lambda lib: lib.WithTag("other"),
      lambda lib: lib.Everything(),
      lambda lib: lib.Nothing(),
    ]
  )


def _compound(children):
  several = st.lists(children, max_size=3)
  return st.one_of(
    several.map(lambda fs: lambda lib: lib.Any(*(f(lib) for f in fs))),
    several.map(lambda fs: lambda lib: lib.All(*(f(lib) for f in fs))),
    several.map(lambda fs: lambda lib: tuple(f(lib) for f in fs)),
    several.map(lambda fs: lambda lib: [f(lib) for f in fs]),
    children.map(lambda f: lambda lib: lib.Not(f(lib))),
  )


FILTERS = st.recursive(_atoms(), _compound, max_leaves=6)


class FiltersTest(parameterized.TestCase):
  @hypothesis.settings(derandomize=True, deadline=None, max_examples=200)
  @hypothesis.given(FILTERS)
  def test_selects_what_flax_selects(self, build):
    from flax.nnx import filterlib

    ours = nnx.filterlib.to_predicate(build(nnx))
    theirs = filterlib.to_predicate(build(flax_nnx))
    for path in PATHS:
      for a, b in zip(leaves(nnx), leaves(flax_nnx)):
        self.assertEqual(bool(ours(path, a)), bool(theirs(path, b)))

  def test_tag_of_a_class_attribute(self):
    class Tagged(nnx.Variable):
      tag = "frozen"

    self.assertTrue(nnx.WithTag("frozen")((), Tagged(1)))
    self.assertFalse(nnx.WithTag("frozen")((), Tagged(1, tag="free")))

  def test_tag_of_an_object(self):
    self.assertTrue(nnx.WithTag("a")((), nnx.RngStream(0, tag="a")))

  def test_path_in(self):
    predicate = nnx.filterlib.PathIn(("a", 0), ("b",))
    self.assertTrue(predicate(("b",), None))
    self.assertFalse(predicate(("a",), None))

  @parameterized.parameters(
    lambda: nnx.OfType(int),
    lambda: nnx.WithTag("a"),
    lambda: nnx.PathContains("a"),
    lambda: nnx.PathContains("a", exact=False),
    lambda: nnx.filterlib.PathIn(("a",), ("b",)),
    lambda: nnx.Any(int, "a"),
    lambda: nnx.All(int, "a"),
    lambda: nnx.Not(int),
    lambda: nnx.Everything(),
    lambda: nnx.Nothing(),
  )
  def test_equal_filters_hash_alike(self, build):
    self.assertEqual(build(), build())
    self.assertLen({build(), build()}, 1)

  def test_different_filters_differ(self):
    self.assertNotEqual(nnx.Any(int), nnx.All(int))
    self.assertNotEqual(nnx.OfType(int), nnx.OfType(str))
    self.assertNotEqual(nnx.PathContains("a"), nnx.PathContains("a", False))

  @parameterized.parameters(nnx, flax_nnx)
  def test_combinations_differ_by_what_they_combine(self, library):
    for kind in (library.Any, library.All):
      of_params, of_stats = kind(library.Param), kind(library.BatchStat)
      self.assertNotEqual(of_params, of_stats)
      self.assertLen({of_params: 0, of_stats: 1}, 2)
    self.assertNotEqual(library.Not(library.Param), library.Not("a"))

  @parameterized.parameters(nnx, flax_nnx)
  def test_a_program_may_describe_its_filter(self, library):
    described = library.Any(library.Param, "frozen")
    described.__doc__ = "What is not trained."
    self.assertEqual(described.__doc__, "What is not trained.")
    self.assertEqual(described, library.Any(library.Param, "frozen"))

  @parameterized.parameters(
    (nnx.OfType(int), "OfType(<class 'int'>)"),
    (nnx.WithTag("a"), "WithTag('a')"),
    (nnx.PathContains("a"), "PathContains('a', exact=True)"),
    (nnx.Not(nnx.Any("a", ...)), "Not(Any(WithTag('a'), Everything()))"),
    (nnx.All(), "All()"),
    (nnx.Nothing(), "Nothing()"),
    (nnx.filterlib.PathIn(("a",)), "PathIn(('a',))"),
  )
  def test_repr(self, predicate, text):
    self.assertEqual(repr(predicate), text)

  def test_no_filter(self):
    with self.assertRaisesRegex(
      TypeError, r"A filter must be a type, .* but got `3` of type `int`"
    ):
      nnx.filterlib.to_predicate(3)

  def test_ellipsis_must_be_last(self):
    with self.assertRaisesRegex(
      ValueError,
      r"must come last, but filter 0 is `Ellipsis` and `'a'` follows",
    ):
      nnx.filterlib.filters_to_predicates([..., "a"])
    self.assertLen(nnx.filterlib.filters_to_predicates(["a", ..., True]), 3)


if __name__ == "__main__":
  absltest.main()
