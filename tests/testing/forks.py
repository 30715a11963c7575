"""Programs that each start fresh, but for what all of them import.

To import jax and nnx takes longer than most programs. So one process imports,
and each program runs in a fork of it, from which it exits as usual:

    with forks.Process(["jax"]) as process:
      done = process.run("import jax; print(jax.__version__)")
"""

from collections.abc import Sequence
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Self

# A fork takes along one thread alone.
_PROGRAM = """
import gc, importlib, json, os, sys
for name in sys.argv[1:]:
  importlib.import_module(name)
assert len(os.listdir("/proc/self/task")) == 1, "an import started threads"
gc.freeze()  # a collection in a fork would copy all of it
for line in sys.stdin:
  code, *files = json.loads(line)
  if not os.fork():
    for number, file in enumerate(files, start=1):
      os.dup2(os.open(file, os.O_WRONLY), number)
    exec(code)
    break
  print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


class Process:
  """A process that has imported modules and is forked for each program.

  Args:
    modules: Their names; they must not start threads.
    options: Of Python's command line.
    environment: What differs from this process's.
  """

  def __init__(
    self,
    modules: Sequence[str],
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
  ):
    path = os.pathsep.join(path for path in sys.path if path)
    self._folder = tempfile.TemporaryDirectory()
    self._out, self._err, self._own = (
      pathlib.Path(self._folder.name, name) for name in ("out", "err", "own")
    )
    with self._own.open("w") as own:
      self._process = subprocess.Popen(
        [sys.executable, *options, "-c", _PROGRAM, *modules],
        env=os.environ
        | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        | (environment or {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=own,
        text=True,
      )

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self._process.communicate()
    self._folder.cleanup()

  def run(self, code: str) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end."""
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin is not None and stdout is not None
    for file in (self._out, self._err):
      file.write_text("")
    print(json.dumps([code, str(self._out), str(self._err)]), file=stdin)
    stdin.flush()
    status = stdout.readline()
    assert status, f"the process that forks died: {self._own.read_text()}"
    return subprocess.CompletedProcess(
      code, int(status), self._out.read_text(), self._err.read_text()
    )
