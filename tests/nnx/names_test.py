"""The names of flax.nnx that programs use are here, `compat` and all."""

import importlib
import types

from absl.testing import absltest
from flax import nnx as flax_nnx
from flax.nnx import traversals as flax_traversals
from hypothesis import given, settings
from hypothesis import strategies as st

import nnx

# Modules of Flax's inner workings, and a type variable.
INNER = {
  "M",
  "deprecations",
  "extract",
  "helpers",
  "object",
  "proxy_caller",
  "tracers",
  "visualization",
  "wrappers",
}
# What only the inner workings of Flax use of these modules.
LIBRARIES = {
  "filterlib": {"All", "Any", "Filter", "Not", "OfType", "PathContains",
                "Predicate", "WithTag", "filters_to_predicates",
                "to_predicate"},
  "graphlib": {"GraphDef", "NodeDef", "clone", "iter_graph", "merge", "pop",
               "split", "state", "update"},
  "pytreelib": {"Object", "Pytree", "data", "is_data", "static"},
  "rnglib": {"RngCount", "RngKey", "RngState", "RngStream", "Rngs"},
  "statelib": {"FlatState", "State", "from_flat_state", "to_flat_state"},
  "variablelib": {"BatchStat", "Cache", "Intermediate", "Param", "Variable",
                  "VariableMetadata", "VariableState", "with_metadata"},
}  # fmt: skip


def public(module: types.ModuleType) -> set[str]:
  return {name for name in dir(module) if not name.startswith("_")}


class NamesTest(absltest.TestCase):
  def test_every_public_name_of_flax_is_here(self):
    missing = public(flax_nnx) - public(nnx) - INNER - {"bridge"}
    self.assertEmpty(missing)

  def test_compat_has_the_functions_of_nnx(self):
    names = public(flax_nnx.compat) - {"functools"}
    self.assertContainsSubset({"jit", "split", "view_info"}, names)
    for name in names:
      function = getattr(nnx.compat, name)
      theirs = getattr(flax_nnx.compat, name)
      self.assertEqual(function.keywords, theirs.keywords)
      self.assertIs(function.func, getattr(nnx, name), name)

  def test_modules_have_the_names_of_flax(self):
    for name, names in LIBRARIES.items():
      self.assertContainsSubset(names, public(getattr(flax_nnx, name)))
      self.assertContainsSubset(names, public(getattr(nnx, name)))
    self.assertTrue(callable(nnx.state) and callable(nnx.variables))

  def test_modules_are_imported_by_the_names_of_flax(self):
    for name, names in LIBRARIES.items():
      for library in ("nnx", "flax.nnx"):
        module = importlib.import_module(f"{library}.{name}")
        self.assertContainsSubset(names, public(module))
      self.assertIs(importlib.import_module(f"nnx.{name}"), getattr(nnx, name))

  def test_a_switch_is_for_a_block_or_a_function(self):
    for library in (nnx, flax_nnx):
      switch = library.set_graph_mode
      before = switch.current_value()

      @switch(not before)
      def other(x, y=1, switch=switch):
        return switch.current_value(), x, y

      self.assertEqual(switch.current_value(), before)
      self.assertEqual(other(2, y=3), (not before, 2, 3))
      self.assertEqual(switch.current_value(), before)
      self.assertEqual(other.__name__, "other")
      with switch(not before):
        self.assertEqual(switch.current_value(), not before)
      self.assertEqual(switch.current_value(), before)


NESTED = st.recursive(
  st.integers(),
  lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
  max_leaves=8,
).filter(lambda x: isinstance(x, dict))


class TraversalsTest(absltest.TestCase):
  @settings(derandomize=True, deadline=None, max_examples=100)
  @given(NESTED, st.booleans(), st.sampled_from([None, "/"]), st.booleans())
  def test_flat_as_in_flax(self, xs, keep, sep, leaves):
    options = {"keep_empty_nodes": keep, "sep": sep}
    if leaves:
      options["is_leaf"] = lambda path, x: "a" in x and len(path) > 0
    ours = nnx.traversals.flatten_mapping(xs, **options)
    theirs = flax_traversals.flatten_mapping(xs, **options)
    stand_ins = {
      path: nnx.traversals.empty_node
      if leaf is flax_traversals.empty_node
      else leaf
      for path, leaf in theirs.items()
    }
    # Flax keeps an empty mapping as one at the empty path.
    self.assertEqual(ours, stand_ins if xs else {})
    del options["sep"], options["keep_empty_nodes"]
    self.assertEqual(
      nnx.traversals.flatten_to_sequence(xs, **options),
      flax_traversals.flatten_to_sequence(xs, **options),
    )

  @settings(derandomize=True, deadline=None, max_examples=100)
  @given(NESTED, st.sampled_from([None, "/"]))
  def test_unflattening_undoes_it(self, xs, sep):
    flat = nnx.traversals.flatten_mapping(xs, keep_empty_nodes=True, sep=sep)
    self.assertEqual(nnx.traversals.unflatten_mapping(flat, sep=sep), xs)

  def test_what_is_no_mapping_is_refused(self):
    for call in (
      nnx.traversals.flatten_mapping,
      nnx.traversals.flatten_to_sequence,
      nnx.traversals.unflatten_mapping,
    ):
      with self.assertRaisesRegex(TypeError, "`xs` must be a mapping, but got"):
        call([1])


if __name__ == "__main__":
  absltest.main()
