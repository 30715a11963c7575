"""The site as it is made: whole, its links good, and nothing fetched."""

import html.parser
import pathlib
import posixpath
import urllib.parse
import zlib

import pytest

from tools.docs import contents, reference

SITE = pathlib.Path("docs/site")


class Page(html.parser.HTMLParser):
  """What a page links to, what it loads, and what can be linked to in it."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self.links: set[str] = set()
    self.loads: set[str] = set()
    self.anchors: set[str] = set()
    self.feed(path.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    if values.get("id"):
      self.anchors.add(values["id"])
    if tag == "a" and values.get("href"):
      self.links.add(values["href"])
    if tag == "link" and values.get("rel") in ("stylesheet", "icon"):
      self.loads.add(values["href"])
    if tag in ("script", "img", "iframe", "source") and values.get("src"):
      self.loads.add(values["src"])


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
  found = {
    path.relative_to(SITE).as_posix(): Page(path)
    for path in sorted(SITE.rglob("*.html"))
  }
  assert found
  return found


def broken(pages: dict[str, Page]) -> list[str]:
  """Links inside of the site that lead nowhere."""
  found = []
  for path, page in pages.items():
    for link in page.links | page.loads:
      url = urllib.parse.urlsplit(link)
      if url.scheme or url.netloc:
        continue
      target = posixpath.normpath(
        posixpath.join(posixpath.dirname(path), urllib.parse.unquote(url.path))
      )
      if not url.path:
        target = path
      there = (SITE / target).is_file()
      if there and url.fragment and target in pages:
        fragment = urllib.parse.unquote(url.fragment)
        # The theme's link to the top of each page is a script's.
        there = not fragment or fragment in pages[target].anchors
      if not there:
        found.append(f"{path}: {link}")
  return found


def test_links_lead_somewhere(pages):
  assert broken(pages) == []


def test_a_broken_link_is_found(pages):
  page = Page(SITE / "index.html")
  page.links = {"nowhere.html", "index.html#nowhere", "docs/sharding.html"}
  assert sorted(broken({"index.html": page})) == [
    "index.html: index.html#nowhere",
    "index.html: nowhere.html",
  ]


def test_no_page_loads_anything_from_elsewhere(pages):
  assert {
    load
    for page in pages.values()
    for load in page.loads
    if urllib.parse.urlsplit(load).netloc
  } == set()


def test_every_page_is_made(pages):
  for page in contents.pages():
    assert f"{contents.name(page)}.html" in pages
  for page in reference.PAGES:
    assert f"{contents.REFERENCE}/{page}.html" in pages


def test_every_public_name_is_documented(pages):
  """Read off the inventory, in which other sites look our names up."""
  _, _, _, _, packed = (SITE / "objects.inv").read_bytes().split(b"\n", 4)
  lines = zlib.decompress(packed).decode().splitlines()
  documented = {line.split()[0] for line in lines if " py:" in line}
  missing = {name.path for name in reference.names()} - documented
  assert missing == set()


def test_search_finds_words_of_pages_and_names():
  index = (SITE / "searchindex.js").read_text(encoding="utf-8")
  for word in ("prefil", "value_and_grad", "decode_attent"):
    assert word in index, word
