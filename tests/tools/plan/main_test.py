"""Tests of the program: what it prints, and what it refuses."""

import contextlib
import io
import pathlib
import re
import shlex

from absl.testing import absltest, parameterized

from tools.plan import main

PAGE = pathlib.Path("docs/planning.md")


def run(*arguments):
  """Returns the exit status, and what went to stdout and to stderr."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    status = main.main(arguments)
  return status, out.getvalue(), err.getvalue()


class MainTest(parameterized.TestCase):
  def test_training(self):
    status, out, _ = run(
      "train",
      "--model=llama2-70b",
      "--chip=h200",
      "--mesh=fsdp=64",
      "--batch=128",
      "--length=4096",
      "--recompute=mlp",
    )
    self.assertEqual(status, 0)
    for name in ("products", "attention", "fsdp gather", "optimizer", "host"):
      self.assertIn(f"| {name} |", out)
    self.assertIn("| activations |", out)
    self.assertIn("tokens/s", out)
    self.assertIn("products takes", out)

  def test_decoding(self):
    status, out, _ = run(
      "decode",
      "--model=llama2-70b",
      "--chip=v5e",
      "--mesh=tensor=8,data=8",
      "--batch=256",
      "--context=2048",
      "--weights=int8",
      "--cache=int8",
    )
    self.assertEqual(status, 0)
    for name in ("cache read", "tensor all-reduce", "starting kernels"):
      self.assertIn(f"| {name} |", out)

  def test_sizes_of_ones_own(self):
    sizes = {
      "layers": 2,
      "features": 64,
      "heads": 4,
      "kv-heads": 2,
      "head-dim": 16,
      "hidden": 128,
      "vocabulary": 100,
      "experts": 4,
      "used": 2,
    }
    status, out, _ = run(
      "decode",
      "--chip=h100",
      "--batch=2",
      "--context=16",
      "--no-gated",
      *(f"--{name}={size}" for name, size in sizes.items()),
    )
    self.assertEqual(status, 0)
    self.assertIn("a step", out)

  def test_flags_replace_sizes_of_a_model(self):
    common = ("decode", "--model=llama2-7b", "--chip=h200", "--batch=1")
    _, whole, _ = run(*common, "--context=16")
    _, half, _ = run(*common, "--context=16", "--layers=16")
    self.assertNotEqual(whole, half)

  @parameterized.parameters(
    (("--mesh=fsdp=3",), "refused: `batch`=8 must be a multiple of"),
    ((), "refused: A device has 133.9 GB, but"),
    (("--mesh=rows=2",), "refused: A mesh is written as"),
  )
  def test_refuses_in_words(self, extra, message):
    status, out, err = run(
      "train",
      "--model=llama2-70b",
      "--chip=h200",
      "--batch=8",
      "--length=128",
      *extra,
    )
    self.assertEqual((status, out), (1, ""))
    self.assertIn(message, err)

  def test_says_what_is_missing(self):
    status, _, err = run("train", "--chip=h200", "--layers=2", "--batch=2")
    self.assertEqual(status, 1)
    self.assertIn("refused: Wanted as well: --features, --heads,", err)

  def test_help_says_what_the_flags_are(self):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), self.assertRaises(SystemExit):
      main.main(["train", "--help"])
    self.assertIn("microbatches: parts of a device's batch", out.getvalue())
    self.assertIn("kv_heads: of keys and values.", out.getvalue())

  def test_help_has_commands_as_they_are_typed(self):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), self.assertRaises(SystemExit):
      main.main(["--help"])
    self.assertIn("--chip=h200 \\\n      --mesh=fsdp=64", out.getvalue())

  def test_numbers_of_a_chip_can_be_others(self):
    common = (
      *("decode", "--model=llama2-7b", "--chip=h200", "--batch=1"),
      *("--context=16", "--mesh=tensor=2"),
    )
    _, before, _ = run(*common)
    for change in ("weights=0.5", "kernel=1e-5", "inner.start=1e-4"):
      _, after, _ = run(*common, f"--change={change}")
      self.assertNotEqual(before, after, change)
    for wrong in ("speed=1", "kernel=fast", "inner.weight=1", "name=1"):
      status, _, err = run(*common, f"--change={wrong}")
      self.assertEqual(status, 1)
      self.assertIn(f"but got `{wrong}`.", err)

  @parameterized.parameters(
    (
      "attention=0",
      "`attention` must be more than 0 and at most 1, but got 0.",
    ),
    (
      "weights=1.5",
      "`weights` must be more than 0 and at most 1, but got 1.5.",
    ),
    ("kernel=-1", "`kernel` must be at least 0 and finite, but got -1."),
    ("memory=nan", "`memory` must be more than 0 and finite, but got nan."),
    (
      "inner.bandwidth=0",
      "`inner.bandwidth` must be more than 0 and finite, but",
    ),
    (
      "inner.hop=inf",
      "`inner.hop` must be at least 0 and finite, but got inf.",
    ),
  )
  def test_refuses_numbers_that_no_chip_has(self, change, message):
    status, out, err = run(
      *("decode", "--model=llama2-7b", "--chip=h200", "--batch=1"),
      *("--context=16", f"--change={change}"),
    )
    self.assertEqual((status, out), (1, ""))
    self.assertIn(f"refused: {message}", err)

  def test_the_commands_of_the_page_print_what_it_says(self):
    page = PAGE.read_text(encoding="utf-8")
    block = re.search("```sh\n(.*?)```", page, re.DOTALL)
    assert block is not None
    lines = block[1].replace("\\\n", "").splitlines()
    printed = []
    for line in lines:
      start, arguments = line.split(" -- ")
      self.assertEqual(start, "tools/bazel run //tools:plan")
      status, out, _ = run(*shlex.split(arguments, comments=True))
      self.assertEqual(status, 0)
      printed.append(out)
    self.assertLen(printed, 3)
    self.assertIn(f"The second prints:\n\n{printed[1]}", page)

  def test_sources(self):
    status, out, _ = run("sources", "--chip=v6e")
    self.assertEqual(status, 0)
    self.assertIn("Google Cloud, TPU v6e", out)
    self.assertIn("assumed", out)


if __name__ == "__main__":
  absltest.main()
