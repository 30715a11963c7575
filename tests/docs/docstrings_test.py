"""Markdown of docstrings in the words of reStructuredText."""

from tools.docs import docstrings


def test_code_may_have_an_ending():
  assert docstrings.translate(["Two `Rngs`, `State`s, ``a``."]) == [
    r"Two `Rngs`, `State`\ s, ``a``."
  ]


def test_a_paragraph_that_a_word_opens_is_one_paragraph():
  lines = ["Numerics: in float32,", "  rounded once.", "", "  >>> x", "End."]
  assert docstrings.translate(lines) == [
    "",
    "**Numerics.** in float32,",
    "rounded once.",
    "",
    "  >>> x",
    "End.",
  ]


def test_paragraphs_follow_one_another():
  assert docstrings.translate(["Batching: one.", "Aliasing: two."]) == [
    "",
    "**Batching.** one.",
    "",
    "**Aliasing.** two.",
  ]


def test_what_is_indented_below_text_is_code():
  lines = [
    "Adds a bias.",
    "",
    "    y = x + `b`s",
    "",
    "    z = y",
    "",
    "Args:",
    "  x: one of the",
    "    `Param`s.",
    "",
    "    and more",
  ]
  assert docstrings.translate(lines) == [
    *lines[:2],
    "::",
    "",
    *lines[2:8],
    r"    `Param`\ s.",
    *lines[9:],
  ]
