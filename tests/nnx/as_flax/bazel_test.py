"""A test that depends on `//nnx:as_flax` runs on `nnx`, with no line for it."""

import os

from absl.testing import absltest
from flax import nnx


class BazelTest(absltest.TestCase):
  @absltest.skipUnless(
    "TEST_SRCDIR" in os.environ,
    "only Bazel puts the dependency's folder on the path",
  )
  def test_flax_nnx_is_ours(self):
    self.assertEqual(nnx.Linear.__module__, "nnx.nn.linear")


if __name__ == "__main__":
  absltest.main()
