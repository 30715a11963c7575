"""Describes the machine and the libraries that a record was measured with."""

import os
import pathlib
import platform

import jax

from tools import versions as versions_lib


def device_description() -> str:
  """Returns platform and model of the first device, and the cores in use."""
  device = jax.devices()[0]
  kind = device.device_kind
  if device.platform == "cpu":
    kind = _processor_name()
    cores = len(os.sched_getaffinity(0))
    return f"cpu: {kind}, {cores} cores"
  return f"{device.platform}: {kind}"


def _processor_name() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    lines = []
  for line in lines:
    key, _, value = line.partition(":")
    if key.strip() == "model name":
      return value.strip()
  return platform.machine()


def workspace_directory() -> str | None:
  """Returns the source tree: under `bazel run` Bazel names it."""
  return os.environ.get("BUILD_WORKSPACE_DIRECTORY")


def invocation_directory() -> pathlib.Path:
  """Returns the directory that relative file arguments are meant for."""
  return pathlib.Path(os.environ.get("BUILD_WORKING_DIRECTORY", "."))


def versions() -> dict[str, str]:
  """Returns the versions of Python, of the libraries, and the commit."""
  packages = ("jax", "jaxlib", "flax", "numpy", "torch")
  return versions_lib.installed(packages) | {"commit": versions_lib.commit()}
