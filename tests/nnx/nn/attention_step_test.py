"""Layers that share a step: what is computed once for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import attention_formula as formula
from tests.nnx.nn.comparison import array


def primitives(jaxpr):
  """The names of all operations, those of inner programs included."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from primitives(inner)


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("precision", [None, "highest"])
def test_rows_and_masks_are_made_once(decode, precision):
  def counts(layers, prepare):
    model = formula.Stack(layers, precision=precision, rope_base=100.0)
    nnx.init_cache(model, 2, 1024, per_sequence=True)
    graphdef, state = nnx.split(model)

    def call(state, x, lengths):
      model = nnx.merge(graphdef, state)
      y = model(x, prepare, lengths=lengths, decode=decode)
      return y, nnx.state(model)

    program = jax.make_jaxpr(call)(
      state, array(2, 3, formula.FEATURES), jnp.array([3, 2])
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
  options = formula.OPTIONS["everything"]
  x = array(2, formula.LENGTH, formula.FEATURES)
  results = []
  for prepare in (False, True):
    model = formula.Stack(3, precision=precision, **options)
    nnx.init_cache(model, 2, formula.LENGTH, per_sequence=True)

    def call(model, x, prepare=prepare):
      parts = [model(x[:, a:b], prepare) for a, b in formula.PARTS]
      full = model(x, prepare, decode=False, lengths=jnp.array([7, 3]))
      return jnp.concatenate(parts, 1), full

    results.append(formula.run(model, call, x))
    assert [layer.cache_index.value.tolist() for layer in model.layers] == [
      [formula.LENGTH] * 2
    ] * 3
  for got, want in zip(results[1], results[0]):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_tokens_without_room_are_lost_in_every_layer():
  model = formula.Stack(2, rope_base=100.0)
  nnx.init_cache(model, 2, 4)
  y = formula.run(
    model, lambda model, x: model(x), array(2, 6, formula.FEATURES)
  )
  assert np.isnan(y[:, 4:]).all() and not np.isnan(y[:, :4]).any()
  with pytest.raises(ValueError, match="must have room for all tokens"):
    model(array(2, 1, formula.FEATURES))


def test_a_step_of_others_is_refused():
  layer, other = formula.make(rope_base=100.0), formula.make(rope_base=10.0)
  nnx.init_cache([layer, other], 2, formula.LENGTH)
  x = array(2, 3, formula.FEATURES)
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
