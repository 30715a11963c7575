"""What README.md and the pages of docs/ show is so."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

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
PROGRAM = """
import sys
sys.path.insert(0, "tests/repo")
import readme_test
readme_test.execute(globals(), *sys.argv[1:])
"""


def execute(scope: dict, name: str, *numbers: str) -> None:
  """Executes some of the blocks of a page, or all of them."""
  page = pathlib.Path(name)
  there = blocks(page)
  for block in [there[int(n)] for n in numbers] or there:
    exec(compile(block, name, "exec"), scope)


def run(page: pathlib.Path, *numbers: int) -> subprocess.CompletedProcess:
  """Runs some of the blocks of a page, or all of them, in one process."""
  return subprocess.run(
    [sys.executable, "-W", "error", "-c", PROGRAM, page, *map(str, numbers)],
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
      "JAX_PLATFORMS": "cpu",
      # For the page on sharding.
      "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    },
    capture_output=True,
    text=True,
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
def test_blocks_of_a_page_run(page, numbers):
  done = run(page, *numbers)
  assert done.returncode == 0, done.stderr


def test_a_block_that_fails_is_seen(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(
    "Text.\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```"
  )
  assert "line 8" in run(page).stderr


def test_the_example_is_short_and_prints():
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
