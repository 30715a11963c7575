"""from_flax_nnx: every layer of flax.nnx, with the same weights and results."""

import collections
import functools
from typing import Any

from absl.testing import absltest, parameterized
import flax
from flax import core, struct
from flax import nnx as fnnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bridge
import nnx

FLAX = tuple(map(int, flax.__version__.split(".")[:3]))
X = jax.random.normal(jax.random.key(0), (2, 5, 4))

# Name, how to make it with either library, arguments of a call, and whether the
# two agree bit for bit.
LAYERS = {
  "Linear": (lambda n, r: n.Linear(4, 3, rngs=r), (X,)),
  "LinearNoBias": (lambda n, r: n.Linear(4, 3, use_bias=False, rngs=r), (X,)),
  "LinearGeneral": (
    lambda n, r: n.LinearGeneral(
      4, (2, 3), batch_axis={0: 2}, rngs=r, dtype=jnp.bfloat16
    ),
    (X,),
  ),
  "Einsum": (
    lambda n, r: n.Einsum("nta,ab->ntb", (4, 3), (3,), rngs=r),
    (X,),
  ),
  "Conv": (lambda n, r: n.Conv(4, 3, kernel_size=(3,), rngs=r), (X,)),
  "ConvTranspose": (
    lambda n, r: n.ConvTranspose(4, 3, kernel_size=(3,), rngs=r),
    (X,),
  ),
  "Embed": (lambda n, r: n.Embed(7, 3, rngs=r), (jnp.arange(4),)),
  "BatchNorm": (lambda n, r: n.BatchNorm(4, rngs=r), (X,)),
  "LayerNorm": (lambda n, r: n.LayerNorm(4, rngs=r), (X,)),
  "RMSNorm": (lambda n, r: n.RMSNorm(4, rngs=r), (X,)),
  "GroupNorm": (lambda n, r: n.GroupNorm(4, num_groups=2, rngs=r), (X,)),
  "InstanceNorm": (lambda n, r: n.InstanceNorm(4, rngs=r), (X,)),
  "WeightNorm": (
    lambda n, r: n.WeightNorm(n.Linear(4, 3, rngs=r), rngs=r),
    (X,),
  ),
  "SpectralNorm": (
    lambda n, r: n.SpectralNorm(n.Linear(4, 3, rngs=r), rngs=r),
    (X,),
  ),
  "Dropout": (lambda n, r: n.Dropout(0.5, rngs=r), (X,)),
  "MultiHeadAttention": (
    lambda n, r: n.MultiHeadAttention(
      2, 4, 16, normalize_qk=True, decode=False, rngs=r
    ),
    (X,),
  ),
  "LoRA": (lambda n, r: n.LoRA(4, 2, 3, rngs=r), (X,)),
  "LoRALinear": (lambda n, r: n.LoRALinear(4, 3, lora_rank=2, rngs=r), (X,)),
  "PReLU": (lambda n, r: n.PReLU(), (X,)),
  "RNN": (lambda n, r: n.RNN(n.LSTMCell(4, 3, rngs=r)), (X,)),
  "RNNSimple": (lambda n, r: n.RNN(n.SimpleCell(4, 3, rngs=r)), (X,)),
  "RNNGRU": (lambda n, r: n.RNN(n.GRUCell(4, 3, rngs=r), rngs=r), (X,)),
  "Bidirectional": (
    lambda n, r: n.Bidirectional(
      n.RNN(n.OptimizedLSTMCell(4, 3, rngs=r)),
      n.RNN(n.GRUCell(4, 3, rngs=r)),
    ),
    (X,),
  ),
  "Sequential": (
    lambda n, r: n.Sequential(
      n.Linear(4, 4, rngs=r),
      n.relu,
      n.Dict(a=n.Linear(4, 4, rngs=r)).a,
      n.List([n.LayerNorm(4, rngs=r)])[0],
    ),
    (X,),
  ),
}


if hasattr(fnnx, "RoPE"):  # since Flax 0.12.12
  LAYERS["RoPE"] = (
    lambda n, r: n.RoPE(embedding_size=4, max_seq_len=6),
    (X, jnp.arange(5)),
  )


def pure(library, node):
  state = library.state(node)
  return {
    "/".join(map(str, path)): (
      (type(v).__name__, v.get_value())
      if isinstance(v, library.Variable)
      else ("array", v)
    )
    for path, v in library.to_flat_state(state)
  }


def check_same_state(test, ours, theirs):
  mine, expected = pure(nnx, ours), pure(fnnx, theirs)
  test.assertEqual(sorted(mine), sorted(expected))
  for path, (kind, value) in mine.items():
    test.assertEqual(kind, expected[path][0])
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
      value, other = map(jax.random.key_data, (value, expected[path][1]))
    else:
      other = expected[path][1]
    np.testing.assert_array_equal(value, other)


class LayersTest(parameterized.TestCase):
  @parameterized.parameters(*LAYERS)
  def test_layer(self, name):
    make, args = LAYERS[name]
    theirs = make(fnnx, fnnx.Rngs(0, dropout=1))
    ours = bridge.from_flax_nnx(theirs)
    native = make(nnx, nnx.Rngs(0, dropout=1))
    if name != "WeightNorm" or FLAX > (0, 12, 8):  # its scales became Params
      self.assertEqual(nnx.graphdef(ours), nnx.graphdef(native))
    check_same_state(self, ours, theirs)
    np.testing.assert_allclose(
      np.asarray(ours(*args), np.float32),
      np.asarray(theirs(*args), np.float32),
      rtol=2e-5,
      atol=2e-6,
    )
    after, expected = pure(nnx, ours), pure(fnnx, theirs)
    for path, (_, value) in after.items():
      if jnp.issubdtype(value.dtype, jnp.floating):
        np.testing.assert_allclose(value, expected[path][1], rtol=1e-5)

  def test_every_layer_of_flax_is_in_the_table(self):
    names = {
      name
      for name in dir(fnnx)
      if isinstance(getattr(fnnx, name), type)
      and issubclass(getattr(fnnx, name), fnnx.Module)
      and hasattr(nnx, name)
    }
    names -= {"Module", "List", "Dict", "RNNCellBase"}
    names -= {c for c in names if c.endswith("Cell")}  # inside of an RNN
    self.assertEmpty(names - set(LAYERS))

  def test_caches(self):
    def make(n, r):
      return n.MultiHeadAttention(2, 4, decode=True, rngs=r)

    theirs = make(fnnx, fnnx.Rngs(0))
    theirs.init_cache((2, 5, 4))
    theirs(X[:, :1])
    ours = bridge.from_flax_nnx(theirs)
    check_same_state(self, ours, theirs)
    for i in range(1, 4):
      np.testing.assert_allclose(
        ours(X[:, i : i + 1]), theirs(X[:, i : i + 1]), rtol=1e-5, atol=1e-6
      )


class TheirBlock(fnnx.Module):
  def __init__(self, rngs):
    self.embed = fnnx.Embed(7, 4, rngs=rngs)
    self.head = self.embed
    self.layers = fnnx.List([fnnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
    self.table = fnnx.data({"norm": fnnx.LayerNorm(4, rngs=rngs)})
    self.rngs = rngs
    self.width = 4


class OurBlock(nnx.Module):
  def __call__(self, tokens):
    x = self.embed(tokens)
    for layer in self.layers:
      x = self.table["norm"](nnx.relu(layer(x)))
    return self.head.attend(x)


class TheirStat(fnnx.Variable):
  pass


class OurStat(nnx.Variable):
  pass


class ModelsTest(absltest.TestCase):
  def test_own_classes(self):
    theirs = TheirBlock(fnnx.Rngs(0))
    ours = bridge.from_flax_nnx(theirs, {TheirBlock: OurBlock})
    self.assertIs(ours.head, ours.embed)
    self.assertIs(type(ours.layers), nnx.List)
    self.assertEqual(ours.width, 4)
    check_same_state(self, ours, theirs)
    self.assertEqual(ours(jnp.arange(3)).shape, (3, 7))
    np.testing.assert_array_equal(
      jax.random.key_data(ours.rngs()), jax.random.key_data(theirs.rngs())
    )

  def test_a_function_for_a_class(self):
    def convert(theirs, inner):
      return nnx.Sequential(*inner(theirs.layers))

    ours = bridge.from_flax_nnx(
      {"model": TheirBlock(fnnx.Rngs(0))}, {TheirBlock: convert}
    )
    self.assertEqual(ours["model"](X).shape, X.shape)

  def test_kinds_of_variables(self):
    theirs = fnnx.Dict(a=TheirStat(jnp.ones(2), unit="m"))
    ours = bridge.from_flax_nnx(theirs, {TheirStat: OurStat})
    self.assertIs(type(ours.a), OurStat)
    self.assertEqual(ours.a.unit, "m")
    self.assertEqual(type(bridge.from_flax_nnx(theirs).a).__name__, "TheirStat")

  def test_arrays_are_copied(self):
    theirs = fnnx.Linear(2, 3, rngs=fnnx.Rngs(0))
    ours = bridge.from_flax_nnx(theirs)

    @nnx.jit
    def write(model):
      model.kernel[...] += 1

    write(ours)
    np.testing.assert_allclose(
      ours.kernel[...], theirs.kernel[...] + 1, rtol=1e-6
    )

  def test_optimizer(self):
    theirs = fnnx.Linear(4, 3, rngs=fnnx.Rngs(0))
    optimizer = fnnx.Optimizer(theirs, optax.adam(0.1), wrt=fnnx.Param)
    grads = fnnx.grad(lambda m: (m(X) ** 2).sum())(theirs)
    optimizer.update(theirs, grads)
    model, ours = bridge.from_flax_nnx((theirs, optimizer))
    self.assertIs(type(ours), nnx.Optimizer)
    self.assertIs(ours.wrt, nnx.Param)
    check_same_state(self, ours, optimizer)
    for library, m, o in ((nnx, model, ours), (fnnx, theirs, optimizer)):
      grads = library.grad(lambda m: (m(X) ** 2).sum())(m)
      o.update(m, grads)
    check_same_state(self, ours, optimizer)
    np.testing.assert_allclose(model.kernel[...], theirs.kernel[...], rtol=1e-6)

  def test_metrics(self):
    theirs = fnnx.MultiMetric(
      accuracy=fnnx.metrics.Accuracy(), loss=fnnx.metrics.Average("loss")
    )
    logits, labels = jnp.eye(3), jnp.array([0, 1, 1])
    theirs.update(logits=logits, labels=labels, loss=jnp.float32(2))
    ours = bridge.from_flax_nnx(theirs)
    ours.update(logits=logits, labels=labels, loss=jnp.float32(3))
    theirs.update(logits=logits, labels=labels, loss=jnp.float32(3))
    self.assertEqual(ours.compute(), theirs.compute())


def linear():
  return fnnx.Linear(4, 3, rngs=fnnx.Rngs(0))


@struct.dataclass
class Pair:
  first: Any
  second: Any = struct.field(pytree_node=False, default=None)


class Ours(nnx.Module):
  """Holds an object of flax.nnx past every check."""

  def __init__(self, layer):
    vars(self)["layer"] = layer
    self.w = nnx.Param(jnp.ones(3), unit="m")
    self.same = self.w

  def __call__(self, x):
    return self.layer(x) * self.w


class PartsTest(parameterized.TestCase):
  """Whatever holds an object of flax.nnx, it is converted."""

  @parameterized.parameters(
    (lambda x: collections.OrderedDict(a=x), lambda x: x["a"]),
    (lambda x: collections.defaultdict(list, a=x), lambda x: x["a"]),
    (lambda x: core.FrozenDict(a=x), lambda x: x["a"]),
    (optax.TraceState, lambda x: x.trace),
    (Pair, lambda x: x.first),
    (functools.partial, lambda x: x.func),
    (jax.tree_util.Partial, lambda x: x.func),
    (lambda x: functools.partial(max, x), lambda x: x.args[0]),
    (lambda x: functools.partial(max, key=x), lambda x: x.keywords["key"]),
    (lambda x: x.__call__, lambda x: x.__self__),
    (Ours, lambda x: x.layer),
    (lambda x: nnx.List([Ours(x)]), lambda x: x[0].layer),
    (lambda x: nnx.Dict(a=Ours(x)), lambda x: x.a.layer),
    (lambda x: fnnx.Sequential(x, functools.partial(x)), lambda x: x.layers[0]),
  )
  def test_holders(self, wrap, unwrap):
    theirs = linear()
    held = wrap(theirs)
    result = bridge.from_flax_nnx(held)
    if not isinstance(held, fnnx.Pytree):
      self.assertIs(type(result), type(held))
    ours = unwrap(result)
    self.assertIs(type(ours), nnx.Linear)
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-6)

  def test_objects_of_ours_are_copied(self):
    model = Ours(linear())
    copy = bridge.from_flax_nnx(model)
    np.testing.assert_allclose(copy(X), model(X), rtol=1e-6)
    self.assertIs(copy.w, copy.same)
    self.assertIsNot(copy.w, model.w)
    self.assertEqual(copy.w.unit, "m")
    grads = nnx.grad(lambda m: m(X).sum())(copy)
    self.assertIn("kernel", grads["layer"])

  def test_variables_and_states(self):
    theirs = linear()
    kernel = bridge.from_flax_nnx(theirs.kernel)
    self.assertIs(type(kernel), nnx.Param)
    np.testing.assert_array_equal(kernel[...], theirs.kernel[...])
    state = bridge.from_flax_nnx(fnnx.state(theirs))
    self.assertIs(type(state), nnx.State)
    ours = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
    nnx.update(ours, state)
    np.testing.assert_allclose(ours(X), theirs(X), rtol=1e-6)
    flat = bridge.from_flax_nnx(fnnx.to_flat_state(fnnx.state(theirs)))
    self.assertIs(type(flat), nnx.FlatState)
    self.assertEqual([path for path, _ in flat], [("bias",), ("kernel",)])
    pure = bridge.from_flax_nnx(fnnx.State({"a": [jnp.ones(2)]}))
    np.testing.assert_array_equal(pure["a"][0], jnp.ones(2))
    streams = bridge.from_flax_nnx(fnnx.Rngs(0, dropout=1))
    self.assertIs(type(streams.dropout.key), nnx.RngKey)


class ErrorsTest(absltest.TestCase):
  def test_what_cannot_be_converted(self):
    for value, text in (
      (
        {"a": fnnx.split(linear())},
        "A graphdef of `flax.nnx` must be given as the object it describes, but"
        " `a/0` is one. Pass `flax.nnx.merge(graphdef, state)`.",
      ),
      (
        [fnnx.jit(lambda m: m)],
        "Every object must be of a class of `flax.nnx` itself or of one in"
        " `known`, but `0` is a `flax.nnx.transforms.compilation.JitWrapped`."
        " Pass `known={JitWrapped: ...}` with a class of ours for each: its"
        " objects get the same attributes.",
      ),
    ):
      with self.assertRaises(ValueError) as caught:
        bridge.from_flax_nnx(value)
      self.assertEqual(str(caught.exception), text)

  def test_all_that_is_unknown_is_listed(self):
    class Custom(fnnx.Linear):
      pass

    model = {
      "a": TheirBlock(fnnx.Rngs(0)),
      "b": [Custom(2, 3, rngs=fnnx.Rngs(0))],
    }
    with self.assertRaisesRegex(
      ValueError,
      r"in `known`, but `a` is a `.*TheirBlock`; `b/0` is a `.*Custom`. Pass"
      r" `known=\{TheirBlock: ...\}`",
    ):
      bridge.from_flax_nnx(model)


if __name__ == "__main__":
  absltest.main()
