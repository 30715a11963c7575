"""What is public is documented, with an example that runs as a doctest."""

import ast
import importlib
import inspect
import pathlib
import re
import types

import pytest

ROOT = pathlib.Path.cwd()
PACKAGES = (
  "bridge",
  "kernels",
  "kernels.batch_stat",
  "kernels.decode_attention",
  "kernels.kv_cache",
  "kernels.matmul",
  "nnx",
)


def public_names(package: str) -> set[str]:
  """The names that a package's `__init__` re-exports as `a as a` or lists."""
  path = ROOT.joinpath(*package.split("."), "__init__.py")
  tree = ast.parse(path.read_text(encoding="utf-8"))
  names = {
    alias.name
    for node in tree.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.asname == alias.name
  }
  return names | set(getattr(importlib.import_module(package), "__all__", ()))


def public_objects():
  for package in PACKAGES:
    module = importlib.import_module(package)
    for name in sorted(public_names(package)):
      yield pytest.param(getattr(module, name), id=f"{package}.{name}")


def shown_by_another(value, doc: str) -> bool:
  """Whether the example is that of the function which makes or takes `value`.

  That is so for named tuples, and for classes whose docstring names it.
  """
  if not inspect.isclass(value):
    return False
  named = set(re.findall(r"`(\w+)`", doc))
  public = {name for package in PACKAGES for name in public_names(package)}
  return hasattr(value, "_fields") or not named.isdisjoint(public)


@pytest.mark.parametrize("value", list(public_objects()))
def test_public_symbol_has_a_docstring_with_an_example(value):
  if not (inspect.isroutine(value) or inspect.isclass(value)):
    return
  if (value.__module__ or "").split(".")[0] == "jax":
    return  # re-exported as it is: jax documents it
  doc = inspect.getdoc(value)
  assert doc, "there is no docstring"
  assert ">>> " in doc or shown_by_another(value, doc), (
    "the docstring has no example"
  )


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_a_docstring(package):
  assert importlib.import_module(package).__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_but_modules_leaks_from_a_package(package):
  module = importlib.import_module(package)
  leaked = {
    name
    for name, value in vars(module).items()
    if not name.startswith("_")
    and not isinstance(value, types.ModuleType)
    and getattr(value, "__module__", "") != "typing"
  }
  assert leaked <= public_names(package)


def summaries(package: str):
  """Yields where each function of the sources is, and its first word."""
  for path in sorted((ROOT / package).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if not isinstance(node, ast.FunctionDef):
        continue
      decorators = " ".join(map(ast.unparse, node.decorator_list))
      doc = ast.get_docstring(node)
      if doc and "property" not in decorators and "setter" not in decorators:
        yield (
          f"{path.relative_to(ROOT)}:{node.lineno}",
          doc.split()[0].strip("`.,:;"),
        )


@pytest.mark.parametrize("package", ("bridge", "kernels", "nnx"))
def test_summaries_of_functions_start_with_a_verb(package):
  """In the third person: whether a word with an s is a verb, people see."""
  found = list(summaries(package))
  assert len(found) > 30
  assert [x for x in found if not x[1].endswith("s") or x[1] == "This"] == []
