"""The CUDA kernels of batch_stat and their bindings, run on the CPU.

The kernels' source under tests/testing/cuda_emulation.h: their logic, not a run
on a GPU. They are held to the contract that every implementation has.
"""

import dataclasses
from unittest import mock

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.batch_stat import ffi, primitive
from kernels.common import libraries
from tests.kernels.batch_stat import batch_norm_test, lies, update_test
from tests.testing import op_contract

_OPS = (
  primitive.UPDATE,
  primitive.TRAIN,
  primitive.MOMENTS,
  primitive.NORMALIZE,
  primitive.GRAD_SUMS,
  primitive.GRAD_INPUT,
)
_TARGETS = (
  "TARGET_UPDATE",
  "TARGET_TRAIN",
  "TARGET_MOMENTS",
  "TARGET_NORMALIZE",
  "TARGET_GRAD_SUMS",
  "TARGET_GRAD_INPUT",
)


@pytest.fixture(autouse=True, scope="module")
def emulated():
  """Adds the emulated handlers, under names of their own."""
  patch = pytest.MonkeyPatch()
  handlers = {}
  for name in _TARGETS:
    target = getattr(ffi, name)
    handlers[f"emulated_{target}"] = ffi.HANDLERS[target]
    patch.setattr(ffi, name, f"emulated_{target}")
  library = libraries.Library(
    "tests.kernels.batch_stat._batch_stat_cuda", handlers
  )
  for op in _OPS:
    impl = dataclasses.replace(
      op.implementations["cuda"],
      name="emulated",
      platforms=("cpu",),
      library=library,
    )
    patch.setitem(op.implementations, "emulated", impl)
  yield
  patch.undo()


class EmulatedUpdateTest(update_test.UpdateContract):
  implementation = "emulated"
  target = "emulated_fused_nnx_batch_stat_update_1"

  def test_sums_may_be_cut_into_any_number_of_parts(self):
    rng = np.random.default_rng(0)
    for parts, shape, axis, mask_shape in (
      (3, (90, 24), -1, None),
      (40, (90, 24), -1, (90, 1)),  # more parts than there is work
      (5, (400, 6), -1, (400, 6)),
      (7, (9, 5, 36), 1, None),
      (4, (2, 3, 5000), 1, None),  # along long rows
      (4, (2, 3, 4999), 1, (2, 1, 4999)),
      (130, (600, 3), -1, None),
    ):
      x = op_contract.array(rng, shape, "float32")
      mask = None if mask_shape is None else rng.random(mask_shape) < 0.7
      with mock.patch.object(ffi, "splits", lambda *_, parts=parts: parts):
        for fast in (True, False):
          self.check(x, feature_axis=axis, mask=mask, use_fast_variance=fast)

  def test_one_pass_loses_nothing_to_a_large_mean(self):
    rng = np.random.default_rng(1)
    for x in (
      rng.normal(size=(5000, 8)) + 1e4,
      rng.normal(size=(5000, 8)) * 1e-3 + np.arange(8) * 100,
      np.sort(rng.normal(size=(5000, 8)) + 1e4, 0),
      np.concatenate([np.full((9, 8), 1e5), rng.normal(size=(4991, 8))]),
    ):
      x = x.astype(np.float32)
      want = x.astype(np.float64).var(0)
      for shaped, axis in ((x, 1), (x.T.copy(), 0)):
        got = self.call(shaped, jnp.zeros(8), jnp.ones(8), feature_axis=axis)
        np.testing.assert_allclose(got.batch_var, want, rtol=3e-5)

  def test_long_parts_are_taken_in_runs(self):
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(2500, 128)) + 1e3).astype(np.float32)
    x[:300] -= 2e3  # the first run is unlike the others
    mask = rng.random((2500, 1)) < 0.9
    with mock.patch.object(ffi, "splits", lambda *_: 1):
      for shaped, axis, shaped_mask in ((x, 1, mask), (x.T.copy(), 0, mask.T)):
        self.check(shaped, feature_axis=axis)
        self.check(shaped, feature_axis=axis, mask=shaped_mask)

  def test_wrong_workspace_is_named(self):
    x, stat = jnp.ones((4, 3)), jnp.zeros(3)
    attributes = {"feature_axis": 1, "batch_axes": 0, "accurate": 0}
    for shape, dtype, message in (
      ((2, 3, 4), "float32", r"float32 of shape \[n, 3, 3\], but got float32"),
      ((2, 3, 3), "int32", "`workspace` must be float32 of shape"),
      ((1, 3, 3), "float32", "`workspace` must have 2 parts or more, but got"),
    ):
      out = (jax.ShapeDtypeStruct((3,), "float32"),) * 4
      call = jax.ffi.ffi_call(
        self.target, (*out, jax.ShapeDtypeStruct(shape, dtype))
      )
      with self.assertRaisesRegex(Exception, message):
        jax.block_until_ready(
          call(
            stat,
            stat,
            jnp.zeros(1),
            x,
            **{name: np.int64(value) for name, value in attributes.items()},
          )
        )


class EmulatedBatchNormTest(batch_norm_test.BatchNormContract):
  implementation = "emulated"
  target = "emulated_fused_nnx_batch_stat_normalize_1"
  targets = (target, "emulated_fused_nnx_batch_stat_train_1")

  def test_sums_may_be_cut_into_any_number_of_parts(self):
    rng = np.random.default_rng(2)
    for parts, shape, axis, dtype in (
      (3, (90, 24), -1, "float32"),
      (40, (90, 24), -1, "bfloat16"),
      (7, (9, 5, 40), 1, "float16"),
      (4, (2, 3, 5000), 1, "float32"),
    ):
      x = op_contract.array(rng, shape, dtype)
      with mock.patch.object(ffi, "splits", lambda *_, parts=parts: parts):
        self.check(x, feature_axis=axis, relu=True)


class SplitsTest(parameterized.TestCase):
  @parameterized.parameters(
    ((64, 56, 56, 256), "bfloat16", 3, 264),
    ((64, 56, 56, 256), "float32", 3, 132),
    ((32, 1024), "float32", 1, 1),
    ((256, 56, 56, 2048), "float32", 3, 16),
    ((16, 64, 112, 112), "float32", 1, 4),
    ((8, 2048, 7, 7), "float32", 1, 1),
  )
  def test_work_is_cut_by_shape(self, shape, dtype, feature_axis, want):
    x = jax.ShapeDtypeStruct(shape, dtype)
    self.assertEqual(ffi.splits(x, feature_axis, 0), want)


class HandlersTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16")
  def test_every_lie_is_refused_by_name(self, dtype):
    handlers = {f"emulated_{k}": v for k, v in ffi.HANDLERS.items()}
    told = lies.check("emulated", dtype, handlers, workspace=True)
    self.assertGreater(told, 300)
