"""Each page is on the site once, and README.md leads to it."""

import pathlib
import re

import pytest

from tools.docs import contents

ROOT = pathlib.Path.cwd()


def test_every_page_of_docs_is_on_the_site_once():
  pages = contents.pages()
  assert len(pages) == len(set(pages))
  there = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
  assert there == {page for page in pages if page.startswith("docs/")}


def test_the_readme_leads_to_every_page_but_itself():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  linked = set(re.findall(r"\]\(([\w/]+\.md)\)", text))
  assert linked == set(contents.pages()) - {contents.FRONT}


def test_the_sidebar_has_every_page_and_the_reference():
  sidebar = contents.sidebar(["reference/a"])
  for page in contents.pages()[1:]:
    assert f"\n{contents.name(page)}\n" in sidebar
  assert "\nreference/a\n" in sidebar
  assert contents.FRONT not in sidebar


@pytest.mark.parametrize(
  "page, place", [("README.md", "index.md"), ("docs/a.md", "docs/a.md")]
)
def test_a_page_is_where_links_expect_it(page, place):
  assert contents.place(page, pathlib.Path("x")) == pathlib.Path("x", place)
