"""The pages of the reference: every public name, by what it is about.

A name is public where the package's `__init__` imports it; the module that it
comes from decides the page. So a new name has its place by itself, and one of a
module that no page is about is an error.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import types
from typing import NamedTuple

from tools.docs import docstrings


class Name(NamedTuple):
  """A public name.

  Attributes:
    path: what users write, as in `nnx.Linear`.
    value: what is behind it.
    module: where `__init__` has it from.
  """

  path: str
  value: object
  module: str


class Page(NamedTuple):
  """A page of the reference.

  Attributes:
    title: of the page.
    modules: whose names it has; the longest prefix of a module decides.
  """

  title: str
  modules: tuple[str, ...]


# By their names on the site.
PAGES = {
  "modules": Page("Modules", ("nnx.module", "nnx.containers", "nnx.pytreelib")),
  "variables": Page("Variables", ("nnx.variablelib",)),
  "state": Page("State and filters", ("nnx.statelib", "nnx.filterlib")),
  "graphs": Page("Objects and graphs", ("nnx.graphlib", "nnx.graph")),
  "transforms": Page("Transforms", ("nnx.transforms", "nnx.in_place")),
  "random": Page("Random streams", ("nnx.rnglib",)),
  "layers": Page("Layers", ("nnx.nn",)),
  "normalization": Page(
    "Normalisation", ("nnx.nn.normalization", "nnx.nn.weight_normalization")
  ),
  "attention": Page(
    "Attention",
    (
      "nnx.nn.attention",
      "nnx.nn.attention_cache",
      "nnx.nn.attention_step",
      "nnx.nn.rope_scaling",
      "nnx.nn.rotary",
    ),
  ),
  "recurrent": Page("Recurrent layers", ("nnx.nn.recurrent",)),
  "activations": Page("Activations", ("nnx.nn.activations",)),
  "initializers": Page("Initializers", ("nnx.nn.initializers",)),
  "training": Page("Training", ("nnx.training",)),
  "sharding": Page("Sharding", ("nnx.spmd", "nnx.partitioning")),
  "display": Page("Looking at models", ("nnx.summary", "nnx.visualization")),
  "errors": Page("Errors", ("nnx.errors",)),
  "kernels": Page("Kernels", ("nnx.kernels",)),
  "bridge": Page("Bridge", ("nnx.bridge",)),
  "others": Page(
    "Other modules",
    ("nnx.compat", "nnx.reprlib", "nnx.tracers", "nnx.traversals"),
  ),
}

# Packages by the names under which nothing else can be meant.
PACKAGES = (
  "nnx",
  "nnx.kernels",
  "nnx.kernels.batch_stat",
  "nnx.kernels.decode_attention",
  "nnx.kernels.kv_cache",
  "nnx.kernels.matmul",
  "nnx.bridge",
)

# Modules of nnx whose own names are public as well.
_OPEN = ("nnx.initializers", "nnx.metrics", "nnx.traversals")


def _imports(package: types.ModuleType) -> dict[str, str]:
  """Returns where a package has its public names from.

  These are what it imports `as` the same name, and what `__all__` lists.
  """
  assert package.__file__
  with open(package.__file__, encoding="utf-8") as source:
    tree = ast.parse(source.read())
  found = {
    alias.name: node.module or ""
    for node in tree.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.asname == alias.name
  }
  listed = dict.fromkeys(getattr(package, "__all__", ()), "")
  return listed | found


def _members(path: str) -> list[Name]:
  """Returns the names of an open module that `nnx` itself does not have."""
  nnx = importlib.import_module("nnx")
  module = getattr(nnx, path.rpartition(".")[2])
  tree = ast.parse(inspect.getsource(module))
  names = {
    node.name
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
  } | set(_imports(module))
  return [
    Name(f"{path}.{name}", getattr(module, name), module.__name__)
    for name in sorted(names)
    if not name.startswith("_") and not hasattr(nnx, name)
  ]


def names() -> list[Name]:
  """Returns all public names of `nnx`, the kernels and the bridge."""
  found = []
  for path in PACKAGES:
    package = importlib.import_module(path)
    for name, module in sorted(_imports(package).items()):
      value = getattr(package, name)
      if path != "nnx":
        module = path
      elif isinstance(value, types.ModuleType):
        module = value.__name__
      found.append(Name(f"{path}.{name}", value, module))
  for path in _OPEN:
    found += _members(path)
  return found


def page_of(name: Name) -> str:
  """Returns the page that a name is on.

  Args:
    name: a public name.

  Raises:
    ValueError: if no page is about its module.
  """
  best, length = "", 0
  for page, (_, modules) in PAGES.items():
    for module in modules:
      if f"{name.module}.".startswith(f"{module}.") and len(module) > length:
        best, length = page, len(module)
  if not best:
    raise ValueError(
      f"`{name.path}` comes from `{name.module}`, which no page of the "
      "reference is about: add it to `PAGES` in tools/docs/reference.py."
    )
  return best


def _is_of_jax(name: Name) -> bool:
  module = getattr(name.value, "__module__", None) or ""
  return module.split(".")[0] == "jax"


def _jax_name(name: Name) -> str:
  called = getattr(name.value, "__name__", name.path.rpartition(".")[2])
  home = "nn.initializers" if "initializers" in name.module else "nn"
  return f"jax.{home}.{called}"


def _summary(name: Name) -> str:
  """Returns the first paragraph of what is said of a name."""
  if _is_of_jax(name):
    return f"The same as `{_jax_name(name)}`."
  value = name.value
  if not isinstance(value, types.ModuleType) and not callable(value):
    return "A constant."
  first = (inspect.getdoc(value) or "").split("\n\n")[0]
  return " ".join(docstrings.translate(first.splitlines()))


def _entry(name: Name) -> str:
  """Returns the directive that documents one name."""
  value = name.value
  if isinstance(value, types.ModuleType):
    # What follows is named in full.
    return f".. automodule:: {name.path}\n\n.. py:currentmodule:: None\n"
  if _is_of_jax(name):
    return f".. py:function:: {name.path}\n\n   {_summary(name)}\n"
  if inspect.isclass(value):
    return f".. autoclass:: {name.path}\n   :members:\n"
  kind = "function" if callable(value) else "data"
  return f".. auto{kind}:: {name.path}\n"


def _heading(title: str, line: str) -> str:
  return f"{title}\n{line * len(title)}\n\n"


def text(page: str, all_names: list[Name]) -> str:
  """Returns a page, in reStructuredText: a list of its names, then each.

  Args:
    page: one of `PAGES`.
    all_names: what `names` returns.
  """
  found = [name for name in all_names if page_of(name) == page]
  names = "".join(
    f"- :py:obj:`{name.path}`: {_summary(name)}\n" for name in found
  )
  # Modules are sections at the end, each with the names that are in it.
  modules = [name for name in found if isinstance(name.value, types.ModuleType)]
  sections = {name.path: _heading(name.path, "-") for name in modules}
  top = ""
  for name in modules + [name for name in found if name not in modules]:
    home = name.path if name in modules else name.path.rpartition(".")[0]
    if home in sections:
      sections[home] += f"{_entry(name)}\n"
    else:
      top += f"{_entry(name)}\n"
  return "".join(
    (
      _heading(PAGES[page].title, "="),
      f"{names}\n",
      top,
      *sections.values(),
    )
  )
