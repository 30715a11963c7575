"""Layouts know their axes."""

from absl.testing import absltest, parameterized
import numpy as np

from kernels.cache import checks, layouts

LAYOUTS = tuple(layouts.Layout)


class LayoutTest(parameterized.TestCase):
  @parameterized.parameters(*LAYOUTS)
  def test_axes_are_where_the_letters_are(self, layout):
    tokens, cache = np.zeros((2, 3, 5, 7)), np.zeros((9, 2, 3, 5, 7))
    sizes = dict(zip(("b", *layout.value[1:]), tokens.shape))
    self.assertEqual(tokens.shape[layout.tokens_axis], sizes["s"])
    self.assertEqual(tokens.shape[layout.heads_axis], sizes["n"])
    self.assertEqual(cache.shape[layout.slots_axis], sizes["s"])
    order = layout.order(sizes["s"], sizes["n"])
    self.assertEqual((2, *order, 7), tokens.shape)

  def test_words_are_in_order(self):
    words = [layout.words("t", "heads") for layout in LAYOUTS]
    self.assertEqual(words, ["b, t, heads, h", "b, heads, t, h"])

  @parameterized.product(layout=LAYOUTS, groups=((), (2,)))
  def test_heads_come_first_and_go_back(self, layout, groups):
    heads = (4, *groups)
    x = np.zeros((2, *layout.order(3, *heads), 8))
    first = layout.to_heads_first(x)
    self.assertEqual(first.shape, (2, *heads, 3, 8))
    self.assertEqual(layout.from_heads_first(first).shape, x.shape)

  def test_an_unknown_name_is_refused(self):
    with self.assertRaisesRegex(
      ValueError, "`layout` must be 'bsnh' or 'bnsh', but got `'sbnh'`"
    ):
      checks.canonical_layout("sbnh")
    self.assertIs(checks.canonical_layout("bnsh"), layouts.Layout.BNSH)


if __name__ == "__main__":
  absltest.main()
