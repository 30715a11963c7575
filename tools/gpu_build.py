"""Builds the extension modules straight from the sources, without Bazel.

What an extension is made of is read from the BUILD files. For gpu_check.py, and
for pip, which wants the extensions for the CPU alone: see wheel/backend.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sysconfig
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Those of tools/build_defs/defs.bzl and cuda.bzl.
HOST_FLAGS = (
  "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-I.",
)  # fmt: skip
DEVICE_FLAGS = (
  "-x", "cu", "-std=c++17", "-O3", "-I.",
  "-Xcompiler=-fPIC,-fvisibility=hidden",
)  # fmt: skip


@dataclasses.dataclass
class Target:
  """A rule of a BUILD file.

  Attributes:
    kind: Name of the rule.
    package: Its folder.
    fields: Its attributes.
  """

  kind: str
  package: str
  fields: dict[str, Any]

  @property
  def label(self) -> str:
    return f"//{self.package}:{self.fields['name']}"

  def files(self, *names: str) -> list[str]:
    """Returns the files that these attributes list, from the root."""
    files = [file for name in names for file in self.fields.get(name, ())]
    return [
      # Of another package: `//nnx/engine/cc:graph_module.cc`.
      file[2:].replace(":", "/") if "/" in file else f"{self.package}/{file}"
      for file in files
      if not file.startswith((":", "@"))
    ]


class _Rules(dict):
  """Names of a BUILD file: a rule that is called is a rule that is noted."""

  def __init__(self, package: str, note: Callable[[Target], None]):
    super().__init__()
    self._package = package
    self._note = note

  def __missing__(self, kind: str) -> Callable[..., None]:
    def rule(*args: Any, **fields: Any) -> None:
      if "name" in fields:
        self._note(Target(kind, self._package, fields))

    return rule


def read_targets(
  root: pathlib.Path, folders: Sequence[str]
) -> dict[str, Target]:
  """Reads the BUILD files, which are Python enough, of some folders.

  Args:
    root: Of the workspace.
    folders: Below which to look.

  Returns:
    Targets by label, `//package:name`.
  """
  targets: dict[str, Target] = {}

  def note(target: Target) -> None:
    targets[target.label] = target

  for folder in folders:
    for path in sorted((root / folder).rglob("BUILD")):
      package = path.parent.relative_to(root).as_posix()
      code = compile(path.read_text(), str(path), "exec")
      exec(code, _Rules(package, note))
  return targets


def sources_of(targets: dict[str, Target], target: Target) -> list[str]:
  """Returns the `.cc` files that make an extension, those of its deps too."""
  found: dict[str, None] = {}
  seen = set()

  def visit(target: Target) -> None:
    if target.label in seen:
      return
    seen.add(target.label)
    for file in target.files("srcs", "kernels"):
      if file.endswith(".cc"):
        found[file] = None
    for dep in target.fields.get("deps", ()):
      label = f"//{target.package}{dep}" if dep.startswith(":") else dep
      if label.startswith("//") and ":" not in label:
        label = f"{label}:{label.rsplit('/', 1)[-1]}"
      if label in targets:
        visit(targets[label])

  visit(target)
  return list(found)


def find_nvcc() -> pathlib.Path:
  """Returns nvcc's path.

  Raises:
    SystemExit: If there is none.
  """
  folders = [
    os.environ.get(name, "") for name in ("NNX_CUDA", "CUDA_HOME", "CUDA_PATH")
  ]
  for folder in [*filter(None, folders), "/usr/local/cuda"]:
    if (nvcc := pathlib.Path(folder, "bin", "nvcc")).exists():
      return nvcc
  if found := shutil.which("nvcc"):
    return pathlib.Path(found).resolve()
  raise SystemExit(
    "gpu_check.py: nvcc must be on PATH, under $CUDA_HOME or in"
    " /usr/local/cuda, but is not: install the CUDA toolkit."
  )


def gpu_architecture() -> str:
  """Returns the compute capability of the first GPU, as nvcc spells it.

  Raises:
    SystemExit: If nvidia-smi finds none.
  """
  command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
  try:
    found = subprocess.run(command, capture_output=True, text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    raise SystemExit(
      "gpu_check.py: nvidia-smi must find a GPU, but does not: name what to"
      " build for, as --architecture=90, and stop there with --only=build."
    ) from None
  return found.stdout.split()[0].replace(".", "")


class Builder:
  """Compiles extensions, each source once.

  Args:
    folder: For the objects.
    architecture: What nvcc compiles for, as `90`; None, and nothing is built
      for a GPU.
    jobs: How many compilers run at a time.
    out: Where the modules go, each into its folder; by default beside the
      sources.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    architecture: str | None,
    jobs: int,
    out: pathlib.Path | None = None,
  ):
    import jax.ffi
    import pybind11

    self._folder = folder
    self._architecture = architecture
    self._jobs = jobs
    self._out = out or ROOT
    includes = [
      jax.ffi.include_dir(),
      pybind11.get_include(),
      sysconfig.get_path("include"),
    ]
    if architecture is not None:
      self._nvcc = find_nvcc()
      self._cuda = self._nvcc.parent.parent
      includes.append(str(self._cuda / "include"))
    self._includes = [part for path in includes for part in ("-isystem", path)]
    self.seconds: dict[str, float] = {}

  def _run(self, name: str, command: Sequence[Any]) -> None:
    start = time.perf_counter()
    done = subprocess.run(
      list(map(str, command)), cwd=ROOT, capture_output=True, text=True
    )
    self.seconds[name] = round(time.perf_counter() - start, 2)
    if done.returncode:
      raise RuntimeError(f"{name} could not be built:\n{done.stderr[-8000:]}")
    print(f"  {self.seconds[name]:7.1f} s  {name}", flush=True)

  def _compile(self, source: str) -> None:
    out = self._object(source)
    if source.endswith(".cu.cc"):
      number = self._architecture
      code = f"-gencode=arch=compute_{number},code=sm_{number}"
      command = [self._nvcc, *DEVICE_FLAGS, code, "-c", source, "-o", out]
    else:
      command = ["g++", *HOST_FLAGS, *self._includes, "-c", source, "-o", out]
    self._run(source, command)

  def _object(self, source: str) -> pathlib.Path:
    return self._folder / (source.replace("/", "_") + ".o")

  def _runtime(self) -> list[str]:
    """Returns what to link with that is CUDA's."""
    for name in ("lib64", "lib", "targets/x86_64-linux/lib"):
      if (path := self._cuda / name / "libcudart_static.a").exists():
        return [str(path), "-ldl", "-lpthread", "-lrt"]
    raise SystemExit(
      f"gpu_check.py: {self._cuda} must hold libcudart_static.a, but does not:"
      " install the whole CUDA toolkit."
    )

  def build(
    self, targets: dict[str, Target]
  ) -> tuple[list[str], dict[str, str]]:
    """Builds every extension module.

    Args:
      targets: What `read_targets` gives.

    Returns:
      The modules' dotted names; and of those that could not be built, the
      compiler's words by their names. An older build of such a one is removed.
    """
    extensions = [
      target
      for target in targets.values()
      if target.kind == "nnx_pybind_extension"
      or (target.kind == "cuda_extension" and self._architecture is not None)
    ]
    sources = {
      target.label: sources_of(targets, target) for target in extensions
    }
    every = {source for listed in sources.values() for source in listed}
    # The kernels first: they take longest.
    order = sorted(every, key=lambda s: (not s.endswith(".cu.cc"), s))
    with futures.ThreadPoolExecutor(self._jobs) as pool:
      compiled = {s: pool.submit(self._compile, s) for s in order}
      linked = {
        target.label: pool.submit(
          self._link, target, {s: compiled[s] for s in sources[target.label]}
        )
        for target in extensions
      }
    modules, failures = [], {}
    for target in extensions:
      name = _path_of(target).replace("/", ".")
      error = linked[target.label].exception()
      if error is None:
        modules.append(name)
      else:
        failures[name] = str(error)
        (self._out / f"{_path_of(target)}.so").unlink(missing_ok=True)
    return modules, failures

  def _link(
    self, target: Target, objects: dict[str, futures.Future[None]]
  ) -> None:
    """Links a module once its objects are there, which were begun before."""
    for compiled in objects.values():
      compiled.result()
    path = _path_of(target)
    runtime = (
      self._runtime() if target.kind == "cuda_extension" else ["-pthread"]
    )
    new = self._folder / (path.replace("/", "_") + ".so")
    files = [self._object(source) for source in objects]
    self._run(f"{path}.so", ["g++", "-shared", *files, *runtime, "-o", new])
    # Replaced at once: a process may have the one before open.
    module = self._out / f"{path}.so"
    module.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(new, f"{module}.new")
    os.replace(f"{module}.new", module)


def _path_of(target: Target) -> str:
  return f"{target.package}/{target.fields['name']}"
