"""Compiles sources to byte code that Python never checks against them.

Such byte code is the same on every machine, and holds without the time stamps
that a build does not keep. The build makes it anew when a source changes.
"""

import py_compile
import sys


def main(paths: list[str]) -> None:
  """Compiles `source, target, source, target, ...`."""
  for source, target in zip(paths[::2], paths[1::2]):
    py_compile.compile(
      source,
      cfile=target,
      dfile=source,
      doraise=True,
      invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


if __name__ == "__main__":
  main(sys.argv[1:])
