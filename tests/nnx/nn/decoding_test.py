"""What attention does beyond flax.nnx, with a cache and without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.nn import dot_product, rotary
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array
from tests.testing import hlo

FEATURES, HEADS, LENGTH, PROMPT = 16, 4, 7, 5
EVERYTHING = {
  "num_kv_heads": 2,
  "normalize_qk": True,
  "window": 3,
  "softcap": 0.7,
  "rope_base": 100.0,
  "rope_scale": 2.0,
}
OPTIONS = {
  "window": {"window": 3},
  "window of a pair": {"window": (2, 0)},
  "softcap": {"softcap": 0.3},
  "rotary": {"rope_base": 10.0, "rope_scale": 0.5},
  "everything": EVERYTHING,
}
# How far results may be from those of float32.
DTYPES = {
  "float32": 2e-6,
  "bfloat16": 2e-2,
  "float16": 3e-3,
  "int8": 3e-2,
  "float8_e4m3fn": 6e-2,
  "float8_e5m2": 2e-1,
}


def compiled(function):
  """`nnx.jit(function)`, compiled in less time."""

  def call(layer, x):
    graphdef, state = nnx.split(layer)

    @comparison.jit
    def run(state, x):
      model = nnx.merge(graphdef, state)
      return function(model, x), nnx.state(model)

    y, state = run(state, x)
    nnx.update(layer, state)
    return y

  return call


def make(**options):
  options = {"decode": True} | options
  layer = nnx.MultiHeadAttention(
    HEADS, FEATURES, rngs=nnx.Rngs(0), bias_init=jax.nn.initializers.normal(),
    **options,
  )  # fmt: skip
  return layer


def in_full(layer, x, is_causal=True):
  """The layer's result by its definition, in float64 and without a cache."""
  x = np.asarray(x, np.float64)

  def project(linear, norm=None):
    y = np.einsum("btf,fnh->btnh", x, linear.kernel.value) + linear.bias.value
    if norm is not None:
      y = y - y.mean(-1, keepdims=True)
      y = y / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * norm.scale.value
    return np.asarray(y, np.float64)

  query = project(layer.query, layer.query_ln)
  key, value = project(layer.key, layer.key_ln), project(layer.value)
  positions = np.arange(x.shape[1])
  features = query.shape[-1]
  if layer.rope_base is not None:
    rate = layer.rope_base ** (-np.arange(0, features, 2) / features)
    turn = np.exp(1j * positions[:, None] * rate / layer.rope_scale)

    def rotate(y):
      first, second = np.split(y, 2, -1)
      y = (first + 1j * second) * turn[:, None]
      return np.concatenate([y.real, y.imag], -1)

    query, key = rotate(query), rotate(key)
  groups = HEADS // key.shape[2]
  key, value = np.repeat(key, groups, 2), np.repeat(value, groups, 2)
  logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(features)
  if layer.softcap is not None:
    logits = layer.softcap * np.tanh(logits / layer.softcap)
  distance = positions[:, None] - positions
  seen = distance >= 0 if is_causal else distance == distance
  if layer.window is not None:
    window = layer.window
    before, after = window if isinstance(window, tuple) else (window - 1, 0)
    seen = seen & (distance <= before) & (-distance <= after)
  logits = np.where(seen, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum("bnts,bsnh->btnh", weights, value)
  out = np.einsum("btnh,nhf->btf", out, layer.out.kernel.value)
  return out + layer.out.bias.value


def close(got, want, tolerance):
  want = np.asarray(want, np.float64)
  scale = np.abs(want).max()
  np.testing.assert_allclose(
    np.asarray(got, np.float64), want, rtol=0, atol=tolerance * scale
  )


@compiled
def in_steps(layer, x):
  """A prompt, then token by token."""
  parts = [layer(x[:, :PROMPT])]
  for i in range(PROMPT, x.shape[1]):
    parts.append(layer(x[:, i : i + 1]))
  return jnp.concatenate(parts, 1)


@compiled
def in_training(layer, x):
  """All at once."""
  return layer(x, is_causal=True)


CASES = [
  *((name, "float32", {}) for name in OPTIONS),
  *(("everything", dtype, {}) for dtype in DTYPES if dtype != "float32"),
  ("everything", "float32", {"precision": "highest"}),
  ("everything", "int8", {"precision": "highest"}),
]


@pytest.mark.parametrize(("name", "dtype", "more"), CASES)
def test_prefill_and_steps_equal_full_attention(name, dtype, more):
  layer = make(**OPTIONS[name], **more)
  x = array(2, LENGTH, FEATURES)
  want = in_full(layer, x)
  per_sequence = name == "everything"
  shape = (2, LENGTH, FEATURES)
  layer.init_cache(shape, jnp.dtype(dtype), per_sequence=per_sequence)
  close(in_steps(layer, x), want, DTYPES[dtype])
  assert layer.cached_key.dtype == dtype
  assert (layer.cache_index.value == LENGTH).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_training_equals_decoding(name):
  for more in ({}, {"precision": "highest"}):
    layer = make(decode=False, **OPTIONS[name], **more)
    x = array(2, LENGTH, FEATURES)
    close(in_training(layer, x), in_full(layer, x), 2e-6)


def test_a_window_of_both_sides():
  layer = make(decode=False, window=(1, 2), rope_base=10.0)
  x = array(2, LENGTH, FEATURES)
  close(layer(x), in_full(layer, x, is_causal=False), 2e-6)
  layer.window = (-1, -1)
  free = layer(x)
  layer.window = None
  np.testing.assert_allclose(free, layer(x), atol=1e-6)


@pytest.mark.parametrize("options", [{"softcap": 0.3}, {"window": (2, 1)}])
def test_gradients_of_options_are_those_of_the_formula(options):
  q = array(2, 5, 4, 8)
  k, v = array(2, 5, 2, 8, seed=1), array(2, 5, 2, 8, seed=2)

  def formula(q, k, v):
    k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    if "softcap" in options:
      logits = 0.3 * jnp.tanh(logits / 0.3)
    else:
      ahead = jnp.arange(5) - jnp.arange(5)[:, None]
      logits = jnp.where((ahead >= -2) & (ahead <= 1), logits, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), v)

  def by_weights(q, k, v):
    return nnx.dot_product_attention(q, k, v, precision="highest", **options)

  def plain(q, k, v):
    return nnx.dot_product_attention(q, k, v, **options)

  def gradients(function):
    return jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2))

  want = comparison.jit(gradients(formula))(q, k, v)
  for function in (plain, by_weights):
    for got, expected in zip(
      comparison.jit(gradients(function))(q, k, v), want
    ):
      np.testing.assert_allclose(got, expected, atol=2e-5)


def test_softmax_of_capped_logits_is_in_float32():
  q = array(1, 64, 1, 8, dtype=jnp.bfloat16)
  got = nnx.dot_product_attention(q, q, q, softcap=5.0)
  wide = q.astype(jnp.float32)
  want = nnx.dot_product_attention(wide, wide, wide, softcap=5.0)
  assert got.dtype == jnp.bfloat16
  close(got, want, 1e-2)


def test_own_attention_functions_get_what_is_set():
  given = []

  def attend(query, key, value, **kwargs):
    given.append({"window", "softcap"} & kwargs.keys())
    return query

  x = array(2, 3, FEATURES)
  make(decode=False, attention_fn=attend)(x)
  make(decode=False, attention_fn=attend, window=2, softcap=1.0)(x)
  assert given == [set(), {"window", "softcap"}]


def test_own_attention_functions_get_positions():
  """Rotary embedding of one's own, as Flax 0.12.12 offers it."""

  def attend(query, key, value, *, input_positions=None, **kwargs):
    if input_positions is not None:
      table = rotary.rows(input_positions, 32, query.shape[-1], 10.0)
      query, key = rotary.rotate(query, *table), rotary.rotate(key, *table)
    return nnx.dot_product_attention(query, key, value, **kwargs)

  x = array(2, 3, FEATURES)
  layer = make(decode=False, attention_fn=attend)
  rotating = make(decode=False, rope_base=10.0)
  close(layer(x), make(decode=False)(x), 1e-6)
  close(layer(x, input_positions=jnp.arange(3)), rotating(x), 1e-5)
  # Distances alone count.
  far = jnp.array([[0], [20]]) + jnp.arange(3)
  close(layer(x, input_positions=far), rotating(x), 1e-5)


def test_float64_decodes_without_kernels():
  with jax.enable_x64(True):
    layer = nnx.MultiHeadAttention(
      HEADS,
      FEATURES,
      decode=True,
      dtype=jnp.float64,
      param_dtype=jnp.float64,
      rngs=nnx.Rngs(0),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, FEATURES)))
    want = layer(x, decode=False, is_causal=True)
    for per_sequence in (False, True):
      layer.init_cache((2, 6, FEATURES), jnp.float64, per_sequence=per_sequence)
      got = [layer(x[:, :4]), layer(x[:, 4:5]), layer(x[:, 5:])]
      got = jnp.concatenate(got, 1)
      assert got.dtype == jnp.float64
      np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


# Prompts of different lengths.


@pytest.mark.parametrize("more", [{}, {"precision": "highest"}])
def test_padding_is_not_seen_and_takes_no_room(more):
  layer = make(**EVERYTHING, **more)
  layer.init_cache((2, LENGTH, FEATURES), per_sequence=True)
  x = array(2, LENGTH, FEATURES)
  lengths = jnp.array([PROMPT, 2])
  want = in_full(layer, x)

  @compiled
  def both(layer, x):
    plain = layer(x, lengths=lengths, decode=False, is_causal=True)
    return plain, layer(x, lengths=lengths)

  plain, got = both(layer, x)
  for y in (plain, got):
    close(y[0, :PROMPT], want[0, :PROMPT], 2e-6)
    close(y[1, :2], want[1, :2], 2e-6)
    # Only the bias of the last projection, which is random here.
    np.testing.assert_allclose(y[1, 2:], y[1, 2:3].repeat(LENGTH - 2, 0))
  assert layer.cache_index.value.tolist() == [PROMPT, 2]
  new = jnp.stack([x[0, PROMPT : PROMPT + 2], x[1, 2:4]])
  got = compiled(lambda layer, x: layer(x, lengths=jnp.array([1, 2])))(
    layer, new
  )
  close(got[0, 0], want[0, PROMPT], 2e-6)
  close(got[1], want[1, 2:4], 2e-6)
  assert layer.cache_index.value.tolist() == [PROMPT + 1, 4]


def test_lengths_of_sequences_need_indices_of_sequences():
  layer = make()
  layer.init_cache((2, LENGTH, FEATURES))
  x = array(2, 3, FEATURES)
  with pytest.raises(
    ValueError, match=r"need a `cache_index` of each, but its shape is \(\)"
  ):
    layer(x, lengths=jnp.array([1, 2]))
  layer(x, lengths=2)
  assert int(layer.cache_index.value) == 2
  with pytest.raises(ValueError, match=r"must be one integer or have the shap"):
    layer(x, lengths=jnp.array([1, 2, 3]))
  with pytest.raises(ValueError, match="queries and keys must be of the same"):
    layer(x, x[:, :2], lengths=2, decode=False)


def test_each_sequence_has_room_of_its_own():
  layer = make()
  layer.init_cache((2, 4, FEATURES), per_sequence=True)
  x = array(2, 3, FEATURES)
  layer(x, lengths=jnp.array([3, 1]))
  with pytest.raises(
    ValueError, match="`cache_index` is 3, and the call adds 3"
  ):
    layer(x)
  layer(x, lengths=jnp.array([1, 3]))
  assert layer.cache_index.value.tolist() == [4, 4]


# Quantised caches.


def test_a_quantised_cache_has_scales():
  layer = make(num_kv_heads=2)
  layer.init_cache((3, LENGTH, FEATURES), jnp.int8)
  layout = {
    path[-1]: (leaf.shape, leaf.dtype)
    for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Cache))
  }
  assert layout == {
    "cache_index": ((), jnp.int32),
    "cached_key": ((3, LENGTH, 2, 4), jnp.int8),
    "cached_key_scale": ((3, 2), jnp.float32),
    "cached_value": ((3, LENGTH, 2, 4), jnp.int8),
    "cached_value_scale": ((3, 2), jnp.float32),
  }
  layer.init_cache((3, LENGTH, FEATURES))
  assert len(nnx.state(layer, nnx.Cache)) == 3


def test_the_first_tokens_choose_the_scales():
  layer = make()
  layer.init_cache((2, LENGTH, FEATURES), jnp.int8, per_sequence=True)
  x = array(2, 3, FEATURES)
  layer(0 * x[:, :1], lengths=jnp.array([0, 1]))
  # No token of the first sequence yet, and a bias alone in the second.
  assert not layer.cached_key_scale.value[0].any()
  assert layer.cached_key_scale.value[1].all()
  layer(x)
  chosen = layer.cached_key_scale.value
  assert chosen.all()
  largest = jnp.max(jnp.abs(layer.key(x[0])), (0, 2))
  np.testing.assert_allclose(chosen[0], largest / 63.5, rtol=1e-6)
  layer(10 * x)
  np.testing.assert_array_equal(layer.cached_key_scale.value, chosen)


def test_scales_may_be_set():
  layer = make()
  layer.init_cache((2, LENGTH, FEATURES), jnp.int8)
  scale = jnp.full((2, HEADS), 0.125)
  layer.cached_key_scale.value = layer.cached_value_scale.value = scale
  layer(array(2, 3, FEATURES))
  np.testing.assert_array_equal(layer.cached_key_scale.value, scale)
  stored = layer.cached_key.value[:, :3]
  want = jnp.round(layer.key(array(2, 3, FEATURES)) / 0.125)
  np.testing.assert_allclose(stored, want, atol=1)


def test_only_zeros_have_no_scale():
  layer = make(use_bias=False)
  layer.init_cache((1, LENGTH, FEATURES), jnp.float8_e4m3fn)
  y = layer(jnp.zeros((1, 1, FEATURES)))
  assert not y.any() and not layer.cached_key_scale.value.any()
  assert jnp.isfinite(layer(array(1, 1, FEATURES))).all()
  assert layer.cached_key_scale.value.all()


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e5m2"])
def test_a_step_is_one_kernel_call(dtype):
  layer = make(**EVERYTHING)
  layer.init_cache((2, LENGTH, FEATURES), jnp.dtype(dtype), per_sequence=True)
  graphdef, state = nnx.split(layer)

  def step(state, x):
    model = nnx.merge(graphdef, state)
    return model(x), nnx.state(model)

  text = jax.jit(step).lower(state, array(2, 1, FEATURES)).as_text()
  target = "fused_nnx_decode_attention_append_1"
  assert hlo.custom_calls(text, target) == 1
  assert text.count("custom_call") == 1
  assert "exponential" not in text and "tanh" not in text


# Parts.


def test_angles_are_exact_far_away():
  positions = np.array([0, 1, 255, 256, 257, 70_001, 131_071])
  cos, sin = jax.jit(lambda at: rotary.rows(at, 131_072, 8, 1e4, 4.0))(
    jnp.asarray(positions)
  )
  angles = positions[:, None] / 4.0 * 1e4 ** (-np.arange(4) / 4)
  np.testing.assert_allclose(cos, np.cos(angles), atol=3e-7)
  np.testing.assert_allclose(sin, np.sin(angles), atol=3e-7)


def test_products_of_rotated_heads_depend_on_distance_alone():
  x = jnp.broadcast_to(array(1, 1, 8), (400, 1, 8))
  query, key = rotary.rotate_from_start(x, x, 1e4)
  products = jnp.einsum("tnh,snh->ts", query, key)
  for distance in (0, 1, 37):
    diagonal = jnp.diagonal(products, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], rtol=2e-5)


def test_masks_of_positions():
  at = jnp.arange(4)
  one = dot_product.positions_mask(at + 1, at, False, (1, 1))
  assert one.astype(int).tolist() == [
    [1, 1, 1, 0],
    [0, 1, 1, 1],
    [0, 0, 1, 1],
    [0, 0, 0, 1],
  ]
  each = dot_product.positions_mask(jnp.array([[0], [2]]), at, True)
  assert each.astype(int).tolist() == [[[1, 0, 0, 0]], [[1, 1, 1, 0]]]


REFUSED = {
  "`window` must be at least 1, the query's own key, but got 0": {"window": 0},
  r"at least 0, or -1 for no limit, but got \(-2, 0\)": {"window": (-2, 0)},
  "`softcap` must be positive and finite, but got 0": {"softcap": 0},
  "even number of features, but `qkv_features=12` and `num_heads=4` make 3": {
    "rope_base": 1e4,
    "qkv_features": 12,
  },
  "`rope_base` must be positive and finite, but got -1.0": {"rope_base": -1.0},
  "`rope_scale` must be positive and finite, but got 0.0": {
    "rope_base": 1e4,
    "rope_scale": 0.0,
  },
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_are_not_possible(message):
  with pytest.raises(ValueError, match=message):
    make(**REFUSED[message])


def test_functions_refuse_them_too():
  q = array(1, 2, 1, 4)
  with pytest.raises(ValueError, match="`softcap` must be positive"):
    nnx.dot_product_attention(q, q, q, softcap=-1.0)
  with pytest.raises(ValueError, match="`window` must be at least 1"):
    nnx.dot_product_attention(q, q, q, window=0)
