"""Train states are pytrees whose steps are those of flax.nnx."""

from absl.testing import absltest
from flax import nnx as flax_nnx
from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nnx

X = np.random.RandomState(0).normal(size=(8, 3)).astype(np.float32)


def train(library):
  """The parameters after some functional steps of a linear model."""
  graphdef, params = library.split(library.Linear(3, 2, rngs=library.Rngs(0)))
  state = library.TrainState.create(
    graphdef, params=params, tx=optax.adam(0.1), step=5
  )

  @jax.jit
  def step(state):
    def loss(params):
      y, _ = state.apply(params)(X)
      return (y**2).mean()

    return state.apply_gradients(jax.grad(loss)(state.params))

  for _ in range(3):
    state = step(state)
  return state


class Bigger(nnx.TrainState):
  counts: nnx.State
  note: str = struct.field(pytree_node=False, default="a")
  other: str = nnx.static(default="b")


class Model(nnx.Module):
  def __init__(self):
    self.w = nnx.Param(2.0)
    self.calls = nnx.BatchStat(0)

  def __call__(self, x):
    self.calls.value += 1
    return self.w * x


class TrainStateTest(absltest.TestCase):
  def test_steps_are_those_of_flax(self):
    ours, theirs = train(nnx), train(flax_nnx)
    self.assertEqual(int(ours.step), int(theirs.step))
    for name in ("kernel", "bias"):
      np.testing.assert_allclose(
        ours.params[name][...], theirs.params[name][...], rtol=1e-5
      )
      np.testing.assert_allclose(
        ours.opt_state[0].nu[name][...],
        theirs.opt_state[0].nu[name][...],
        rtol=1e-5,
      )

  def make(self):
    graphdef, params, counts = nnx.split(Model(), nnx.Param, ...)
    return Bigger.create(
      graphdef, params=params, tx=optax.sgd(0.5), counts=counts
    )

  def test_derived_class(self):
    state = self.make()
    self.assertEqual((state.note, state.other), ("a", "b"))
    leaves = jax.tree.leaves(state)
    self.assertLen(leaves, 3)  # w, calls, step
    self.assertEqual(
      jax.tree.structure(state), jax.tree.structure(state.replace(step=7))
    )
    self.assertNotEqual(
      jax.tree.structure(state), jax.tree.structure(state.replace(note="c"))
    )

  def test_apply_changes_nothing_of_the_state(self):
    state = self.make()
    y, (_, after) = state.apply("params", "counts")(3.0)
    self.assertEqual(
      (y, after.calls.value, state.counts.calls.value), (6, 1, 0)
    )

  def test_gradients_with_other_fields(self):
    state = self.make()
    after = state.apply_gradients(
      nnx.State({"w": nnx.Param(1.0)}),
      counts=nnx.State({"calls": nnx.BatchStat(4)}),
    )
    self.assertEqual(float(after.params.w.value), 1.5)
    self.assertEqual(after.counts.calls.value, 4)
    self.assertEqual(int(after.step), 1)
    self.assertEqual(float(state.params.w.value), 2.0)

  def test_immutable(self):
    with self.assertRaises(AttributeError):
      self.make().step = 3

  def test_apply_of_a_field_that_is_no_state(self):
    with self.assertRaisesRegex(
      TypeError, "`Bigger.note` must be a State to be applied, but it is a `str"
    ):
      self.make().apply("params", "note")

  def test_scan(self):
    def step(state, x):
      grads = jax.tree.map(lambda w: jnp.full_like(w, x), state.params)
      return state.apply_gradients(grads), state.step

    state = self.make()
    state = state.replace(
      params=jax.tree.map(jnp.float32, state.params),
      step=jnp.int32(0),
    )
    state, steps = jax.lax.scan(step, state, jnp.ones(3))
    self.assertEqual(steps.tolist(), [0, 1, 2])
    self.assertEqual(float(state.params.w.value), 0.5)


if __name__ == "__main__":
  absltest.main()
