"""What our docstrings say in Markdown, in the words of reStructuredText."""

from __future__ import annotations

import re

_CODE = re.compile(r"(`+)[^`]+\1")
_ENDING = re.compile(r"\w")

# Paragraphs that a word opens, the rest of which is indented.
_OPENING = re.compile(
  r"(Numerics|Aliasing|Batching|Differentiation|Sharding|Source): *(.*)"
)


def _ended(code: re.Match) -> str:
  """Parts code from letters right behind it, as in `Variable`s."""
  return code[0] + ("\\ " if _ENDING.match(code.string, code.end()) else "")


def translate(lines: list[str]) -> list[str]:
  """Returns the lines of a docstring as reStructuredText.

  Args:
    lines: without common indentation.
  """
  found: list[str] = []
  paragraph = code = False  # inside of which we are
  above = " "  # the last line with text
  for line in lines:
    opening = _OPENING.fullmatch(line)
    paragraph = paragraph and line.startswith("  ")
    code = code and (not line or line.startswith("    "))
    if opening:
      found += ["", f"**{opening[1]}.** {_CODE.sub(_ended, opening[2])}"]
      paragraph = True
    elif paragraph:
      found.append(_CODE.sub(_ended, line.strip()))
    elif code:
      found.append(line)
    elif (
      line.startswith("    ") and not above.startswith(" ") and not found[-1]
    ):
      found += ["::", "", line]  # four spaces below text that has none
      code = True
    else:
      found.append(_CODE.sub(_ended, line))
    above = line or above
  return found
