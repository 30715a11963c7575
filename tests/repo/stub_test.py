"""Every compiled extension has a stub, and the stub says what is there."""

import ast
import enum
import importlib
import pathlib

import pytest

ROOT = pathlib.Path.cwd()
EXTENSIONS = sorted(
  path.relative_to(ROOT)
  for package in ("bridge", "kernels", "nnx")
  for path in (ROOT / package).rglob("_*.so")
  if "." not in path.stem
)


def members(value) -> set[str]:
  if isinstance(value, enum.EnumMeta):
    return set(value.__members__)
  if isinstance(value, type) and issubclass(value, tuple):
    return set(value.__match_args__)  # of a struct sequence
  return {
    name for name in vars(value) if not name.startswith(("__", "pybind11"))
  }


def declared(
  body: list[ast.stmt], is_enum: bool = False
) -> dict[str, ast.stmt]:
  """The names that a stub's body declares, with their statements."""
  found = {}
  for node in body:
    if isinstance(node, ast.ClassDef) and "TypedDict" in map(
      ast.unparse, node.bases
    ):
      continue  # a type for the stub's own use, as the plain assignments below
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      found[node.name] = node
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      found[node.target.id] = node
    elif is_enum and isinstance(node, ast.Assign):
      found[node.targets[0].id] = node
    # Other plain assignments are names of types, for the stub's own use.
  return {k: node for k, node in found.items() if not k.startswith("__")}


def test_there_are_extensions():
  assert len(EXTENSIONS) >= 3


@pytest.mark.parametrize("path", EXTENSIONS, ids=str)
def test_stub_says_what_is_there(path):
  stub = (ROOT / path).with_suffix(".pyi")
  assert stub.exists(), f"{path} has no stub; write {path.with_suffix('.pyi')}"
  module = importlib.import_module(".".join(path.with_suffix("").parts))
  names = declared(ast.parse(stub.read_text(encoding="utf-8")).body)
  assert set(names) == members(module)
  for name, node in names.items():
    value = getattr(module, name)
    assert isinstance(node, ast.ClassDef) == isinstance(value, type), name
    if isinstance(node, ast.ClassDef):
      is_enum = isinstance(value, enum.EnumMeta)
      assert set(declared(node.body, is_enum)) == members(value), name
