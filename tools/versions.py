"""Names the versions that a result was measured with."""

from collections.abc import Sequence
from importlib import metadata
import pathlib
import platform
import subprocess


def installed(packages: Sequence[str]) -> dict[str, str]:
  """Returns the versions of Python and of those packages that are there."""
  found = {"python": platform.python_version()}
  for name in packages:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def commit() -> str:
  """Returns the commit of the source tree, `+changes` if it has any."""
  # Bazel's runfiles are links into the source tree.
  folder = pathlib.Path(__file__).resolve().parent

  def git(*arguments: str) -> str:
    return subprocess.run(
      ["git", *arguments],
      cwd=folder,
      capture_output=True,
      check=True,
      text=True,
    ).stdout.strip()

  try:
    name = git("describe", "--always", "--abbrev=12", "--exclude=*")
    changes = git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return name + ("+changes" if changes else "")
