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
  is_open = False
  for line in lines:
    line = _CODE.sub(_ended, line)
    opening = _OPENING.fullmatch(line)
    if opening:
      found += ["", f"**{opening[1]}.** {opening[2]}"]
    elif is_open and line.startswith("  "):
      found.append(line.strip())
    else:
      found.append(line)
    is_open = bool(opening) or (is_open and line.startswith("  "))
  return found
