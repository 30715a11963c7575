"""Norms, against flax.nnx."""

from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array
from tests.testing import hlo

HALF = jnp.bfloat16
MASK = jnp.arange(4)[:, None] < 3


def in_float32(args, /, *, dtype=None, inexact=True):
  del dtype, inexact
  return tuple(x if x is None else jnp.asarray(x, jnp.float32) for x in args)


BATCH_NORM = {
  "plain": {},
  "momentum": {"momentum": 0.5, "epsilon": 1e-2},
  "axis": {"axis": 1},
  "no scale": {"use_scale": False},
  "no bias": {"use_bias": False},
  "neither": {"use_bias": False, "use_scale": False},
  "accurate": {"use_fast_variance": False},
  "dtype": {"dtype": HALF},
  "param_dtype": {"param_dtype": HALF},
  "promote_dtype": {"dtype": HALF, "promote_dtype": in_float32},
  "initializers": {
    "scale_init": jax.nn.initializers.normal(),
    "bias_init": jax.nn.initializers.normal(),
  },
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", BATCH_NORM.values(), ids=BATCH_NORM)
def test_batch_norm(options, training):
  pair = comparison.pair("BatchNorm", 3, **options)
  shape = (4, 3, 5) if options.get("axis") else (4, 5, 3)
  half = HALF in options.values()
  comparison.assert_same(
    *pair,
    array(*shape),
    then=[(array(*shape, seed=1),)],  # from other averages
    use_running_average=not training,
    rtol=2e-2 if half else 2e-5,
    grad_rtol=4e-2 if half else 2e-4,
  )


@pytest.mark.parametrize("dtype", [HALF, jnp.float16, jnp.int32])
def test_batch_norm_of_other_dtypes(dtype):
  pair = comparison.pair("BatchNorm", 3)
  x = (4 * array(4, 3)).astype(dtype)
  comparison.assert_same(*pair, x, rtol=2e-2, grads=False)
  if dtype in (HALF, jnp.float16):
    # flax.nnx promotes x to float32 first; its gradients are rounded last too.
    comparison.assert_same(*pair, x, rtol=2e-2, grad_rtol=4e-2)


def test_batch_norm_refuses_complex_batches():
  # flax.nnx drops the imaginary part of the averages, with a warning.
  layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  with pytest.raises(TypeError, match="must be floating, but got complex64"):
    layer(array(4, 3).astype(jnp.complex64))


def test_batch_norm_with_a_mask():
  pair = comparison.pair("BatchNorm", 3)
  comparison.assert_same(*pair, array(4, 3), mask=MASK, grad_rtol=2e-4)


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
def test_batch_norm_across_a_mapped_axis(groups):
  pair = comparison.pair(
    "BatchNorm", 3, axis_name="i", axis_index_groups=groups
  )
  outputs = []
  for library, layer in zip((nnx, flax_nnx), pair):

    def call(x, library=library, layer=layer):
      layer = library.clone(layer)
      y = layer(x)
      return y, layer.mean[...], layer.var[...]

    if groups is None:
      outputs.append(jax.vmap(call, axis_name="i")(array(4, 2, 3)))
    else:
      # vmap has no groups: the arguments are what must arrive.
      with pytest.raises(Exception, match="axis_index_groups|groups"):
        jax.vmap(call, axis_name="i")(array(4, 2, 3))
  if outputs:
    for got, want in zip(*outputs):
      np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_batch_norm_follows_train_and_eval():
  ours, theirs = comparison.pair("BatchNorm", 3)
  for layer in (ours, theirs):
    layer.eval()
  comparison.assert_same(ours, theirs, array(4, 3))
  for layer in (ours, theirs):
    layer.train()
  comparison.assert_same(ours, theirs, array(4, 3), grad_rtol=2e-4)


def test_batch_norm_must_be_told():
  layer = nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="must be told `use_running_average`"):
    layer(array(4, 3))


def test_batch_norm_is_one_kernel_call_with_its_averages():
  layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

  def step(layer, x):
    return layer(x)

  graphdef, state = nnx.split(layer)

  def pure(state, x):
    model = nnx.merge(graphdef, state)
    y = step(model, x)
    return y, nnx.state(model)

  # Of a large array, XLA fuses what is elementwise with what follows.
  for rows, calls in ((4, 1), (2**14, 0)):
    x = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
    text = jax.jit(pure).lower(state, x).as_text()
    assert hlo.custom_calls(text, "fused_nnx_batch_stat_train_1") == 1
    assert hlo.custom_calls(text, "fused_nnx_batch_stat_normalize_1") == calls
    assert "stablehlo.reduce" not in text


def test_batch_norm_reads_half_precision_without_a_wide_copy():
  layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

  def pure(x):
    return nnx.clone(layer)(x)

  jaxpr = jax.make_jaxpr(pure)(array(4, 3, dtype=HALF))
  wide = [
    eqn
    for eqn in jaxpr.jaxpr.eqns
    if eqn.primitive.name == "convert_element_type"
    and eqn.outvars[0].aval.shape == (4, 3)
  ]
  assert not wide


NORMS = {
  "LayerNorm": (3,),
  "RMSNorm": (3,),
  "GroupNorm": (6, 3),
  "InstanceNorm": (3,),
}
OPTIONS = {
  "plain": {},
  "epsilon": {"epsilon": 1e-1},
  "no scale": {"use_scale": False},
  "no bias": {"use_bias": False},
  "accurate": {"use_fast_variance": False},
  "dtype": {"dtype": HALF},
  "param_dtype": {"param_dtype": HALF},
  "promote_dtype": {"dtype": HALF, "promote_dtype": in_float32},
  "scale_init": {"scale_init": jax.nn.initializers.normal()},
  "bias_init": {"bias_init": jax.nn.initializers.normal()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, options):
  if name == "RMSNorm" and any("bias" in key for key in options):
    pytest.skip("RMSNorm has no bias")
  features = NORMS[name][0]
  pair = comparison.pair(name, *NORMS[name], **options)
  half = HALF in options.values()
  comparison.assert_same(
    *pair,
    array(2, 4, 5, features),
    rtol=2e-2 if half else 2e-5,
    grad_rtol=4e-2 if half else 2e-4,
  )


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_half_precision(name):
  features = NORMS[name][0]
  pair = comparison.pair(name, *NORMS[name])
  comparison.assert_same(
    *pair, array(2, 4, features, dtype=HALF), rtol=2e-2, grad_rtol=4e-2
  )


@pytest.mark.parametrize("name", NORMS)
def test_norms_with_a_mask(name):
  features = NORMS[name][0]
  pair = comparison.pair(name, *NORMS[name])
  x = array(2, 4, features)
  mask = jnp.arange(x.size).reshape(x.shape) % 5 > 0
  comparison.assert_same(*pair, x, mask=mask, grad_rtol=2e-4)


@pytest.mark.parametrize("name", NORMS)
def test_norms_across_a_mapped_axis(name):
  features = NORMS[name][0]
  pair = comparison.pair(name, *NORMS[name], axis_name="i")
  x = array(3, 2, 4, features)
  got, want = (jax.vmap(layer, axis_name="i")(x) for layer in pair)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("accurate", [True, False])
def test_each_value_counts_the_same_across_a_mapped_axis(name, accurate):
  features = NORMS[name][0]
  layer = getattr(nnx, name)(
    *NORMS[name],
    axis_name="i",
    use_fast_variance=not accurate,
    rngs=nnx.Rngs(0),
  )
  row = array(1, 5, features)
  x = jnp.stack([row, row, array(1, 5, features, seed=1)])
  # The second repeats some values of the first, and the last has none.
  mask = jnp.stack(
    [
      jnp.ones((1, 5, features), bool),
      jnp.broadcast_to(jnp.arange(features) % 3 > 0, (1, 5, features)),
      jnp.zeros((1, 5, features), bool),
    ]
  )
  y = jax.vmap(lambda x, mask: layer(x, mask=mask), axis_name="i")(x, mask)
  np.testing.assert_array_equal(y[0], y[1])
  weights = mask.sum(0)
  axes = {"LayerNorm": 2, "RMSNorm": 2, "InstanceNorm": 1}.get(name, (1, 3))
  if name == "GroupNorm":
    row, weights = (z.reshape(1, 5, 3, 2) for z in (row, weights))

  def mean(z):
    return (z * weights).sum(axes, keepdims=True) / weights.sum(
      axes, keepdims=True
    )

  centred = row if name == "RMSNorm" else row - mean(row)
  want = centred / jnp.sqrt(mean(centred**2) + 1e-6)
  np.testing.assert_allclose(y[0].ravel(), want.ravel(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "args", "options", "shape"),
  [
    ("LayerNorm", (3,), {"reduction_axes": (1, 2)}, (2, 4, 3)),
    ("LayerNorm", (4,), {"reduction_axes": (1,), "feature_axes": 1}, (2, 4, 3)),
    ("RMSNorm", (3,), {"reduction_axes": (-2, -1)}, (2, 4, 3)),
    ("RMSNorm", (4,), {"feature_axes": (1,)}, (2, 4, 3)),
    ("GroupNorm", (6, None, 2), {}, (2, 4, 6)),
    ("GroupNorm", (6, 2), {"reduction_axes": (-2, -1)}, (2, 4, 6)),
    ("GroupNorm", (64,), {}, (2, 3, 64)),
    ("InstanceNorm", (4,), {"feature_axes": 1}, (2, 4, 3)),
  ],
)
def test_axes_and_groups(name, args, options, shape):
  pair = comparison.pair(name, *args, **options)
  comparison.assert_same(*pair, array(*shape), grad_rtol=2e-4)


def test_group_norm_without_a_batch_or_with_more_axes_of_it():
  # flax.nnx refuses the first, and mixes groups up in the second.
  layer = nnx.GroupNorm(6, 2, reduction_axes=-1, rngs=nnx.Rngs(0))
  x = array(2, 4, 6)
  want = x.reshape(2, 4, 2, 3) - x.reshape(2, 4, 2, 3).mean(-1, keepdims=True)
  want = want / jnp.sqrt((want**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(layer(x), want.reshape(x.shape), rtol=1e-4)
  np.testing.assert_allclose(layer(x[0, 0]), layer(x)[0, 0], rtol=1e-5)


def test_group_norm_takes_a_mask_without_features():
  layer = nnx.GroupNorm(6, 2, rngs=nnx.Rngs(0))
  x, mask = array(2, 4, 6), jnp.arange(4)[:, None] < 3
  full = jnp.broadcast_to(mask, x.shape)
  np.testing.assert_allclose(
    layer(x, mask=mask), layer(x, mask=full), rtol=1e-5
  )


def test_refusals():
  for groups in ((None, None), (2, 3)):
    with pytest.raises(
      ValueError, match="One of `num_groups` and `group_size`"
    ):
      nnx.GroupNorm(6, *groups, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`num_groups` must be a positive div"):
    nnx.GroupNorm(6, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`group_size` must be a positive div"):
    nnx.GroupNorm(6, None, 4, rngs=nnx.Rngs(0))
  layer = nnx.GroupNorm(6, 2, reduction_axes=1, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`reduction_axes` must contain the la"):
    layer(array(2, 4, 6))
  layer = nnx.InstanceNorm(2, feature_axes=0, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`feature_axes` must not contain the f"):
    layer(array(2, 4, 6))


@pytest.mark.parametrize("name", ["BatchNorm", *NORMS])
def test_metadata_reaches_the_parameters(name):
  args = NORMS.get(name, (3,))
  kwargs = {"scale_metadata": {"tag": 1}}
  if name != "RMSNorm":
    kwargs["bias_metadata"] = {"tag": 2}
  layer = getattr(nnx, name)(*args, rngs=nnx.Rngs(0), **kwargs)
  assert layer.scale.tag == 1
  assert name == "RMSNorm" or layer.bias.tag == 2


def test_view_sets_the_mode():
  layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
  assert nnx.view(layer, use_running_average=True).use_running_average
  assert not layer.use_running_average
