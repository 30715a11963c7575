"""Recurrent cells and layers, against flax.nnx."""

from flax import nnx as flax_nnx
from flax.nnx.nn import recurrent as flax_recurrent
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.nn import recurrent
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import Own, array

HALF = jnp.bfloat16
CELLS = ("LSTMCell", "OptimizedLSTMCell", "SimpleCell", "GRUCell")


def in_float32(args, /, *, dtype=None, inexact=True):
  del dtype, inexact
  return tuple(x if x is None else jnp.asarray(x, jnp.float32) for x in args)


OPTIONS = {
  "plain": {},
  "activation": {"activation_fn": jax.nn.relu},
  "gate": {"gate_fn": jax.nn.hard_sigmoid},
  "residual": {"residual": True},
  "initializers": {
    "kernel_init": jax.nn.initializers.normal(),
    "recurrent_kernel_init": jax.nn.initializers.he_normal(),
    "bias_init": jax.nn.initializers.ones,
  },
  "dtype": {"dtype": HALF},
  "promote_dtype": {"dtype": HALF, "promote_dtype": in_float32},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", CELLS)
def test_cells(name, options):
  if ("gate_fn" in options and name == "SimpleCell") or (
    "residual" in options and name != "SimpleCell"
  ):
    pytest.skip(f"{name} has no such option")
  pair = comparison.pair(name, 3, 4, **options)
  if any("init" in option for option in options):
    return  # the parameters are the same: nothing else depends on these
  carry = (array(2, 4, seed=1), array(2, 4, seed=2))
  rtol = 2e-2 if HALF in list(options.values()) else 5e-5

  def call(layer, x, c, h):
    return layer((c, h) if "LSTM" in name else c + h, x)

  comparison.assert_same(*pair, array(2, 3), *carry, rtol=rtol, call=call)


@pytest.mark.parametrize("name", CELLS)
def test_carries(name):
  ours, theirs = comparison.pair(name, 3, 4)
  for init in (None, jax.nn.initializers.normal()):
    got, want = (
      layer.initialize_carry((2, 5, 3), library.Rngs(7), init)
      for library, layer in ((nnx, ours), (flax_nnx, theirs))
    )
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
      np.testing.assert_array_equal(a, b)
  assert ours.num_feature_axes == theirs.num_feature_axes == 1
  with pytest.raises(ValueError, match="`initialize_carry` must have `rngs`"):
    ours.initialize_carry((2, 3), carry_init=jax.nn.initializers.normal())
  with pytest.raises(ValueError):
    theirs.initialize_carry((2, 3), carry_init=jax.nn.initializers.normal())


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
  ("init", "value"),
  [
    (None, 0),
    (jax.nn.initializers.ones, 1),
    (jax.nn.initializers.constant(3), 3),
  ],
)
def test_carries_that_take_no_keys_need_no_streams(name, init, value):
  # As Flax 0.10's cells, which kept the streams that they were made with.
  cell = getattr(nnx, name)(3, 4, carry_init=init, rngs=nnx.Rngs(0))
  for carry in (
    cell.initialize_carry((2, 3)),
    cell.initialize_carry((2, 3), cell.rngs),
  ):
    leaves = jax.tree.leaves(carry)
    assert len({id(leaf) for leaf in leaves}) == len(leaves)
    for leaf in leaves:
      np.testing.assert_array_equal(leaf, jnp.full((2, 4), value))


def test_errors_of_initializers_with_keys_stay_as_they_are():
  cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match="argument"):
    cell.initialize_carry((2, 3), nnx.Rngs(0), lambda key: key)


@pytest.mark.parametrize("name", CELLS)
def test_cells_may_keep_streams_and_initializers(name):
  # flax.nnx warns of both, and does the same.
  cell = getattr(nnx, name)(
    3,
    4,
    keep_rngs=True,
    carry_init=jax.nn.initializers.ones,
    rngs=nnx.Rngs(0),
  )
  for carry in jax.tree.leaves(cell.initialize_carry((2, 3))):
    np.testing.assert_array_equal(carry, jnp.ones((2, 4)))
  assert "rngs" in nnx.state(cell, nnx.RngState)


@pytest.mark.parametrize("name", CELLS)
def test_metadata_reaches_the_parameters(name):
  cell = getattr(nnx, name)(
    3,
    4,
    kernel_metadata={"tag": "in"},
    recurrent_kernel_metadata={"tag": "hidden"},
    bias_metadata={"tag": "bias"},
    rngs=nnx.Rngs(0),
  )
  for path, leaf in nnx.to_flat_state(nnx.state(cell)):
    want = "hidden" if path[0] in ("dense_h", "hi", "hf", "hg", "ho") else "in"
    assert leaf.tag == ("bias" if path[1] == "bias" else want), path


def test_the_lstm_may_have_half_precision_parameters():
  pair = comparison.pair("LSTMCell", 3, 4, param_dtype=HALF)
  assert pair[0].hi.kernel.dtype == HALF


def test_rnns_take_no_streams_as_in_flax_0_10():
  x = array(2, 5, 3)
  for make in (
    lambda cell, rngs: nnx.RNN(cell, rngs=rngs),
    lambda cell, rngs: nnx.Bidirectional(
      nnx.RNN(cell, rngs=rngs), nnx.RNN(cell, rngs=rngs), rngs=rngs
    ),
  ):
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    got, want = (make(cell, rngs)(x) for rngs in (None, True))
    np.testing.assert_array_equal(got, want)


def rnn_pair(cell="GRUCell", **options):
  return comparison.pair(
    "RNN",
    Own(lambda library: getattr(library, cell)(3, 4, rngs=library.Rngs(5))),
    rngs=Own(lambda library: library.Rngs(6)),
    **options,
  )


LENGTHS = jnp.array([2, 5])
RNN = {
  "plain": ({}, {}),
  "unrolled": ({"unroll": 2}, {}),
  "carry": ({"return_carry": True}, {}),
  "reversed": ({"reverse": True}, {}),
  "in order": ({"reverse": True, "keep_order": True}, {}),
  "lengths": ({"return_carry": True}, {"seq_lengths": LENGTHS}),
  "all": (
    {},
    {
      "seq_lengths": LENGTHS,
      "return_carry": True,
      "reverse": True,
      "keep_order": True,
    },
  ),
}


@pytest.mark.parametrize(
  ("name", "time_major"),
  [*((name, False) for name in RNN), ("carry", True), ("all", True)],
)
def test_rnn(name, time_major):
  options, kwargs = RNN[name]
  pair = rnn_pair(time_major=time_major, **options)
  x = array(5, 2, 3) if time_major else array(2, 5, 3)
  comparison.assert_same(*pair, x, rtol=5e-5, **kwargs)


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "GRUCell"])
def test_rnn_of_each_other_cell(cell):
  comparison.assert_same(*rnn_pair(cell), array(2, 5, 3), rtol=5e-5)


def test_rnn_takes_carries_and_streams_of_the_call():
  pair = rnn_pair()
  comparison.assert_same(
    *pair, array(2, 5, 3), rtol=5e-5, initial_carry=array(2, 4)
  )
  comparison.assert_same(
    *pair,
    array(2, 5, 3),
    rtol=5e-5,
    rngs=Own(lambda lib: lib.Rngs(1)),
    grads=False,
  )


def test_rnn_makes_streams():
  for rngs in (True, False):
    make = Own(lambda lib: lib.GRUCell(3, 4, rngs=lib.Rngs(5)))
    ours, theirs = comparison.pair("RNN", make, rngs=rngs)
    comparison.assert_same(
      ours,
      theirs,
      array(2, 5, 3),
      rtol=5e-5,
      initial_carry=array(2, 4),
      grads=False,
    )
  with pytest.raises(TypeError, match="or a bool, but got a `int`"):
    nnx.RNN(ours.cell, rngs=3)


def noisy_cell(library):
  class Noisy(library.RNNCellBase):
    num_feature_axes = 1

    def __init__(self):
      self.dropout = library.Dropout(0.5, rngs=library.Rngs(dropout=3))

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
      return jnp.zeros(input_shape)

    def __call__(self, carry, x):
      return carry, self.dropout(x)

  return Noisy()


def test_rnn_is_compiled_once_outside_of_traces():
  traces = 0

  class Cell(nnx.GRUCell):
    def __call__(self, carry, inputs):
      nonlocal traces
      traces += 1
      return super().__call__(carry, inputs)

  layers = [nnx.RNN(Cell(3, 4, rngs=nnx.Rngs(i))) for i in range(2)]
  x = jnp.ones((2, 5, 3))
  layers[0](x)
  assert traces
  traces = 0
  one, two = (layer(x) for layer in layers)
  assert not traces
  assert np.abs(one - two).max() > 1e-3
  layers[0](x, time_major=True)
  assert traces
  traces = 0
  layers[0].unroll = True  # equal to 1, and not the same
  layers[0](x)
  assert traces


@pytest.mark.parametrize("broadcast", [False, True])
def test_random_cells(broadcast):
  options = {"broadcast_rngs": "dropout"} if broadcast else {}
  pair = comparison.pair("RNN", Own(noisy_cell), rngs=True, **options)
  x = jnp.ones((2, 5, 3))
  comparison.assert_same(*pair, x, then=[(x,)])
  y = pair[0](jnp.ones((2, 5, 3)))
  assert bool((y == y[:, :1]).all()) == broadcast


def test_flip_sequences():
  for lengths in (None, LENGTHS):
    for time_major in (False, True):
      x = array(5, 2, 3) if time_major else array(2, 5, 3)
      np.testing.assert_array_equal(
        recurrent.flip_sequences(x, lengths, 1, time_major),
        flax_recurrent.flip_sequences(x, lengths, 1, time_major),
      )


def test_carries_at_the_end_of_any_batch():
  layer = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
  x, lengths = array(2, 3, 5, 3), jnp.array([[1, 2, 3], [4, 5, 1]])
  carry, y = layer(x, seq_lengths=lengths)
  np.testing.assert_allclose(carry[1, 0], y[1, 0, 3], rtol=1e-5)
  np.testing.assert_allclose(carry[0, 2], y[0, 2, 2], rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_carry_of_an_empty_sequence_is_the_first(reverse):
  layer = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
  first = (array(2, 4), array(2, 4, seed=1))
  (c, h), y = layer(
    array(2, 5, 3),
    initial_carry=first,
    seq_lengths=jnp.array([0, 5]),
    reverse=reverse,
  )
  np.testing.assert_array_equal(c[0], first[0][0])
  np.testing.assert_array_equal(h[0], first[1][0])
  np.testing.assert_array_equal(h[1], y[1, -1])


@pytest.mark.parametrize(
  ("lengths", "error", "text"),
  [
    ([2, 6], ValueError, "must lie between 0 and 5, the steps of the inputs"),
    ([2, -1], ValueError, "must lie between 0 and 5, the steps of the inputs"),
    ([2.0, 3.0], TypeError, "must be integers, but got `float32`"),
    ([True, False], TypeError, "must be integers, but got `bool`"),
    ([2], ValueError, r"must have the shape \(2,\), that of the batch, but"),
    ([[2], [3]], ValueError, r"must have the shape \(2,\), that of the batch"),
    (2, ValueError, r"must have the shape \(2,\), that of the batch, but got"),
  ],
)
def test_lengths_that_cannot_be(lengths, error, text):
  x, lengths = array(2, 5, 3), jnp.asarray(lengths)
  layer = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))
  with pytest.raises(error, match="`seq_lengths` " + text):
    layer(x, seq_lengths=lengths)
  with pytest.raises(error, match="`seq_lengths` " + text):
    recurrent.flip_sequences(x, lengths, 1, False)


@pytest.mark.parametrize("length", [-1, 6])
@pytest.mark.parametrize("reverse", [False, True])
def test_under_a_trace_lengths_that_cannot_be_make_nan(length, reverse):
  layer = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
  run = nnx.jit(lambda m, x, n: m(x, seq_lengths=n, reverse=reverse))
  x = array(2, 5, 3)
  carry, y = run(layer, x, jnp.array([length, 4]))
  right, z = run(layer, x, jnp.array([3, 4]))
  assert bool(jnp.isnan(carry[0]).all())
  assert not reverse or bool(jnp.isnan(y[0]).all())
  np.testing.assert_array_equal(carry[1], right[1])
  np.testing.assert_array_equal(y[1], z[1])


def test_lengths_may_be_lists_and_small_integers():
  layer = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
  x = array(2, 200, 3)
  want = layer(x, seq_lengths=jnp.array([200, 0]), reverse=True)
  for lengths in ([200, 0], np.array([200, 0], np.uint8)):
    got = layer(x, seq_lengths=lengths, reverse=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def bidirectional(**options):
  def make(seed):
    return Own(
      lambda library: library.RNN(
        library.GRUCell(3, 4, rngs=library.Rngs(seed))
      )
    )

  return comparison.pair(
    "Bidirectional",
    make(1),
    make(2),
    rngs=Own(lambda library: library.Rngs(6)),
    **options,
  )


@pytest.mark.parametrize(
  ("options", "kwargs"),
  [
    ({"return_carry": True}, {"seq_lengths": LENGTHS}),
    ({"merge_fn": jnp.add}, {"rngs": Own(lambda lib: lib.Rngs(1))}),
    ({}, {"initial_carry": (array(2, 4), array(2, 4, seed=1))}),
  ],
)
def test_bidirectional(options, kwargs):
  comparison.assert_same(
    *bidirectional(**options), array(2, 5, 3), rtol=5e-5, **kwargs
  )


def test_bidirectional_with_time_first():
  comparison.assert_same(
    *bidirectional(time_major=True), array(5, 2, 3), rtol=5e-5
  )


def test_cells_must_define_their_parts():
  cell = nnx.RNNCellBase()
  with pytest.raises(NotImplementedError, match="must define `initialize_ca"):
    cell.initialize_carry((2,))
  with pytest.raises(NotImplementedError, match="must define `__call__"):
    cell(1, 2)
  with pytest.raises(NotImplementedError, match="must define `num_feature_a"):
    _ = cell.num_feature_axes
