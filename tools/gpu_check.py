#!/usr/bin/env python3
"""Builds, tests and measures the CUDA kernels on a machine with a GPU.

For machines without Bazel and without a network. They need a Python with jax
(and its CUDA plugin), flax, pybind11, pytest, absl-py and hypothesis; g++; and
nvcc, on PATH, under $CUDA_HOME or in /usr/local/cuda. Run it from anywhere:

    python3 tools/gpu_check.py --json results.json

It builds every extension next to its sources, as the BUILD files list them,
for the GPU that is there; runs the op tests with TEST_PLATFORM=gpu, where a
missing device is a failure; and measures the ops beside XLA. One JSON file
holds it all, and is written anew after each result.

Each step does without the others (`--only`). Tests and bench begin nothing more
after `--limit` seconds; `--resume` does what the JSON file has no result of. So
where a command may take ten minutes:

    python3 tools/gpu_check.py --only build
    python3 tools/gpu_check.py --only tests  # again with --resume, if need be
    python3 tools/gpu_check.py --only bench

`--rehearse` does all of it on the CPU, with the CPU's kernels and tiny arrays:
it measures nothing, and shows that nothing is missing before there is a GPU.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent import futures
import hashlib
import importlib.util
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import Any
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools import gpu_build  # noqa: E402
from tools import versions as versions_lib  # noqa: E402

STEPS = ("build", "tests", "bench")
# Failures of a shard that are told at length: in the results, on the screen.
_TOLD = 20
_SHOWN = 3
NEEDED = ("absl", "flax", "hypothesis", "jax", "pybind11", "pytest")


def _first_line(command: Sequence[Any], word: str = "") -> str | None:
  """Returns the first line with `word` that a command writes, if it runs."""
  try:
    done = subprocess.run(
      list(map(str, command)), capture_output=True, text=True, check=True
    )
  except (OSError, subprocess.CalledProcessError):
    return None
  return next((x.strip() for x in done.stdout.split("\n") if word in x), None)


def versions() -> dict[str, str]:
  """Returns the versions of what takes part, and a digest of the sources."""
  found = versions_lib.installed(
    ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch")
  )
  found["commit"] = versions_lib.commit()
  driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
  if line := _first_line(driver):
    found["driver"] = line
  digest = hashlib.sha256()
  for folder in ("kernels", "nnx", "tests", "tools"):
    for path in sorted((ROOT / folder).rglob("*")):
      if path.name == "BUILD" or path.suffix in (".py", ".cc", ".h", ".inc"):
        digest.update(path.read_bytes())
  return found | {"sources": digest.hexdigest()[:16]}


def test_files(targets: dict[str, gpu_build.Target]) -> list[str]:
  """Returns the files of the op tests that have something to say of GPUs."""
  return [
    file
    for target in targets.values()
    if target.kind == "op_test"
    and "gpu" in target.fields.get("platforms", ("gpu",))
    for file in target.files("srcs")
  ]


def environment(rehearse: bool) -> dict[str, str]:
  """Returns the environment of the processes that use the device."""
  return {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu" if rehearse else "cuda,cpu",
    "TEST_PLATFORM": "cpu" if rehearse else "gpu",
    "REQUIRE_DEVICE": "1",
  }


def run_tests(
  file: str,
  shard: int,
  shards: int,
  folder: pathlib.Path,
  seconds: float,
  rehearse: bool = False,
) -> dict[str, Any]:
  """Runs a part of one test file.

  Args:
    file: From the root.
    shard: Which part.
    shards: Of how many.
    folder: For its reports.
    seconds: After which it is ended.
    rehearse: Whether on the CPU.

  Returns:
    How many tests passed, failed and were skipped, words for the failures, and
    pytest's exit status, None if it was ended.
  """
  stem = f"{file.replace('/', '_')}.{shard}"
  report = folder / f"{stem}.xml"
  variables = environment(rehearse) | {
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
        cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT,
        timeout=seconds,
      ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
      status = None
    log.seek(0)
    tail = log.read()[-4000:]
  row: dict[str, Any] = {
    "file": file,
    "shard": f"{shard} of {shards}",
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
      few = row["failed"] <= _TOLD
      words = (broken.text if few else broken.get("message")) or ""
      row["failures"][name] = words[-2500:] if few else words[:200]
    elif skipped is not None:
      why = skipped.get("message") or ""
      row["skipped"][why] = row["skipped"].get(why, 0) + 1
    else:
      row["passed"] += 1
  return row


def run_rows(
  names: Sequence[str], command: Sequence[str], rehearse: bool, seconds: float
) -> Iterator[dict[str, Any]]:
  """Runs a program that measures rows; yields what it writes, a dict a line.

  Args:
    names: Of the rows, in order: arguments of the program, which writes a
      dict of its own before their records, and may die at any time.
    command: The program.
    rehearse: Whether on the CPU.
    seconds: After which a row is given up.
  """
  left = list(names)
  while left:
    with (
      tempfile.TemporaryFile("w+") as errors,
      subprocess.Popen(
        [*command, *left], cwd=ROOT, env=environment(rehearse),
        stdout=subprocess.PIPE, stderr=errors, text=True,
      ) as process,
    ):  # fmt: skip
      assert process.stdout is not None
      lines: queue.Queue[str | None] = queue.Queue()

      def read(stream=process.stdout, lines=lines):
        for line in stream:
          if line.startswith("{"):
            lines.put(line)
        lines.put(None)

      threading.Thread(target=read, daemon=True).start()
      greeted = False
      try:
        while left:
          why = "its process ended"
          try:
            line = lines.get(timeout=seconds)
          except queue.Empty:
            line, why = None, f"no result after {seconds:g} s"
          if line is None:
            process.kill()
            errors.seek(0)
            words = f"{why}:\n{errors.read()[-3000:]}"
            if not greeted:
              raise RuntimeError(f"No row could be measured: {words}")
            yield {"row": left.pop(0), "error": words}
            break
          record = json.loads(line)
          greeted = True
          if "row" in record:
            left.remove(record["row"])
          yield record
          if "error" in record:
            break  # the program ends
      finally:
        process.kill()


class Check:
  """The steps, and the results that they share.

  Args:
    options: Of the command line.
  """

  def __init__(self, options: argparse.Namespace):
    self._options = options
    self._path = pathlib.Path(options.json)
    self._targets = gpu_build.read_targets(
      ROOT, ("kernels", "nnx", "tests/kernels", "tests/testing", "tests/tools")
    )
    self.results = self._read()

  def _read(self) -> dict[str, Any]:
    """Returns what other steps have found, if it is about the same sources."""
    now: dict[str, Any] = {"versions": versions()}
    if self._options.rehearse:
      now["rehearsal"] = "on the CPU: no result of this file is a GPU's"
    if self._path.exists():
      before = json.loads(self._path.read_text())
      if all(before.get(key) == now.get(key) for key in (*now, "rehearsal")):
        return before
      old = self._path.with_name(self._path.name + ".old")
      os.replace(self._path, old)
      print(f"{self._path} was about other sources or versions: now {old}")
    return now

  def _save(self) -> None:
    text = json.dumps(self.results, indent=1, sort_keys=True) + "\n"
    new = self._path.with_name(self._path.name + ".new")
    new.write_text(text)
    os.replace(new, self._path)  # whole at any time

  def run(self, step: str) -> bool:
    """Does one step, and says whether all went well in it."""
    self.results.setdefault("errors", {}).pop(step, None)
    self._end = time.monotonic() + self._options.limit
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
      try:
        good = getattr(self, f"_{step}")(pathlib.Path(folder))
      except (Exception, SystemExit):
        # What comes after does what it can.
        words = traceback.format_exc()[-4000:]
        self.results["errors"][step] = words
        print(f"FAILED {step}\n{words}", flush=True)
        good = False
    self._save()
    return good

  def _left(self) -> float:
    """Returns the seconds that the step may still take."""
    return self._end - time.monotonic()

  def _build(self, folder: pathlib.Path) -> bool:
    options = self._options
    architecture = options.architecture or gpu_build.gpu_architecture()
    print(f"Building for sm_{architecture}", flush=True)
    builder = gpu_build.Builder(folder, architecture, options.jobs)
    start = time.perf_counter()
    # The extensions of tests emulate a GPU.
    shipped = {
      label: target
      for label, target in self._targets.items()
      if not target.package.startswith("tests")
    }
    modules, failures = builder.build(shipped)
    self.results["build"] = {
      "architecture": architecture,
      "nvcc": _first_line([gpu_build.find_nvcc(), "--version"], "release"),
      "modules": modules,
      "failures": failures,
      "seconds": round(time.perf_counter() - start, 1),
      "each": builder.seconds,
    }
    for module, words in failures.items():
      print(f"FAILED {module}\n{words}", flush=True)
    return not failures

  def _tests(self, folder: pathlib.Path) -> bool:
    options = self._options
    print("Testing", flush=True)
    files = [x for x in test_files(self._targets) if options.filter in x]
    if not files:
      raise SystemExit(
        "gpu_check.py: `--filter` must be a part of a test file's path, but no"
        f" path has `{options.filter}`."
      )
    before = self.results.get("tests", []) if options.resume else []
    rows = [row for row in before if not row.get("cut_off")]
    self.results["tests"] = rows
    had = {(row["file"], row["shard"]) for row in rows}

    def run(file: str, shard: int) -> dict[str, Any] | None:
      seconds = min(options.seconds, self._left())
      if seconds <= 0:
        return None
      row = run_tests(
        file, shard, options.shards, folder, seconds, options.rehearse
      )
      # By the limit of the step, not its own: no result.
      row["cut_off"] = row["status"] is None and seconds < options.seconds
      return row

    late = 0
    with futures.ThreadPoolExecutor(options.processes) as pool:
      running = [
        pool.submit(run, file, shard)
        for file in files
        for shard in range(options.shards)
        if (file, f"{shard} of {options.shards}") not in had
      ]
      for done in futures.as_completed(running):
        row = done.result()
        if row is None:
          late += 1
          continue
        late += row["cut_off"]
        rows.append(row)
        self._save()
        print(
          f"  {row['seconds']:7.1f} s  {row['file']} {row['shard']}:"
          f" {row['passed']} passed, {row['failed']} failed,"
          f" {sum(row['skipped'].values())} skipped",
          flush=True,
        )
        for test, words in list(row["failures"].items())[:_SHOWN]:
          print(f"FAILED {test}\n{words[-1200:]}", flush=True)
    if late:
      self._put_off(f"{late} shards of tests")
    return not late and not any(row["status"] != 0 for row in rows)

  def _bench(self, folder: pathlib.Path) -> bool:
    del folder
    from tools.bench import gpu

    options = self._options
    print("Measuring", flush=True)
    before = self.results.get("bench", []) if options.resume else []
    rows = list(before)
    self.results["bench"] = rows
    had = {row["row"] for row in rows}
    chosen = [x.name for x in gpu.rows() if options.bench_filter in x.name]
    if not chosen:
      raise SystemExit(
        "gpu_check.py: `--bench-filter` must be a part of a row's name, but no"
        f" name has `{options.bench_filter}`."
      )
    names = [name for name in chosen if name not in had]
    command = [sys.executable, "-m", "tools.bench.gpu"]
    if options.rehearse:
      command.append("--tiny")
    done = 0
    for record in run_rows(names, command, options.rehearse, options.seconds):
      if "row" not in record:
        self.results |= record
        continue
      done += 1
      rows.append(record)
      self._save()
      print(f"  {gpu.text(record)}", flush=True)
      if self._left() <= 0 and done < len(names):
        self._put_off(f"{len(names) - done} rows")
        return False
    return not any("error" in row for row in rows)

  def _put_off(self, what: str) -> None:
    print(
      f"{what} have not begun after {self._options.limit:g} s: --resume does"
      " them.",
      flush=True,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="gpu_check.py",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--json", default="gpu_check.json", help="the results")
  parser.add_argument(
    "--only",
    choices=STEPS,
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
    "--seconds",
    type=float,
    default=400,
    help="that a shard or a row may take (default: %(default)s)",
  )
  parser.add_argument(
    "--limit",
    type=float,
    default=540,
    help="seconds after which a step begins no more (default: %(default)s)",
  )
  parser.add_argument(
    "--resume",
    action="store_true",
    help="only what has no result in the JSON file",
  )
  parser.add_argument(
    "--rehearse", action="store_true", help="on the CPU, without a GPU"
  )
  parser.add_argument("--filter", default="", help="part of a test file's path")
  parser.add_argument("--bench-filter", default="", help="part of a row's name")
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the steps; returns 0 if all is built and passes."""
  options = parse(arguments)
  if options.rehearse:
    options.architecture = options.architecture or "90"
  if missing := [n for n in NEEDED if importlib.util.find_spec(n) is None]:
    raise SystemExit(
      f"gpu_check.py: `{sys.executable}` must have the packages"
      f" {', '.join(NEEDED)}, but lacks {', '.join(missing)}: install them."
    )
  check = Check(options)
  good = [check.run(step) for step in options.only or STEPS]
  print(f"wrote {options.json}")
  return 0 if all(good) else 1


if __name__ == "__main__":
  sys.exit(main())
