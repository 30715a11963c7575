"""Options that models of today have, against their formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array
from tests.testing import hlo

FEATURES, HEADS, KV_HEADS, LENGTH, PROMPT = 16, 4, 2, 7, 4
# Two sequences of up to 8 tokens in blocks of 2, in no order.
TABLE = jnp.array([[7, 0, 3, 2], [1, 6, 5, 4]])
POSITIONS = np.array([[3, 4, 5, 9, 10, 11, 70_000], [0, 2, 4, 6, 8, 10, 12]])


def llama3_rates(dim, base, factor, low, high, old):
  """As transformers computes them, a pair at a time."""
  rates = []
  for i in range(dim // 2):
    rate = 1.0 / base ** (2 * i / dim)
    wavelength = 2 * np.pi / rate
    if wavelength > old / low:
      rate = rate / factor
    elif wavelength > old / high:
      smooth = (old / wavelength - low) / (high - low)
      rate = (1 - smooth) * rate / factor + smooth * rate
    rates.append(rate)
  return np.array(rates)


def yarn_rates(dim, base, factor, old, fast=32, slow=1, truncate=True):
  def correction(rotations):
    return (dim * np.log(old / (rotations * 2 * np.pi))) / (2 * np.log(base))

  low, high = correction(fast), correction(slow)
  if truncate:
    low, high = np.floor(low), np.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  rates = []
  for i in range(dim // 2):
    extrapolated = 1.0 / base ** (2 * i / dim)
    ramp = min(max((i - low) / (high - low), 0), 1)
    rates.append(extrapolated / factor * ramp + extrapolated * (1 - ramp))
  return np.array(rates)


@pytest.mark.parametrize(
  ("scaling", "rates", "magnitude"),
  [
    (
      nnx.Llama3Scaling(8.0, 1.0, 4.0, 8192),
      llama3_rates(128, 5e5, 8.0, 1.0, 4.0, 8192),
      1.0,
    ),
    (
      nnx.Llama3Scaling(32.0, 2.0, 3.0, 1024),
      llama3_rates(128, 5e5, 32.0, 2.0, 3.0, 1024),
      1.0,
    ),
    (
      nnx.YarnScaling(4.0, 32768),
      yarn_rates(128, 5e5, 4.0, 32768),
      0.1 * np.log(4) + 1,
    ),
    (
      nnx.YarnScaling(
        40.0, 4096, 16.0, 2.0, mscale=0.7, mscale_all_dim=1.5, truncate=False
      ),
      yarn_rates(128, 5e5, 40.0, 4096, 16.0, 2.0, truncate=False),
      (0.07 * np.log(40) + 1) / (0.15 * np.log(40) + 1),
    ),
    (
      nnx.YarnScaling(1.0, 512, attention_factor=0.5),
      yarn_rates(128, 5e5, 1.0, 512),
      0.5,
    ),
  ],
)
def test_scaled_rates_are_those_of_the_formulas(scaling, rates, magnitude):
  np.testing.assert_allclose(scaling.rates(128, 5e5), rates, rtol=1e-12)
  np.testing.assert_allclose(scaling.magnitude, magnitude, rtol=1e-12)


YARN = nnx.YarnScaling(4.0, 64, 8.0, 1.0)
LLAMA = nnx.Llama3Scaling(8.0, 1.0, 4.0, 64)
OPTIONS = {
  "head_dim": {"head_dim": 6},
  "RMS norms": {"qk_norm": functools.partial(nnx.RMSNorm, epsilon=1e-2)},
  "interleaved": {"rope_base": 10.0, "rope_interleaved": True},
  "partial": {"rope_base": 10.0, "rope_dim": 2},
  "Llama 3": {"rope_base": 100.0, "rope_scaling": LLAMA, "head_dim": 8},
  "YaRN": {"rope_base": 100.0, "rope_scaling": YARN, "head_dim": 8},
  "everything": {
    "head_dim": 10,
    "qk_norm": functools.partial(nnx.RMSNorm, epsilon=1e-2),
    "rope_base": 100.0,
    "rope_dim": 8,
    "rope_interleaved": True,
    "rope_scaling": YARN,
    "rope_scale": 2.0,
    "window": 4,
    "softcap": 3.0,
  },
}


def make(**options):
  layer = nnx.MultiHeadAttention(
    HEADS,
    FEATURES,
    num_kv_heads=KV_HEADS,
    decode=True,
    is_causal=True,
    kernel_init=jax.nn.initializers.normal(0.5),
    bias_init=jax.nn.initializers.normal(),
    rngs=nnx.Rngs(0),
    **options,
  )
  for norm in (layer.query_ln, layer.key_ln):
    if norm is not None:
      norm.scale.value = 1 + array(*norm.scale.shape) / 4
  return layer


def angles(layer, options, positions):
  """`[b, t, pairs]` in float64, and the magnitude."""
  dim = options.get("rope_dim") or layer.head_dim
  base, scaling = options["rope_base"], options.get("rope_scaling")
  magnitude = 1.0
  if scaling is LLAMA:
    rates = llama3_rates(dim, base, 8.0, 1.0, 4.0, 64)
  elif scaling is YARN:
    rates = yarn_rates(dim, base, 4.0, 64, 8.0, 1.0)
    magnitude = 0.1 * np.log(4.0) + 1
  else:
    rates = base ** (-np.arange(0, dim, 2) / dim)
  at = positions[..., None] / options.get("rope_scale", 1.0)
  return at * rates, magnitude


def turned(x, angle, magnitude, interleaved):
  """Rotates `[b, t, n, h]` by a 2 x 2 matrix for each pair."""
  x = x.copy()
  pairs = angle.shape[-1]
  for i in range(pairs):
    a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
    cos, sin = (magnitude * f(angle[..., None, i]) for f in (np.cos, np.sin))
    first, second = x[..., a].copy(), x[..., b].copy()
    x[..., a] = cos * first - sin * second
    x[..., b] = sin * first + cos * second
  return x


def in_full(layer, options, x, positions=None, is_causal=True):
  """What the layer computes, in float64."""
  x = np.asarray(x, np.float64)
  batch, tokens = x.shape[:2]
  if positions is None:
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens))

  def project(linear, norm=None):
    kernel, bias = (
      np.asarray(p.value, np.float64) for p in (linear.kernel, linear.bias)
    )
    y = np.einsum("btf,fnh->btnh", x, kernel) + bias
    if norm is not None:
      y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-2)
      y = y * np.asarray(norm.scale.value, np.float64)
    return y

  query = project(layer.query, layer.query_ln)
  key, value = project(layer.key, layer.key_ln), project(layer.value)
  if "rope_base" in options:
    angle = angles(layer, options, positions)
    query, key = (
      turned(y, *angle, options.get("rope_interleaved")) for y in (query, key)
    )
  groups = HEADS // KV_HEADS
  key, value = np.repeat(key, groups, 2), np.repeat(value, groups, 2)
  logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(layer.head_dim)
  if "softcap" in options:
    logits = options["softcap"] * np.tanh(logits / options["softcap"])
  behind = np.arange(tokens)[:, None] - np.arange(tokens)
  seen = (behind >= 0) | (not is_causal)
  if "window" in options:
    seen = seen & (behind < options["window"])
  logits = np.where(seen, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum("bnts,bsnh->btnh", weights, value)
  kernel = np.asarray(layer.out.kernel.value, np.float64)
  return np.einsum("btnh,nhf->btf", out, kernel) + np.asarray(
    layer.out.bias.value, np.float64
  )


def close(got, want, tolerance=5e-6):
  np.testing.assert_allclose(
    np.asarray(got, np.float64), want, 0, tolerance * np.abs(want).max()
  )


def run(layer, function, *arrays):
  """Calls `function(layer, *arrays)` in one quickly compiled program."""
  graphdef, state = nnx.split(layer)

  @comparison.jit
  def call(state, *arrays):
    model = nnx.merge(graphdef, state)
    return function(model, *arrays), nnx.state(model)

  y, state = call(state, *arrays)
  nnx.update(layer, state)
  return y


PARTS = ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, LENGTH))


def in_steps(layer, x, positions=None, prepare=False, **kwargs):
  """A prompt, a token, and two at once."""
  parts = []
  for first, last in PARTS:
    part, given = x[:, first:last], dict(kwargs)
    if positions is not None:
      given["input_positions"] = positions[..., first:last]
    if prepare:
      given = {"step": layer.prepare_step(part, **given)}
    parts.append(layer(part, **given))
  return jnp.concatenate(parts, 1)


@pytest.mark.parametrize("name", OPTIONS)
def test_layer_computes_the_formula(name):
  options = OPTIONS[name]
  layer = make(**options)
  x = array(2, LENGTH, FEATURES)
  want = in_full(layer, options, x)
  for more in ({}, {"precision": "highest"}):
    layer.precision = more.get("precision")
    nnx.init_cache(layer, 2, LENGTH)

    def both(layer, x):
      return layer(x, decode=False), in_steps(layer, x)

    full, steps = run(layer, both, x)
    close(full, want)
    close(steps, want)
    assert int(layer.cache_index.value) == LENGTH


@pytest.mark.parametrize("name", ["interleaved", "everything"])
@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS[0]])
def test_positions_of_tokens_turn_them(name, positions):
  options = OPTIONS[name]
  layer = make(**options)
  x = array(2, LENGTH, FEATURES)
  want = in_full(layer, options, x, np.broadcast_to(positions, (2, LENGTH)))
  for precision in (None, "highest"):
    layer.precision = precision
    nnx.init_cache(layer, 2, LENGTH)

    def both(layer, x, at):
      full = layer(x, decode=False, input_positions=at)
      return full, in_steps(layer, x, at)

    for got in run(layer, both, x, jnp.asarray(positions)):
      close(got, want, 2e-5)
  step = layer.prepare_step(x, decode=False, input_positions=positions)
  close(layer(x, step=step), want, 2e-5)


@pytest.mark.parametrize("name", ["head_dim", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cache_of_blocks(name, dtype):
  options = OPTIONS[name]
  layer = make(**options)
  x = array(2, LENGTH, FEATURES)
  want = in_full(layer, options, x)
  for precision in (None, "highest"):
    for prepare in (False, True):
      layer.precision = precision
      nnx.init_cache(layer, 2, 8, jnp.dtype(dtype), block_size=2)
      assert layer.cached_key.shape[:2] == (8, 2)
      got = run(
        layer,
        lambda layer, x, table, prepare=prepare: in_steps(
          layer, x, prepare=prepare, block_table=table
        ),
        x,
        TABLE,
      )
      close(got, want, 5e-6 if dtype == "float32" else 5e-2)
      assert layer.cache_index.value.tolist() == [LENGTH, LENGTH]
      if dtype == "int8":
        assert layer.cached_key_scale.shape == (KV_HEADS,)


def test_sequences_of_a_pool_come_and_go():
  """As a server has them: the caller counts, and the batch changes."""
  options = OPTIONS["everything"]
  layer = make(**options)
  nnx.init_cache(layer, 1, 8, block_size=2, blocks=9)
  x = array(3, LENGTH, FEATURES)
  want = in_full(layer, options, x)

  def call(tokens, index, table, lengths=None):
    step = layer.prepare_step(
      tokens, index=index, block_table=table, lengths=lengths
    )
    return layer(tokens, step=step)

  call(x[2:, :5], 0, jnp.array([[8, 5, 3, 0]]))
  close(call(x[:1, :3], 0, jnp.array([[1, 4, 7, 0]])), want[:1, :3])
  # The third goes on; its first block is also that of the second.
  tables = jnp.array([[1, 4, 7, 0], [8, 5, 3, 2]])
  two = jnp.stack([x[0, 3:5], x[2, 5:7]])
  got = call(two, jnp.array([3, 5]), tables, jnp.array([1, 2]))
  close(got[0, :1], want[0, 3:4])
  close(got[1], want[2, 5:7])
  assert layer.cache_index.value.tolist() == [0]
  again = call(x[2:, 2:4], 2, jnp.array([[8, 6, 6, 6]]))
  close(again, want[2:, 2:4])


def test_float64_blocks_need_no_kernels():
  with jax.enable_x64(True):
    layer = make(dtype=jnp.float64, param_dtype=jnp.float64, rope_base=100.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, FEATURES)))
    nnx.init_cache(layer, 2, 8, block_size=2)
    assert layer.cached_key.dtype == jnp.float64
    want = layer(x, decode=False)
    got = in_steps(layer, x, block_table=TABLE)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_step_with_blocks_is_one_kernel_call(dtype):
  layer = make(**OPTIONS["everything"])
  nnx.init_cache(layer, 2, 8, jnp.dtype(dtype), block_size=2)
  graphdef, state = nnx.split(layer)

  def step(state, x):
    model = nnx.merge(graphdef, state)
    return model(x, block_table=TABLE), nnx.state(model)

  text = jax.jit(step).lower(state, array(2, 1, FEATURES)).as_text()
  assert hlo.custom_calls(text, "fused_nnx_decode_attention_append_1") == 1
  assert text.count("custom_call") == 1
  assert "exponential" not in text and "tanh" not in text


# What layers share.


def primitives(jaxpr):
  """The names of all operations, those of inner programs included."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from primitives(inner)


class Stack(nnx.Module):
  def __init__(self, count, **options):
    self.layers = nnx.List(make(**options) for _ in range(count))

  def __call__(self, x, prepare=True, **kwargs):
    if prepare:
      kwargs = {"step": self.layers[0].prepare_step(x, **kwargs)}
    for layer in self.layers:
      x = x + layer(x, **kwargs)
    return x


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("precision", [None, "highest"])
def test_rows_and_masks_are_made_once(decode, precision):
  def counts(layers, prepare):
    model = Stack(layers, precision=precision, rope_base=100.0)
    nnx.init_cache(model, 2, 1024, per_sequence=True)
    graphdef, state = nnx.split(model)

    def call(state, x, lengths):
      model = nnx.merge(graphdef, state)
      y = model(x, prepare, lengths=lengths, decode=decode)
      return y, nnx.state(model)

    program = jax.make_jaxpr(call)(
      state, array(2, 3, FEATURES), jnp.array([3, 2])
    )
    names = list(primitives(program.jaxpr))
    return {name: names.count(name) for name in ("gather", "ge", "le")}

  once, all_of_them = counts(1, True), counts(3, True)
  assert once["gather"] == all_of_them["gather"] > 0
  assert counts(3, False)["gather"] == 3 * once["gather"]
  if decode:  # which keys a token sees, and which tokens have room
    assert once["ge"] == all_of_them["ge"] > 0
    assert once["le"] == all_of_them["le"] == (precision is not None)


@pytest.mark.parametrize("precision", [None, "highest"])
def test_a_shared_step_changes_nothing(precision):
  options = OPTIONS["everything"]
  x = array(2, LENGTH, FEATURES)
  results = []
  for prepare in (False, True):
    model = Stack(3, precision=precision, **options)
    nnx.init_cache(model, 2, LENGTH, per_sequence=True)

    def call(model, x, prepare=prepare):
      parts = [model(x[:, a:b], prepare) for a, b in PARTS]
      full = model(x, prepare, decode=False, lengths=jnp.array([7, 3]))
      return jnp.concatenate(parts, 1), full

    results.append(run(model, call, x))
    assert [layer.cache_index.value.tolist() for layer in model.layers] == [
      [LENGTH] * 2
    ] * 3
  for got, want in zip(results[1], results[0]):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tokens_without_room_are_lost_in_every_layer():
  model = Stack(2, rope_base=100.0)
  nnx.init_cache(model, 2, 4)
  y = run(model, lambda model, x: model(x), array(2, 6, FEATURES))
  assert np.isnan(y[:, 4:]).all() and not np.isnan(y[:, :4]).any()
  with pytest.raises(ValueError, match="must have room for all tokens"):
    model(array(2, 1, FEATURES))


def test_a_step_of_others_is_refused():
  layer, other = make(rope_base=100.0), make(rope_base=10.0)
  nnx.init_cache([layer, other], 2, LENGTH)
  x = array(2, 3, FEATURES)
  step = layer.prepare_step(x)
  with pytest.raises(ValueError, match="must be of a layer with the same rot"):
    other(x, step=step)
  with pytest.raises(ValueError, match="one of 3 tokens and"):
    layer(x[:, :2], step=step)
  with pytest.raises(ValueError, match="must be given to `prepare_step`, not"):
    layer(x, step=step, lengths=2)
  layer(x, step=step)
  with pytest.raises(ValueError, match="cache has seen the same tokens, but"):
    layer(x, step=step)
  with pytest.raises(ValueError, match="The inputs must fit the cache"):
    layer.prepare_step(x[:1])


# Caches of models.


@pytest.mark.parametrize(
  ("options", "dtype"),
  [
    ({}, jnp.float32),
    ({"dtype": jnp.bfloat16}, jnp.bfloat16),
    ({"param_dtype": jnp.bfloat16}, jnp.bfloat16),
    ({"dtype": jnp.float16, "param_dtype": jnp.bfloat16}, jnp.float16),
    ({"param_dtype": jnp.float8_e4m3fn}, jnp.float32),
  ],
)
def test_a_cache_has_the_dtype_of_the_layer(options, dtype):
  layer = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0), **options)
  layer.init_cache((2, 3, 4))
  assert layer.cached_key.dtype == layer.cached_value.dtype == dtype
  layer.init_cache((2, 3, 4), jnp.float32)
  assert layer.cached_key.dtype == jnp.float32
  view = nnx.view(
    nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), **options),
    decode=True,
    batch_size=2,
    max_length=3,
  )
  assert view.cached_key.dtype == dtype


@pytest.mark.parametrize("dtype", [None, jnp.int8])
def test_rewinding_takes_tokens_back(dtype):
  model = Stack(2, rope_base=100.0)
  nnx.init_cache(model, 2, LENGTH, dtype, per_sequence=True)
  x, other = array(2, LENGTH, FEATURES), array(2, LENGTH, FEATURES, seed=1)
  want = model(x)
  nnx.rewind_cache(model, jnp.array([0, 2]))
  layer = model.layers[0]
  assert layer.cache_index.value.tolist() == [0, 2]
  if dtype is not None:
    assert not layer.cached_key_scale.value[0].any()
    assert layer.cached_key_scale.value[1].all()
  nnx.rewind_cache(model)
  model(other)
  nnx.rewind_cache(model)
  assert layer.cache_index.value.tolist() == [0, 0]
  again = [model(x[:, :5])]
  model(other[:, :2])
  run(model, lambda model: nnx.rewind_cache(model, jnp.int32(5)))
  again.append(model(x[:, 5:]))
  again = jnp.concatenate(again, 1)
  close(again, np.asarray(want), 1e-5 if dtype is None else 1e-1)


def test_caches_of_stacked_layers():
  @nnx.vmap
  def layers(rngs):
    return nnx.MultiHeadAttention(
      2, 4, rope_base=100.0, decode=True, is_causal=True, rngs=rngs
    )

  @nnx.vmap(in_axes=0)
  def with_cache(layer):
    nnx.init_cache(layer, 2, 5)

  stack = layers(nnx.Rngs(0).fork(split=3))
  with_cache(stack)
  assert stack.cached_key.shape == (3, 2, 5, 2, 2)

  def call(stack, x):
    step = nnx.merge(*nnx.split(stack))
    del step
    return nnx.scan(
      lambda layer, x: x + layer(x),
      in_axes=(0, nnx.Carry),
      out_axes=nnx.Carry,
    )(stack, x)

  x = array(2, 3, 4)
  assert call(stack, x).shape == x.shape
  assert stack.cache_index.value.tolist() == [3, 3, 3]


# Causality.


def test_a_causal_layer_is_causal_always():
  layer = make()
  x = array(2, 3, FEATURES)
  want = in_full(layer, {}, x)
  close(layer(x, decode=False), want)
  layer.is_causal = None
  close(layer(x, decode=False, is_causal=True), want)
  free = in_full(layer, {}, x, is_causal=False)
  close(layer(x, decode=False), free)
  layer.is_causal = False
  close(layer(x, decode=False), free)
  nnx.init_cache(layer, 2, 3)
  for call in (layer, layer.prepare_step):
    with pytest.raises(ValueError, match="decodes causally, but its `is_caus"):
      call(x)


REFUSED = {
  "must be `num_heads \\* head_dim`, but got `qkv_features=12`": {
    "qkv_features": 12,
    "head_dim": 4,
  },
  "`head_dim` must be at least 1, but got 0": {"head_dim": 0},
  "`rope_dim` must be even and at most the features of a head, but got 3": {
    "rope_base": 10.0,
    "rope_dim": 3,
  },
  "must be even and at most the features of a head, but got 6 for heads of 4": {
    "rope_base": 10.0,
    "rope_dim": 6,
  },
  "`rope_dim` must not be given without `rope_base`": {"rope_dim": 2},
  "`rope_interleaved` must not be given without `rope_base`": {
    "rope_interleaved": True
  },
  "`rope_scaling` must not be given without `rope_base`": {
    "rope_scaling": YARN
  },
  "must be above 1 for `YarnScaling`, but got 1.0": {
    "rope_base": 1.0,
    "rope_scaling": YARN,
  },
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_are_not_possible(message):
  with pytest.raises(ValueError, match=message):
    make(**REFUSED[message])


def test_scalings_that_are_not_possible():
  with pytest.raises(TypeError, match="must be an `nnx.RopeScaling`, such as"):
    make(rope_base=10.0, rope_scaling=8.0)
  for message, wrong in {
    "`factor` must be positive and finite": lambda: nnx.Llama3Scaling(0.0),
    "`high_freq_factor` must be above": lambda: nnx.Llama3Scaling(2.0, 4.0),
    "`factor` must be at least 1, but got 0.5": lambda: nnx.YarnScaling(0.5, 8),
    "`beta_fast` must be above": lambda: nnx.YarnScaling(2.0, 8, 1.0, 1.0),
    "`mscale` must be finite": lambda: nnx.YarnScaling(2.0, 8, mscale=-1.0),
  }.items():
    with pytest.raises(ValueError, match=message):
      wrong()


def test_calls_that_are_not_possible():
  layer = make(rope_base=10.0)
  x = array(2, 3, FEATURES)
  for wrong, message in {
    (0, 1): r"shape \(3,\) or \(2, 3\), one for each token, but got `int",
    (0.0, 1.0, 2.0): "must be integers of the shape",
    (0, -1, 2): "must be at least 0, but got -1",
  }.items():
    with pytest.raises(ValueError, match=message):
      layer(x, decode=False, input_positions=jnp.array(wrong))
  with pytest.raises(ValueError, match="need keys of the same tokens as the q"):
    layer(x, x[:, :2], decode=False, input_positions=jnp.arange(3))
  with pytest.raises(ValueError, match="are of a cache, but `decode` is False"):
    layer(x, decode=False, block_table=TABLE)
  with pytest.raises(ValueError, match="must have a cache to rewind"):
    nnx.rewind_cache(layer)
  nnx.init_cache(layer, 2, 4)
  with pytest.raises(ValueError, match="for a cache of blocks and for no othe"):
    layer(x, block_table=TABLE)
  with pytest.raises(ValueError, match=r"`index` must be integers of the shap"):
    layer.prepare_step(x, index=jnp.zeros(3, int))
  with pytest.raises(ValueError, match="or have the shape of `cache_index`"):
    nnx.rewind_cache(layer, jnp.array([0, 1]))
  with pytest.raises(ValueError, match="`length` must be at least 0, but got"):
    nnx.rewind_cache(layer, -1)
  nnx.init_cache(layer, 2, 4, block_size=2)
  with pytest.raises(ValueError, match="got `None` for one of `block_size=2`"):
    layer(x)
  with pytest.raises(
    ValueError, match=r"of the shape \(2, 4\), with the block"
  ):
    layer(x, block_table=TABLE[:1])
  for message, options in {
    "`blocks` must not be given without `block_size`": {"blocks": 3},
    "`block_size` must be at least 1": {"block_size": 0},
    "`blocks` must be at least 1": {"block_size": 1, "blocks": 0},
  }.items():
    with pytest.raises(ValueError, match=message):
      nnx.init_cache(layer, 2, 4, **options)
  with pytest.raises(ValueError, match="must have an attention layer, as"):
    nnx.init_cache(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 2, 4)
  with pytest.raises(
    ValueError, match="layer's `rope_base` is None. Pass them"
  ):
    make().prepare_step(x, decode=False, input_positions=jnp.arange(3))
