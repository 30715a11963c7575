"""Dropout, against flax.nnx: the same keys drop the same elements."""

import jax
from jax import monitoring
import jax.numpy as jnp
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import Own, array

OPTIONS = {
  "plain": {},
  "broadcast": {"broadcast_dims": (0, -1)},
  "collection": {"rng_collection": "params"},
  "deterministic": {"deterministic": True},
  "stream": {"rngs": Own(lambda library: library.Rngs(dropout=3).dropout)},
}


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dropout(rate, options):
  pair = comparison.pair("Dropout", rate, **options)
  comparison.assert_same(
    *pair, array(3, 4, 5), then=[(array(3, 4, 5, seed=1),)]
  )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dropout_of_other_dtypes(dtype):
  pair = comparison.pair("Dropout", 0.3)
  comparison.assert_same(*pair, array(3, 40, dtype=dtype), rtol=1e-2)


@pytest.mark.parametrize(
  "make",
  [
    lambda library: library.Rngs(0, dropout=3),
    lambda library: library.Rngs(0).default,
    lambda library: jax.random.key(5),
  ],
)
def test_dropout_takes_keys_of_the_call(make):
  pair = comparison.pair("Dropout", 0.3, rngs=None)
  comparison.assert_same(*pair, array(3, 4), rngs=Own(make))
  comparison.assert_same(*pair, array(3, 4), deterministic=True)


def test_dropout_follows_train_and_eval():
  ours, theirs = comparison.pair("Dropout", 0.3)
  for layer in (ours, theirs):
    layer.eval()
  comparison.assert_same(ours, theirs, array(3, 4))
  for layer in (ours, theirs):
    layer.train()
  comparison.assert_same(ours, theirs, array(3, 4))
  assert nnx.view(ours, deterministic=True).deterministic


def test_the_rate_may_change_without_a_new_compilation():
  layer = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
  x = array(3, 4)
  layer(x)
  events = []
  monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: events.append(name)
  )
  layer.rate = 0.7
  layer(x)
  assert not [name for name in events if "compile" in name]


def test_refusals():
  with pytest.raises(TypeError, match="`rngs` must be a `Rngs`, a `RngStream`"):
    nnx.Dropout(0.1, rngs=3)
  layer = nnx.Dropout(0.1, deterministic=None)
  with pytest.raises(ValueError, match="must be told `deterministic`"):
    layer(array(3))
  with pytest.raises(ValueError, match="must have `rngs` unless it is determ"):
    layer(array(3), deterministic=False)
  with pytest.raises(TypeError, match="or a key, but got a `int`"):
    layer(array(3), deterministic=False, rngs=3)
