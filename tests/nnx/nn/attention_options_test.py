"""Options that models of today have, against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import attention_formula as formula
from tests.nnx.nn.comparison import array


@pytest.mark.parametrize(
  ("scaling", "rates", "magnitude"),
  [
    (
      nnx.Llama3Scaling(8.0, 1.0, 4.0, 8192),
      formula.llama3_rates(128, 5e5, 8.0, 1.0, 4.0, 8192),
      1.0,
    ),
    (
      nnx.Llama3Scaling(32.0, 2.0, 3.0, 1024),
      formula.llama3_rates(128, 5e5, 32.0, 2.0, 3.0, 1024),
      1.0,
    ),
    (
      nnx.YarnScaling(4.0, 32768),
      formula.yarn_rates(128, 5e5, 4.0, 32768),
      0.1 * np.log(4) + 1,
    ),
    (
      nnx.YarnScaling(
        40.0, 4096, 16.0, 2.0, mscale=0.7, mscale_all_dim=1.5, truncate=False
      ),
      formula.yarn_rates(128, 5e5, 40.0, 4096, 16.0, 2.0, truncate=False),
      (0.07 * np.log(40) + 1) / (0.15 * np.log(40) + 1),
    ),
    (
      nnx.YarnScaling(1.0, 512, attention_factor=0.5),
      formula.yarn_rates(128, 5e5, 1.0, 512),
      0.5,
    ),
  ],
)
def test_scaled_rates_are_those_of_the_formulas(scaling, rates, magnitude):
  np.testing.assert_allclose(scaling.rates(128, 5e5), rates, rtol=1e-12)
  np.testing.assert_allclose(scaling.magnitude, magnitude, rtol=1e-12)


@pytest.mark.parametrize("name", formula.OPTIONS)
def test_layer_computes_the_formula(name):
  options = formula.OPTIONS[name]
  layer = formula.make(**options)
  x = array(2, formula.LENGTH, formula.FEATURES)
  want = formula.in_full(layer, options, x)
  for more in ({}, {"precision": "highest"}):
    layer.precision = more.get("precision")
    nnx.init_cache(layer, 2, formula.LENGTH)

    def both(layer, x):
      return layer(x, decode=False), formula.in_steps(layer, x)

    full, steps = formula.run(layer, both, x)
    formula.close(full, want)
    formula.close(steps, want)
    assert int(layer.cache_index.value) == formula.LENGTH


@pytest.mark.parametrize("name", ["interleaved", "everything"])
@pytest.mark.parametrize("positions", [formula.POSITIONS, formula.POSITIONS[0]])
def test_positions_of_tokens_turn_them(name, positions):
  options = formula.OPTIONS[name]
  layer = formula.make(**options)
  x = array(2, formula.LENGTH, formula.FEATURES)
  want = formula.in_full(
    layer, options, x, np.broadcast_to(positions, (2, formula.LENGTH))
  )
  for precision in (None, "highest"):
    layer.precision = precision
    nnx.init_cache(layer, 2, formula.LENGTH)

    def both(layer, x, at):
      full = layer(x, decode=False, input_positions=at)
      return full, formula.in_steps(layer, x, at)

    for got in formula.run(layer, both, x, jnp.asarray(positions)):
      formula.close(got, want, 2e-5)
  step = layer.prepare_step(x, decode=False, input_positions=positions)
  formula.close(layer(x, step=step), want, 2e-5)


def test_a_causal_layer_is_causal_always():
  layer = formula.make()
  x = array(2, 3, formula.FEATURES)
  want = formula.in_full(layer, {}, x)
  formula.close(layer(x, decode=False), want)
  layer.is_causal = None
  formula.close(layer(x, decode=False, is_causal=True), want)
  free = formula.in_full(layer, {}, x, is_causal=False)
  formula.close(layer(x, decode=False), free)
  layer.is_causal = False
  formula.close(layer(x, decode=False), free)
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
    "rope_scaling": formula.YARN
  },
  "must be above 1 for `YarnScaling`, but got 1.0": {
    "rope_base": 1.0,
    "rope_scaling": formula.YARN,
  },
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_are_not_possible(message):
  with pytest.raises(ValueError, match=message):
    formula.make(**REFUSED[message])


def test_scalings_that_are_not_possible():
  with pytest.raises(TypeError, match="must be an `nnx.RopeScaling`, such as"):
    formula.make(rope_base=10.0, rope_scaling=8.0)
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
  layer = formula.make(rope_base=10.0)
  x = array(2, 3, formula.FEATURES)
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
    layer(x, decode=False, block_table=formula.TABLE)
  with pytest.raises(ValueError, match="must have a cache to rewind"):
    nnx.rewind_cache(layer)
  nnx.init_cache(layer, 2, 4)
  with pytest.raises(ValueError, match="for a cache of blocks and for no othe"):
    layer(x, block_table=formula.TABLE)
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
    layer(x, block_table=formula.TABLE[:1])
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
    formula.make().prepare_step(x, decode=False, input_positions=jnp.arange(3))
