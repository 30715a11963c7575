"""The reference has every public name once."""

import collections
import importlib
import types

import pytest

import nnx
from tools.docs import reference

NAMES = reference.names()


def test_a_name_is_there_once():
  paths = collections.Counter(name.path for name in NAMES)
  assert [path for path, count in paths.items() if count > 1] == []
  assert len(paths) > 300


@pytest.mark.parametrize("package", reference.PACKAGES)
def test_all_that_a_package_shows_is_there(package):
  """Read off the package itself: modules that it merely imported aside."""
  module = importlib.import_module(package)
  shown = {
    f"{package}.{name}"
    for name, value in vars(module).items()
    if not name.startswith("_")
    and not isinstance(value, types.ModuleType)
    and getattr(value, "__module__", "") != "typing"
  }
  paths = {name.path for name in NAMES}
  assert shown and shown <= paths
  assert {f"{package}.{name}" for name in getattr(module, "__all__", ())} <= (
    paths
  )


def test_modules_are_there():
  paths = {name.path for name in NAMES}
  assert {"nnx.metrics", "nnx.initializers", "nnx.filterlib"} <= paths
  assert {"nnx.metrics.Accuracy", "nnx.initializers.he_normal"} <= paths


@pytest.mark.parametrize("page", reference.PAGES)
def test_a_page_lists_and_documents_its_names(page):
  text = reference.text(page, NAMES)
  names = [name for name in NAMES if reference.page_of(name) == page]
  assert names
  for name in names:
    assert f"- :py:obj:`{name.path}`: " in text
    assert f":: {name.path}\n" in text


def test_caches_and_rotations_are_beside_attention():
  pages = {name.path: reference.page_of(name) for name in NAMES}
  for name in ("AttentionStep", "RoPE", "YarnScaling", "init_cache"):
    assert pages[f"nnx.{name}"] == pages["nnx.MultiHeadAttention"]


def test_functions_of_jax_are_named_and_not_explained():
  text = reference.text("activations", NAMES)
  assert "- :py:obj:`nnx.relu`: The same as `jax.nn.relu`.\n" in text
  assert "auto" not in text.split(":: nnx.relu\n")[0].splitlines()[-1]


def test_a_module_that_no_page_is_about_is_refused():
  name = reference.Name("nnx.thing", nnx.jit, "nnx.elsewhere")
  with pytest.raises(ValueError, match="`nnx.elsewhere`, which no page"):
    reference.page_of(name)
