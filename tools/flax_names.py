"""Writes docs/flax_names.md: the names of `flax.nnx`, and what they are here.

    python -m tools.flax_names > docs/flax_names.md
    python -m tools.flax_names 0.10.2=folder 0.12.12=folder > docs/flax_names.md

Each argument is another version of Flax and the folder of its package `flax`;
the installed one is always read. Names are read from the sources: what a module
defines, and what `__init__.py` re-exports. What they are here is looked up,
parameters included, under `nnx.as_flax`; what is not here needs a reason below.
"""

import ast
import fnmatch
import importlib.metadata
import importlib.util
import inspect
import pathlib
import sys

# Names that are here, and what is different about them.
DIFFERS = {
  "Optimizer": "without `wrt` it keeps the model, as in 0.10",
  "ModelAndOptimizer": "the same class of state as `Optimizer`",
  "VariableState": "the same class as `Variable`, without a warning",
  "State": "its leaves print as in 0.10",
  "Variable": "`v += x` works; hooks under both of their names",
  "Pytree": "plain lists and dicts of data need no mark, unless `strict=True`",
  "is_data": "plain containers that hold data are looked into all the same",
  "jit": "of Modules to donate, donates the Variables that are written",
  "display": "needs treescope in notebooks alone",
  "bridge.wrappers.ToNNX": "without `mutable` it writes what Linen lets it",
  "bridge.ToNNX": "without `mutable` it writes what Linen lets it",
  "module.ModuleMeta": "no class of ours has it; one may be derived from it",
  "pytreelib.PytreeMeta": "no class of ours has it; one may be derived from it",
  "pytreelib.ObjectMeta": "no class of ours has it; one may be derived from it",
  "pytreelib.PytreeState": "a view; transforms do not carry it along",
  "variablelib.VariableMeta": "is `type`",
  "extract.GraphDefState": "a named tuple",
  "transforms.compilation.JitWrapped": "made by `nnx.jit` alone",
}

# Names that are not here, by patterns, the first that fits: why.
REFUSED = {
  "wrappers": "a module that leaks; it is `bridge.wrappers`",
  "module.StateMapping": "a type annotation",
  "graphlib.*": "inner workings of Flax's walk over a graph, which is in C++",
  "graph.*": "inner workings of Flax's walk over a graph, which is in C++",
  "extract.*": "inner workings of Flax's transforms",
  "transforms.*.*Fn*": "a class behind one of Flax's transforms",
  "transforms.*": "inner workings of Flax's transforms",
  "reprlib.*": "how Flax prints; here a class has a `__repr__` of its own",
  "summary.*": "inner workings of `tabulate`",
  "visualization.*": "how Flax draws in notebooks",
  "variablelib.*Hook": "a type annotation",
  "variablelib.*": "inner workings of Flax's Variables, hijax among them",
  "pytreelib.*": "inner workings of Flax's objects",
  "object.*": "inner workings of Flax's objects",
  "rnglib.*": "inner workings, or a type annotation",
  "statelib.*": "a type annotation, or how Flax prints",
  "bridge.*": "inner workings of the bridge",
  "training.*": "inner workings of the optimizer",
  "nn.*": "a type annotation",
  "filterlib.*": "a type annotation",
  "spmd.*": "a type annotation",
  "traversals.*": "a type annotation",
  "proxy_caller.*": "a type annotation",
  "deprecations.*": "a type annotation",
}

_TYPE_VARIABLES = ("TypeVar", "ParamSpec", "TypeVarTuple")


def _is_type_variable(value: ast.AST | None) -> bool:
  call = value.func if isinstance(value, ast.Call) else None
  name = getattr(call, "attr", getattr(call, "id", None))
  return name in _TYPE_VARIABLES


def _parameters(node: ast.AST) -> list[str] | None:
  """Returns the parameters of a function or constructor, None for others."""
  if isinstance(node, ast.ClassDef):
    for child in node.body:
      if isinstance(child, ast.FunctionDef) and child.name == "__init__":
        return [p for p in _parameters(child) or [] if p != "self"]
    return None
  if not isinstance(node, ast.FunctionDef):
    return None
  args = node.args
  # Nobody can give those by name that are for positions only.
  return [a.arg for a in (*args.args, *args.kwonlyargs)]


def _in_module(
  tree: ast.Module, reexports: bool
) -> dict[str, list[str] | None]:
  """Returns the public names of a module, with their parameters."""
  names: dict[str, list[str] | None] = {}
  for node in tree.body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      # Of overloads the last one is the function.
      names[node.name] = _parameters(node)
    elif isinstance(node, ast.Assign) and not _is_type_variable(node.value):
      for target in node.targets:
        if isinstance(target, ast.Name):
          names.setdefault(target.id, None)
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      names.setdefault(node.target.id, None)
    elif isinstance(node, ast.ImportFrom) and reexports:
      for alias in node.names:
        if alias.asname == alias.name or node.module == "graphlib":
          names.setdefault(alias.asname or alias.name, None)
  return {
    name: parameters
    for name, parameters in names.items()
    if not name.startswith("_") and name not in ("M", "F")
  }


def names_of(flax: pathlib.Path) -> dict[str, list[str] | None]:
  """Returns the public names below `flax.nnx`, and their parameters.

  Args:
    flax: the folder of the package `flax`.
  """
  root = flax / "nnx"
  found: dict[str, list[str] | None] = {}
  for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for name, parameters in _in_module(tree, is_package).items():
      found[f"{module}.{name}" if module else name] = parameters
  return found


_MISSING = object()


def _look_up(name: str) -> object:
  """Returns what `flax.nnx.<name>` is under the switch."""
  from nnx.as_flax import places

  module, _, item = name.rpartition(".")
  full = f"flax.nnx.{module}" if module else "flax.nnx"
  if places.place(full) is None:
    return _MISSING
  return getattr(places.module(full), item, _MISSING)


def _lacking(value: object, parameters: list[str] | None) -> list[str]:
  """Lists parameters of Flax's that ours does not take."""
  if parameters is None or not callable(value):
    return []
  try:
    ours = inspect.signature(value).parameters
  except (TypeError, ValueError):
    return []
  if any(p.kind is p.VAR_KEYWORD for p in ours.values()):
    return []
  return [name for name in parameters if name not in ours]


def status(name: str, parameters: list[str] | None) -> str:
  """Says what a name of `flax.nnx` is here: same, differs or refused, and why.

  Args:
    name: the name, without `flax.nnx.`.
    parameters: those of a function or of a constructor, in Flax.

  Raises:
    LookupError: if it is not here, and there is no reason why.
  """
  value = _look_up(name)
  if value is _MISSING:
    for pattern, reason in REFUSED.items():
      if fnmatch.fnmatchcase(name, pattern):
        return f"refused: {reason}"
    raise LookupError(f"`flax.nnx.{name}` is not here: say why in `REFUSED`.")
  if name in DIFFERS:
    return f"differs: {DIFFERS[name]}"
  lacking = [p for p in _lacking(value, parameters) if not p.startswith("_")]
  if lacking:
    return f"differs: no parameter {', '.join(f'`{p}`' for p in lacking)}"
  return "same"


def rows(
  versions: dict[str, dict[str, list[str] | None]],
) -> dict[str, tuple[list[str], str]]:
  """Lists for each name the versions that have it, and what it is here.

  Args:
    versions: the names of each version, the oldest first.
  """
  result: dict[str, tuple[list[str], str]] = {}
  for version, names in versions.items():
    for name, parameters in names.items():
      having = result[name][0] if name in result else []
      # What a name is, is told of the newest version that has it.
      result[name] = ([*having, version], status(name, parameters))
  return dict(sorted(result.items(), key=lambda row: (row[0].count("."), row)))


_HEADER = """\
# The names of `flax.nnx`, and what they are here

Made by `python -m tools.flax_names`; do not edit. *Same* means: here by the
same name, at the same place under `import nnx.as_flax`, with at least the
parameters that it has in Flax. {counts}

| `flax.nnx.` | in Flax | here |
| --- | --- | --- |
"""


def main(argv: list[str]) -> None:
  """Prints the table.

  Args:
    argv: further versions, as `version=folder`.
  """
  import nnx.as_flax  # noqa: F401

  spec = importlib.util.find_spec("flax")
  assert spec is not None and spec.origin is not None
  installed = pathlib.Path(spec.origin).parent
  folders = {importlib.metadata.version("flax"): installed}
  for argument in argv:
    name, _, folder = argument.partition("=")
    folders[name] = pathlib.Path(folder)
  ordered = sorted(folders, key=lambda v: [int(n) for n in v.split(".")])
  table = rows({name: names_of(folders[name]) for name in ordered})
  kinds = [kind.partition(":")[0] for _, kind in table.values()]
  counts = ", ".join(
    f"{kinds.count(kind)} {kind}" for kind in ("same", "differs", "refused")
  )
  print(_HEADER.format(counts=f"In all: {counts}."), end="")
  for name, (having, kind) in table.items():
    print(f"| `{name}` | {', '.join(having)} | {kind} |")


if __name__ == "__main__":
  main(sys.argv[1:])
