"""Recurrent cells: each does one step of a sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx.nn import checks, dtypes, initializers
from nnx.nn.cell_base import Cell, modified_orthogonal
from nnx.nn.initializers import (
  NO_METADATA,
  Initializer,
  default_kernel_init,
  default_recurrent_init,
)
from nnx.nn.linear import Linear
from nnx.rnglib import Rngs


def _linear_layers(
  cell: Any,
  rngs: Rngs,
  of_input: Mapping[str, Any],
  of_output: Mapping[str, Any],
  **options: Any,
) -> tuple[Callable[..., Linear], Callable[..., Linear]]:
  """Returns what makes the layers of a cell, of its input and its last output.

  Args:
    cell: The cell, with its sizes and dtypes.
    rngs: Gives the keys of the parameters.
    of_input: Options of the layers of the input.
    of_output: Options of the layers of the last output.
    **options: Options of both.
  """
  linear = functools.partial(
    Linear,
    dtype=cell.dtype,
    param_dtype=cell.param_dtype,
    promote_dtype=cell.promote_dtype,
    rngs=rngs,
    **options,
  )
  return (
    functools.partial(linear, cell.in_features, **of_input),
    functools.partial(linear, cell.hidden_features, **of_output),
  )


class LSTMCell(Cell):
  r"""A cell with a memory c, whose gates control keeping, writing and reading.

      i = gate_fn(x @ W_ii + h @ W_hi + b_hi)
      f = gate_fn(x @ W_if + h @ W_hf + b_hf)
      g = activation_fn(x @ W_ig + h @ W_hg + b_hg)
      o = gate_fn(x @ W_io + h @ W_ho + b_ho)
      c = f * c + i * g
      h = o * activation_fn(c)

  Source: Hochreiter and Schmidhuber 1997, "Long short-term memory".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    >>> carry = cell.initialize_carry((2, 3), nnx.Rngs(1))
    >>> carry, y = cell(carry, jnp.ones((2, 3)))
    >>> y.shape
    (2, 4)

  Args:
    in_features: k, the features of the input x.
    hidden_features: c, those of the memory and of the output h.
    gate_fn: Activation of the gates.
    activation_fn: Activation of the new content and of the output.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: The same for the kernel of the last output.
    bias_init: `(key, shape, dtype) -> bias`.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: Whether to keep a fork of the stream `carry`.
    rngs: The stream `params` gives the keys of the parameters.
    kernel_metadata: Metadata of the kernels of the input.
    recurrent_kernel_metadata: The same for the kernel of the last output.
    bias_metadata: Metadata of the biases.

  Attributes:
    ii: `Linear`, of the input; `if_`, `ig` and `io` likewise.
    hi: `Linear`, of the last output; `hf`, `hg` and `ho` likewise.
  """

  _num_carries = 2

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    gate_fn: Callable[..., Any] = jax.nn.sigmoid,
    activation_fn: Callable[..., Any] = jnp.tanh,
    kernel_init: Initializer = default_kernel_init,
    recurrent_kernel_init: Initializer = modified_orthogonal,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    carry_init: Initializer | None = None,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    keep_rngs: bool = False,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("in_features", in_features)
    checks.whole("hidden_features", hidden_features)
    self.in_features = in_features
    self.hidden_features = hidden_features
    self.gate_fn = gate_fn
    self.activation_fn = activation_fn
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype
    self.carry_init = carry_init
    self.rngs = rngs.carry.fork() if keep_rngs else None
    of_input, of_output = _linear_layers(
      self,
      rngs,
      of_input={"kernel_init": kernel_init, "kernel_metadata": kernel_metadata},
      of_output={
        "kernel_init": recurrent_kernel_init,
        "kernel_metadata": recurrent_kernel_metadata,
      },
      bias_init=bias_init,
      bias_metadata=bias_metadata,
    )
    self.ii = of_input(hidden_features, use_bias=False)
    self.if_ = of_input(hidden_features, use_bias=False)
    self.ig = of_input(hidden_features, use_bias=False)
    self.io = of_input(hidden_features, use_bias=False)
    self.hi = of_output(hidden_features)
    self.hf = of_output(hidden_features)
    self.hg = of_output(hidden_features)
    self.ho = of_output(hidden_features)

  def __call__(
    self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Does one step.

    Args:
      carry: The memory and the last output, each `[..., c]`.
      inputs: `[..., k]`.

    Returns:
      The new memory and output, and the output.
    """
    memory, h = carry
    return _lstm(
      self,
      memory,
      self.ii(inputs) + self.hi(h),
      self.if_(inputs) + self.hf(h),
      self.ig(inputs) + self.hg(h),
      self.io(inputs) + self.ho(h),
    )


def _lstm(cell, memory, i, f, g, o):
  i, f, o = cell.gate_fn(i), cell.gate_fn(f), cell.gate_fn(o)
  memory = f * memory + i * cell.activation_fn(g)
  h = o * cell.activation_fn(memory)
  return (memory, h), h


class OptimizedLSTMCell(Cell):
  r"""An `LSTMCell` whose four kernels for each input are one.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> cell = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0))
    >>> cell.dense_i.kernel.shape
    (3, 16)
    >>> carry = cell.initialize_carry((2, 3), nnx.Rngs(1))
    >>> carry, y = cell(carry, jnp.ones((2, 3)))
    >>> y.shape
    (2, 4)

  Args:
    in_features: k, the features of the input.
    hidden_features: c, those of the memory and of the output.
    gate_fn: Activation of the gates.
    activation_fn: Activation of the new content and of the output.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: The same for the kernel of the last output.
    bias_init: `(key, shape, dtype) -> bias`.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: Whether to keep a fork of the stream `carry`.
    rngs: The stream `params` gives the keys of the parameters.
    kernel_metadata: Metadata of the kernel of the input.
    recurrent_kernel_metadata: The same for the kernel of the last output.
    bias_metadata: Metadata of the bias.

  Attributes:
    dense_i: `Linear` to `[..., 4 * c]`, the gates i, f, g and o, of the input.
    dense_h: The same of the last output.
  """

  _num_carries = 2

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    gate_fn: Callable[..., Any] = jax.nn.sigmoid,
    activation_fn: Callable[..., Any] = jnp.tanh,
    kernel_init: Initializer = default_kernel_init,
    recurrent_kernel_init: Initializer = default_recurrent_init,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    carry_init: Initializer | None = None,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    keep_rngs: bool = False,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("in_features", in_features)
    checks.whole("hidden_features", hidden_features)
    self.in_features = in_features
    self.hidden_features = hidden_features
    self.gate_fn = gate_fn
    self.activation_fn = activation_fn
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype
    self.carry_init = carry_init
    self.rngs = rngs.carry.fork() if keep_rngs else None
    of_input, of_output = _linear_layers(
      self,
      rngs,
      of_input={"kernel_init": kernel_init, "kernel_metadata": kernel_metadata},
      of_output={
        "kernel_init": recurrent_kernel_init,
        "kernel_metadata": recurrent_kernel_metadata,
      },
      bias_init=bias_init,
      bias_metadata=bias_metadata,
    )
    self.dense_i = of_input(4 * hidden_features, use_bias=False)
    self.dense_h = of_output(4 * hidden_features, use_bias=True)

  def __call__(
    self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Does one step.

    Args:
      carry: The memory and the last output, each `[..., c]`.
      inputs: `[..., k]`.

    Returns:
      The new memory and output, and the output.
    """
    memory, h = carry
    gates = self.dense_i(inputs) + self.dense_h(h)
    return _lstm(self, memory, *jnp.split(gates, 4, axis=-1))


class SimpleCell(Cell):
  r"""A cell whose only memory is its output.

      h = activation_fn(x @ W_i + b_i + h @ W_h)

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> cell = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))
    >>> carry = cell.initialize_carry((2, 3), nnx.Rngs(1))
    >>> carry, y = cell(carry, jnp.ones((2, 3)))
    >>> y.shape
    (2, 4)

  Args:
    in_features: k, the features of the input x.
    hidden_features: c, those of the output h.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    residual: Whether to add the last output before `activation_fn`.
    activation_fn: Activation of the sum.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: The same for the kernel of the last output.
    bias_init: `(key, shape, dtype) -> bias`.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: Whether to keep a fork of the stream `carry`.
    rngs: The stream `params` gives the keys of the parameters.
    kernel_metadata: Metadata of the kernel of the input.
    recurrent_kernel_metadata: The same for the kernel of the last output.
    bias_metadata: Metadata of the bias.

  Attributes:
    dense_i: `Linear` of the input.
    dense_h: `Linear` of the last output, without bias.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    dtype: dtypes.Dtype = jnp.float32,
    param_dtype: dtypes.Dtype = jnp.float32,
    carry_init: Initializer | None = None,
    residual: bool = False,
    activation_fn: Callable[..., Any] = jnp.tanh,
    kernel_init: Initializer = default_kernel_init,
    recurrent_kernel_init: Initializer = default_recurrent_init,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    keep_rngs: bool = False,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("in_features", in_features)
    checks.whole("hidden_features", hidden_features)
    self.in_features = in_features
    self.hidden_features = hidden_features
    self.activation_fn = activation_fn
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.residual = residual
    self.promote_dtype = promote_dtype
    self.carry_init = carry_init
    self.rngs = rngs.carry.fork() if keep_rngs else None
    of_input, of_output = _linear_layers(
      self,
      rngs,
      of_input={"kernel_init": kernel_init, "kernel_metadata": kernel_metadata},
      of_output={
        "kernel_init": recurrent_kernel_init,
        "kernel_metadata": recurrent_kernel_metadata,
      },
      bias_init=bias_init,
      bias_metadata=bias_metadata,
    )
    # In this order: the keys come from one stream.
    self.dense_h = of_output(hidden_features, use_bias=False)
    self.dense_i = of_input(hidden_features, use_bias=True)

  def __call__(
    self, carry: jax.Array, inputs: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Does one step.

    Args:
      carry: The last output, `[..., c]`.
      inputs: `[..., k]`.

    Returns:
      The output, twice.
    """
    h = self.dense_i(inputs) + self.dense_h(carry)
    if self.residual:
      h = h + carry
    h = self.activation_fn(h)
    return h, h


class GRUCell(Cell):
  r"""A cell whose gates decide how much of its last output to keep and use.

      r = gate_fn(x @ W_ir + b_ir + h @ W_hr)
      z = gate_fn(x @ W_iz + b_iz + h @ W_hz)
      n = activation_fn(x @ W_in + b_in + r * (h @ W_hn))
      h = (1 - z) * n + z * h

  Source: Cho et al. 2014, "Learning phrase representations using RNN
  encoder-decoder".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    >>> carry = cell.initialize_carry((2, 3), nnx.Rngs(1))
    >>> carry, y = cell(carry, jnp.ones((2, 3)))
    >>> y.shape
    (2, 4)

  Args:
    in_features: k, the features of the input x.
    hidden_features: c, those of the output h.
    gate_fn: Activation of the gates r and z.
    activation_fn: Activation of n.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: The same for the kernel of the last output.
    bias_init: `(key, shape, dtype) -> bias`.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: Whether to keep a fork of the stream `carry`.
    rngs: The stream `params` gives the keys of the parameters.
    kernel_metadata: Metadata of the kernel of the input.
    recurrent_kernel_metadata: The same for the kernel of the last output.
    bias_metadata: Metadata of the bias.

  Attributes:
    dense_i: `Linear` to `[..., 3 * c]`, for r, z and n, of the input.
    dense_h: The same of the last output, without bias.
  """

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    *,
    gate_fn: Callable[..., Any] = jax.nn.sigmoid,
    activation_fn: Callable[..., Any] = jnp.tanh,
    kernel_init: Initializer = default_kernel_init,
    recurrent_kernel_init: Initializer = default_recurrent_init,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    carry_init: Initializer | None = None,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    keep_rngs: bool = False,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    recurrent_kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("in_features", in_features)
    checks.whole("hidden_features", hidden_features)
    self.in_features = in_features
    self.hidden_features = hidden_features
    self.gate_fn = gate_fn
    self.activation_fn = activation_fn
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype
    self.carry_init = carry_init
    self.rngs = rngs.carry.fork() if keep_rngs else None
    of_input, of_output = _linear_layers(
      self,
      rngs,
      of_input={"kernel_init": kernel_init, "kernel_metadata": kernel_metadata},
      of_output={
        "kernel_init": recurrent_kernel_init,
        "kernel_metadata": recurrent_kernel_metadata,
      },
      bias_init=bias_init,
      bias_metadata=bias_metadata,
    )
    self.dense_i = of_input(3 * hidden_features, use_bias=True)
    self.dense_h = of_output(3 * hidden_features, use_bias=False)

  def __call__(
    self, carry: jax.Array, inputs: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Does one step.

    Args:
      carry: The last output, `[..., c]`.
      inputs: `[..., k]`.

    Returns:
      The output, twice.
    """
    x_r, x_z, x_n = jnp.split(self.dense_i(inputs), 3, axis=-1)
    h_r, h_z, h_n = jnp.split(self.dense_h(carry), 3, axis=-1)
    r, z = self.gate_fn(x_r + h_r), self.gate_fn(x_z + h_z)
    n = self.activation_fn(x_n + r * h_n)
    h = (1.0 - z) * n + z * carry
    return h, h
