"""Runs test files under pytest the way Bazel asks for it.

Understands Bazel's sharding, `--test_filter` and XML report.  With NNX_ALONE in
the environment, cases are run one to a process; see `alone`.  Where
TEST_PLATFORM is an accelerator, a test runs on it or is skipped in words, so
that a run on the CPU is never taken for one; the marker `deviceless` exempts
those that only compile for it.
"""

import fnmatch
import gc
import itertools
import os
import pathlib
import site
import sys

import pytest

# Their drivers' device nodes: to ask jax would start the backend.
_DEVICE_NODES = {
  "gpu": ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"),
  "tpu": ("/dev/accel0", "/dev/vfio/0"),
}


def _matches(pattern: str, item: pytest.Item) -> bool:
  """Says whether `Class.test`, a part of it or a glob names `item`."""
  name = item.nodeid.replace("::", ".")
  pattern = pattern.replace("::", ".")
  return pattern in name or fnmatch.fnmatchcase(name, f"*{pattern}")


def _choose_backend(platform: str) -> None:
  """Keeps jax off accelerators that the test is not for, or are not there."""
  nodes = _DEVICE_NODES.get(platform, ())
  if not any(os.path.exists(node) for node in nodes):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _has_device(platform: str) -> bool:
  if platform == "cpu":
    return True
  import jax

  try:
    return bool(jax.devices(platform))
  except RuntimeError:
    return False


def _alone_one_of() -> int:
  """Says of how many cases one is run, alone; 0 where all share a process."""
  return int(os.environ.get("NNX_ALONE") or 0)


class BazelPlugin:
  """Keeps the tests of this shard and filter that have their device."""

  def pytest_configure(self, config: pytest.Config) -> None:
    config.addinivalue_line(
      "markers", "deviceless: compiles for TEST_PLATFORM, and runs nothing"
    )

  def pytest_collection_finish(self) -> None:
    # What is imported by now stays: the collector need not look at it while
    # that is done, nor again for every few hundred objects that a trace makes.
    gc.collect()
    gc.freeze()
    gc.enable()

  def pytest_collection_modifyitems(
    self, config: pytest.Config, items: list[pytest.Item]
  ) -> None:
    if "absl.flags" in sys.modules:
      # absltest reads its flags; Bazel gives their values as environment.
      sys.modules["absl.flags"].FLAGS.mark_as_parsed()
    pattern = os.environ.get("TESTBRIDGE_TEST_ONLY")
    if pattern:
      self._keep(config, items, [i for i in items if _matches(pattern, i)])
    shards = int(os.environ.get("TEST_TOTAL_SHARDS") or 1)
    if shards > 1:
      if not items:
        return
      self.shard_may_be_empty = True
      shard = int(os.environ["TEST_SHARD_INDEX"])
      pathlib.Path(os.environ["TEST_SHARD_STATUS_FILE"]).touch()
      self._keep(config, items, items[shard::shards])
    if _alone_one_of() > 1:
      from tools.build_defs import alone

      self.shard_may_be_empty = True
      kept = alone.sample([item.nodeid for item in items], _alone_one_of())
      self._keep(config, items, list(itertools.compress(items, kept)))

  shard_may_be_empty = False
  stopped = False

  def pytest_keyboard_interrupt(self) -> None:
    # Also called for `pytest.exit`, which may say that all went well.
    self.stopped = True

  def _keep(self, config, items, kept) -> None:
    dropped = [item for item in items if item not in kept]
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept

  def pytest_runtest_setup(self, item: pytest.Item) -> None:
    if item.get_closest_marker("deviceless") is not None:
      return
    platform = os.environ.get("TEST_PLATFORM", "cpu")
    if not _has_device(platform):
      words = f"no {platform} device: numerics NOT run"
      if os.environ.get("REQUIRE_DEVICE") == "1":
        pytest.fail(words)
      pytest.skip(words)


def main(argv: list[str]) -> int:
  """Runs the files and options of `argv`; returns the exit status."""
  args = [
    "--import-mode=importlib",
    "--config-file=/dev/null",
    f"--rootdir={os.getcwd()}",
    "--strict-markers",
    # What C++ prints as it dies, a sanitizer's report above all, must not
    # die with it.
    "--capture=sys",
    "-pno:cacheprovider",
    "-q",
    "-ra",
    *argv,
  ]
  if xml := os.environ.get("XML_OUTPUT_FILE"):
    args.append(f"--junitxml={xml}")
  plugin = BazelPlugin()
  plugins: list[object] = [plugin]
  if _alone_one_of():
    from tools.build_defs import alone

    plugins.append(alone.AlonePlugin([sys.executable, __file__]))
  status = pytest.main(args, plugins=plugins)
  if plugin.stopped:
    return int(status) or int(pytest.ExitCode.INTERRUPTED)
  if status == pytest.ExitCode.NO_TESTS_COLLECTED and plugin.shard_may_be_empty:
    return 0
  return int(status)


def _hide_host_packages() -> None:
  """Leaves what the host happens to have installed out of a Bazel test.

  It is no part of the build, and may cost more than what is: flax imports all
  of IPython wherever it finds it.
  """
  if "TEST_SRCDIR" in os.environ:
    hidden = {*site.getsitepackages(), site.getusersitepackages()}
    sys.path[:] = [path for path in sys.path if path not in hidden]


if __name__ == "__main__":
  gc.disable()  # until the tests are imported
  _hide_host_packages()
  if os.environ.get("QUICK_XLA") == "1":
    from tools.build_defs import quick_xla

    quick_xla.use()
  _choose_backend(os.environ.get("TEST_PLATFORM", "cpu"))
  # Plugins that the host happens to have are no part of these tests.
  os.environ.setdefault("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
  # NumPy's threads would wait for work by spinning, beside tests that run.
  os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
  sys.exit(main(sys.argv[1:]))
