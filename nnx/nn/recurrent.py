"""Recurrent cells, and the layers that run them over sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx import filterlib
from nnx.graphlib import functional
from nnx.module import Module
from nnx.nn import checks, dtypes, initializers
from nnx.nn.initializers import (
  NO_METADATA,
  Initializer,
  default_kernel_init,
  default_recurrent_init,
  initialize,
)
from nnx.nn.linear import Linear
from nnx.rnglib import Rngs, RngState, RngStream, restore_rngs, split_rngs
from nnx.transforms.carry import Carry
from nnx.transforms.scan import scan
from nnx.transforms.vmap import StateAxes


def modified_orthogonal(
  key: jax.Array, shape: tuple[int, ...], dtype: dtypes.Dtype = jnp.float32
) -> jax.Array:
  """An orthogonal matrix, made in float32, in any dtype.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from nnx.nn.recurrent import modified_orthogonal
    >>> modified_orthogonal(jax.random.key(0), (4, 4), jnp.bfloat16).dtype
    dtype(bfloat16)

  Args:
    key: `[]`, a random key.
    shape: the shape of the matrix.
    dtype: its dtype.

  Returns:
    The matrix.
  """
  matrix = initialize(default_recurrent_init, key, shape, jnp.float32)
  return matrix.astype(dtype)


class RNNCellBase(Module):
  """What `RNN` needs of a cell; a base for cells of one's own.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Sum(nnx.RNNCellBase):
    ...   num_feature_axes = 1
    ...
    ...   def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    ...     return jnp.zeros(input_shape)
    ...
    ...   def __call__(self, carry, inputs):
    ...     return carry + inputs, carry + inputs
    >>> nnx.RNN(Sum())(jnp.ones((1, 3, 1)))[0, :, 0]
    Array([1., 2., 3.], dtype=float32)
  """

  def initialize_carry(
    self,
    input_shape: tuple[int, ...],
    rngs: Rngs | RngStream | None = None,
    carry_init: Initializer | None = None,
  ) -> Any:
    """Makes the carry to start with.

    Args:
      input_shape: the shape of the input of one step.
      rngs: where `carry_init` gets its keys from.
      carry_init: `(key, shape, dtype) -> carry`.

    Returns:
      A pytree of arrays.
    """
    raise NotImplementedError(
      f"`{type(self).__name__}` must define `initialize_carry(input_shape,"
      " rngs, carry_init)`."
    )

  def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
    """Does one step.

    Args:
      carry: of the step before.
      inputs: of this step.

    Returns:
      The new carry, and the output of this step.
    """
    raise NotImplementedError(
      f"`{type(self).__name__}` must define `__call__(carry, inputs)`."
    )

  @property
  def num_feature_axes(self) -> int:
    """How many of the last axes of the inputs are no batch axes."""
    raise NotImplementedError(
      f"`{type(self).__name__}` must define `num_feature_axes`."
    )


class _Cell(RNNCellBase):
  """What the cells of this file share: settings, and arrays as carry."""

  _num_carries = 1

  def _set_up(self, settings: Mapping[str, Any]) -> None:
    rngs, keep_rngs = settings["rngs"], settings["keep_rngs"]
    checks.whole("in_features", settings["in_features"])
    checks.whole("hidden_features", settings["hidden_features"])
    for name in (
      "in_features",
      "hidden_features",
      "gate_fn",
      "activation_fn",
      "dtype",
      "param_dtype",
      "residual",
      "promote_dtype",
      "carry_init",
    ):
      if name in settings:
        setattr(self, name, settings[name])
    self.rngs = rngs.carry.fork() if keep_rngs else None

  def _input_layer(self, settings, features, use_bias):
    return self._layer(settings, self.in_features, features, use_bias, "kernel")

  def _hidden_layer(self, settings, features, use_bias):
    return self._layer(
      settings, self.hidden_features, features, use_bias, "recurrent_kernel"
    )

  def _layer(self, settings, in_features, out_features, use_bias, kernel):
    return Linear(
      in_features,
      out_features,
      use_bias=use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=settings[f"{kernel}_init"],
      bias_init=settings["bias_init"],
      promote_dtype=self.promote_dtype,
      rngs=settings["rngs"],
      kernel_metadata=settings[f"{kernel}_metadata"],
      bias_metadata=settings["bias_metadata"],
    )

  def initialize_carry(
    self,
    input_shape: tuple[int, ...],
    rngs: Rngs | RngStream | None = None,
    carry_init: Initializer | None = None,
  ) -> Any:
    """Makes the carry to start with.

    Example:

      >>> import nnx
      >>> cell = nnx.GRUCell(3, 2, rngs=nnx.Rngs(0))
      >>> cell.initialize_carry((1, 3))
      Array([[0., 0.]], dtype=float32)

    Args:
      input_shape: `(..., in_features)`, of the input of one step.
      rngs: its stream `carry`, or this stream, gives the keys; the cell's own,
        if None. Not needed for zeros and what else takes no key.
      carry_init: `(key, shape, dtype) -> array`; the cell's, if None, and
        without any zeros.

    Returns:
      `[..., hidden_features]`, or for an LSTM the pair of memory and output.

    Raises:
      ValueError: if `carry_init` takes keys and neither the call nor the cell
        has `rngs`.
    """
    rngs = self.rngs if rngs is None else rngs
    if isinstance(rngs, Rngs):
      rngs = rngs.carry
    carry_init = carry_init or self.carry_init or initializers.zeros
    shape = (*input_shape[:-1], self.hidden_features)
    try:
      carries = tuple(
        initialize(
          carry_init,
          None if rngs is None else rngs(),
          shape,
          self.param_dtype,
        )
        for _ in range(self._num_carries)
      )
    except TypeError as error:
      if rngs is not None:
        raise
      # jax refuses None as a key.
      raise ValueError(
        "`initialize_carry` must have `rngs` for a `carry_init` that takes"
        " keys, but they are None in the call and in the cell, and it raised:"
        f" {error}. Pass `rngs=nnx.Rngs(seed)`."
      ) from error
    return carries if len(carries) > 1 else carries[0]

  @property
  def num_feature_axes(self) -> int:
    """How many of the last axes of the inputs are no batch axes: 1."""
    return 1


class LSTMCell(_Cell):
  r"""A cell with a memory c, which gates decide to keep, write and read.

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
    gate_fn: of the gates.
    activation_fn: of what is written and read.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: the same of the output of the step before.
    bias_init: `(key, shape, dtype) -> bias`.
    dtype: the dtype to compute in; of inputs and parameters, if None.
    param_dtype: the dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: whether to keep a fork of the stream `carry`.
    rngs: the stream `params` gives the keys of the parameters.
    kernel_metadata: metadata of the kernels of the input.
    recurrent_kernel_metadata: the same of the output of the step before.
    bias_metadata: metadata of the biases.

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
    settings = dict(locals())
    self._set_up(settings)
    for name in ("ii", "if_", "ig", "io"):
      setattr(self, name, self._input_layer(settings, hidden_features, False))
    for name in ("hi", "hf", "hg", "ho"):
      setattr(self, name, self._hidden_layer(settings, hidden_features, True))

  def __call__(
    self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Does one step.

    Args:
      carry: the memory and the last output, each `[..., c]`.
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


class OptimizedLSTMCell(_Cell):
  r"""An `LSTMCell` with the four kernels of each input in one.

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
    gate_fn: of the gates.
    activation_fn: of what is written and read.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: the same of the output of the step before.
    bias_init: `(key, shape, dtype) -> bias`.
    dtype: the dtype to compute in; of inputs and parameters, if None.
    param_dtype: the dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: whether to keep a fork of the stream `carry`.
    rngs: the stream `params` gives the keys of the parameters.
    kernel_metadata: metadata of the kernel of the input.
    recurrent_kernel_metadata: the same of the output of the step before.
    bias_metadata: metadata of the bias.

  Attributes:
    dense_i: `Linear` to `[..., 4 * c]`, the gates i, f, g and o, of the input.
    dense_h: the same of the last output.
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
    settings = dict(locals())
    self._set_up(settings)
    self.dense_i = self._input_layer(settings, 4 * hidden_features, False)
    self.dense_h = self._hidden_layer(settings, 4 * hidden_features, True)

  def __call__(
    self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Does one step.

    Args:
      carry: the memory and the last output, each `[..., c]`.
      inputs: `[..., k]`.

    Returns:
      The new memory and output, and the output.
    """
    memory, h = carry
    gates = self.dense_i(inputs) + self.dense_h(h)
    return _lstm(self, memory, *jnp.split(gates, 4, axis=-1))


class SimpleCell(_Cell):
  r"""A cell whose output is all that it remembers.

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
    dtype: the dtype to compute in; of inputs and parameters, if None.
    param_dtype: the dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    residual: whether to add the last output before `activation_fn`.
    activation_fn: of the sum.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: the same of the output of the step before.
    bias_init: `(key, shape, dtype) -> bias`.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: whether to keep a fork of the stream `carry`.
    rngs: the stream `params` gives the keys of the parameters.
    kernel_metadata: metadata of the kernel of the input.
    recurrent_kernel_metadata: the same of the output of the step before.
    bias_metadata: metadata of the bias.

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
    settings = dict(locals())
    self._set_up(settings)
    # In this order: the keys come from one stream.
    self.dense_h = self._hidden_layer(settings, hidden_features, False)
    self.dense_i = self._input_layer(settings, hidden_features, True)

  def __call__(
    self, carry: jax.Array, inputs: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Does one step.

    Args:
      carry: the last output, `[..., c]`.
      inputs: `[..., k]`.

    Returns:
      The output, twice.
    """
    h = self.dense_i(inputs) + self.dense_h(carry)
    if self.residual:
      h = h + carry
    h = self.activation_fn(h)
    return h, h


class GRUCell(_Cell):
  r"""A cell whose gates decide how much of its output to keep and to use.

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
    gate_fn: of the gates r and z.
    activation_fn: of n.
    kernel_init: `(key, shape, dtype) -> kernel` of the input.
    recurrent_kernel_init: the same of the output of the step before.
    bias_init: `(key, shape, dtype) -> bias`.
    dtype: the dtype to compute in; of inputs and parameters, if None.
    param_dtype: the dtype of the parameters and of the carry.
    carry_init: `(key, shape, dtype) -> array`, of the carry; zeros, if None.
    promote_dtype: `promote_dtype` of the linear layers.
    keep_rngs: whether to keep a fork of the stream `carry`.
    rngs: the stream `params` gives the keys of the parameters.
    kernel_metadata: metadata of the kernel of the input.
    recurrent_kernel_metadata: the same of the output of the step before.
    bias_metadata: metadata of the bias.

  Attributes:
    dense_i: `Linear` to `[..., 3 * c]`, for r, z and n, of the input.
    dense_h: the same of the last output, without bias.
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
    settings = dict(locals())
    self._set_up(settings)
    self.dense_i = self._input_layer(settings, 3 * hidden_features, True)
    self.dense_h = self._hidden_layer(settings, 3 * hidden_features, False)

  def __call__(
    self, carry: jax.Array, inputs: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Does one step.

    Args:
      carry: the last output, `[..., c]`.
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


def flip_sequences(
  inputs: jax.Array,
  seq_lengths: jax.Array | None,
  num_batch_dims: int,
  time_major: bool,
) -> jax.Array:
  """Reverses sequences, each within its own length.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.recurrent import flip_sequences
    >>> x = jnp.array([[1, 2, 0], [3, 4, 5]])
    >>> flip_sequences(x, jnp.array([2, 3]), 1, False).tolist()
    [[2, 1, 0], [5, 4, 3]]

  Args:
    inputs: `[*batch, time, ...]`, or `[time, *batch, ...]`.
    seq_lengths: `[*batch]`, integers, how long each sequence is; the rest is
      padding, which goes to the end in reverse order as well. All are as long
      as the axis, if None.
    num_batch_dims: how many axes `batch` has.
    time_major: whether time comes first.

  Returns:
    An array of the shape of `inputs`.
  """
  axis = 0 if time_major else num_batch_dims
  if seq_lengths is None:
    return jnp.flip(inputs, axis)
  steps = inputs.shape[axis]
  shape = [1] * (num_batch_dims + 1)
  shape[axis] = steps
  backwards = jnp.arange(steps - 1, -1, -1).reshape(shape)
  positions = (backwards + jnp.expand_dims(seq_lengths, axis)) % steps
  features = range(num_batch_dims + 1, inputs.ndim)
  return jnp.take_along_axis(
    inputs, jnp.expand_dims(positions, tuple(features)), axis
  )


def _last_carry(carries: Any, seq_lengths: jax.Array) -> Any:
  """The carries `[time, *batch, ...]` at the ends of the sequences."""

  def pick(x):
    last = jnp.expand_dims(seq_lengths - 1, 0)
    last = jnp.expand_dims(last, tuple(range(last.ndim, x.ndim)))
    return jnp.take_along_axis(x, last, 0)[0]

  return jax.tree.map(pick, carries)


def _streams(cell: Any, only: filterlib.Filter) -> list[tuple[Any, ...]]:
  """The streams of a cell that a filter selects, with their keys and counts."""
  if only is None:
    return []
  selects = filterlib.to_predicate(only)
  return [
    (value, value.key.value, value.count.value)
    for path, value in functional.iter_graph(cell)
    if isinstance(value, RngStream) and selects((*path, "key"), value.key)
  ]


def _carry_stream(rngs: Rngs | RngStream | bool | None) -> RngStream | None:
  if rngs is True or rngs is None:
    return RngStream(0, tag="carry")
  if rngs is False:
    return None
  if isinstance(rngs, Rngs):
    return rngs.carry.fork()
  if isinstance(rngs, RngStream):
    return rngs
  raise TypeError(
    "`rngs` must be a `Rngs`, a `RngStream` or a bool, but got a"
    f" `{type(rngs).__name__}`. Pass `rngs=nnx.Rngs(seed)`."
  )


class RNN(Module):
  """Runs a cell over sequences, by `nnx.scan`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))
    >>> layer(jnp.ones((2, 7, 3))).shape
    (2, 7, 4)

  Args:
    cell: the cell.
    time_major: whether time is the first axis, not the last before features.
    return_carry: whether to return the last carry too.
    reverse: whether to start at the end.
    keep_order: whether outputs of a reversed run keep the order of the inputs.
    unroll: how many steps to unroll in one, as in `jax.lax.scan`.
    state_axes: filters of the cell's Variables with an axis that is scanned,
      `nnx.Carry`, or None for what is the same for all steps; all are carried,
      if None.
    broadcast_rngs: a filter of the cell's random streams that give the same
      keys in each step.
    rngs: where the keys of the first carry come from: a fork of the stream
      `carry`, this stream, if True, or None as in Flax 0.10, one of the seed 0,
      if False what each call brings.
  """

  def __init__(
    self,
    cell: RNNCellBase,
    *,
    time_major: bool = False,
    return_carry: bool = False,
    reverse: bool = False,
    keep_order: bool = False,
    unroll: int = 1,
    state_axes: Mapping[str, Any] | None = None,
    broadcast_rngs: filterlib.Filter = None,
    rngs: Rngs | RngStream | bool | None = True,
  ):
    checks.whole("unroll", unroll, 0 if unroll is False else 1)
    self.cell = cell
    self.time_major = time_major
    self.return_carry = return_carry
    self.reverse = reverse
    self.keep_order = keep_order
    self.unroll = unroll
    self.state_axes = StateAxes(state_axes or {...: Carry})
    self.broadcast_rngs = broadcast_rngs
    self.rngs = _carry_stream(rngs)

  def __call__(
    self,
    inputs: jax.Array,
    *,
    initial_carry: Any = None,
    seq_lengths: jax.Array | None = None,
    return_carry: bool | None = None,
    time_major: bool | None = None,
    reverse: bool | None = None,
    keep_order: bool | None = None,
    rngs: Rngs | RngStream | None = None,
  ) -> Any:
    """Runs the cell.

    Args:
      inputs: `[*batch, time, *features]`, or `[time, *batch, *features]`.
      initial_carry: what to start with; the cell's, if None.
      seq_lengths: `[*batch]`, integers, how long each sequence is. The steps
        after that are run but do not count in the carry that is returned, and
        stay at the end in a reversed run.
      return_carry: in place of the layer's, if not None.
      time_major: likewise.
      reverse: likewise.
      keep_order: likewise.
      rngs: likewise; of a `Rngs`, a fork of the stream `carry`.

    Returns:
      The outputs of all steps, with time where it was; or the last carry and
      these.
    """
    return_carry = self.return_carry if return_carry is None else return_carry
    time_major = self.time_major if time_major is None else time_major
    reverse = self.reverse if reverse is None else reverse
    keep_order = self.keep_order if keep_order is None else keep_order
    batch = inputs.ndim - self.cell.num_feature_axes - 1
    axis = 0 if time_major else batch

    def flip(x):
      return flip_sequences(x, seq_lengths, batch, time_major)

    if reverse:
      inputs = jax.tree.map(flip, inputs)
    carry = initial_carry
    if carry is None:
      if rngs is None:
        rngs = self.rngs
      elif isinstance(rngs, Rngs):
        rngs = rngs.carry.fork()
      shape = inputs.shape[:axis] + inputs.shape[axis + 1 :]
      carry = self.cell.initialize_carry(shape, rngs)
    every_carry = seq_lengths is not None and return_carry
    steps = _steps(
      tuple(self.state_axes.items()),
      self.broadcast_rngs,
      axis,
      every_carry,
      self.unroll,
    )
    if self.broadcast_rngs is None:
      carry, outputs = steps(self.cell, carry, inputs)
    else:
      # Keys that are the same in all steps, but not in all calls.
      with split_rngs(
        self.cell,
        splits=1,
        only=self.broadcast_rngs,
        squeeze=True,
        graph=True,
        graph_updates=True,
      ):
        carry, outputs = steps(self.cell, carry, inputs)
    if every_carry:
      carries, outputs = outputs
      carry = _last_carry(carries, seq_lengths)
    if reverse and keep_order:
      outputs = jax.tree.map(flip, outputs)
    return (carry, outputs) if return_carry else outputs


def _make_steps(state_axes, broadcast_rngs, axis, every_carry, unroll):
  """A function that runs a cell over an axis of its inputs."""

  @scan(
    in_axes=(
      StateAxes([(filterlib.All(RngState, broadcast_rngs), None), *state_axes]),
      Carry,
      axis,
    ),
    out_axes=(Carry, (0, axis) if every_carry else axis),
    unroll=unroll,
  )
  def steps(cell, carry, x):
    backups = _streams(cell, broadcast_rngs)
    carry, y = cell(carry, x)
    restore_rngs(backups)
    return carry, (carry, y) if every_carry else y

  return steps


# By type as well: to unroll 1 step is not to unroll all of them, True.
_kept_steps = functools.lru_cache(maxsize=256, typed=True)(_make_steps)


def _steps(*options: Any) -> Callable[..., Any]:
  """The same function for the same options, so that it is compiled once."""
  try:
    return _kept_steps(*options)
  except TypeError:  # A filter that has no hash, such as a list.
    return _make_steps(*options)


def _concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.concatenate([a, b], axis=-1)


class Bidirectional(Module):
  """Runs one layer forwards and one backwards, and joins what they put out.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = nnx.Bidirectional(
    ...   nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)),
    ...   nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)),
    ... )
    >>> layer(jnp.ones((2, 7, 3))).shape
    (2, 7, 8)

  Args:
    forward_rnn: an `RNN`, or what is called like one.
    backward_rnn: the same; with one object in both places, both directions
      share its parameters.
    merge_fn: of the outputs of both, which have one order; concatenates them
      along the last axis by default.
    time_major: whether time is the first axis, not the last before features.
    return_carry: whether to return the last carries too.
    rngs: where the keys of the first carries come from, as in `RNN`.
  """

  def __init__(
    self,
    forward_rnn: Any,
    backward_rnn: Any,
    *,
    merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = _concatenate,
    time_major: bool = False,
    return_carry: bool = False,
    rngs: Rngs | RngStream | bool | None = True,
  ):
    self.forward_rnn = forward_rnn
    self.backward_rnn = backward_rnn
    self.merge_fn = merge_fn
    self.time_major = time_major
    self.return_carry = return_carry
    self.rngs = _carry_stream(rngs)

  def __call__(
    self,
    inputs: jax.Array,
    *,
    initial_carry: tuple[Any, Any] | None = None,
    rngs: Rngs | RngStream | None = None,
    seq_lengths: jax.Array | None = None,
    return_carry: bool | None = None,
    time_major: bool | None = None,
    reverse: bool | None = None,
    keep_order: bool | None = None,
  ) -> Any:
    """Runs both layers.

    Args:
      inputs: `[*batch, time, *features]`, or `[time, *batch, *features]`.
      initial_carry: what both start with; their own, if None.
      rngs: in place of the layer's, if not None.
      seq_lengths: `[*batch]`, integers, how long each sequence is.
      return_carry: in place of the layer's, if not None.
      time_major: likewise.
      reverse: without effect, since both directions are run; so that the layer
        can be called like an `RNN`.
      keep_order: likewise.

    Returns:
      The joined outputs of all steps; or the last carries and these.
    """
    del reverse, keep_order
    time_major = self.time_major if time_major is None else time_major
    return_carry = self.return_carry if return_carry is None else return_carry
    if rngs is None:
      rngs = self.rngs
    if isinstance(rngs, Rngs):
      rngs = rngs.carry
    forward, backward = (None, None) if initial_carry is None else initial_carry
    forward, outputs = self.forward_rnn(
      inputs,
      initial_carry=forward,
      rngs=rngs,
      seq_lengths=seq_lengths,
      return_carry=True,
      time_major=time_major,
      reverse=False,
    )
    backward, others = self.backward_rnn(
      inputs,
      initial_carry=backward,
      rngs=rngs,
      seq_lengths=seq_lengths,
      return_carry=True,
      time_major=time_major,
      reverse=True,
      keep_order=True,
    )
    outputs = jax.tree.map(self.merge_fn, outputs, others)
    return ((forward, backward), outputs) if return_carry else outputs
