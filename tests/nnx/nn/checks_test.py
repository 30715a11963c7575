"""Layers refuse, in one sentence, what cannot be meant."""

import math

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx

_NAN = float("nan")

# Class, arguments by position, keywords, the error and its text.
_OPTIONS = (
  ("Linear", (-1, 3), {}, "`in_features` must be at least 0, but got -1."),
  ("Linear", (2, -3), {}, "`out_features` must be at least 0, but got -3."),
  ("Linear", (2, 2.5), {}, "`out_features` must be an integer, but got 2.5."),
  ("LinearGeneral", ((2, -3), 4), {"axis": (-2, -1)}, "`in_features` must be"),
  ("LinearGeneral", (2, (4, -1)), {}, "`out_features` must be at least 0"),
  ("Einsum", ("ab,bc->ac", (2, -3)), {}, "`kernel_shape` must be at least 0"),
  ("Linear", (2, 3), {"kernel_init": 0.1}, "An initializer must be a function"),
  ("Conv", (-2, 3, (3,)), {}, "`in_features` must be at least 0, but got -2."),
  ("Conv", (2, 3, (0,)), {}, "`kernel_size` must be at least 1, but got 0."),
  ("Conv", (2, 3, (3,)), {"strides": 0}, "`strides` must be at least 1"),
  (
    "Conv",
    (2, 3, (3,)),
    {"strides": (1, 2)},
    "`strides` must be one number or one for each axis of `kernel_size=(3,)`,"
    " but got (1, 2).",
  ),
  (
    "Conv",
    (2, 3, (3,)),
    {"kernel_dilation": -1},
    "`kernel_dilation` must be at least 1, but got -1.",
  ),
  (
    "Conv",
    (2, 3, (3,)),
    {"input_dilation": 1.5},
    "`input_dilation` must be an",
  ),
  (
    "Conv",
    (2, 2, (3,)),
    {"feature_group_count": 0},
    "`feature_group_count` must be at least 1, but got 0.",
  ),
  (
    "Conv",
    (2, 3, (3,)),
    {"padding": "SOME"},
    "`padding` must be one of SAME, VALID, SAME_LOWER, CAUSAL, CIRCULAR,"
    " REFLECT or numbers, but got 'SOME'.",
  ),
  ("ConvTranspose", (2, -3, (3,)), {}, "`out_features` must be at least 0"),
  ("ConvTranspose", (2, 3, (3,)), {"strides": 0}, "`strides` must be at least"),
  (
    "ConvTranspose",
    (2, 3, (3,)),
    {"padding": "valid"},
    "`padding` must be one of SAME, VALID, SAME_LOWER, CIRCULAR or numbers, but"
    " got 'valid'.",
  ),
  (
    "ConvTranspose",
    (2, 3, (3,)),
    {"padding": "REFLECT"},
    "`padding` must be one of SAME, VALID, SAME_LOWER, CIRCULAR or numbers, but"
    " got 'REFLECT'.",
  ),
  ("Conv", (2, 3, (3,)), {"padding": 1.5}, "`padding` must be an integer, but"),
  (
    "Conv",
    (2, 3, (3,)),
    {"padding": ((0, 2.5),)},
    "`padding` must be an integer, but got 2.5.",
  ),
  ("ConvTranspose", (2, 3, (3,)), {"padding": 0.5}, "`padding` must be an int"),
  ("Embed", (-5, 3), {}, "`num_embeddings` must be at least 0, but got -5."),
  ("Embed", (5, 3.0), {}, "`features` must be an integer, but got 3.0."),
  ("BatchNorm", (-3,), {}, "`num_features` must be at least 0, but got -3."),
  ("BatchNorm", (3,), {"momentum": 1.5}, "`momentum` must lie in [0, 1]"),
  ("BatchNorm", (3,), {"momentum": -0.1}, "`momentum` must lie in [0, 1]"),
  ("BatchNorm", (3,), {"momentum": _NAN}, "`momentum` must lie in [0, 1], but"),
  (
    "BatchNorm",
    (3,),
    {"momentum": "1"},
    "`momentum` must be a number, but got",
  ),
  ("LayerNorm", (3,), {"epsilon": "a"}, "`epsilon` must be a number, but got"),
  ("BatchNorm", (3,), {"epsilon": _NAN}, "`epsilon` must be finite and at"),
  ("LayerNorm", (3,), {"epsilon": -1e-6}, "`epsilon` must be finite and at"),
  ("LayerNorm", (3,), {"epsilon": math.inf}, "`epsilon` must be finite and at"),
  ("LayerNorm", (2.5,), {}, "`num_features` must be an integer, but got 2.5."),
  ("RMSNorm", (3,), {"epsilon": _NAN}, "`epsilon` must be finite and at least"),
  ("GroupNorm", (4, 2), {"epsilon": -1.0}, "`epsilon` must be finite and at"),
  ("GroupNorm", (4, 3), {}, "`num_groups` must be a positive divisor of"),
  ("GroupNorm", (-4, 2), {}, "`num_features` must be at least 0, but got -4."),
  ("InstanceNorm", (3,), {"epsilon": _NAN}, "`epsilon` must be finite and at"),
  ("Dropout", (1.5,), {}, "`rate` must lie in [0, 1], but got 1.5."),
  ("Dropout", (-0.1,), {}, "`rate` must lie in [0, 1], but got -0.1."),
  ("Dropout", (_NAN,), {}, "`rate` must lie in [0, 1], but got nan."),
  ("Dropout", ("a",), {}, "`rate` must be a number, but got 'a'."),
  ("LoRA", (3, 0, 4), {}, "`lora_rank` must be at least 1, but got 0."),
  ("LoRA", (-3, 2, 4), {}, "`in_features` must be at least 0, but got -3."),
  ("LoRALinear", (3, 4), {"lora_rank": -1}, "`lora_rank` must be at least 1"),
  ("LSTMCell", (-3, 4), {}, "`in_features` must be at least 0, but got -3."),
  ("GRUCell", (3, -4), {}, "`hidden_features` must be at least 0, but got -4."),
  ("SimpleCell", (3, 4.0), {}, "`hidden_features` must be an integer"),
  ("OptimizedLSTMCell", (3, -4), {}, "`hidden_features` must be at least 0"),
  ("MultiHeadAttention", (0, 4), {}, "`num_heads` must be at least 1"),
  ("MultiHeadAttention", (3, 4), {}, "`qkv_features` must be a multiple of"),
  ("MultiHeadAttention", (-2, 4), {}, "`num_heads` must be at least 1, but"),
  (
    "MultiHeadAttention",
    (2, 4),
    {"num_kv_heads": 0},
    "`num_kv_heads` must be at least 1, but got 0.",
  ),
  (
    "MultiHeadAttention",
    (2, 4),
    {"dropout_rate": 1.5},
    "`dropout_rate` must lie in [0, 1], but got 1.5.",
  ),
  ("MultiHeadAttention", (2, 4), {"softcap": math.inf}, "`softcap` must be"),
  ("MultiHeadAttention", (2, 4), {"softcap": _NAN}, "`softcap` must be pos"),
  (
    "MultiHeadAttention",
    (2, 4),
    {"window": (1.9, 0)},
    "`window` must be an integer or a pair of integers, but got (1.9, 0).",
  ),
  ("MultiHeadAttention", (2, 4), {"window": 2.7}, "`window` must be an int"),
  (
    "MultiHeadAttention",
    (2, 4),
    {"rope_base": math.inf},
    "`rope_base` must be positive and finite, but got inf.",
  ),
  (
    "MultiHeadAttention",
    (2, 4),
    {"rope_base": 10.0, "rope_scale": _NAN},
    "`rope_scale` must be positive and finite, but got nan.",
  ),
)

_WITH_PARAMETERS = (
  ("Linear", (2, 3), {}),
  ("LinearGeneral", (2, 3), {}),
  ("Einsum", ("ab,bc->ac", (2, 3)), {}),
  ("Conv", (2, 3, (3,)), {}),
  ("ConvTranspose", (2, 3, (3,)), {}),
  ("Embed", (2, 3), {}),
  ("LayerNorm", (3,), {}),
  ("BatchNorm", (3,), {}),
  ("LoRA", (3, 2, 4), {}),
  ("GRUCell", (3, 4), {}),
  ("MultiHeadAttention", (2, 4), {}),
)

# Class, arguments, keywords, shape of the input, the message.
_INPUTS = (
  (
    "Linear",
    (2, 3),
    {},
    (5, 4),
    "The last axis of `inputs` must be 2 for this `Linear`, but got (5, 4).",
  ),
  ("Linear", (2, 3), {}, (), "The last axis of `inputs` must be 2 for this"),
  (
    "LinearGeneral",
    (2, 3),
    {},
    (5, 4),
    "Axis -1 of `inputs` must be 2 for this `LinearGeneral`, but got (5, 4).",
  ),
  (
    "Conv",
    (2, 3, (3,)),
    {},
    (1, 5, 4),
    "The last axis of `inputs` must be 2 for this `Conv`, but got (1, 5, 4).",
  ),
  (
    "Conv",
    (2, 3, (3,)),
    {},
    (2,),
    "`inputs` must have at least 2 axes for this `Conv`, but got (2,).",
  ),
  (
    "Conv",
    (4, 4, (3,)),
    {"feature_group_count": 2},
    (1, 5, 2),
    "The last axis of `inputs` must be 4 for this `Conv`, but got (1, 5, 2).",
  ),
  (
    "ConvTranspose",
    (2, 3, (3,)),
    {},
    (1, 5, 4),
    "The last axis of `inputs` must be 2 for this `ConvTranspose`, but got"
    " (1, 5, 4).",
  ),
  (
    "LayerNorm",
    (3,),
    {},
    (5, 4),
    "`x` must have 3 features for this `LayerNorm`, but got (5, 4).",
  ),
  ("RMSNorm", (3,), {}, (5, 4), "`x` must have 3 features for this `RMSNorm`"),
  ("GroupNorm", (4, 2), {}, (5, 6), "`x` must have 4 features for this"),
  ("InstanceNorm", (3,), {}, (1, 5, 4), "`x` must have 3 features for this"),
  ("BatchNorm", (3,), {}, (5, 4), "`x` must have 3 features for this"),
  (
    "BatchNorm",
    (3,),
    {"use_running_average": True},
    (5, 4),
    "`x` must have 3 features for this `BatchNorm`, but got (5, 4).",
  ),
  (
    "LoRA",
    (3, 2, 4),
    {},
    (5, 4),
    "The last axis of `x` must be 3 for this `LoRA`, but got (5, 4).",
  ),
  ("LoRALinear", (3, 4), {"lora_rank": 2}, (5, 4), "The last axis of `inputs`"),
  (
    "MultiHeadAttention",
    (2, 4),
    {"decode": False},
    (1, 5, 6),
    "`inputs_q` must have `in_features=4` as its last axis, but got the shape"
    " (1, 5, 6).",
  ),
)


def _rngs(name, rngs):
  return {} if name == "Dropout" else {"rngs": rngs}


class ChecksTest(parameterized.TestCase):
  def assert_says(self, kinds, text, function, *args, **kwargs):
    with self.assertRaises(kinds) as caught:
      function(*args, **kwargs)
    message = str(caught.exception)
    self.assertIn(text, message)
    self.assertLess(len(message), 250)

  @parameterized.parameters(*_OPTIONS)
  def test_option_is_refused(self, name, args, kwargs, text):
    kwargs = {**kwargs, **_rngs(name, nnx.Rngs(0))}
    self.assert_says(
      (TypeError, ValueError), text, getattr(nnx, name), *args, **kwargs
    )

  @parameterized.parameters(*_WITH_PARAMETERS)
  def test_rngs_that_are_none_are_refused(self, name, args, kwargs):
    self.assert_says(
      TypeError,
      "`rngs` must be an `nnx.Rngs`, but got 0. Pass `nnx.Rngs(seed)`.",
      getattr(nnx, name),
      *args,
      **kwargs,
      rngs=0,
    )

  @parameterized.parameters(*_INPUTS)
  def test_input_is_refused(self, name, args, kwargs, shape, text):
    layer = getattr(nnx, name)(*args, **kwargs, rngs=nnx.Rngs(0))
    self.assert_says(ValueError, text, layer, jnp.ones(shape))
    self.assert_says(
      ValueError, text, nnx.jit(lambda m, x: m(x)), layer, jnp.ones(shape)
    )

  @parameterized.parameters(
    ("Linear", (3, 2), (2, 3)),
    ("LinearGeneral", (3, 2), (2, 3)),
    ("Einsum", ("ab,bc->ac", (3, 2)), (2, 3)),
    ("Conv", (3, 2, (3,)), (1, 5, 3)),
    ("ConvTranspose", (3, 2, (3,)), (1, 5, 3)),
    ("BatchNorm", (3,), (2, 3)),
    ("LayerNorm", (3,), (2, 3)),
    ("GroupNorm", (4, 2), (2, 4)),
    ("LoRA", (3, 2, 4), (2, 3)),
    ("PReLU", (), (2, 3)),
  )
  def test_plain_arrays_serve_as_parameters(self, name, args, shape):
    kwargs = {} if name == "PReLU" else {"rngs": nnx.Rngs(0)}
    layer = getattr(nnx, name)(*args, **kwargs)
    x = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    expected = layer(x)
    for key, value in list(vars(layer).items()):
      if isinstance(value, nnx.Param):
        setattr(layer, key, value[...])
    self.assertEmpty(jax.tree.leaves(nnx.state(layer, nnx.Param)))
    np.testing.assert_array_equal(layer(x), expected)

  def test_plain_array_serves_as_embedding(self):
    layer = nnx.Embed(3, 2, rngs=nnx.Rngs(0))
    layer.embedding = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(layer(jnp.array([2])), [[4.0, 5.0]])
    np.testing.assert_array_equal(layer.attend(jnp.ones(2)), [1.0, 5.0, 9.0])

  def test_input_of_cell_is_refused(self):
    cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    carry = cell.initialize_carry((2, 3))
    self.assert_says(
      ValueError,
      "The last axis of `inputs` must be 3 for this `Linear`, but got (2, 5).",
      cell,
      carry,
      jnp.ones((2, 5)),
    )

  def test_query_of_attend_is_refused(self):
    self.assert_says(
      ValueError,
      "The last axis of `query` must be 3 for this `Embed`, but got (2, 5).",
      nnx.Embed(4, 3, rngs=nnx.Rngs(0)).attend,
      jnp.ones((2, 5)),
    )

  def test_error_of_an_own_dot_general_is_kept(self):
    def refuse(*args, **kwargs):
      raise ValueError("not today")

    layer = nnx.Linear(2, 3, dot_general=refuse, rngs=nnx.Rngs(0))
    self.assert_says(ValueError, "not today", layer, jnp.ones((1, 2)))

  def test_numpy_numbers_and_bounds_are_taken(self):
    nnx.Linear(np.int64(2), np.int32(3), rngs=nnx.Rngs(0))
    nnx.BatchNorm(3, momentum=1.0, epsilon=0.0, rngs=nnx.Rngs(0))
    nnx.BatchNorm(3, momentum=np.float32(0), rngs=nnx.Rngs(0))
    nnx.Dropout(np.float64(1.0), rngs=nnx.Rngs(0))

  def test_rate_set_later_is_refused(self):
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    layer.rate = 2.0
    self.assert_says(
      ValueError, "`rate` must lie in [0, 1]", layer, jnp.ones(3)
    )

  @parameterized.parameters(-0.5, 1.5, _NAN)
  def test_rate_of_attention_is_refused(self, rate):
    x = jnp.ones((2, 1, 4))
    for function in (
      lambda **kwargs: nnx.dot_product_attention(x, x, x, **kwargs),
      lambda **kwargs: nnx.nn.attention.dot_product_attention_weights(
        x, x, **kwargs
      ),
    ):
      self.assert_says(
        ValueError,
        f"`dropout_rate` must lie in [0, 1], but got {rate}.",
        function,
        dropout_rate=rate,
        dropout_rng=jax.random.key(0),
      )

  def test_rate_of_attention_without_key_is_refused(self):
    x = jnp.ones((2, 1, 4))
    self.assert_says(
      ValueError,
      "`dropout_rng` must be a key for `dropout_rate=0.5`, but got None.",
      nnx.dot_product_attention,
      x,
      x,
      x,
      dropout_rate=0.5,
    )
    nnx.dot_product_attention(x, x, x, dropout_rate=0.5, deterministic=True)

  def test_rate_of_1_drops_all_weights(self):
    x = jnp.ones((2, 1, 4))
    y = nnx.dot_product_attention(
      x, x, x, dropout_rate=1.0, dropout_rng=jax.random.key(0)
    )
    np.testing.assert_array_equal(y, np.zeros((2, 1, 4)))

  @parameterized.parameters(nnx.avg_pool, nnx.max_pool, nnx.min_pool)
  def test_pooling_is_refused(self, pool):
    x = jnp.ones((1, 4, 2))
    for kwargs, text in (
      (
        {"window_shape": (2,), "padding": 1},
        "`padding` must be a string or one pair (before, after) for each of"
        " `window_shape`, but got `padding=1` and `window_shape=(2,)`.",
      ),
      (
        {"window_shape": (2,), "padding": (1,)},
        "but got `padding=(1,)` and `window_shape=(2,)`.",
      ),
      (
        {"window_shape": (2,), "padding": "SOME"},
        "`padding` must be SAME, VALID, SAME_LOWER or pairs of numbers, but got"
        " 'SOME'.",
      ),
      (
        {"window_shape": 2},
        "`window_shape` must have a number for each spatial axis, but got 2.",
      ),
      ({"window_shape": (0,)}, "`window_shape` must be at least 1, but got 0."),
      (
        {"window_shape": (-2,)},
        "`window_shape` must be at least 1, but got -2",
      ),
      (
        {"window_shape": (2,), "strides": 2},
        "`strides` must have a number for each spatial axis, but got 2.",
      ),
      (
        {"window_shape": (2,), "strides": (0,)},
        "`strides` must be at least 1, but got 0.",
      ),
    ):
      self.assert_says(ValueError, text, pool, x, **kwargs)

  def test_padding_of_conv_takes_one_number(self):
    layer = nnx.Conv(2, 3, (3,), padding=1, rngs=nnx.Rngs(0))
    self.assertEqual(layer(jnp.ones((1, 5, 2))).shape, (1, 5, 3))

  def test_sequential_refuses_a_list(self):
    a, b = (nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    self.assert_says(
      TypeError,
      "The layers of a `Sequential` must be callable, but layer 0 is a `list`."
      " Pass them one by one: `Sequential(*layers)`.",
      nnx.Sequential,
      [a, b],
    )
    self.assert_says(TypeError, "but layer 1 is a `int`.", nnx.Sequential, a, 3)


if __name__ == "__main__":
  absltest.main()
