"""What docs/performance.md says of large pages, in processes of their own."""

import os
import pathlib
import subprocess
import sys

import pytest

SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import jax
x = jax.block_until_ready(jax.numpy.ones(2**24))
with open("/proc/self/smaps_rollup") as file:
  sizes = dict(line.split()[:2] for line in file.readlines()[1:])
print(sizes["AnonHugePages:"])
"""
ARRAY_KIB = 2**16


def large_pages(**environment: str) -> int:
  """Returns how many KiB of large pages the program has."""
  result = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env=os.environ | environment,
    capture_output=True,
    text=True,
    check=True,
  )
  return int(result.stdout)


def setting() -> str:
  """Returns who gets large pages: `always`, `madvise` or `never`."""
  if not SETTING.exists():
    return "never"
  return SETTING.read_text().partition("[")[2].partition("]")[0]


@pytest.mark.skipif(
  setting() != "madvise", reason="this system gives all or none large pages"
)
def test_arrays_lie_in_large_pages_where_the_c_library_asks_for_them():
  assert large_pages(GLIBC_TUNABLES="") < ARRAY_KIB / 4
  asked = large_pages(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
  assert asked > ARRAY_KIB * 3 / 4
