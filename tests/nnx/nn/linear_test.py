"""`Linear`, `LinearGeneral` and `Einsum`, against flax.nnx."""

import time

from flax import nnx as flax_nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.nn import linear as linear_lib
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array

HALF = jnp.bfloat16


def in_float32(args, /, *, dtype=None, inexact=True):
  del dtype, inexact
  return tuple(x if x is None else jnp.asarray(x, jnp.float32) for x in args)


def doubled(*args, **kwargs):
  return 2 * lax.dot_general(*args, **kwargs)


LINEAR = {
  "plain": {},
  "no bias": {"use_bias": False},
  "dtype": {"dtype": HALF},
  "param_dtype": {"param_dtype": HALF},
  "precision": {"precision": "highest"},
  "preferred": {"dtype": HALF, "preferred_element_type": jnp.float32},
  "promote_dtype": {"dtype": HALF, "promote_dtype": in_float32},
  "dot_general": {"dot_general": doubled},
  "initializers": {
    "kernel_init": jax.nn.initializers.normal(),
    "bias_init": jax.nn.initializers.ones,
  },
}


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
def test_linear(options, shape):
  pair = comparison.pair("Linear", 4, 3, **options)
  rtol = 2e-2 if HALF in options.values() else 2e-5
  comparison.assert_same(*pair, array(*shape), rtol=rtol)


@pytest.mark.parametrize("dtype", [HALF, jnp.float16, jnp.int32, jnp.complex64])
def test_linear_of_other_dtypes(dtype):
  pair = comparison.pair("Linear", 4, 3)
  x = jnp.ones((2, 4), dtype)
  comparison.assert_same(*pair, x, rtol=1e-2, grads=dtype != jnp.int32)


def test_linear_takes_numpy_arrays_and_lists():
  ours, theirs = comparison.pair("Linear", 2, 3)
  for x in (np.ones((1, 2), np.float32), [[1.0, 2.0]]):
    np.testing.assert_allclose(ours(jnp.asarray(x)), ours(np.asarray(x)))
  comparison.assert_same(ours, theirs, np.ones((1, 2), np.float32))


GENERAL = {
  "plain": ((4, 3), {}, (2, 4)),
  "out": ((4, (2, 3)), {}, (5, 4)),
  "two axes": (((2, 3), (4, 5)), {"axis": (1, -1)}, (6, 2, 3)),
  "first axis": ((3, 4), {"axis": 0}, (3, 5)),
  "batch": ((4, (2, 3)), {"batch_axis": {0: 5}}, (5, 6, 4)),
  "batch, no bias": (
    (4, 3),
    {"batch_axis": {0: 2, 1: 3}, "use_bias": False},
    (2, 3, 7, 4),
  ),
  "two batch": ((4, 3), {"batch_axis": {0: 2, 1: 3}}, (2, 3, 7, 4)),
  "dtype": ((4, 3), {"dtype": HALF, "precision": "high"}, (2, 4)),
  "param_dtype": ((4, 3), {"param_dtype": HALF}, (2, 4)),
  "preferred": (
    (4, 3),
    {"dtype": HALF, "preferred_element_type": jnp.float32},
    (2, 4),
  ),
  "promote_dtype": (
    (4, (3, 2)),
    {"dtype": HALF, "promote_dtype": in_float32},
    (2, 4),
  ),
  "dot_general": ((4, 3), {"dot_general": doubled}, (2, 4)),
  "dot_general_cls": ((4, 3), {"dot_general_cls": lambda: doubled}, (2, 4)),
  "initializers": (
    (4, (3, 2)),
    {
      "kernel_init": jax.nn.initializers.he_normal(),
      "bias_init": jax.nn.initializers.normal(),
    },
    (2, 4),
  ),
}


@pytest.mark.parametrize(
  ("args", "options", "shape"), GENERAL.values(), ids=GENERAL
)
def test_linear_general(args, options, shape):
  pair = comparison.pair("LinearGeneral", *args, **options)
  rtol = 2e-2 if HALF in options.values() else 2e-5
  comparison.assert_same(*pair, array(*shape), rtol=rtol)


def test_linear_general_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match="`in_features` must have one size for"):
    nnx.LinearGeneral((2, 3), 4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`batch_axis` must name the leading"):
    nnx.LinearGeneral(2, 4, batch_axis={1: 3}, rngs=nnx.Rngs(0))


EINSUM = {
  "plain": (("nta,hab->nthb", (8, 2, 4), (8, 4)), {}, (3, 5, 2)),
  "spaces": (("nta, hab -> nthb", (8, 2, 4), (8, 4)), {}, (3, 5, 2)),
  "no bias": (("na,ab->nb", (2, 4)), {}, (3, 2)),
  "bias of a size": (("na,ab->nb", (2, 4), 4), {}, (3, 2)),
  "ellipsis": (("...a,ab->...b", (2, 4), (4,)), {}, (3, 5, 2)),
  "ellipsis in front": (("a...,ab->b...", (2, 4), (4,)), {}, (2, 3, 5)),
  "order": (("na,ab->bn", (2, 4), (4,)), {}, (3, 2)),
  "dtype": (("na,ab->nb", (2, 4), (4,)), {"dtype": HALF}, (3, 2)),
  "options": (
    ("na,ab->nb", (2, 4), (4,)),
    {
      "param_dtype": HALF,
      "dtype": HALF,
      "precision": "highest",
      "preferred_element_type": jnp.float32,
      "kernel_init": jax.nn.initializers.he_uniform(),
      "bias_init": jax.nn.initializers.ones,
    },
    (3, 2),
  ),
  "promote_dtype": (
    ("na,ab->nb", (2, 4), (4,)),
    {"dtype": HALF, "promote_dtype": in_float32},
    (3, 2),
  ),
  "einsum_op": (
    ("na,ab->nb", (2, 4), (4,)),
    {"einsum_op": lambda *a, **k: 2 * jnp.einsum(*a, **k)},
    (3, 2),
  ),
}


@pytest.mark.parametrize(
  ("args", "options", "shape"), EINSUM.values(), ids=EINSUM
)
def test_einsum(args, options, shape):
  pair = comparison.pair("Einsum", *args, **options)
  rtol = 2e-2 if HALF in options.values() else 2e-5
  comparison.assert_same(*pair, array(*shape), rtol=rtol)


def test_einsum_takes_an_equation_of_the_call():
  pair = comparison.pair("Einsum", "na,ab->nb", (2, 4), (4,))
  comparison.assert_same(*pair, array(3, 2), einsum_str="na,ab->bn")
  layer = nnx.Einsum(None, (2, 4), rngs=nnx.Rngs(0))
  assert layer(array(3, 2), "na, ab -> nb").shape == (3, 4)


def test_einsum_refuses_equations_that_are_none():
  with pytest.raises(ValueError, match="`einsum_str` must have the result"):
    nnx.Einsum("na,ab", (2, 4), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="two operands.*but got 3 in"):
    nnx.Einsum("na,ab,bc->nc", (2, 4), rngs=nnx.Rngs(0))
  layer = nnx.Einsum(None, (2, 4), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`Einsum` must get `einsum_str` from"):
    layer(array(3, 2))


@pytest.mark.parametrize(
  ("name", "args"),
  [
    ("Linear", (4, 3)),
    ("LinearGeneral", (4, 3)),
    ("Einsum", ("na,ab->nb", (4, 3), (3,))),
  ],
)
def test_metadata_reaches_the_parameters(name, args):
  layer = getattr(nnx, name)(
    *args,
    kernel_metadata={"sharding_names": ("in", "out")},
    bias_metadata={"tag": 1},
    rngs=nnx.Rngs(0),
  )
  assert layer.kernel.sharding_names == ("in", "out")
  assert layer.bias.tag == 1


def test_metadata_of_initializers_survives_the_reshape():
  layer = nnx.LinearGeneral(
    2,
    (3, 4),
    kernel_init=nnx.with_partitioning(
      jax.nn.initializers.ones, (None, "heads", None)
    ),
    bias_init=nnx.with_metadata(jax.nn.initializers.ones, tag=1),
    rngs=nnx.Rngs(0),
  )
  assert layer.kernel.shape == (2, 3, 4)
  assert layer.kernel.out_sharding == (None, "heads", None)
  assert layer.bias.shape == (3, 4) and layer.bias.tag == 1


def test_one_compiled_call_that_leaves_no_trace():
  layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  text = str(jax.make_jaxpr(lambda x: layer(x))(array(2, 4)))
  assert "pjit" not in text and "dot_general" in text


def test_an_eager_call_is_not_slow():
  x, layer = array(4, 8), nnx.Linear(8, 8, rngs=nnx.Rngs(0))
  kernel, bias = layer.kernel.value, layer.bias.value

  def seconds(function):
    function()
    best = float("inf")
    for _ in range(5):
      start = time.thread_time()
      for _ in range(300):
        function()
      best = min(best, time.thread_time() - start)
    return best

  plain = seconds(lambda: x @ kernel + bias)
  assert seconds(lambda: layer(x)) < 3 * plain


def test_rank_promotion_may_be_refused():
  layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  with jax.numpy_rank_promotion("raise"):
    assert layer(array(2, 5, 4)).shape == (2, 5, 3)


def test_axis_sizes_is_a_mapping_that_prints():
  sizes = linear_lib.AxisSizes({0: 2})
  assert repr(sizes) == "AxisSizes({0: 2})"
  assert list(sizes) == [0] and len(sizes) == 1 and sizes == {0: 2}


def test_linear_under_vmap_and_jit_of_flax_and_ours():
  ours, theirs = comparison.pair("Linear", 4, 3)
  x = array(5, 4)
  got = nnx.jit(lambda m, x: m(x))(ours, x)
  want = flax_nnx.jit(lambda m, x: m(x))(theirs, x)
  np.testing.assert_allclose(got, want, rtol=2e-5)
  np.testing.assert_allclose(jax.vmap(ours)(x), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "args", "features"),
  [("Linear", (0, 3), 3), ("Linear", (3, 0), 0), ("LoRALinear", (0, 3), 3)],
)
def test_layers_may_have_no_features(name, args, features):
  options = {"lora_rank": 2} if name == "LoRALinear" else {}
  layer = getattr(nnx, name)(*args, **options, rngs=nnx.Rngs(0))
  y = layer(jnp.ones((2, args[0])))
  np.testing.assert_array_equal(y, np.zeros((2, features)))
