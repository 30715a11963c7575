"""What is on the site, in the order of its sidebar."""

from __future__ import annotations

import pathlib

# The front page; its place on the site is that of `index`.
FRONT = "README.md"

# Where `tools.docs.reference` puts the pages that it makes of docstrings.
REFERENCE = "reference"

# Pages by their paths in the repository, so that links hold in both.
SECTIONS: dict[str, tuple[str, ...]] = {
  "Start": (
    "docs/getting_started.md",
    "docs/thinking_in_nnx.md",
  ),
  "Moving": (
    "docs/from_flax.md",
    "docs/from_linen.md",
    "docs/from_pytorch.md",
    "docs/flax_names.md",
  ),
  "Guides": (
    "docs/layers_on_kernels.md",
    "docs/generating_text.md",
    "examples/llm/README.md",
    "docs/batch_norm.md",
    "docs/checkpoints.md",
    "docs/export.md",
    "docs/sharding.md",
    "docs/planning.md",
    "docs/performance.md",
    "docs/support.md",
  ),
  "Inside": (
    "docs/architecture.md",
    "docs/writing_an_op.md",
    "kernels/README.md",
    "kernels/batch_stat/README.md",
    "kernels/kv_cache/README.md",
    "kernels/decode_attention/README.md",
    "kernels/matmul/README.md",
    "nnx/engine/README.md",
    "bridge/README.md",
    "CONTRIBUTING.md",
  ),
  "Numbers": (
    "tools/bench/README.md",
    "tools/bench/results/RESULTS.md",
  ),
  "Changes": ("CHANGELOG.md",),
}


def pages() -> list[str]:
  """Returns the paths of all pages that people write, the front page first."""
  return [FRONT, *(page for pages in SECTIONS.values() for page in pages)]


def name(page: str) -> str:
  """Returns what Sphinx calls a page: its place on the site, without suffix."""
  return "index" if page == FRONT else page.removesuffix(".md")


def sidebar(reference: list[str]) -> str:
  """Returns the lists of pages that the front page hides at its end.

  Args:
    reference: names of the pages of the reference.
  """
  lists = {
    title: [name(page) for page in pages] for title, pages in SECTIONS.items()
  }
  changes = lists.pop("Changes")
  lists |= {"Reference": reference, "Changes": changes}
  return "".join(
    f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n"
    + "".join(f"{page}\n" for page in pages)
    + "```\n"
    for title, pages in lists.items()
  )


def place(page: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns where a page goes in the folder that Sphinx reads."""
  return folder / f"{name(page)}.md"
