"""What a program sees that replaces functions of jax while layers run."""

from absl.testing import absltest, parameterized
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.nn import comparison
from tests.testing import interception

_OPERATIONS = (
  "jax.lax.conv_general_dilated",
  "jax.lax.dot_general",
  "jax.nn.softmax",
  "jax.numpy.dot",
  "jax.numpy.einsum",
  "jax.numpy.take",
  "jax.random.bernoulli",
)


def _attend(layer, x):
  return layer.attend(x)


def _call(layer, x):
  return layer(x)


def _step(layer, x):
  return layer((x, x), x)[1]


_ONES = np.linspace(-1, 1, 42, dtype=np.float32).reshape(2, 7, 3)
_TOKENS = np.array([[0, 2, 1]])

# Name, class, positional arguments, keywords, input, call.
_LAYERS = (
  ("linear", "Linear", (3, 5), {}, _ONES, _call),
  ("linear_general", "LinearGeneral", (3, (2, 2)), {}, _ONES, _call),
  ("einsum", "Einsum", ("abc,cd->abd", (3, 4), 4), {}, _ONES, _call),
  ("conv", "Conv", (3, 5, (3,)), {}, _ONES, _call),
  ("conv_transpose", "ConvTranspose", (3, 5, (3,)), {}, _ONES, _call),
  ("embed", "Embed", (3, 5), {}, _TOKENS, _call),
  ("attend", "Embed", (4, 3), {}, _ONES, _attend),
  ("lora", "LoRALinear", (3, 5), {"lora_rank": 2}, _ONES, _call),
  ("lstm", "LSTMCell", (3, 3), {}, _ONES, _step),
  (
    "attention",
    "MultiHeadAttention",
    (3, 3),
    {"decode": False, "normalize_qk": True},
    _ONES,
    _call,
  ),
  ("dropout", "Dropout", (0.5,), {}, _ONES, _call),
)


# What these layers leave to functions of jax, which call it by other names than
# the public ones.
_WITHIN_JAX = {
  "ConvTranspose": ["jax.lax.conv_general_dilated"],
  "MultiHeadAttention": ["jax.nn.softmax", "jax.numpy.einsum"],
}


class _Recorder:
  """Notes the operations and the shapes of their results, and doubles these."""

  def __init__(self):
    self.seen = []

  def __call__(self, name, original, *args, **kwargs):
    y = original(*args, **kwargs)
    self.seen.append((name, jnp.shape(y)))
    return y if y.dtype == bool else y * 2


def _record(function, *args, by="code"):
  recorder = _Recorder()
  with interception.replaced(_OPERATIONS, recorder, by):
    y = function(*args)
  return recorder.seen, y


def _transforms(layer, call, x):
  """Programs that trace the layer anew."""
  graphdef, state = nnx.split(layer)
  x = jnp.asarray(x)

  def pure():  # A new function each time: jax knows an old one again.
    return lambda state, x: call(nnx.merge(graphdef, state), x)

  def loss(layer, x):
    return call(layer, x).sum()

  return {
    "jax.jit": lambda: jax.jit(pure())(state, x),
    "nnx.jit": lambda: nnx.jit(lambda layer, x: call(layer, x))(layer, x),
    "grad": lambda: nnx.grad(loss)(layer, x),
    "eval_shape": lambda: jax.eval_shape(pure(), state, x),
    "make_jaxpr": lambda: jax.make_jaxpr(pure())(state, x),
  }


class InterceptionTest(parameterized.TestCase):
  @parameterized.named_parameters(*_LAYERS)
  def test_layer_is_seen_as_flax_is_seen(self, name, args, kwargs, x, call):
    ours, theirs = comparison.pair(name, *args, **kwargs)
    x = jnp.asarray(x)
    if name == "Dropout":  # The streams, which both libraries start alike.
      plain = None
    else:
      plain = call(ours, x)
    want, expected = _record(call, theirs, x)
    self.assertNotEmpty(want)
    for by in ("code", "attribute"):
      with self.subTest(by):
        seen, y = _record(call, ours, x, by=by)
        if by == "attribute" and name in _WITHIN_JAX:
          hidden = _WITHIN_JAX[name]
          self.assertEqual(seen, [row for row in want if row[0] not in hidden])
          continue
        self.assertEqual(seen, want)
        if plain is not None:
          np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
          self.assertGreater(np.abs(y - plain).max(), 1e-3)
    if plain is not None:
      np.testing.assert_array_equal(call(ours, x), plain)

  @parameterized.named_parameters(*_LAYERS)
  def test_layer_is_seen_in_every_trace(self, name, args, kwargs, x, call):
    layer, theirs = comparison.pair(name, *args, **kwargs)
    call(layer, jnp.asarray(x))
    want, _ = _record(call, theirs, jnp.asarray(x))
    for transform, run in _transforms(layer, call, x).items():
      with self.subTest(transform):
        seen, _ = _record(run)
        # Gradients have products of their own, after these.
        self.assertEqual(seen[: len(want)], want)
        self.assertTrue(len(seen) == len(want) or transform == "grad")

  @parameterized.named_parameters(
    ("layer_norm", nnx.LayerNorm, (3,), {}),
    ("rms_norm", nnx.RMSNorm, (3,), {}),
    ("group_norm", nnx.GroupNorm, (3, 1), {}),
    ("instance_norm", nnx.InstanceNorm, (3,), {}),
    ("batch_norm", nnx.BatchNorm, (3,), {"use_running_average": True}),
  )
  def test_norm_is_seen(self, cls, args, kwargs):
    layer = cls(*args, **kwargs, rngs=nnx.Rngs(0))
    x = jnp.asarray(_ONES)
    before = layer(x)
    for by in ("code", "attribute"):
      recorder = _Recorder()
      with interception.replaced(["jax.lax.rsqrt"], recorder, by):
        y = layer(x)
        jax.jit(lambda x: layer(x))(x)
      self.assertLen(recorder.seen, 2)
      np.testing.assert_allclose(y, 2 * before, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer(x), before)

  def test_what_is_compiled_first_under_interception_is_not_kept(self):
    layer = nnx.Linear(3, 11, rngs=nnx.Rngs(0))
    x = jnp.asarray(_ONES)
    seen, _ = _record(layer, x)
    self.assertLen(seen, 1)
    want = np.asarray(x, np.float64) @ np.asarray(layer.kernel.value)
    np.testing.assert_allclose(layer(x), want, rtol=1e-4, atol=1e-5)

  def test_interceptor_may_look_at_concrete_values(self):
    layer = nnx.Linear(3, 12, rngs=nnx.Rngs(0))

    def handle(_, original, lhs, rhs, *args, **kwargs):
      scale = float(jnp.abs(rhs).max())  # raises in a trace
      return original(lhs, rhs / scale, *args, **kwargs) * scale

    with interception.replaced(["jax.lax.dot_general"], handle):
      y = layer(jnp.asarray(_ONES))
    np.testing.assert_allclose(y, layer(jnp.asarray(_ONES)), rtol=1e-5)

  def test_scan_that_is_kept_is_seen(self):
    rnn = nnx.RNN(nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0)))
    x = jnp.asarray(_ONES)
    before = rnn(x)
    seen, y = _record(rnn, x)
    self.assertEqual([name for name, _ in seen], ["jax.lax.dot_general"] * 2)
    self.assertGreater(np.abs(y - before).max(), 1e-3)
    np.testing.assert_array_equal(rnn(x), before)

  def test_decoding_is_seen(self):
    ours, theirs = comparison.pair(
      "MultiHeadAttention", 1, 3, decode=True, randomize=True
    )
    x = jnp.asarray(_ONES[:, :1])
    for layer in (ours, theirs):
      layer.init_cache((2, 8, 3))
    ours(x)
    ours.init_cache((2, 8, 3))
    (seen, y), (want, expected) = (_record(m, x) for m in (ours, theirs))
    self.assertEqual([name for name, _ in seen], [name for name, _ in want])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)

  def test_every_operation_by_its_primitive_is_seen(self):
    layer = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    x = jnp.asarray(_ONES)
    layer(x)
    bind, seen = jax.extend.core.Primitive.bind, []

    def spy(self, *args, **params):
      seen.append(self.name)
      return bind(self, *args, **params)

    jax.extend.core.Primitive.bind = spy
    try:
      layer(x)
    finally:
      jax.extend.core.Primitive.bind = bind
    self.assertIn("rsqrt", seen)

  def test_disable_jit_runs_the_plain_operations(self):
    layer = nnx.Linear(3, 13, rngs=nnx.Rngs(0))
    x = jnp.asarray(_ONES)
    before = layer(x)
    with jax.disable_jit():
      np.testing.assert_allclose(layer(x), before, rtol=1e-5, atol=1e-6)

  def test_named_dot_general_is_called_as_it_is(self):
    calls = []

    def dot_general(*args, **kwargs):
      calls.append(args[0].shape)
      return jax.lax.dot_general(*args, **kwargs)

    layer = nnx.Linear(3, 4, dot_general=dot_general, rngs=nnx.Rngs(0))
    layer(jnp.asarray(_ONES))
    layer(jnp.asarray(_ONES))
    self.assertEqual(calls, [(2, 7, 3)] * 2)


if __name__ == "__main__":
  absltest.main()
