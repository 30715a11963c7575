"""The dtype helpers, against flax.nnx."""

from flax.nnx.nn import dtypes as flax_dtypes
import jax.numpy as jnp
import numpy as np
import pytest

from nnx.nn import dtypes

VALUES = {
  "float": (jnp.ones(2), None, jnp.ones(2)),
  "half": (jnp.ones(2, jnp.bfloat16), jnp.ones(2)),
  "halves": (jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float16)),
  "ints": (jnp.arange(2), np.arange(2, dtype=np.int8)),
  "weak": (1.0, jnp.ones(2, jnp.bfloat16)),
  "all weak": (1.0, 2),
  "list": ([1, 2], jnp.ones(2, jnp.float16)),
  "complex": (jnp.ones(2, jnp.complex64), jnp.ones(2)),
  "bool": (jnp.ones(2, bool),),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, "float32", jnp.int32])
@pytest.mark.parametrize("inexact", [True, False])
def test_promotion(values, dtype, inexact):
  kwargs = {"dtype": dtype, "inexact": inexact}
  if inexact and dtype == jnp.int32:
    for promote in (dtypes.promote_dtype, flax_dtypes.promote_dtype):
      with pytest.raises(ValueError, match="inexact|floating or complex"):
        promote(values, **kwargs)
    return
  if "complex" in str(getattr(values[0], "dtype", "")) and dtype is not None:
    pytest.skip("jax warns that it drops the imaginary part")
  got = dtypes.promote_dtype(values, **kwargs)
  want = flax_dtypes.promote_dtype(values, **kwargs)
  assert len(got) == len(want)
  for a, b in zip(got, want):
    if b is None:
      assert a is None
      continue
    assert (a.dtype, a.weak_type) == (b.dtype, b.weak_type)
    np.testing.assert_array_equal(a, b)
  assert dtypes.canonicalize_dtype(
    *values, **kwargs
  ) == flax_dtypes.canonicalize_dtype(*values, **kwargs)


def test_the_error_names_the_dtype():
  message = "`dtype` must be floating or complex, but got `int32`"
  with pytest.raises(ValueError, match=message):
    dtypes.canonicalize_dtype(dtype=jnp.int32)


def test_arrays_that_fit_are_not_copied():
  x = jnp.ones(2)
  assert dtypes.promote_dtype((x,))[0] is x
