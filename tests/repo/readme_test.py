"""What README.md and the pages of docs/ show is so."""

import os
import pathlib
import re
import sys

import pytest

from tests.testing import forks

ROOT = pathlib.Path.cwd()
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path) -> list[str]:
  """The blocks of Python of a page, each at its line."""
  text = page.read_text(encoding="utf-8")
  return [
    "\n" * (text[: match.start(1)].count("\n")) + match[1]
    for match in BLOCK.finditer(text)
  ]


# A page is one program, whose blocks go on from those before; but for these, of
# which each block is: some are switched over to nnx, and some are not.
IN_PARTS = {"from_flax.md"}


def execute(scope: dict, name: str, *numbers: int) -> None:
  """Executes some of the blocks of a page, or all of them."""
  page = pathlib.Path(name)
  there = blocks(page)
  for block in [there[n] for n in numbers] or there:
    exec(compile(block, name, "exec"), scope)


@pytest.fixture(scope="session")
def run():
  """Runs some of the blocks of a page, or all of them, in one process."""
  folder = str(ROOT / "tests" / "repo")
  with forks.Process(
    # Of what pages import, jax alone: what else is imported when is theirs.
    ["jax", "readme_test"],
    options=["-W", "error"],
    environment={
      "PYTHONPATH": os.pathsep.join(filter(None, [folder, *sys.path])),
      "JAX_PLATFORMS": "cpu",
      # For the page on sharding.
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    },
  ) as process:
    yield lambda page, *numbers: process.run(
      "import readme_test;"
      f"readme_test.execute(globals(), {str(page)!r}, *{numbers})"
    )


def programs():
  for page in PAGES:
    count = len(blocks(page))
    if page.name in IN_PARTS:
      for n in range(count):
        yield pytest.param(page, (n,), id=f"{page.name}-{n}")
    elif count:
      yield pytest.param(page, (), id=page.name)


@pytest.mark.parametrize("page, numbers", list(programs()))
def test_blocks_of_a_page_run(run, page, numbers):
  done = run(page, *numbers)
  assert done.returncode == 0, done.stderr


def test_a_block_that_fails_is_seen(run, tmp_path):
  page = tmp_path / "page.md"
  page.write_text(
    "Text.\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```"
  )
  assert "line 8" in run(page).stderr


def test_the_example_is_short_and_prints(run):
  example = README.read_text(encoding="utf-8").split("## An example")[1]
  (code, *_) = BLOCK.findall(example)
  assert len([line for line in code.splitlines() if line]) <= 20
  assert run(README).stdout, "the example should print what it did"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_that_are_named_exist(page):
  text = page.read_text(encoding="utf-8")
  for name in re.findall(r"docs/\w+\.md", text):
    assert (ROOT / name).exists(), name
  for name in re.findall(r"\]\((\w+\.md)", text):
    assert (page.parent / name).exists(), name


def test_the_opening_is_short():
  opening = README.read_text(encoding="utf-8").split("## An example")[0]
  assert len(opening.split()) <= 330
