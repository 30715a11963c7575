"""The fuzzer of the kernels; `worker` says how to run it."""

import sys

from tests.fuzz import kernels_attention, kernels_cache, worker

FAMILIES: dict[str, worker.Family] = {
  **kernels_attention.FAMILIES,
  **kernels_cache.FAMILIES,
}

if __name__ == "__main__":
  sys.exit(worker.main("tests.fuzz.kernels_fuzz"))
