"""Measurements for GPUs: their arithmetic, and that their programs compile."""

import contextlib
import functools
import io
import json
from unittest import mock

from absl.testing import absltest
import jax
import jax.numpy as jnp
import pytest

from tests.testing import deviceless, op_contract
from tools.bench import bandwidth, compare, gpu, gpu_rows, harness


def tiny(name="add/8/float32", **changes):
  def call(implementation, total, x):
    return total + x * (1.0 if implementation == "xla" else 1.5), x

  arguments = {
    "name": name,
    "moved": 96,
    "arguments": lambda implementation: (jnp.zeros(8), jnp.arange(8.0)),
    "call": call,
    "donated": (0,),
  }
  return gpu_rows.Row(**(arguments | changes))


class MeasureTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    op_contract.only_on("cpu")
    patch = functools.partial(mock.patch.object, gpu)
    self.enter_context(patch("_TOLERANCE", compare.NormTolerance(1.0)))

  def measure(self, **changes):
    return gpu.measure(tiny(**changes), gpu._TINY_SETTINGS)

  def test_record_compares_and_counts(self):
    def broken(total, x):
      raise ValueError("not here")

    record = self.measure(baselines={"broken": broken})
    self.assertEqual(set(record["ms"]), {"ours", "xla"})
    self.assertEqual(set(record["spread_ms"]), {"ours", "xla"})
    self.assertAlmostEqual(record["difference"], 0.5)
    self.assertEqual(record["without"], {"broken": "not here"})
    self.assertAlmostEqual(
      record["fraction_of_copy"],
      record["gigabytes_per_second"] / record["copy_gigabytes_per_second"],
    )
    self.assertIn("of a copy, differs by 5.0e-01", gpu.text(record))

  def test_times_are_those_of_one_step_of_one_layer(self):
    sample = mock.patch.object(harness, "_sample", lambda *_: 12e-3)
    mover = mock.patch.object(bandwidth, "Mover", autospec=True)
    with sample, mover:
      record = self.measure(layers=2, steps=3)
    self.assertAlmostEqual(record["ms"]["ours"], 2.0)
    self.assertAlmostEqual(record["ms"]["xla"], 2.0)
    self.assertAlmostEqual(record["gigabytes_per_second"], 96 / 2e-3 / 1e9)
    # The copy is of one as it is.
    self.assertAlmostEqual(record["fraction_of_copy"], 6.0)

  def test_calls_are_queued_and_the_last_is_waited_for(self):
    comparison = gpu.build(tiny())
    self.assertIs(comparison.clock.waits, harness.Waits.LAST_CALL)

  def test_every_layer_has_arrays_of_its_own_which_are_made_once(self):
    made = []

    def arguments(implementation):
      made.append(implementation)
      return jnp.zeros(8), jnp.arange(8.0)

    self.measure(arguments=arguments, layers=3)
    self.assertEqual(made, ["auto"] * 3 + ["xla"] * 3)

  def test_arguments_are_made_for_whom_they_are_for(self):
    asked = []

    def arguments(implementation):
      asked.append(implementation)
      return jnp.zeros(8), jnp.arange(8.0)

    def add(total, x):
      return total + x, x

    self.measure(
      arguments=arguments,
      baselines={"cuda": add, "other": add},
      others={"alone": add},
    )
    self.assertEqual(asked, ["auto", "xla", "cuda", "auto", "auto"])

  def test_what_computes_something_else_is_timed_and_not_compared(self):
    def other(total, x):
      return total, x * 100

    record = self.measure(others={"other": other})
    self.assertEqual(set(record["ms"]), {"ours", "xla", "other"})
    with self.assertRaisesRegex(compare.MismatchError, "against other"):
      self.measure(baselines={"other": other})

  def test_what_is_wrong_is_not_timed(self):
    def nan(implementation, total, x):
      return total + (jnp.nan if implementation == "auto" else 1), x

    strict = compare.NormTolerance(0.4)
    with mock.patch.object(gpu, "_TOLERANCE", strict):
      for changes, words in (({}, "is 0.5"), ({"call": nan}, "is nan")):
        with self.assertRaisesRegex(compare.MismatchError, words):
          self.measure(**changes)

  def test_a_broken_row_is_the_last(self):
    def broken(implementation, *arrays):
      raise ValueError("no kernel")

    rows = [tiny("a"), tiny("b", call=broken), tiny("c")]
    with mock.patch.object(gpu, "rows", lambda small: rows):
      self.assertEqual(
        [record["row"] for record in gpu.run("abc", False)], ["a", "b"]
      )
      [record] = gpu.run("b", False)
    self.assertIn("FAILED b", gpu.text(record))
    self.assertIn("no kernel", record["error"])

  def test_every_row_has_a_tiny_form(self):
    real = {row.name: row for row in gpu.rows()}
    rows = list(gpu.rows(True))
    self.assertEqual([row.name for row in rows], list(real))
    for row in rows:
      with self.subTest(row.name):
        self.assertLess(row.moved, 1 << 20)
        self.assertLess(row.moved, real[row.name].moved)
        structs = jax.eval_shape(functools.partial(row.arguments, "auto"))
        got = jax.eval_shape(functools.partial(row.call, "auto"), *structs)
        for place, new in zip(row.donated, got):
          self.assertEqual(new.shape, structs[place].shape)

  def test_rehearsal_on_the_cpu(self):
    names = [
      "kv_cache.update/prefill_B8_S32768_N8_H128/int8",
      "decode/B8_S32768_N8_G4_H128/float16",
      "decode/B8_S32768_N8_G4_H128/int8",
      "batch_norm_grad/65536x1024/float32",
    ]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      gpu.main(["--tiny", *names])
    greeting, *records = map(json.loads, out.getvalue().splitlines())
    self.assertEqual(greeting, {"device": "cpu"})
    self.assertEqual([record["row"] for record in records], names)
    for record in records:
      with self.subTest(record["row"]):
        self.assertNotIn("error", record)
        self.assertGreaterEqual(set(record["ms"]), {"ours", "xla"})
        self.assertLess(record["difference"], 0.02)

  def test_rows_are_told_apart(self):
    names = [row.name for row in gpu.rows()]
    self.assertLen(set(names), len(names))


@pytest.mark.deviceless
class CompiledRowsTest(absltest.TestCase):
  def test_every_row_compiles_in_place(self):
    op_contract.only_on("gpu")
    for row in gpu.rows():
      with self.subTest(row.name):
        structs = jax.eval_shape(functools.partial(row.arguments, "cuda"))
        compiled = deviceless.compile_for(
          deviceless.gpu_devices()[0],
          functools.partial(row.call, "cuda"),
          *structs,
          donate=row.donated,
        )
        donated = [structs[place] for place in row.donated]
        deviceless.assert_in_place(
          compiled, sum(s.size * s.dtype.itemsize for s in donated)
        )


if __name__ == "__main__":
  absltest.main()
