"""The suites of the benchmark, by name."""

from collections.abc import Sequence
import importlib

from tools.bench import harness

NAMES = (
  "batch_stat",
  "kv_cache",
  "decode",
  "matmul",
  "graph",
  "train_step",
  "bridge",
  "layers",
  "generate",
  "train",
)
# Those of configurations of their own, whose packages other runs do not have.
CONFIGURED = ("ecosystem", "llm")


def cases(name: str, settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows of one suite.

  The module is imported only when asked for, so that a run of one suite does
  not pay for the libraries of another.

  Args:
    name: one of `NAMES` or `CONFIGURED`.
    settings: decides between small and full shapes.
  """
  return importlib.import_module(f"tools.bench.{name}").cases(settings)
