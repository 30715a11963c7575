"""The fuzzer of the kernels; `worker` says how to run it."""

import sys

from tests.fuzz import (
  kernels_artifacts,
  kernels_attention,
  kernels_cache,
  kernels_matmul,
  kernels_statistics,
  kernels_wrong,
  worker,
)
from tools.build_defs import quick_xla

FAMILIES: dict[str, worker.Family] = {
  **kernels_artifacts.FAMILIES,
  **kernels_attention.FAMILIES,
  **kernels_cache.FAMILIES,
  **kernels_matmul.FAMILIES,
  **kernels_statistics.FAMILIES,
  **kernels_wrong.FAMILIES,
}

if __name__ == "__main__":
  quick_xla.use()  # most of the time would be XLA's
  sys.exit(worker.main("tests.fuzz.kernels_fuzz"))
