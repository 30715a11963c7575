"""Runs the cases of a fuzzer in worker processes, which may die.

A fuzzer is a module with a dict `FAMILIES` from a name to a function

    def family(rng: np.random.Generator) -> Case

It draws what is slow to change, such as the program to compile, and returns a
Case, a function of a generator as well that draws one case, runs it and raises
if something is wrong. What it draws depends on the two generators alone, so
that a finding is made again from three words: the family, the number of its
program, that of the case.

    python -m tests.fuzz.kernels_update --seconds=60
    python -m tests.fuzz.kernels_update --case=update:17:3

A case that raises, kills its worker or does not end is a finding, and is told
in one line that makes it again. Also in a test, by `run`.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from typing import IO, Any
import zlib

import numpy as np

Case = Callable[[np.random.Generator], None]
Family = Callable[[np.random.Generator], Case]

# Of a program's cases, the one that makes the program itself.
_PROGRAM = -1

# Seconds that a worker may take to begin.
_START = 600.0

# Seconds after which a run says how far it is.
_SILENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """How much a fuzzer does.

  Attributes:
    seconds: When to stop starting programs, or None.
    cases: After how many cases to stop, or None.
    each: Cases of one program.
    first: Number of the first program of each family: other numbers, other
      cases.
    workers: Processes at a time.
    renew: A worker is replaced after so many programs, as what it compiled
      stays.
    patience: Seconds that one case may take.
    only: Names of the families to run, or () for all.
  """

  seconds: float | None = None
  cases: int | None = None
  each: int = 100
  first: int = 0
  workers: int = 1
  renew: int = 40
  patience: float = 300.0
  only: tuple[str, ...] = ()


@dataclasses.dataclass
class Report:
  """What a run came to.

  Attributes:
    cases: Cases by family.
    findings: One text each; its first line makes the finding again.
    seconds: That it took.
  """

  cases: dict[str, int]
  findings: list[str]
  seconds: float

  def __str__(self) -> str:
    total = sum(self.cases.values())
    each = ", ".join(f"{name} {n}" for name, n in sorted(self.cases.items()))
    return (
      f"{total} cases ({each}) in {self.seconds:.0f} s,"
      f" {total / max(self.seconds, 1e-9):.0f} a second:"
      f" {len(self.findings)} findings"
    )


def _generator(*words: Any) -> np.random.Generator:
  text = ":".join(map(str, words))
  return np.random.default_rng(zlib.crc32(text.encode()))


def _one_program(
  families: dict[str, Family],
  name: str,
  program: int,
  numbers: Sequence[int],
  tell: Callable[..., None],
) -> None:
  """Runs cases of one program; tells of each before it starts."""
  number = _PROGRAM
  try:
    tell(at=number)
    case = families[name](_generator(name, program))
    for number in numbers:
      tell(at=number)
      case(_generator(name, program, number))
  except Exception:
    # The rest of the program's cases would most likely say the same.
    tell(finding=traceback.format_exc())
  tell(done=True)


def _serve() -> None:
  """What a worker does: programs from its input until that ends."""
  module, told = sys.argv[1], os.fdopen(int(sys.argv[2]), "w", buffering=1)
  families = importlib.import_module(module).FAMILIES
  # Cases call the collector, which need not look at what is imported.
  gc.freeze()

  def tell(**what: Any) -> None:
    told.write(json.dumps(what) + "\n")

  for line in sys.stdin:
    name, program, each = json.loads(line)
    _one_program(families, name, program, range(each), tell)


class _Worker:
  """A process that runs programs, and what it said of the one it is at."""

  def __init__(self, module: str):
    self.programs = 0
    self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")
    read, write = os.pipe()
    environment = os.environ | {
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
      "PYTHONFAULTHANDLER": "1",
      "OPENBLAS_NUM_THREADS": "1",
    }
    environment.setdefault("JAX_PLATFORMS", "cpu")
    code = "from tests.fuzz import worker; worker._serve()"
    self._process = subprocess.Popen(
      [sys.executable, "-c", code, module, str(write)],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=self._errors,
      stderr=self._errors,
      pass_fds=(write,),
      text=True,
    )
    os.close(write)
    self._lines: queue.Queue[str | None] = queue.Queue()
    self._reader = threading.Thread(
      target=self._read, args=(os.fdopen(read),), daemon=True
    )
    self._reader.start()

  def _read(self, told: IO[str]) -> None:
    with told:
      for line in told:
        self._lines.put(line)
    self._lines.put(None)

  def run(
    self, name: str, program: int, plan: Plan
  ) -> tuple[int, tuple[int, str] | None]:
    """Returns how many cases ran, and the number and words of a finding."""
    self.programs += 1
    at = _PROGRAM
    assert self._process.stdin is not None
    try:
      self._process.stdin.write(json.dumps([name, program, plan.each]) + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # it died: its own words follow
    # A new worker imports the fuzzer first, and what that needs.
    patience = _START
    while True:
      try:
        line = self._lines.get(timeout=patience)
      except queue.Empty:
        self._process.kill()
        self._process.wait()
        words = f"did not end within {plan.patience:.0f} s"
        return at + 1, (at, f"{words}\n{self.errors()}")
      if line is None:
        self._process.wait()
        return at + 1, (at, f"{self._end()}\n{self.errors()}")
      what = json.loads(line)
      patience = plan.patience
      if "at" in what:
        at = what["at"]
      elif "finding" in what:
        self._lines.get(timeout=_START)  # that it is done
        return at + 1, (at, what["finding"])
      else:
        return at + 1, None

  def _end(self) -> str:
    code = self._process.returncode
    if code < 0:
      return f"the worker died of {signal.Signals(-code).name}"
    return f"the worker ended with status {code}"

  @property
  def alive(self) -> bool:
    return self._process.poll() is None

  def errors(self) -> str:
    """Returns the end of what the process wrote."""
    self._errors.seek(0)
    return self._errors.read()[-6000:]

  def stop(self) -> None:
    """Ends the process, and gives back what it held."""
    self._process.kill()
    self._process.communicate()
    self._reader.join()
    self._errors.close()


def _programs(
  names: Sequence[str], plan: Plan
) -> Iterator[tuple[str, int, Plan]]:
  """Yields programs, the families in turn, until the plan is fulfilled."""
  start, number, cases = time.monotonic(), plan.first, 0
  while True:
    for name in names:
      if plan.cases is not None and cases >= plan.cases:
        return
      if plan.seconds is not None and time.monotonic() - start >= plan.seconds:
        return
      each = plan.each
      if plan.cases is not None:
        each = min(each, plan.cases - cases)
      cases += each
      yield name, number, dataclasses.replace(plan, each=each)
    number += 1


def _print(text: str) -> None:
  print(text, flush=True)


def run(
  module: str, plan: Plan, tell: Callable[[str], None] = _print
) -> Report:
  """Runs a fuzzer.

  Args:
    module: Dotted name of the module with its `FAMILIES`.
    plan: How much to do.
    tell: Is told each finding when it is made, and at times how far it is.

  Returns:
    What it came to.
  """
  families = importlib.import_module(module).FAMILIES
  names = [name for name in families if not plan.only or name in plan.only]
  report = Report(dict.fromkeys(names, 0), [], 0.0)
  start = told = time.monotonic()
  todo, lock = _programs(names, plan), threading.Lock()

  def work() -> None:
    nonlocal told
    worker = None
    while True:
      with lock:
        item = next(todo, None)
      if item is None:
        break
      if worker is None or not worker.alive or worker.programs >= plan.renew:
        if worker is not None:
          worker.stop()
        worker = _Worker(module)
      name, program, part = item
      count, finding = worker.run(name, program, part)
      with lock:
        report.cases[name] += count
        if finding is not None:
          number, words = finding
          again = f"python -m {module} --case={name}:{program}:{number}"
          report.findings.append(f"{again}\n{words}")
          tell(report.findings[-1])
        report.seconds = time.monotonic() - start
        if time.monotonic() - told >= _SILENCE:
          told = time.monotonic()
          tell(f"so far {report}")
    if worker is not None:
      worker.stop()

  threads = [threading.Thread(target=work) for _ in range(plan.workers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  report.seconds = time.monotonic() - start
  return report


def check(module: str, plan: Plan) -> None:
  """Runs a fuzzer as a test; raises AssertionError for a finding."""
  report = run(module, plan, tell=lambda text: None)
  assert not report.findings, "\n".join([str(report), *report.findings])
  assert all(report.cases.values()), str(report)


def main(module: str) -> int:
  """Runs a fuzzer as its command line asks; returns the exit status.

  Args:
    module: Dotted name of the module with its `FAMILIES`.
  """
  parser = argparse.ArgumentParser(prog=f"python -m {module}")
  parser.add_argument(
    "--seconds", type=float, help="when to stop; 120, if --cases is not given"
  )
  parser.add_argument("--hours", type=float, help="the same, in hours")
  parser.add_argument("--cases", type=int, help="how many cases to run")
  parser.add_argument("--each", type=int, default=100, help="of each program")
  parser.add_argument("--first", type=int, default=0, help="the first program")
  parser.add_argument("--workers", type=int, default=1, help="processes")
  parser.add_argument(
    "--only", default="", help="families, with commas between"
  )
  parser.add_argument("--case", help="family:program:case, to run it alone")
  flags = parser.parse_args()
  if flags.case:
    name, program, number = flags.case.rsplit(":", 2)
    numbers = [] if int(number) == _PROGRAM else [int(number)]
    found = []

    def tell(finding: str | None = None, **_: Any) -> None:
      if finding is not None:
        found.append(finding)
        print(finding)

    families = importlib.import_module(module).FAMILIES
    _one_program(families, name, int(program), numbers, tell)
    return 1 if found else 0
  seconds = flags.hours * 3600 if flags.hours else flags.seconds
  if seconds is None and flags.cases is None:
    seconds = 120.0
  report = run(
    module,
    Plan(
      seconds=seconds,
      cases=flags.cases,
      each=flags.each,
      first=flags.first,
      workers=flags.workers,
      only=tuple(filter(None, flags.only.split(","))),
    ),
  )
  print(report)
  return 1 if report.findings else 0
