"""Text that comes token by token."""

from absl.testing import absltest, parameterized

from examples.llm import text_stream


class Bytes:
  """A token is a byte."""

  def decode(self, tokens):
    return bytes(tokens).decode("utf-8", "replace")


class TextStreamTest(parameterized.TestCase):
  @parameterized.parameters("plain", "naïve – 你好 🙂!", "a\n\nb")
  def test_pieces_are_the_text(self, text):
    stream = text_stream.TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    self.assertFalse(any("\ufffd" in piece for piece in pieces))
    self.assertEqual("".join(pieces) + stream.finish(), text)

  def test_plain_text_is_not_kept_back(self):
    stream = text_stream.TextStream(Bytes(), ["zz"])
    self.assertEqual([stream.push(byte) for byte in b"abc"], ["a", "b", "c"])

  @parameterized.parameters(
    ("one two three", ["two"], "one "),
    ("one two three", ["xx", "three", "two"], "one "),
    ("abab abc", ["abc"], "abab "),
    ("aab", ["ab"], "a"),
    ("one", ["one"], ""),
  )
  def test_a_stop_word_ends_the_text(self, text, stops, expected):
    stream = text_stream.TextStream(Bytes(), stops)
    pieces = [stream.push(byte) for byte in text.encode()]
    self.assertTrue(stream.stopped)
    self.assertEqual("".join(pieces) + stream.finish(), expected)

  def test_the_beginning_of_a_stop_word_comes_when_it_is_none(self):
    stream = text_stream.TextStream(Bytes(), ["stop"])
    pieces = [stream.push(byte) for byte in b"a sto"]
    self.assertEqual("".join(pieces), "a ")
    self.assertEqual(stream.finish(), "sto")

  def test_unfinished_bytes_come_at_the_end(self):
    stream = text_stream.TextStream(Bytes())
    self.assertEqual(stream.push("é".encode()[0]), "")
    self.assertEqual(stream.finish(), "\ufffd")

  def test_an_empty_stop_word_is_refused(self):
    with self.assertRaisesRegex(ValueError, "`stops` must be words"):
      text_stream.TextStream(Bytes(), ["a", ""])


if __name__ == "__main__":
  absltest.main()
