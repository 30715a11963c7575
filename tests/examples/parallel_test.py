"""Tests of the example on several devices."""

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from examples import digits, parallel, shared
import nnx
from tests.testing import devices

devices.use_cpu_devices(8)


@pytest.fixture(autouse=True)
def enough_devices():
  devices.need_devices(8)


def test_parts_are_made_where_they_belong():
  with jax.set_mesh(parallel.make_mesh()):
    model, optimizer = nnx.jit(parallel.make)()
  kernel = model.hidden.kernel.value
  assert kernel.sharding.spec == P(None, "model")
  assert kernel.addressable_shards[0].data.shape == (64, 64)
  momentum = optimizer.opt_state[0].mu.hidden.kernel.value
  assert momentum.sharding.spec == kernel.sharding.spec


def test_it_is_the_model_of_the_other_examples():
  ours, theirs = parallel.Mlp(rngs=nnx.Rngs(0)), shared.Mlp(rngs=nnx.Rngs(0))
  images = digits.load().test_images
  np.testing.assert_allclose(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_the_mesh_trains_as_one_device_does(capsys, tmp_path):
  parallel.main(["--steps=20", f"--plot={tmp_path / 'parallel.png'}"])
  said = capsys.readouterr().out
  assert "(64, 64) a device" in said and "test accuracy" in said
  assert (tmp_path / "parallel.png").exists()
