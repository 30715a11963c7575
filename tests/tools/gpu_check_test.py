"""What tools/gpu_check.py reads and reports, without a GPU."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
from unittest import mock

from absl.testing import absltest, parameterized

from tools import gpu_build, gpu_check

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
import os, pathlib, sys, time
want = {"REQUIRE_DEVICE": "1", "TEST_PLATFORM": "gpu"}
assert {name: os.environ[name] for name in want} == want
assert os.environ["JAX_PLATFORMS"].startswith("cuda")  # no other, if it fails
print("looking at", sys.argv[1], flush=True)
if sys.argv[1] == "dies.py":
  sys.exit("no such thing")
if sys.argv[1] == "sleeps.py":
  time.sleep(60)
pathlib.Path(os.environ["XML_OUTPUT_FILE"]).write_text('''
<testsuites><testsuite>
<testcase classname="a" name="good"/>
<testcase classname="a" name="bad"><failure>3 is not 4</failure></testcase>
<testcase classname="a" name="set_up"><error>no GPU</error></testcase>
<testcase classname="a" name="away"><skipped message="for the cpu alone"/>
</testcase></testsuite></testsuites>''')
sys.exit(1)
"""


# Measures rows until one is called "bad", and dies at one called "dead".
_PROGRAM = """
import json, sys, time
print(json.dumps({"device": "none"}), flush=True)
for row in sys.argv[1:]:
  if row == "dead":
    sys.exit("struck dead")
  if row == "slow":
    time.sleep(60)
  record = {"row": row}
  if row == "bad":
    record["error"] = "out of memory"
  print(json.dumps(record), flush=True)
  if row == "bad":
    break
"""


class GpuCheckTest(parameterized.TestCase):
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
    targets = gpu_build.read_targets(self.root, ("kernels",))
    self.assertEqual(
      gpu_build.sources_of(targets, targets["//kernels/op:_op_cuda"]),
      [
        "kernels/op/op_ffi.cc",
        "kernels/op/op.cu.cc",
        "kernels/op/loops.cc",
        "kernels/common/common.cc",
      ],
    )
    self.assertEqual(gpu_check.test_files(targets), ["kernels/op/op_test.py"])

  def test_sources_of_another_package_are_found(self):
    self.write(
      "nnx/engine/BUILD",
      'nnx_pybind_extension(name = "_engine", srcs = ["//nnx/engine/cc:a.cc"])',
    )
    targets = gpu_build.read_targets(self.root, ("nnx",))
    self.assertEqual(
      gpu_build.sources_of(targets, targets["//nnx/engine:_engine"]),
      ["nnx/engine/cc/a.cc"],
    )

  def test_results_of_tests_are_counted(self):
    self.write("tools/build_defs/pytest_main.py", _PYTEST_MAIN)
    with mock.patch.object(gpu_check, "ROOT", self.root):
      row = gpu_check.run_tests("t.py", 0, 2, self.root, 60)
      died = gpu_check.run_tests("dies.py", 1, 2, self.root, 60)
      slept = gpu_check.run_tests("sleeps.py", 1, 2, self.root, 5)
    self.assertEqual(
      (row["status"], row["passed"], row["failed"], row["skipped"]),
      (1, 1, 2, {"for the cpu alone": 1}),
    )
    self.assertEqual(
      row["failures"], {"a.bad": "3 is not 4", "a.set_up": "no GPU"}
    )
    self.assertEqual((died["status"], died["passed"]), (1, 0))
    self.assertIn("no such thing", died["failures"]["no report"])
    self.assertIsNone(slept["status"])
    self.assertIn("looking at sleeps.py", slept["failures"]["no report"])

  def test_an_extension_that_cannot_be_built_costs_no_other(self):
    self.write(
      "kernels/op/BUILD",
      "".join(
        f'cuda_extension(name = "_{n}", srcs = ["{n}.cc"], kernels = [])\n'
        for n in ("good", "bad")
      ),
    )
    self.write("kernels/op/_bad.so", "of yesterday")
    self.write("cuda/lib64/libcudart_static.a", "")

    def run(self, name, command):
      if "bad" in name:
        raise RuntimeError(f"{name} could not be built: 3 is not a type")
      pathlib.Path(command[-1]).write_text("new")

    with (
      mock.patch.object(gpu_build, "ROOT", self.root),
      mock.patch.object(
        gpu_build, "find_nvcc", lambda: self.root / "cuda/bin/nvcc"
      ),
      mock.patch.object(gpu_build.Builder, "_run", run),
    ):
      builder = gpu_build.Builder(self.root, "90", jobs=1)
      modules, failures = builder.build(
        gpu_build.read_targets(self.root, ("kernels",))
      )
    self.assertEqual(modules, ["kernels.op._good"])
    self.assertEqual((self.root / "kernels/op/_good.so").read_text(), "new")
    self.assertEqual(list(failures), ["kernels.op._bad"])
    self.assertIn("3 is not a type", failures["kernels.op._bad"])
    self.assertFalse((self.root / "kernels/op/_bad.so").exists())

  def test_a_row_that_fails_costs_no_other_row(self):
    program = [sys.executable, "-c", _PROGRAM]
    names = ["a", "bad", "b", "dead", "slow", "c"]
    records = list(gpu_check.run_rows(names, program, True, 3))
    rows = [record for record in records if "row" in record]
    self.assertEqual([row["row"] for row in rows], names)
    errors = {row["row"]: row["error"] for row in rows if "error" in row}
    self.assertEqual(set(errors), {"bad", "dead", "slow"})
    self.assertEqual(errors["bad"], "out of memory")
    self.assertIn("struck dead", errors["dead"])
    self.assertIn("no result after 3 s", errors["slow"])

  def test_a_program_that_cannot_begin_is_not_begun_for_every_row(self):
    program = [sys.executable, "-c", "import no_such_module"]
    with self.assertRaisesRegex(RuntimeError, "(?s)No row could.*no_such_mod"):
      list(gpu_check.run_rows(["a", "b"], program, True, 60))

  def check(self, *arguments):
    path = self.root / "results.json"
    patch = self.enter_context(mock.patch.object(gpu_check, "versions"))
    patch.return_value = {"sources": "1"}
    options = gpu_check.parse([f"--json={path}", "--shards=1", *arguments])
    with mock.patch.object(gpu_check, "ROOT", self.root):
      return gpu_check.Check(options), lambda: json.loads(path.read_text())

  def test_a_step_that_fails_keeps_what_others_have_found(self):
    check, results = self.check()
    with mock.patch.object(
      check, "_build", lambda folder: check.results.update(build="good") or True
    ):
      self.assertTrue(check.run("build"))
    again, _ = self.check()
    with mock.patch.object(again, "_tests", side_effect=SystemExit("no GPU")):
      self.assertFalse(again.run("tests"))
    self.assertEqual(results()["build"], "good")
    self.assertIn("no GPU", results()["errors"]["tests"])

  def test_results_of_other_sources_are_put_aside(self):
    check, results = self.check()
    check.results["bench"] = ["old"]
    with mock.patch.object(check, "_build", lambda folder: True):
      check.run("build")
    self.assertEqual(results()["bench"], ["old"])
    again, _ = self.check("--rehearse")
    self.assertNotIn("bench", again.results)
    self.assertIn("no result of this file is a GPU", again.results["rehearsal"])
    self.assertTrue((self.root / "results.json.old").exists())

  def test_tests_go_on_where_they_were_cut_off(self):
    self.write(
      "tests/kernels/op/BUILD",
      "".join(
        f'op_test(name = "{name}", srcs = ["{name}.py"])\n' for name in "abc"
      ),
    )
    statuses = {"a": [0], "b": [None, 0], "c": [0]}

    def run_tests(file, shard, shards, *_):
      status = statuses[pathlib.Path(file).stem].pop(0)
      return {
        "file": file, "shard": f"{shard} of {shards}", "status": status,
        "seconds": 1, "passed": 1, "failed": 0, "skipped": {}, "failures": {},
      }  # fmt: skip

    with mock.patch.object(gpu_check, "run_tests", run_tests):
      check, _ = self.check("--seconds=400", "--limit=100")
      self.assertFalse(check.run("tests"))
      again, results = self.check("--seconds=400", "--limit=100", "--resume")
      self.assertTrue(again.run("tests"))
    self.assertEqual(statuses, {"a": [], "b": [], "c": []})
    self.assertCountEqual(
      [(row["file"][-4:], row["status"]) for row in results()["tests"]],
      [("a.py", 0), ("b.py", 0), ("c.py", 0)],
    )

  # What pytest says of failures, what a signal leaves, the limit of a shard.
  @parameterized.parameters(1, -11, None)
  def test_tests_that_do_not_pass_fail_the_step(self, status):
    self.write("tests/kernels/op/BUILD", _BUILD)
    row = {
      "file": "", "shard": "", "seconds": 1, "passed": 9, "failed": 0,
      "skipped": {}, "failures": {},
    }  # fmt: skip
    arguments = ("--seconds=1", "--limit=100")
    for shards in ([0, 0], [0, status], [status, 0]):
      rows = iter([row | {"status": each} for each in shards])
      with mock.patch.object(
        gpu_check, "run_tests", lambda *_, r=rows: next(r)
      ):
        check, _ = self.check(*arguments, "--shards=2")
        self.assertEqual(check.run("tests"), status not in shards)

  def fake_bench(self):
    gpu = types.SimpleNamespace(
      rows=lambda: [types.SimpleNamespace(name="a")], text=str
    )
    return mock.patch.dict(
      sys.modules, {"tools.bench": types.SimpleNamespace(gpu=gpu)}
    )

  def test_nothing_to_do_is_no_success(self):
    self.write("tests/kernels/op/BUILD", _BUILD)
    check, results = self.check("--filter=opp", "--bench-filter=aa")
    self.assertFalse(check.run("tests"))
    with self.fake_bench():
      self.assertFalse(check.run("bench"))
    errors = results()["errors"]
    self.assertIn("`--filter` must be a part", errors["tests"])
    self.assertIn("no name has `aa`", errors["bench"])

  def test_a_row_or_an_extension_that_fails_fails_its_step(self):
    for record, good in (
      ({"row": "a"}, True),
      ({"row": "a", "error": ""}, False),
    ):
      with (
        self.fake_bench(),
        mock.patch.object(
          gpu_check, "run_rows", lambda *_, r=record: iter([{"device": ""}, r])
        ),
      ):
        self.assertEqual(self.check()[0].run("bench"), good)
    for failures, good in (({}, True), ({"_op_cuda": "no"}, False)):
      with (
        mock.patch.object(gpu_build, "find_nvcc", lambda: self.root / "nvcc"),
        mock.patch.object(
          gpu_build.Builder, "build", lambda *_, f=failures: ([], f)
        ),
      ):
        check, _ = self.check("--architecture=90")
        self.assertEqual(check.run("build"), good)

  def test_a_step_that_fails_is_the_exit_status(self):
    for bad in (None, *gpu_check.STEPS):
      with (
        mock.patch.object(gpu_check, "ROOT", self.root),
        mock.patch.object(gpu_check, "NEEDED", ()),
        mock.patch.object(
          gpu_check.Check, "run", lambda self, step, bad=bad: step != bad
        ),
      ):
        status = gpu_check.main([f"--json={self.root}/results.json"])
      self.assertEqual(status, 0 if bad is None else 1)

  def test_what_is_missing_is_named(self):
    with (
      mock.patch.dict("os.environ", clear=True),
      mock.patch.object(shutil, "which", return_value=None),
      mock.patch.object(pathlib.Path, "exists", return_value=False),
      self.assertRaisesRegex(SystemExit, "nvcc must be on PATH, under"),
    ):
      gpu_build.find_nvcc()
    with (
      mock.patch.object(subprocess, "run", side_effect=FileNotFoundError),
      self.assertRaisesRegex(SystemExit, "nvidia-smi must find a GPU, but"),
    ):
      gpu_build.gpu_architecture()
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
