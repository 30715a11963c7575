"""The product of activations with a matrix of weights."""

from typing import Any

import jax

from ..common import dispatch, options
from . import checks, primitive, quantization


def matmul(
  x: Any,
  w: Any,
  bias: Any = None,
  *,
  transposed: bool = False,
  precision: Any = None,
  preferred_element_type: Any = None,
  implementation: str = dispatch.AUTO,
) -> jax.Array:
  """Multiplies rows of activations with a matrix, `x @ w + bias`.

  With few rows, as in decoding, reading the weights is what a product takes;
  the CPU's kernels do that once, in the order of memory. XLA on the CPU
  converts weights of half precision to float32 in memory first.

  Args:
    x: `[..., k]`, floating.
    w: `[k, n]`, floating, or a `QuantizedWeight`.
    bias: `[n]`, floating, or None.
    transposed: Whether `w` is `[n, k]`, as tables of embeddings are; it is read
      as it lies. Packed weights must not be: pack the transpose.
    precision: As in `jax.numpy.matmul`. The CPU's kernels multiply and sum in
      float32, which none of them asks more than.
    preferred_element_type: Dtype of the result. If None, the one that
      `jnp.matmul(x, w) + bias` has; packed weights do not count.
    implementation: "auto", or by name: "xla" or "cpu".

  Returns:
    `[..., n]`.

  Raises:
    TypeError: If an array is not floating.
    ValueError: If shapes do not match, or an option is not known.

  Numerics: the CPU's kernels multiply and sum in float32, add the bias to the
    sum and round once. Results do not depend on the number of threads.
  Batching: `jax.vmap` over x makes more rows of one product; over w, one call
    with one product more for each.
  Differentiation: forward and reverse, for x, w and bias, through XLA; of
    packed weights for the scale and the minimum.
  Sharding: rows, k and n may be split; partial sums over k cross devices in
    float32. The larger of x and w stays where it is.

  Example:
    >>> import jax.numpy as jnp
    >>> import kernels
    >>> x = jnp.array([[1.0, 2.0]])
    >>> w = jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 2.0]], jnp.bfloat16)
    >>> kernels.matmul(x, w, jnp.array([0.0, 0.0, 1.0])).tolist()
    [[1.0, 2.5, 5.0]]
  """
  primitive.MULTIPLY.check_implementation(implementation)
  x = checks.floating("x", x)
  biases = [] if bias is None else [checks.floating("bias", bias)]
  transposed = options.boolean("transposed", transposed)
  if isinstance(w, quantization.QuantizedWeight):
    quantization.check_packed("w", w)
    if transposed:
      raise ValueError(
        "`transposed` must be False for packed weights. Pack the transpose:"
        " `kernels.matmul.quantize(w.T)`."
      )
    op, weights = primitive.MULTIPLY_PACKED, jax.tree.leaves(w)
    dtypes = [x, *biases]
  else:
    w = checks.floating("w", w)
    op = primitive.MULTIPLY_TRANSPOSED if transposed else primitive.MULTIPLY
    weights, dtypes = [w], [x, w, *biases]
  checks.check_shapes(x, w.shape, biases[0] if biases else None, transposed)
  (y,) = op(
    x,
    *weights,
    *biases,
    batch_axes=0,
    dtype=checks.check_dtype(preferred_element_type, *dtypes),
    precision=checks.check_precision(precision),
    implementation=implementation,
  )
  return y
