"""Makes the site of documentation; `//docs` runs it.

    python -m tools.docs.main --output=site

reads the pages from the current folder, the root of the repository. What is
wrong with a page or a docstring is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import os
import pathlib
import sys
import tempfile

from sphinx.cmd import (  # pyright: ignore[reportMissingImports]
  build as sphinx_build,
)

from tools.docs import contents, reference


def stage(folder: pathlib.Path) -> None:
  """Writes what Sphinx reads into a folder: pages, and those of the reference.

  Args:
    folder: an empty one.
  """
  reference_pages = [f"{contents.REFERENCE}/{page}" for page in reference.PAGES]
  for page in contents.pages():
    text = pathlib.Path(page).read_text(encoding="utf-8")
    if page == contents.FRONT:
      text += contents.sidebar(reference_pages)
    place = contents.place(page, folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
  (folder / contents.REFERENCE).mkdir()
  names = reference.names()
  for page in reference.PAGES:
    text = reference.text(page, names)
    path = folder / contents.REFERENCE / f"{page}.rst"
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
  """Makes the site, and returns what the process exits with."""
  parser = argparse.ArgumentParser(description="Makes the documentation.")
  parser.add_argument("--output", required=True, help="the folder of the site")
  options = parser.parse_args(arguments)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  settings = pathlib.Path(__file__).parent
  with tempfile.TemporaryDirectory() as scratch:
    source = pathlib.Path(scratch, "source")
    source.mkdir()
    stage(source)
    return sphinx_build.main(
      [
        "--builder=html",
        "--fail-on-warning",
        "--quiet",
        f"--conf-dir={settings}",
        f"--doctree-dir={scratch}/doctrees",
        str(source),
        options.output,
      ]
    )


if __name__ == "__main__":
  sys.exit(main())
