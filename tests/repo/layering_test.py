"""Holds the table of who may import whom; CONTRIBUTING.md explains it.

Imports are read from the sources, those inside functions too.  C++ needs no
such test: a header that is not in a target's `deps` is not in its sandbox.
Compiled modules are known by their stubs.
"""

import ast
import collections
import graphlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path.cwd()
OURS = ("bridge", "examples", "kernels", "nnx", "tools")

# What each layer may import: layers of ours, `public:` for what the package
# shows the world alone, and other distributions.  The longest prefix of a
# module's name decides; the standard library is open to all.
_CACHE_OP = {"kernels.cache", "kernels.common", "self", "jax", "numpy"}
ALLOWED = {
  "kernels": {"kernels", "jax", "numpy"},
  "kernels.common": {"kernels.common", "jax", "numpy"},
  "kernels.*": {"kernels.common", "self", "jax", "numpy"},
  # The ops on caches share how those are laid out, addressed and written.
  "kernels.decode_attention": _CACHE_OP,
  "kernels.kv_cache": _CACHE_OP,
  "nnx": {"nnx", "jax", "numpy", "typing_extensions"},
  "nnx.engine": {"nnx.engine", "jax", "numpy"},
  "nnx.visualization": {"nnx", "jax", "numpy", "treescope"},
  "nnx.summary_cells": {"nnx", "jax", "numpy", "rich"},
  # It counts what a fused kernel computes.
  "nnx.summary": {"nnx", "public:kernels", "jax", "numpy", "rich"},
  "nnx.nn": {"nnx", "public:kernels", "jax", "numpy", "typing_extensions"},
  # The switch stands between the two, and so knows both.
  "nnx.as_flax": {"nnx", "public:bridge", "flax", "jax"},
  "bridge": {"bridge", "public:nnx", "flax", "jax", "numpy"},
}

# Programs bring in what they like, but see of ours the public part only.
PROGRAMS = ("examples", "tools")

# What is above all of the library.
SWITCH = "nnx.as_flax"

# Later ones may import earlier ones, never the other way round.
ORDER = (
  "nnx.engine",
  "nnx.missing",
  "nnx.environment",
  "nnx.in_place",
  "nnx.filterlib",
  "nnx.variable_settings",
  "nnx.variable_metadata",
  "nnx.variable_initial",
  "nnx.variable_operators",
  "nnx.variable_pickling",
  "nnx.variable_base",
  "nnx.variablelib",
  "nnx.nested_mappings",
  "nnx.flat_states",
  "nnx.statelib",
  "nnx.graphlib",
  "nnx.rng_streams",
  "nnx.rnglib",
  "nnx.module_base",
  "nnx.module_capture",
  "nnx.module",
  "nnx.nn",
)

# The one module of each package that may touch what jax keeps to itself.
JAX_PRIVATE = {"kernels.common.jax_private", "nnx.engine.jax_private"}

EXCEPTIONS = {
  # Second names, under which nothing else can be meant; see nnx.neighbours.
  ("nnx.bridge", "bridge"),
  ("nnx.kernels", "kernels"),
  # To a type checker alone: at run time they are imported when asked for.
  ("nnx", "bridge"),
  ("nnx", "kernels"),
  # It asks where the switch has the names of Flax.
  ("tools.flax_names", "nnx.as_flax.places"),
  # It runs the bench where there is a GPU and no Bazel.
  ("tools.gpu_check", "tools.bench.gpu"),
  # There is one harness that measures.
  ("tools.plan.host", "tools.bench.harness"),
  # Initializers run once, as tests do, and compile as they do.
  ("tools.bench.models", "tools.build_defs.quick_xla"),
  # pip and Bazel refuse the same Pythons, in the same words.
  ("tools.wheel.backend", "tools.build_defs.python_probe"),
}


def module_name(path: pathlib.Path) -> str:
  parts = path.relative_to(ROOT).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, pathlib.Path]:
  return {
    module_name(path): path
    for package in OURS
    for pattern in ("*.py", "*.pyi")
    for path in sorted((ROOT / package).rglob(pattern))
  }


def within(module: str, prefix: str) -> bool:
  return module == prefix or module.startswith(prefix + ".")


def imports(
  module: str, tree: ast.AST, is_package: bool, known: set[str]
) -> set[str]:
  """Absolute names of the modules that `tree` imports."""
  found = set()
  package = module.split(".") if is_package else module.split(".")[:-1]
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      up = package[: len(package) - node.level + 1] if node.level else []
      base = ".".join([*up, *filter(None, [node.module])])
      for alias in node.names:
        name = f"{base}.{alias.name}"
        found.add(name if name in known else base)
  return found


def is_public(module: str, package: str) -> bool:
  parts = module.split(".")
  return (
    parts[0] == package
    and len(parts) <= 2
    and parts[-1] not in ("cache", "common")
    and not parts[-1].startswith("_")
  )


def rule_for(module: str) -> set[str]:
  best = max((prefix for prefix in ALLOWED if within(module, prefix)), key=len)
  if best == "kernels" and module != "kernels":
    best = "kernels.*"
  return ALLOWED[best]


def is_allowed(module: str, imported: str) -> bool:
  """Whether `module` may import `imported`, both by their absolute names."""
  if within(imported, "nnx.bridge") or within(imported, "nnx.kernels"):
    imported = imported.removeprefix("nnx.")
  parts = imported.split(".")
  top = parts[0]
  if top in sys.stdlib_module_names or (module, imported) in EXCEPTIONS:
    return True
  own = ".".join(module.split(".")[:2])
  if within(imported, SWITCH) and module.split(".")[0] not in PROGRAMS:
    return within(module, SWITCH)
  if module.split(".")[0] in PROGRAMS:
    return (
      top not in OURS
      or within(imported, own)
      or is_public(imported, top)
      # Tests and benchmarks share the shapes of an op.
      or (module.startswith("tools.bench.") and parts[-1] == "arg_specs")
      # A suite measures the program that people start from.
      or (within(own, "tools.bench") and within(imported, "examples.llm"))
    )
  for entry in rule_for(module):
    if entry == "self":
      if within(imported, own):
        return True
    elif entry.startswith("public:"):
      if is_public(imported, entry.removeprefix("public:")):
        return True
    elif within(imported, entry):
      return True
  return False


def rank(module: str) -> int | None:
  return next(
    (i for i, prefix in enumerate(ORDER) if within(module, prefix)), None
  )


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
  files = sources()
  return {
    module: imports(
      module,
      ast.parse(path.read_text(encoding="utf-8"), str(path)),
      path.name == "__init__.py",
      set(files),
    )
    for module, path in files.items()
  }


def test_sources_are_found(graph):
  packages = collections.Counter(module.split(".")[0] for module in graph)
  assert packages["nnx"] > 5 and packages["kernels"] > 5, packages


def test_every_import_is_in_the_table(graph):
  wrong = [
    f"{module} must not import {imported}"
    for module, names in graph.items()
    for imported in sorted(names)
    if not is_allowed(module, imported)
  ]
  assert not wrong, "\n".join(wrong)


def test_the_core_is_layered_in_order(graph):
  wrong = [
    f"{module} must not import {imported}, a later layer"
    for module, names in graph.items()
    for imported in sorted(names)
    if None not in (rank(module), rank(imported))
    and rank(imported) > rank(module)
  ]
  assert not wrong, "\n".join(wrong)


def test_compiled_modules_are_known(graph):
  compiled = {m for m in graph if m.split(".")[-1].startswith("_")}
  assert "nnx.engine._engine" in compiled and len(compiled) >= 4, compiled
  assert not any(is_allowed("nnx.engine.pytrees", m) for m in ("nnx", "bridge"))


def test_one_module_a_package_touches_the_private_parts_of_jax(graph):
  users = {
    module
    for module, names in graph.items()
    if any("_src" in name.split(".") for name in names)
  }
  assert users == JAX_PRIVATE


def test_no_import_cycle(graph):
  ours = {
    module: {
      name
      for name in names
      if name in graph
      and not within(module, name)
      and (module, name) not in EXCEPTIONS
    }
    for module, names in graph.items()
  }
  try:
    graphlib.TopologicalSorter(ours).prepare()
  except graphlib.CycleError as error:
    pytest.fail("import cycle: " + " -> ".join(error.args[1]))


@pytest.mark.parametrize(
  "module, imported",
  [
    ("nnx.module", "flax"),
    ("nnx.module", "flax.nnx"),
    ("nnx.module", "nnx.as_flax"),
    ("nnx.module", "bridge.variables"),
    ("nnx.nn.linear", "kernels.common.dispatch"),
    ("nnx.nn.linear", "kernels.kv_cache.api"),
    ("nnx.nn.linear", "nnx.kernels.common"),
    ("nnx.module", "nnx.kernels"),
    ("nnx.graphlib.functional", "optax"),
    ("nnx.nn.linear", "kernels.cache"),
    ("kernels.kv_cache.api", "nnx"),
    ("kernels.kv_cache.api", "kernels.batch_stat.api"),
    ("kernels.decode_attention.api", "kernels.kv_cache"),
    ("kernels.cache.rows", "kernels.kv_cache"),
    ("kernels.kv_cache.api", "flax"),
    ("kernels.common.dispatch", "kernels.kv_cache"),
    ("bridge.to_nnx", "nnx.graphlib.functional"),
    ("bridge.to_nnx", "kernels"),
    ("tools.bench.main", "nnx.graphlib.functional"),
    ("tools.bench.main", "kernels.common.dispatch"),
  ],
)
def test_a_forbidden_import_is_seen(module, imported):
  assert not is_allowed(module, imported)


@pytest.mark.parametrize(
  "module, imported",
  [
    ("nnx.nn.linear", "kernels.kv_cache"),
    ("nnx.nn.linear", "nnx.kernels.kv_cache"),
    ("nnx.nn.linear", "nnx.module"),
    ("nnx.module", "jax.numpy"),
    ("nnx.bridge", "bridge"),
    ("kernels.kv_cache.api", "kernels.kv_cache.reference"),
    ("kernels.kv_cache.api", "kernels.cache.checks"),
    ("kernels.kv_cache.api", "kernels.common.dispatch"),
    ("bridge.to_nnx", "flax.linen"),
    ("nnx.as_flax.linen_names", "flax"),
    ("bridge.to_nnx", "nnx"),
    ("tools.bench.main", "tools.bench.table"),
    ("tools.bench.main", "flax.nnx"),
  ],
)
def test_an_allowed_import_is_seen(module, imported):
  assert is_allowed(module, imported)


@pytest.mark.parametrize("package", ["bridge", "kernels"])
def test_packages_beside_nnx_call_themselves_by_no_name(package):
  """So that they are the same in a wheel, where they are inside of `nnx`."""
  wrong = [
    f"{path}:{node.lineno}"
    for path in sorted((ROOT / package).rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.Import | ast.ImportFrom)
    for name in [getattr(node, "module", None), *(a.name for a in node.names)]
    if not getattr(node, "level", 0) and within(name or "", package)
  ]
  assert not wrong, "write `from . import` instead: " + ", ".join(wrong)


def test_the_map_names_every_module_of_nnx():
  page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  table = page.split("## The modules of `nnx`")[1].split("## ")[0]
  missing = [
    path.name
    for path in sorted((ROOT / "nnx").iterdir())
    if path.name != "__init__.py"
    and (path.suffix == ".py" or any(path.glob("*.py")))
    and f"`{path.stem}`" not in table
    and f"`{path.name}/`" not in table
  ]
  assert not missing


def hidden_modules(package: str, tree: ast.Module, known: set[str]) -> set[str]:
  """Modules of `package` whose names its `__init__` gives to something else."""
  return {
    f"{package}.{name}"
    for node in tree.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    for name in [alias.asname or alias.name]
    if f"{package}.{name}" in known
    and (alias.name != name or (node.module or package) != package)
    and not (node.level == 1 and node.module is None)
  }


def test_no_function_hides_a_module(graph):
  hidden = {
    name
    for package, path in sources().items()
    if path.name == "__init__.py"
    for name in hidden_modules(
      package, ast.parse(path.read_text(encoding="utf-8")), set(graph)
    )
  }
  assert not hidden


def test_a_hidden_module_is_seen():
  tree = ast.parse("from . import b\nfrom p import c\nfrom .d import d\n")
  assert hidden_modules("p", tree, {"p.b", "p.c", "p.d"}) == {"p.d"}


def test_imports_inside_functions_are_seen():
  tree = ast.parse("def f():\n  from flax import nnx\n  import optax as o\n")
  assert imports("nnx.module", tree, False, set()) == {"flax", "optax"}


def test_relative_imports_are_resolved():
  tree = ast.parse("from . import b\nfrom .c import d\nfrom .. import e\n")
  known = {"nnx.graph.b", "nnx.graph.c", "nnx.e"}
  assert imports("nnx.graph.a", tree, False, known) == known
