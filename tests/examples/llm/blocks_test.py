"""Who holds which blocks."""

import random

from absl.testing import absltest

from examples.llm import blocks


class BlocksTest(absltest.TestCase):
  def test_blocks_are_named_by_all_that_is_before(self):
    first = blocks.digests([1, 2, 3, 4, 5], 2)
    self.assertLen(first, 2)
    self.assertEqual(blocks.digests([1, 2, 3, 4], 2), first)
    self.assertEqual(blocks.digests([1, 2, 3, 4], 2, first[:1]), first)
    other = blocks.digests([0, 2, 3, 4], 2)
    self.assertNotEqual(other[1], first[1])

  def test_what_is_not_free_is_not_taken(self):
    pool = blocks.Blocks(3)
    taken = pool.take([], 2)
    self.assertEqual(pool.free, 1)
    self.assertIsNone(pool.take([], 2))
    self.assertEqual(pool.free, 1)
    pool.give_back(taken)
    self.assertEqual(pool.free, 3)

  def test_a_beginning_is_shared_and_stays_until_all_have_given_it_back(self):
    pool = blocks.Blocks(3)
    names = blocks.digests([1, 2, 3, 4], 2)
    first = pool.take([], 2)
    for block, name in zip(first, names):
      pool.name(block, name)
    found = pool.find(names)
    self.assertEqual(found, first)
    second = pool.take(found, 1)
    self.assertEqual(second[:2], first)
    pool.give_back(first)
    self.assertEqual(pool.free, 0)
    pool.give_back(second)
    self.assertEqual(pool.free, 3)

  def test_a_free_block_is_found_until_it_is_taken_for_another(self):
    pool = blocks.Blocks(2)
    names = blocks.digests([1, 2, 3, 4], 2)
    taken = pool.take([], 2)
    for block, name in zip(taken, names):
      pool.name(block, name)
    pool.give_back(taken)
    self.assertEqual(pool.find(names), taken)
    # The end of a text is worth less than its beginning.
    self.assertEqual(pool.take([], 1), taken[1:])
    self.assertEqual(pool.find(names), taken[:1])
    self.assertIsNone(pool.take(taken[:1], 1))

  def test_any_order_leaves_all_free(self):
    numbers = random.Random(0)
    pool = blocks.Blocks(12)
    held = []
    for _ in range(2000):
      if held and numbers.random() < 0.5:
        pool.give_back(held.pop(numbers.randrange(len(held))))
        continue
      text = [numbers.randrange(2) for _ in range(8)]
      names = blocks.digests(text, 2)
      shared = pool.find(names)
      taken = pool.take(shared, 4 - len(shared))
      if taken is None:
        continue
      self.assertLen(set(taken), 4)
      for block, name in zip(taken, names):
        pool.name(block, name)
      held.append(taken)
      users = {block for blocks_ in held for block in blocks_}
      self.assertEqual(pool.free, 12 - len(users))
    for taken in held:
      pool.give_back(taken)
    self.assertEqual(pool.free, 12)


if __name__ == "__main__":
  absltest.main()
