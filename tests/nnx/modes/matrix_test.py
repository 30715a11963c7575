"""Every transform in every mode without updates does what flax.nnx does in it.

A cell is a transform, a mode, what the function does and what it is given. It
compares values, what is shared, what was written back, and whether the program
is refused. In graph mode with updates more is right here than Flax 0.12 does,
that of both its eras: the tests of each transform hold what.
"""

import functools

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx

import nnx
from tests.nnx.modes import programs

CELLS = [
  *((effect, programs.tree) for effect in programs.EFFECTS),
  *((programs.writes, argument) for argument in programs.ARGUMENTS[1:]),
]
CASES = [
  (f"{transform.__name__}_{mode}", transform, mode)
  for transform in programs.TRANSFORMS
  for mode in ("values", "tree")
]
NO_CELLS: frozenset[str] = frozenset()

# Where Flax refuses what runs here, by transform and mode.
MORE: dict[tuple[str, str], frozenset[str]] = {
  # It looks for duplicates where it has put graphs together again.
  **dict.fromkeys(
    (("eval_shape", "values"), ("make_jaxpr", "values")),
    frozenset(("writes, shared_variable", "writes, shared_module")),
  ),
  # "GraphDef index 0 already used": it takes graphs out of one context twice.
  **dict.fromkeys(
    (("grad", "values"), ("grad_of_both", "values")),
    frozenset(
      (
        "makes_a_model, tree",
        "returns_what_has_no_variables, tree",
        "returns_a_copy, tree",
      )
    ),
  ),
  # What jax says of a carry whose static part changes.
  ("scan_same", "values"): frozenset(("changes_metadata, tree",)),
  ("scan_same", "tree"): frozenset(("changes_metadata, tree",)),
}
# Where Flax runs what is refused here: it loops over a copy for each place,
# and gives back what happens to be written last.
LESS: dict[tuple[str, str], frozenset[str]] = dict.fromkeys(
  (("while_loop", "tree"), ("fori_loop", "tree")),
  frozenset(("writes, shared_variable", "writes, shared_module")),
)


def run(lib, transform, mode, effect, argument):
  def program():
    model = argument(lib)
    function = functools.partial(effect, lib)
    result = transform(lib, function, **programs.MODES[mode])(model, 1.0)
    return model, result

  return programs.outcome(lib, program)


class MatrixTest(parameterized.TestCase):
  @parameterized.named_parameters(*CASES)
  def test_does_what_flax_does(self, transform, mode):
    more = MORE.get((transform.__name__, mode), NO_CELLS)
    less = LESS.get((transform.__name__, mode), NO_CELLS)
    for effect, argument in CELLS:
      cell = f"{effect.__name__}, {argument.__name__}"
      if argument is programs.cycle and self.is_endless(transform, mode):
        continue
      with self.subTest(cell):
        ours, error = run(nnx, transform, mode, effect, argument)
        theirs, their_error = run(flax_nnx, transform, mode, effect, argument)
        if cell in more:
          self.assertIsNone(error)
          self.assertIsNotNone(their_error)
        elif cell in less:
          self.assertIsInstance(error, ValueError)
          self.assertIsNone(their_error)
        elif their_error is not None:
          self.assertIsInstance(
            error, (ValueError, TypeError), f"Flax: {their_error}"
          )
        elif "'TreeState'" in str(theirs):
          # It has not put together again what it returns.
          self.assertIsNone(error)
        else:
          self.assertIsNone(error)
          self.assertEqual(ours, theirs)

  def is_endless(self, transform, mode):
    """Tells whether jax would open a cycle, and lose count of its frames."""
    return mode == "tree" or transform in (
      programs.custom_vjp,
      programs.eval_shape,
      programs.make_jaxpr,
      programs.transform_metadata,
    )

  @parameterized.named_parameters(
    *((t.__name__, t) for t in programs.TRANSFORMS)
  )
  def test_a_cycle_is_refused_in_tree_mode(self, transform):
    function = functools.partial(programs.writes, nnx)
    transformed = transform(nnx, function, **programs.MODES["tree"])
    with self.assertRaisesRegex(
      ValueError, r"tree mode .* may be no cycles, but `.*plain.parent` is `"
    ):
      transformed(programs.cycle(nnx), 1.0)


if __name__ == "__main__":
  absltest.main()
