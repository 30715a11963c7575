"""Measurements for GPUs: their arithmetic, and that their programs compile."""

import functools
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
    "arguments": lambda: (jnp.zeros(8), jnp.arange(8.0)),
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

  def test_broken_row_does_not_cost_the_others(self):
    def broken(implementation, *arrays):
      raise ValueError("no kernel")

    rows = [tiny("a", call=broken), tiny("b"), tiny("c")]
    with mock.patch.object(gpu, "rows", lambda: rows):
      first, second, _ = gpu.run("")
      self.assertIn("FAILED a", gpu.text(first))
      self.assertIn("no kernel", first["error"])
      self.assertEqual(second["row"], "b")
      self.assertLen(list(gpu.run("b")), 1)

  def test_rows_are_told_apart(self):
    names = [row.name for row in gpu.rows()]
    self.assertLen(set(names), len(names))


@pytest.mark.deviceless
class CompiledRowsTest(absltest.TestCase):
  def test_every_row_compiles_in_place(self):
    op_contract.only_on("gpu")
    for row in gpu.rows():
      with self.subTest(row.name):
        structs = jax.eval_shape(row.arguments)
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
