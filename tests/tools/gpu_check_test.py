"""What tools/gpu_check.py reads and reports, without a GPU."""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

from absl.testing import absltest

from tools import gpu_check

_BUILD = """
load("//tools/build_defs:defs.bzl", "cuda_extension")

package(default_visibility = ["//visibility:private"])

cuda_extension(
    name = "_op_cuda",
    srcs = ["op_ffi.cc"],
    kernels = ["op.cu.cc"],
    deps = [":loops", "//kernels/common", "@pypi//jaxlib:headers"],
)

cc_library(name = "loops", srcs = ["loops.cc"], hdrs = ["loops.h"])
op_test(name = "op_test", srcs = ["op_test.py"])
op_test(name = "tpu_test", srcs = ["tpu_test.py"], platforms = ["tpu"])
"""
_COMMON = 'cc_library(name = "common", srcs = ["common.cc"], deps = [":x"])'
_PYTEST_MAIN = """
import os, pathlib, sys
assert os.environ["REQUIRE_DEVICE"] == "1"
print("looking at", sys.argv[1])
if sys.argv[1] == "dies.py":
  sys.exit("no such thing")
pathlib.Path(os.environ["XML_OUTPUT_FILE"]).write_text('''
<testsuites><testsuite>
<testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure>3 is not 4</failure></testcase>
<testcase classname="a" name="away"><skipped message="for the cpu alone"/>
</testcase></testsuite></testsuites>''')
sys.exit(1)
"""


class GpuCheckTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

  def write(self, path: str, text: str) -> None:
    file = self.root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)

  def test_build_files_say_what_an_extension_is_made_of(self):
    self.write("kernels/op/BUILD", _BUILD)
    self.write("kernels/common/BUILD", _COMMON)
    targets = gpu_check.read_targets(self.root, ("kernels",))
    self.assertEqual(
      gpu_check.sources_of(targets, targets["//kernels/op:_op_cuda"]),
      [
        "kernels/op/op_ffi.cc",
        "kernels/op/op.cu.cc",
        "kernels/op/loops.cc",
        "kernels/common/common.cc",
      ],
    )
    self.assertEqual(gpu_check.test_files(targets), ["kernels/op/op_test.py"])

  def test_results_of_tests_are_counted(self):
    self.write("tools/build_defs/pytest_main.py", _PYTEST_MAIN)
    with mock.patch.object(gpu_check, "ROOT", self.root):
      row = gpu_check.run_tests("t.py", 0, 2, self.root, 60)
      died = gpu_check.run_tests("dies.py", 1, 2, self.root, 60)
    self.assertEqual(
      (row["status"], row["passed"], row["failed"], row["skipped"]),
      (1, 1, 1, {"for the cpu alone": 1}),
    )
    self.assertEqual(row["failures"], {"a.bad": "3 is not 4"})
    self.assertIn("no such thing", died["failures"]["no report"])

  def test_what_is_missing_is_named(self):
    with (
      mock.patch.dict("os.environ", clear=True),
      mock.patch.object(shutil, "which", return_value=None),
      mock.patch.object(pathlib.Path, "exists", return_value=False),
      self.assertRaisesRegex(SystemExit, "nvcc must be on PATH, under"),
    ):
      gpu_check.find_nvcc()
    with (
      mock.patch.object(subprocess, "run", side_effect=FileNotFoundError),
      self.assertRaisesRegex(SystemExit, "nvidia-smi must find a GPU, but"),
    ):
      gpu_check.gpu_architecture()
    with (
      mock.patch.object(gpu_check, "NEEDED", ("os", "no_such_package")),
      self.assertRaisesRegex(SystemExit, "but lacks no_such_package: install"),
    ):
      gpu_check.main([])

  def test_help_says_how_to_run_it(self):
    done = subprocess.run(
      [sys.executable, gpu_check.__file__, "--help"],
      capture_output=True,
      text=True,
      check=True,
    )
    self.assertIn("python3 tools/gpu_check.py --json results.json", done.stdout)


if __name__ == "__main__":
  absltest.main()
