"""Tests of the mixture of experts: routes, values and programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import digits, experts
import nnx
from tests.testing import devices, hlo

devices.use_cpu_devices(8)


@pytest.fixture(autouse=True)
def enough_devices():
  devices.need_devices(8)


def batch(size=64):
  data = digits.load()
  return data.train_images[:size], data.train_labels[:size]


@functools.cache
def compiled_gradient():
  """What computes the loss and its gradients on the mesh."""
  mesh = experts.make_mesh()
  with jax.set_mesh(mesh):
    model, _ = nnx.eval_shape(lambda: experts.make(experts.AXIS))
    run = nnx.value_and_grad(experts.split_loss(mesh), has_aux=True)
    return nnx.jit(run).lower(model, *batch()).compile()


def test_first_choices_get_their_places_first():
  probabilities = jnp.array(
    [[0.7, 0.3, 0.0], [0.1, 0.9, 0.0], [0.6, 0.3, 0.1], [0.3, 0.2, 0.5]]
  )
  routes = experts.route(probabilities, 2)
  np.testing.assert_array_equal(routes.expert, [[0, 1, 0, 2], [1, 0, 1, 0]])
  np.testing.assert_array_equal(routes.place, [[0, 0, 1, 0], [1, 2, 2, 3]])
  np.testing.assert_allclose(
    routes.weight, [[0.7, 0.9, 0.6, 0.5], [0.3, 0.1, 0.3, 0.3]]
  )


def test_balance_loss():
  even = jnp.full((6, 3), 1 / 3)
  routes = experts.route(even + 0.01 * jnp.eye(3)[jnp.arange(6) % 3], 1)
  np.testing.assert_allclose(experts.balance_loss(even, routes), 1, rtol=1e-6)
  skewed = jnp.array([[0.8, 0.2], [0.6, 0.4], [0.6, 0.4], [0.4, 0.6]])
  # Shares 3/4 and 1/4 of the first choices, probabilities 0.6 and 0.4.
  loss = experts.balance_loss(skewed, experts.route(skewed, 2))
  np.testing.assert_allclose(loss, 2 * (0.75 * 0.6 + 0.25 * 0.4), rtol=1e-6)


@pytest.mark.parametrize("capacity", (0.5, 8.0))
def test_a_mixture_is_the_sum_over_its_experts(capacity):
  layer = experts.Mixture(6, 4, capacity=capacity, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (16, 6))
  y, load = layer(x)
  probabilities = np.asarray(jax.nn.softmax(layer.router(x)))
  (up, _, down) = layer.experts.layers
  places = max(1, round(capacity * 16 * 2 / 4))
  want, taken, dropped = np.zeros((16, 6)), [0] * 4, 0
  order = np.argsort(-probabilities, axis=-1)
  for choice in range(2):
    for token in range(16):
      i = order[token, choice]
      if taken[i] == places:
        dropped += 1
        continue
      taken[i] += 1
      hidden = np.maximum(x[token] @ up.kernel[i] + up.bias[i], 0)
      made = hidden @ down.kernel[i] + down.bias[i]
      want[token] += probabilities[token, i] * made
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(load.dropped, dropped / 32)
  assert (dropped > 0) == (capacity < 1)
  np.testing.assert_allclose(
    load.share, np.bincount(order[:, :2].ravel(), minlength=4) / 32
  )


def test_loss_and_gradients_are_those_of_one_device():
  model, _ = experts.make()
  grad = nnx.value_and_grad(experts.grouped_loss, has_aux=True)
  (want, want_load), want_grads = nnx.jit(grad)(model, *batch())
  assert want_load.dropped > 0
  split, _ = experts.make(experts.AXIS)
  with jax.set_mesh(experts.make_mesh()):
    (loss, load), grads = compiled_gradient()(split, *batch())
  kernel = grads.mixture.experts.layers[0].kernel.value
  assert kernel.addressable_shards[0].data.shape == (1, 32, 64)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  for ours, theirs in ((load, want_load), (grads, want_grads)):
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_tokens_travel_and_experts_stay():
  mesh = experts.make_mesh()
  with jax.set_mesh(mesh):
    model, _ = nnx.eval_shape(lambda: experts.make(experts.AXIS))
    run = nnx.jit(experts.split_loss(mesh))
    forward = run.lower(model, *batch()).compile().as_text()
  both = compiled_gradient().as_text()
  assert len(hlo.instructions(forward, "all-to-all")) == 2
  assert len(hlo.instructions(both, "all-to-all")) == 4
  for text in (forward, both):
    assert not hlo.instructions(text, "all-gather")
    size = experts.SIZE
    assert hlo.shape_text((experts.EXPERTS, size, 2 * size)) not in text


def test_the_mesh_trains_as_one_device_does(capsys, tmp_path):
  experts.main(["--steps=20", f"--plot={tmp_path / 'experts.png'}"])
  said = capsys.readouterr().out
  assert "(1, 32, 64) a device" in said and "of the choices" in said
  assert (tmp_path / "experts.png").exists()
