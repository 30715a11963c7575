"""Runs tests with `nnx` in the place of `flax.nnx`.

pytest -p nnx.as_flax.pytest_plugin
"""

import nnx.as_flax  # noqa: F401


def pytest_report_header() -> str:
  """Says in the report which of the two was tested."""
  return "flax.nnx: nnx, by nnx.as_flax"
