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
from tools.bench import gpu


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
  return gpu.Row(**(arguments | changes))


class MeasureTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    op_contract.only_on("cpu")
    patch = functools.partial(mock.patch.object, gpu)
    self.enter_context(patch("_SAMPLE_SECONDS", 1e-4))
    self.enter_context(patch("_COPY_BYTES", 2**16))
    self.enter_context(patch("_LARGEST_DIFFERENCE", 1.0))

  def test_record_compares_and_counts(self):
    def broken(total, x):
      raise ValueError("not here")

    record = gpu.measure(tiny(baselines={"broken": broken}))
    self.assertEqual(set(record["ms"]), {"ours", "xla"})
    self.assertAlmostEqual(record["difference"], 0.5)
    self.assertEqual(record["without"], {"broken": "not here"})
    self.assertAlmostEqual(
      record["fraction_of_copy"],
      record["gigabytes_per_second"] / record["copy_gigabytes_per_second"],
    )
    self.assertIn("of a copy, differs by 5.0e-01", gpu.text(record))

  def test_times_are_those_of_one_step_of_one_layer(self):
    def queue(step, state, count):
      del count
      return 12e-3, step(state)[0]

    with mock.patch.object(gpu, "_queue", queue):
      record = gpu.measure(tiny(layers=2, steps=3))
    self.assertAlmostEqual(record["ms"]["ours"], 2.0)
    self.assertAlmostEqual(record["ms"]["xla"], 2.0)
    self.assertAlmostEqual(record["gigabytes_per_second"], 96 / 2e-3 / 1e9)

  def test_sides_take_turns(self):
    order = []
    sides = [mock.Mock(sample=lambda n=n: order.append(n)) for n in "ab"]
    gpu._time(sides)
    self.assertEqual(order, ["a", "b"] * gpu._SAMPLES)

  def test_arguments_are_made_for_whom_they_are_for(self):
    asked = []

    def arguments(implementation):
      asked.append(implementation)
      return jnp.zeros(8), jnp.arange(8.0)

    both = {name: lambda total, x: (total, x) for name in ("cuda", "other")}
    gpu.measure(tiny(arguments=arguments, baselines=both))
    # To compare results, and then to measure.
    self.assertEqual(asked, ["auto", "xla"] + ["auto", "xla", "cuda", "auto"])

  def test_difference_is_of_whole_arrays(self):
    want = jnp.ones(10000), jnp.full((2, 8), 2.0, "bfloat16"), jnp.arange(3)
    self.assertEqual(gpu._difference(want, want), 0)
    # A gate that is open on one side alone.
    got = want[0].at[7].set(0), *want[1:]
    self.assertAlmostEqual(gpu._difference(got, want), 0.01)
    # The array that is furthest off counts.
    got = got[0], want[1] * 1.5, want[2]
    self.assertAlmostEqual(gpu._difference(got, want), 0.5)
    zeros = (jnp.zeros(4),)
    self.assertAlmostEqual(gpu._difference((jnp.ones(4),), zeros), 2)

  def test_what_is_wrong_is_not_timed(self):
    def nan(implementation, total, x):
      return total + (jnp.nan if implementation == "auto" else 1), x

    with mock.patch.object(gpu, "_LARGEST_DIFFERENCE", 0.4):
      for changes, words in (({}, "differs by 0.5"), ({"call": nan}, "by nan")):
        with self.assertRaisesRegex(ValueError, words):
          gpu.measure(tiny(**changes))

  def test_what_is_not_a_number_never_passes(self):
    good = jnp.ones(4)
    for broken in (good.at[1].set(jnp.nan), good.at[1].set(jnp.inf)):
      for got, want in (
        ((broken, good), (good, good)),
        ((good, broken), (good, good)),
        ((broken, good), (broken, good)),
        ((good, good), (good, broken)),
      ):
        self.assertFalse(gpu._difference(got, want) < 1e9)

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
