"""The CUDA kernel of the cache update and its binding, run on the CPU.

The kernel's source under tests/testing/cuda_emulation.h: its logic, not a run
on a GPU.
"""

import functools

from absl.testing import parameterized
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import kv_cache
from kernels.cache import layouts
from kernels.common import dispatch, libraries
from kernels.kv_cache import ffi, primitive
from tests.kernels.kv_cache import cases, lies, oracle

TARGET = "emulated_kv_cache_update_1"
LIBRARY = libraries.Library(
  "tests.kernels.kv_cache._kv_cache_cuda", {TARGET: "kv_cache_update"}
)


@pytest.fixture(autouse=True, scope="module")
def emulated():
  """Adds the emulated handler to the op's implementations."""
  impl = dispatch.Implementation(
    name="emulated",
    platforms=("cpu",),
    fn=functools.partial(ffi.update, target=TARGET),
    library=LIBRARY,
  )
  primitive.UPDATE.implementations["emulated"] = impl
  yield
  del primitive.UPDATE.implementations["emulated"]


def check(args, **kwargs):
  update = functools.partial(
    kv_cache.update, implementation="emulated", **kwargs
  )
  cases.assert_same(jax.jit(update)(*args), oracle.update(*args, **kwargs))


class EmulatedUpdateTest(parameterized.TestCase):
  def test_every_feature_on_random_shapes(self):
    @hypothesis.given(cases.problems())
    @hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
    def each(problem):
      args, kwargs = problem
      check(args, **kwargs)

    each()

  @parameterized.product(
    dtype=oracle.FLOATS + oracle.QUANTIZED,
    layout=("bsnh", "bnsh"),
    h=(64, 6, 5),
  )
  def test_widths_of_access(self, dtype, layout, h):
    args = cases.arguments(t=3, h=h, dtype=dtype, layout=layout)
    scales = {}
    if dtype in oracle.QUANTIZED:
      scales = {"k_scale": np.float32(0.01), "v_scale": np.float32([0.003, 1])}
    check((*args, np.array([0, 7, -2])), layout=layout, **scales)

  def test_several_items_for_each_thread(self):
    args = cases.arguments(b=2, s=700, t=600, n=4, h=64)
    check((*args, np.array([3, 650])))

  @parameterized.product(layout=("bsnh", "bnsh"), ring=(False, True))
  def test_parts_of_a_sharded_cache(self, layout, ring):
    args = cases.arguments(t=2, layout=layout)
    cases.check_parts(args, "emulated", layout, ring)

  @parameterized.parameters(*oracle.QUANTIZED)
  def test_quantises_special_values(self, dtype):
    special = np.float32(
      [0.0, -0.0, np.inf, -np.inf, 1e30, -1e30, 1e-30, 0.5, 1.5, 2.5, 2.0**-9,
       2.0**-10, 3 * 2.0**-10, 2.0**-16, 2.0**-17, 464.0, 465.0, 61439.0,
       61441.0, 0.99 * 2.0**-6, 127.5, -128.5]
    )  # fmt: skip
    for count in (16, special.size):
      new = jnp.asarray(special[None, None, None, :count])
      cache = jnp.ones((1, 2, 1, count), dtype)
      check((cache, cache, new, new, np.array([1])), k_scale=1.0, v_scale=1.0)
    nan = jnp.full((1, 1, 1, 16), np.nan)
    cache = jnp.ones((1, 2, 1, 16), dtype)
    got, _ = kv_cache.update(
      cache, cache, nan, nan, 1, k_scale=1.0, v_scale=1.0,
      implementation="emulated",
    )  # fmt: skip
    row = np.asarray(got)[0, 1, 0].astype(np.float32)
    assert (row == 0).all() if dtype == "int8" else np.isnan(row).all()

  @parameterized.parameters(*oracle.QUANTIZED)
  def test_quotients_are_rounded_as_those_of_a_division(self, dtype):
    # Half-way between two codes: one bit less, and it is the other one.
    scale = np.float32(0.007)
    new = jnp.asarray((np.arange(-128, 128) + 0.5) * scale, "float32")
    cache = jnp.ones((1, 2, 1, 256), dtype)
    new = new[None, None, None]
    check((cache, cache, new, -new, 1), k_scale=scale, v_scale=np.float32(0.3))

  def test_wrong_shapes_are_refused(self):
    cache = jnp.zeros((2, 4, 1, 8))
    rows = (jnp.zeros((2, 1, 1, 8)),) * 2
    one = jnp.zeros((2,), jnp.int32)
    three = jnp.zeros((3,), jnp.int32)
    with pytest.raises(
      Exception, match=r"`index` must have shape \[2\] of int32"
    ):
      jax.block_until_ready(
        ffi.update(
          cache, cache, *rows, three, one, one, one[:, None], jnp.int32(0),
          layout=layouts.Layout.BSNH, ring=0, aligned=True, uniform=(),
          target=TARGET,
        )
      )  # fmt: skip

  @parameterized.parameters(
    ("float32", "bsnh", False), ("int8", "bnsh", False),
    ("bfloat16", "bnsh", True),
  )  # fmt: skip
  def test_every_lie_is_refused_by_name(self, dtype, layout, paged):
    self.assertGreater(lies.check("emulated", dtype, layout, paged), 150)
