"""Tests that source distributions bundle pass on `nnx` where they do on Flax.

What fails on `nnx` alone is in bundled_differences.txt, with the reason, and
nothing else is.
"""

import importlib.metadata
import os
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

import pytest

if importlib.metadata.version("flax") != "0.12.8":
  pytest.skip(
    "bundled_differences.txt is of flax 0.12.8, the newest for Python 3.11",
    allow_module_level=True,
  )

DIFFERENCES = pathlib.Path("tests/ecosystem/bundled_differences.txt")
# Unpacked source distributions by name.
SOURCES = {
  path.name: path for path in map(pathlib.Path, os.environ["SOURCES"].split())
}
# Their tests of NNX, which patterns name.
BUNDLED = {
  "bijx-1.3.2": [
    "tests/test_bijections_core.py",
    "tests/test_distributions.py",
    "tests/test_nnx_pytree_compliance.py",
  ],
  "cax-0.3.3": ["tests/**/test_*.py"],
  # Flax 0.12 cannot import those of its graph and of earlier transforms.
  "flax-0.10.2": [
    f"tests/nnx/{name}.py"
    for name in (
      "bridge/wrappers_test",
      "containers_test",
      "filters_test",
      "helpers_test",
      "ids_test",
      "integration_test",
      "metrics_test",
      "module_test",
      "nn/attention_test",
      "nn/conv_test",
      "nn/embed_test",
      "nn/linear_test",
      "nn/lora_test",
      "nn/normalization_test",
      "optimizer_test",
      "partitioning_test",
      "rngs_test",
      "state_test",
      "test_traversals",
      "variable_test",
    )
  ],
  "flax-0.12.8": ["tests/nnx/**/*_test.py", "tests/nnx/test_*.py"],
  "keras-3.15.1": [
    f"keras/src/{name}_test.py"
    for name in (
      "backend/jax/core",
      "layers/core/dense",
      "layers/layer",
      "layers/normalization/batch_normalization",
      "models/functional",
    )
  ],
  "mamba2_jax-1.1.2": ["tests/test_*.py"],
  # The others want MuJoCo.
  "nnx_ppo-0.3.0": ["nnx_ppo/networks/**/*_test.py"],
}
ENVIRONMENT = {
  # Their tests of sharding want some devices.
  "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
  "KERAS_BACKEND": "jax",
  "KERAS_NNX_ENABLED": "true",
  "PYTHONDONTWRITEBYTECODE": "1",
  "PYTHONWARNINGS": "ignore",
}


def files() -> list[tuple[str, str]]:
  return [
    (sources, str(path.relative_to(SOURCES[sources])))
    for sources, patterns in BUNDLED.items()
    for pattern in patterns
    for path in sorted(SOURCES[sources].glob(pattern))
  ]


def run(
  sources: str, file: str, report: pathlib.Path, *plugin: str
) -> set[str]:
  """Returns the cases that passed."""
  root = SOURCES[sources].absolute()
  done = subprocess.run(
    [
      *(sys.executable, "-m", "pytest", "-q", "--tb=short", *plugin),
      *("--import-mode=importlib", "--config-file=/dev/null"),
      *(f"--rootdir={root}", "-pno:cacheprovider", f"--junitxml={report}"),
      str(root / file),
    ],
    env={
      **os.environ,
      **ENVIRONMENT,
      "KERAS_HOME": str(report.parent),
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    },
    capture_output=True,
    text=True,
  )
  assert report.exists(), done.stdout + done.stderr
  print(done.stdout)
  passed, other = set(), set()
  for case in ElementTree.parse(report).iter("testcase"):
    outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
    name = f"{case.get('classname')}.{case.get('name')}"
    (other if outcomes else passed).add(name)
  return passed - other  # a case with subtests is there more than once


def differences(sources: str) -> dict[str, str]:
  """Returns the reasons by which cases fail on `nnx` alone."""
  found: dict[str, str] = {}
  of, reason = "", ""
  for line in DIFFERENCES.read_text().splitlines():
    if line.startswith("  "):
      case = line.strip()
      if of == sources:
        assert case not in found, f"twice: {case}"
        found[case] = reason
    elif not line.startswith("#"):
      of, reason = line.split(": ", 1)
  return found


@pytest.mark.parametrize("sources, file", files())
def test_what_passes_on_flax_passes(sources, file, tmp_path):
  theirs = run(sources, file, tmp_path / "theirs.xml")
  ours = run(
    sources, file, tmp_path / "ours.xml", "-pnnx.as_flax.pytest_plugin"
  )
  print(f"{sources} {file}: Flax {len(theirs)}, ours {len(ours)}")
  module = file.removesuffix(".py").replace("/", ".")
  known = {
    case: reason
    for case, reason in differences(sources).items()
    if case.startswith(f"{module}.")
  }
  lost = theirs - ours
  assert lost <= known.keys(), "these fail on `nnx` alone, and are not listed"
  # Another processor may round as Flax does.
  always = {
    case for case, reason in known.items() if not reason.startswith("rounding")
  }
  assert always <= lost, "these are listed, and do not fail on `nnx` alone"


@pytest.mark.parametrize("sources", BUNDLED)
def test_every_name_is_of_a_file(sources):
  for pattern in BUNDLED[sources]:
    assert any(SOURCES[sources].glob(pattern)), pattern
  modules = [
    file.removesuffix(".py").replace("/", ".")
    for of, file in files()
    if of == sources
  ]
  for case in differences(sources):
    assert any(case.startswith(f"{module}.") for module in modules), case
