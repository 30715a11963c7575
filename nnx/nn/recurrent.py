"""Layers that run recurrent cells over sequences; the cells are in `cells`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx import filterlib
from nnx.graphlib import traversal
from nnx.module import Module
from nnx.nn import checks
from nnx.nn.cell_base import RNNCellBase as RNNCellBase
from nnx.nn.cell_base import modified_orthogonal as modified_orthogonal
from nnx.nn.cells import GRUCell as GRUCell
from nnx.nn.cells import LSTMCell as LSTMCell
from nnx.nn.cells import OptimizedLSTMCell as OptimizedLSTMCell
from nnx.nn.cells import SimpleCell as SimpleCell
from nnx.nn.initializers import default_kernel_init as default_kernel_init
from nnx.rnglib import Rngs, RngState, RngStream, restore_rngs, split_rngs
from nnx.transforms.carry import Carry
from nnx.transforms.scan import scan
from nnx.transforms.vmap import StateAxes


def _checked_lengths(
  seq_lengths: Any, batch: tuple[int, ...], steps: int
) -> jax.Array:
  """Returns lengths of sequences, each between 0 and the steps.

  Under a trace, one that is not becomes one more than the steps, for which
  there is nothing to take: NaN.
  """
  lengths = jnp.asarray(seq_lengths)
  if not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise TypeError(
      f"`seq_lengths` must be integers, but got `{lengths.dtype}`. Convert"
      " them: `seq_lengths.astype(int)`."
    )
  if lengths.shape != batch:
    raise ValueError(
      f"`seq_lengths` must have the shape {batch}, that of the batch, but got"
      f" {lengths.shape}. Give the length of each sequence."
    )
  lengths = lengths.astype(jnp.int32)
  fits = (lengths >= 0) & (lengths <= steps)
  if not isinstance(fits, jax.core.Tracer) and not fits.all():
    raise ValueError(
      f"`seq_lengths` must lie between 0 and {steps}, the steps of the inputs,"
      f" but got {lengths}."
    )
  return jnp.where(fits, lengths, steps + 1)


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
    seq_lengths: `[*batch]`, integers, the length of each sequence; the rest is
      padding, which goes to the end in reverse order as well. All are as long
      as the axis, if None. Under a trace, what comes of a length that cannot be
      is NaN.
    num_batch_dims: How many axes `batch` has.
    time_major: Whether time comes first.

  Returns:
    An array of the shape of `inputs`.

  Raises:
    TypeError: If the lengths are not integers.
    ValueError: If they have another shape, are negative or longer than the
      axis.
  """
  axis = 0 if time_major else num_batch_dims
  if seq_lengths is not None:
    sizes = inputs.shape[: num_batch_dims + 1]
    seq_lengths = _checked_lengths(
      seq_lengths, sizes[:axis] + sizes[axis + 1 :], sizes[axis]
    )
  return _flipped(inputs, seq_lengths, num_batch_dims, axis)


def _flipped(
  inputs: jax.Array,
  seq_lengths: jax.Array | None,
  num_batch_dims: int,
  axis: int,
) -> jax.Array:
  """Reverses sequences along an axis; the lengths are checked."""
  if seq_lengths is None:
    return jnp.flip(inputs, axis)
  steps = inputs.shape[axis]
  shape = [1] * (num_batch_dims + 1)
  shape[axis] = steps
  backwards = jnp.arange(steps - 1, -1, -1).reshape(shape)
  lengths = jnp.expand_dims(seq_lengths, axis)
  positions = (backwards + lengths) % max(steps, 1)
  positions = jnp.where(lengths > steps, steps, positions)
  features = range(num_batch_dims + 1, inputs.ndim)
  return jnp.take_along_axis(
    inputs, jnp.expand_dims(positions, tuple(features)), axis
  )


def _last_carry(first: Any, carries: Any, seq_lengths: jax.Array) -> Any:
  """Returns the carries of `[time, *batch, ...]` at the ends of sequences.

  An empty sequence ends with the first carry.
  """

  def pick(first, x):
    lengths = jnp.expand_dims(
      seq_lengths, tuple(range(seq_lengths.ndim, x.ndim - 1))
    )
    last = jnp.take_along_axis(x, lengths[None] - 1, 0)[0]
    return jnp.where(lengths == 0, first, last)

  return jax.tree.map(pick, first, carries)


def _streams(cell: Any, only: filterlib.Filter) -> list[tuple[Any, ...]]:
  """Returns the streams that a filter selects, with their keys and counts."""
  if only is None:
    return []
  selects = filterlib.to_predicate(only)
  return [
    (value, value.key.value, value.count.value)
    for path, value in traversal.iter_graph(cell, graph=True)
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
    cell: The cell.
    time_major: Whether time is the first axis, not the last before features.
    return_carry: Whether to return the last carry too.
    reverse: Whether to run from the end to the start.
    keep_order: Whether outputs of a reversed run keep the order of the inputs.
    unroll: How many steps to unroll in one, as in `jax.lax.scan`.
    state_axes: Filters of the cell's Variables with an axis that is scanned,
      `nnx.Carry`, or None for what is the same for all steps; all are carried,
      if None.
    broadcast_rngs: A filter of the cell's random streams that give the same
      keys in every step.
    rngs: The source of the keys of the first carry: a `Rngs`, of whose stream
      `carry` a fork is kept; a stream; True, or None as in Flax 0.10, for a
      stream of the seed 0; False, if each call brings its own.
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
    state_axes: Mapping[Any, Any] | None = None,
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
      initial_carry: The carry to start with; that of the cell, if None.
      seq_lengths: `[*batch]`, integers, the length of each sequence. Later
        steps are run, but do not count in the carry that is returned, and stay
        at the end in a reversed run. Of an empty sequence it is the first one.
        Under a trace, what comes of a length that cannot be is NaN.
      return_carry: Overrides that of the layer, if not None.
      time_major: Likewise.
      reverse: Likewise.
      keep_order: Likewise.
      rngs: Likewise; of a `Rngs`, a fork of the stream `carry`.

    Returns:
      The outputs of all steps, with time where it was; or the last carry and
      these.

    Raises:
      TypeError: If `seq_lengths` are not integers.
      ValueError: If they have another shape, are negative or longer than the
        axis.
    """
    return_carry = self.return_carry if return_carry is None else return_carry
    time_major = self.time_major if time_major is None else time_major
    reverse = self.reverse if reverse is None else reverse
    keep_order = self.keep_order if keep_order is None else keep_order
    batch = inputs.ndim - self.cell.num_feature_axes - 1
    axis = 0 if time_major else batch

    shape = inputs.shape[:axis] + inputs.shape[axis + 1 :]
    if seq_lengths is not None:
      seq_lengths = _checked_lengths(
        seq_lengths, shape[:batch], inputs.shape[axis]
      )

    def flip(x):
      return _flipped(x, seq_lengths, batch, axis)

    if reverse:
      inputs = jax.tree.map(flip, inputs)
    carry = initial_carry
    if carry is None:
      if rngs is None:
        rngs = self.rngs
      elif isinstance(rngs, Rngs):
        rngs = rngs.carry.fork()
      carry = self.cell.initialize_carry(shape, rngs)
    every_carry = seq_lengths is not None and return_carry
    steps = _steps(
      tuple(self.state_axes.items()),
      self.broadcast_rngs,
      axis,
      every_carry,
      self.unroll,
    )
    first = carry
    if self.broadcast_rngs is None:
      carry, outputs = steps(self.cell, carry, inputs)
    else:
      # The keys are the same in all steps of a call, and differ between calls.
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
      assert seq_lengths is not None
      carry = _last_carry(first, carries, seq_lengths)
    if reverse and keep_order:
      outputs = jax.tree.map(flip, outputs)
    return (carry, outputs) if return_carry else outputs


def _make_steps(state_axes, broadcast_rngs, axis, every_carry, unroll):
  """Makes a function that runs a cell over an axis of its inputs."""

  @scan(
    in_axes=(
      StateAxes([(filterlib.All(RngState, broadcast_rngs), None), *state_axes]),
      Carry,
      axis,
    ),
    out_axes=(Carry, (0, axis) if every_carry else axis),
    unroll=unroll,
    graph=True,
    graph_updates=True,
  )
  def steps(cell, carry, x):
    backups = _streams(cell, broadcast_rngs)
    carry, y = cell(carry, x)
    restore_rngs(backups)
    return carry, (carry, y) if every_carry else y

  return steps


# Typed, as `unroll=1` and `unroll=True` compare equal.
_kept_steps = functools.lru_cache(maxsize=256, typed=True)(_make_steps)


def _steps(*options: Any) -> Callable[..., Any]:
  """Returns one function for the same options, so that it is compiled once."""
  try:
    return _kept_steps(*options)
  except TypeError:  # A filter that has no hash, such as a list.
    return _make_steps(*options)


def _concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.concatenate([a, b], axis=-1)


class Bidirectional(Module):
  """Runs one layer forwards and one backwards, and joins their outputs.

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
    forward_rnn: An `RNN`, or a layer that is called like one.
    backward_rnn: The same; with one object in both places, both directions
      share its parameters.
    merge_fn: Of the outputs of both, which have one order; concatenates them
      along the last axis by default.
    time_major: Whether time is the first axis, not the last before features.
    return_carry: Whether to return the last carries too.
    rngs: The source of the keys of the first carries, as in `RNN`.
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
      initial_carry: The carries to start with; those of the layers, if None.
      rngs: Overrides that of the layer, if not None.
      seq_lengths: `[*batch]`, integers, the length of each sequence.
      return_carry: Overrides that of the layer, if not None.
      time_major: Likewise.
      reverse: Has no effect, as both directions are run; it lets the layer be
        called like an `RNN`.
      keep_order: Likewise.

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
