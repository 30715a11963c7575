#!/usr/bin/env python3
"""Builds, tests and measures the CUDA kernels on a machine with a GPU.

For machines without Bazel and without a network. They need a Python with jax
(and its CUDA plugin), flax, pybind11, pytest, absl-py and hypothesis; g++; and
nvcc, on PATH, under $CUDA_HOME or in /usr/local/cuda. Run it from anywhere:

    python3 tools/gpu_check.py --json results.json

It builds every extension next to its sources, as the BUILD files list them,
for the GPU that is there; runs the op tests with TEST_PLATFORM=gpu, where a
missing device is a failure; and measures the ops beside XLA. One JSON file
holds it all, and is written anew after each step.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from typing import Any
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Those of tools/build_defs/defs.bzl and cuda.bzl.
HOST_FLAGS = (
  "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-I.",
)  # fmt: skip
DEVICE_FLAGS = (
  "-x", "cu", "-std=c++17", "-O3", "-I.",
  "-Xcompiler=-fPIC,-fvisibility=hidden",
)  # fmt: skip
NEEDED = ("absl", "flax", "hypothesis", "jax", "pybind11", "pytest")


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
    return [
      f"{self.package}/{file}"
      for name in names
      for file in self.fields.get(name, ())
      if not file.startswith((":", "//", "@"))
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
    architecture: What nvcc compiles for, as `90`.
    jobs: How many compilers run at a time.
  """

  def __init__(self, folder: pathlib.Path, architecture: str, jobs: int):
    import jax.ffi
    import pybind11

    self._folder = folder
    self._nvcc = find_nvcc()
    self._architecture = architecture
    self._jobs = jobs
    self._cuda = self._nvcc.parent.parent
    includes = (
      jax.ffi.include_dir(),
      pybind11.get_include(),
      sysconfig.get_path("include"),
      str(self._cuda / "include"),
    )
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

  def build(self, targets: dict[str, Target]) -> list[str]:
    """Builds every extension module, next to its sources.

    Args:
      targets: What `read_targets` gives.

    Returns:
      The modules' dotted names.

    Raises:
      RuntimeError: With the compiler's words, if one cannot be built.
    """
    extensions = [
      target
      for target in targets.values()
      if target.kind in ("cuda_extension", "nnx_pybind_extension")
    ]
    sources = {
      target.label: sources_of(targets, target) for target in extensions
    }
    every = {source for listed in sources.values() for source in listed}
    with futures.ThreadPoolExecutor(self._jobs) as pool:
      # The kernels first: they take longest.
      order = sorted(every, key=lambda s: (not s.endswith(".cu.cc"), s))
      for done in [pool.submit(self._compile, source) for source in order]:
        done.result()
    modules = []
    for target in extensions:
      name = f"{target.package}/{target.fields['name']}"
      runtime = (
        self._runtime() if target.kind == "cuda_extension" else ["-pthread"]
      )
      objects = [self._object(source) for source in sources[target.label]]
      # Replaced at once: a process may have the one before open.
      new = self._folder / "new.so"
      self._run(f"{name}.so", ["g++", "-shared", *objects, *runtime, "-o", new])
      shutil.move(new, ROOT / f"{name}.so")
      modules.append(name.replace("/", "."))
    return modules


def versions() -> dict[str, str]:
  """Returns the versions of what takes part."""
  found = {"python": platform.python_version()}
  for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  for name, command in (
    ("nvcc", [find_nvcc(), "--version"]),
    (
      "driver",
      ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
    ),
    ("commit", ["git", "-C", ROOT, "rev-parse", "--short=12", "HEAD"]),
  ):
    try:
      done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
      )
      lines = done.stdout.split("\n")
      release = [line for line in lines if "release" in line]
      found[name] = (release or lines)[0].strip()
    except (OSError, subprocess.CalledProcessError):
      continue
  return found


def test_files(targets: dict[str, Target]) -> list[str]:
  """Returns the files of the op tests that have something to say of GPUs."""
  return [
    file
    for target in targets.values()
    if target.kind == "op_test"
    and "gpu" in target.fields.get("platforms", ("gpu",))
    for file in target.files("srcs")
  ]


def run_tests(
  file: str, shard: int, shards: int, folder: pathlib.Path, seconds: float
) -> dict[str, Any]:
  """Runs a part of one test file on the GPU.

  Args:
    file: From the root.
    shard: Which part.
    shards: Of how many.
    folder: For its reports.
    seconds: After which it is ended.

  Returns:
    How many tests passed, failed and were skipped, and words for the failures.
  """
  stem = f"{file.replace('/', '_')}.{shard}"
  report = folder / f"{stem}.xml"
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cuda,cpu",
    "TEST_PLATFORM": "gpu",
    "REQUIRE_DEVICE": "1",
    "TEST_TOTAL_SHARDS": str(shards),
    "TEST_SHARD_INDEX": str(shard),
    "TEST_SHARD_STATUS_FILE": str(folder / f"{stem}.shard"),
    "XML_OUTPUT_FILE": str(report),
    # Several processes share the GPU.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }
  start = time.perf_counter()
  with (folder / f"{stem}.log").open("w+") as log:
    try:
      status = subprocess.run(
        [sys.executable, "tools/build_defs/pytest_main.py", file],
        cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        timeout=seconds,
      ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
      status = -1
    log.seek(0)
    tail = log.read()[-4000:]
  row: dict[str, Any] = {
    "file": file,
    "shard": shard,
    "status": status,
    "seconds": round(time.perf_counter() - start, 1),
    "passed": 0,
    "failed": 0,
    "skipped": {},
    "failures": {},
  }
  if not report.exists():
    row["failures"]["no report"] = tail
    return row
  for case in ElementTree.parse(report).iter("testcase"):
    name = f"{case.get('classname')}.{case.get('name')}"
    broken = case.find("failure")
    broken = case.find("error") if broken is None else broken
    skipped = case.find("skipped")
    if broken is not None:
      row["failed"] += 1
      row["failures"][name] = (broken.text or "")[-2500:]
    elif skipped is not None:
      why = skipped.get("message") or ""
      row["skipped"][why] = row["skipped"].get(why, 0) + 1
    else:
      row["passed"] += 1
  return row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="gpu_check.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--json", default="gpu_check.json", help="the results")
  parser.add_argument(
    "--only",
    choices=("build", "tests", "bench"),
    action="append",
    help="only these steps (default: all three)",
  )
  parser.add_argument("--architecture", help="as 90 (default: the GPU's)")
  parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
  parser.add_argument(
    "--processes",
    type=int,
    default=max(2, (os.cpu_count() or 2) * 3 // 4),
    help="of tests, on the GPU at a time",
  )
  parser.add_argument("--shards", type=int, default=6, help="of a test file")
  parser.add_argument(
    "--seconds", type=float, default=400, help="that a shard may take"
  )
  parser.add_argument("--filter", default="", help="part of a test file's path")
  parser.add_argument("--bench-filter", default="", help="part of a row's name")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the steps; returns 0 if all is built and passes."""
  options = parse(arguments)
  steps = options.only or ["build", "tests", "bench"]
  if missing := [n for n in NEEDED if importlib.util.find_spec(n) is None]:
    raise SystemExit(
      f"gpu_check.py: `{sys.executable}` must have the packages"
      f" {', '.join(NEEDED)}, but lacks {', '.join(missing)}: install them."
    )
  path = pathlib.Path(options.json)
  results: dict[str, Any] = {"versions": versions()}

  def save() -> None:
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")

  targets = read_targets(ROOT, ("kernels", "nnx", "tests/kernels"))
  failed = False
  with tempfile.TemporaryDirectory(prefix="gpu_check.") as name:
    folder = pathlib.Path(name)
    if "build" in steps:
      architecture = options.architecture or gpu_architecture()
      print(f"Building for sm_{architecture}", flush=True)
      builder = Builder(folder, architecture, options.jobs)
      start = time.perf_counter()
      # The extensions of tests emulate a GPU.
      shipped = {
        label: target
        for label, target in targets.items()
        if not target.package.startswith("tests")
      }
      modules = builder.build(shipped)
      results["build"] = {
        "architecture": architecture,
        "modules": modules,
        "seconds": round(time.perf_counter() - start, 1),
        "each": builder.seconds,
      }
      save()
    if "tests" in steps:
      print("Testing", flush=True)
      files = [f for f in test_files(targets) if options.filter in f]
      results["tests"] = []
      with futures.ThreadPoolExecutor(options.processes) as pool:
        running = [
          pool.submit(
            run_tests, file, shard, options.shards, folder, options.seconds
          )
          for file in files
          for shard in range(options.shards)
        ]
        for done in futures.as_completed(running):
          row = done.result()
          results["tests"].append(row)
          save()
          print(
            f"  {row['seconds']:7.1f} s  {row['file']} {row['shard']}:"
            f" {row['passed']} passed, {row['failed']} failed,"
            f" {sum(row['skipped'].values())} skipped",
            flush=True,
          )
          for test, words in row["failures"].items():
            print(f"FAILED {test}\n{words[-1200:]}", flush=True)
      failed = any(row["status"] or row["failed"] for row in results["tests"])
    if "bench" in steps:
      print("Measuring", flush=True)
      sys.path.insert(0, str(ROOT))
      from tools.bench import gpu

      results["device"] = gpu.device()
      results["bench"] = []
      for record in gpu.run(options.bench_filter):
        results["bench"].append(record)
        save()
        failed = failed or "error" in record
        print(f"  {gpu.text(record)}", flush=True)
  save()
  print(f"wrote {path}")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
