"""Wrappers that normalise weights, against flax.nnx."""

from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import Own, array

LINEAR = Own(lambda library: library.Linear(4, 3, rngs=library.Rngs(5)))
CONV = Own(lambda library: library.Conv(4, 3, 2, rngs=library.Rngs(5)))


def weight_norms(layer, **options):
  """Ours and theirs, as `comparison.pair` makes them."""

  def make(library):
    kwargs = {
      name: value(library) if isinstance(value, Own) else value
      for name, value in options.items()
    }
    return library.WeightNorm(layer(library), rngs=library.Rngs(0), **kwargs)

  ours, theirs = make(nnx), comparison.with_param_scales(make(flax_nnx))
  comparison.assert_same_state(ours, theirs)
  comparison.shake(ours, theirs)
  return ours, theirs


@pytest.mark.parametrize("layer", [LINEAR, CONV])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"feature_axes": 0},
    {"feature_axes": (0, 1)},
    {"feature_axes": None},
    {"use_scale": False},
    {"epsilon": 1e-1},
    {"dtype": jnp.bfloat16},
    {"variable_filter": Own(lambda library: library.PathContains("bias"))},
  ],
)
def test_weight_norm(layer, options):
  ours, theirs = weight_norms(layer, **options)
  rtol = 2e-2 if options.get("dtype") else 5e-5
  comparison.assert_same(
    ours,
    theirs,
    array(5, 2, 4),
    then=[(array(5, 2, 4, seed=1),)],
    rtol=rtol,
  )


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.float16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("use_scale", [False, True])
def test_weight_norm_rounds_where_flax_does(dtype, param_dtype, use_scale):
  weights = []
  for library in (nnx, flax_nnx):
    rngs = library.Rngs(5)
    linear = library.Linear(16, 8, param_dtype=param_dtype, rngs=rngs)
    layer = library.WeightNorm(
      linear,
      use_scale=use_scale,
      scale_init=jax.nn.initializers.constant(10.0),
      dtype=dtype,
      rngs=rngs,
    )
    layer(array(2, 16))
    weights.append(np.asarray(linear.kernel[...]))
  ours, theirs = weights
  assert ours.dtype == theirs.dtype
  # Compiled as one, ours keeps more bits inside of a sum of half precision.
  rounding = np.finfo(param_dtype).eps + np.finfo(ours.dtype).eps
  np.testing.assert_allclose(ours, theirs, rtol=2 * rounding, atol=0)


def test_weight_norm_draws_and_types_its_scales():
  rngs = nnx.Rngs(0)
  layer = nnx.WeightNorm(
    nnx.Linear(4, 3, rngs=rngs),
    scale_init=jax.nn.initializers.normal(),
    param_dtype=jnp.bfloat16,
    rngs=rngs,
  )
  (scale,) = layer.scales.values()
  assert scale.dtype == jnp.bfloat16 and float(jnp.std(scale)) > 0
  assert int(rngs.default.count.value) == 3


def test_weight_norm_trains_its_scales():
  rngs = nnx.Rngs(0)
  layer = nnx.WeightNorm(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
  x = array(5, 4)
  grads = nnx.grad(lambda layer: jnp.sum(layer(x)))(layer)
  weight = layer.layer_instance.kernel.value  # normalised
  want = np.sum(np.asarray(x) @ np.asarray(weight), 0)
  got = grads.scales["kernel",].value
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_weight_norm_loads_what_flax_kept_as_arrays():
  layer = nnx.WeightNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
  flat = dict(nnx.to_flat_state(nnx.state(layer)))
  flat["scales", ("kernel",)] = jnp.full((3,), 5.0)
  nnx.update(layer, nnx.from_flat_state(flat))
  assert isinstance(layer.scales["kernel",], nnx.Param)
  layer(array(2, 4))
  norms = jnp.linalg.norm(layer.layer_instance.kernel.value, axis=0)
  np.testing.assert_allclose(norms, 5.0, rtol=1e-5)


def test_weight_norm_promotes():
  calls = []

  def promote(args, /, *, dtype=None, inexact=True):
    calls.append((len(args), dtype))
    return args

  rngs = nnx.Rngs(0)
  layer = nnx.WeightNorm(
    nnx.Linear(4, 3, rngs=rngs),
    dtype=jnp.float32,
    promote_dtype=promote,
    rngs=rngs,
  )
  layer(array(2, 4))
  assert calls == [(2, jnp.float32)]


@pytest.mark.parametrize("layer", [LINEAR, CONV])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"n_steps": 3},
    {"n_steps": 0},
    {"epsilon": 1e-1},
    {"dtype": jnp.bfloat16},
    {"update_stats": False},
  ],
)
def test_spectral_norm(layer, options):
  ours, theirs = comparison.pair("SpectralNorm", layer, **options)
  rtol = 2e-2 if options.get("dtype") else 5e-5
  comparison.assert_same(
    ours,
    theirs,
    array(5, 2, 4),
    then=[(array(5, 2, 4, seed=1),)],
    rtol=rtol,
  )
  if not options:
    comparison.assert_same(
      ours, theirs, array(5, 2, 4), rtol=rtol, update_stats=False
    )


def test_spectral_norm_has_vectors_of_its_dtype():
  pair = comparison.pair("SpectralNorm", LINEAR, param_dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in pair[0].batch_stats.values()} == {
    jnp.dtype(jnp.bfloat16)
  }


def test_spectral_norm_follows_train_and_eval():
  ours, theirs = comparison.pair("SpectralNorm", LINEAR)
  for layer in (ours, theirs):
    layer.eval()
  before = np.asarray(ours.batch_stats["kernel", "u"].value)
  comparison.assert_same(ours, theirs, array(5, 4), rtol=5e-5)
  np.testing.assert_array_equal(ours.batch_stats["kernel", "u"].value, before)


def test_spectral_norm_may_refuse_what_is_no_matrix():
  rngs = nnx.Rngs(0)
  with pytest.raises(ValueError, match=r"`kernel` has the shape \(2, 4, 3\)"):
    nnx.SpectralNorm(
      nnx.Conv(4, 3, 2, rngs=rngs), error_on_non_matrix=True, rngs=rngs
    )


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_new_parameters_are_refused(name):
  rngs = nnx.Rngs(0)
  layer = getattr(nnx, name)(nnx.Linear(4, 3, rngs=rngs), rngs=rngs)
  layer.layer_instance.inner = nnx.Linear(4, 3, rngs=rngs)
  with pytest.raises(RuntimeError, match="one at `inner/kernel` is new"):
    layer(array(2, 4))
