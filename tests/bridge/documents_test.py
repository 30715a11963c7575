"""The documents' examples of the bridge print what they say."""

import doctest
import pathlib

from absl.testing import absltest


class DocumentsTest(absltest.TestCase):
  def test_examples(self):
    path = pathlib.Path(__file__).with_name("documents.txt")
    failed, attempted = doctest.testfile(
      str(path), module_relative=False, encoding="utf-8"
    )
    self.assertGreater(attempted, 30)
    self.assertEqual(failed, 0)


if __name__ == "__main__":
  absltest.main()
