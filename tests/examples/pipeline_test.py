"""Tests of the pipeline: its schedules, values, memory and programs."""

import functools

import jax
import numpy as np
import pytest

from examples import digits, pipeline, shared
import nnx
from tests.testing import devices, hlo

devices.use_cpu_devices(8)


@pytest.fixture(autouse=True)
def enough_devices():
  devices.need_devices(8)


def batches(count, size):
  data = digits.load()
  chosen = np.arange(count * size).reshape(count, size)
  return data.train_images[chosen], data.train_labels[chosen]


@functools.cache
def of_one_device(count):
  """The loss of some microbatches of four, and its gradients."""
  model, _ = pipeline.make()
  images, labels = batches(count, 4)
  return nnx.jit(nnx.value_and_grad(shared.loss_fn))(
    model, images.reshape(-1, 8, 8, 1), labels.ravel()
  )


@functools.cache
def compiled(schedule, count):
  mesh = pipeline.make_mesh()
  run = pipeline.pipelined(mesh, pipeline.SCHEDULES[schedule])
  with jax.set_mesh(mesh):
    model, _ = nnx.eval_shape(pipeline.make)
    return hlo.compiled(nnx.jit(run).lower(model, batches(count, 32)))


@pytest.mark.parametrize("stages", (1, 2, 5, 8))
@pytest.mark.parametrize("count", (1, 3, 16))
def test_ticks_of_1f1b_follow_each_other(stages, count):
  done = {}
  for t in range(2 * (count + stages - 1)):
    for here in range(stages):
      back, number = pipeline.job(t, here, stages)
      if 0 <= number < count:
        assert (back, here, number) not in done
        done[back, here, number] = t
  assert len(done) == 2 * stages * count
  for (back, here, number), t in done.items():
    before = here + 1 if back else here - 1
    if 0 <= before < stages:
      assert done[back, before, number] == t - 1
    elif back:
      assert done[0, here, number] == t - 1
    # Those under way when this one goes forward.
    assert back or stages - here >= sum(
      done[0, here, other] <= t < done[1, here, other] for other in range(count)
    )


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
@pytest.mark.parametrize("count", (3, 16))
def test_loss_and_gradients_are_those_of_one_device(schedule, count):
  want, want_grads = of_one_device(count)
  model, _ = pipeline.make()
  mesh = pipeline.make_mesh()
  with jax.set_mesh(mesh):
    run = nnx.jit(pipeline.pipelined(mesh, pipeline.SCHEDULES[schedule]))
    loss, grads = run(model, batches(count, 4))
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    grads,
    want_grads,
  )


@pytest.mark.parametrize("schedule", pipeline.SCHEDULES)
def test_a_stage_has_its_own_layers_alone(schedule):
  text = compiled(schedule, 8).as_text()
  assert hlo.instructions(text, "collective-permute")
  assert not hlo.instructions(text, "all-gather")
  layers, size = pipeline.LAYERS, pipeline.SIZE
  here = layers // pipeline.STAGES
  assert hlo.shape_text((here, size, 2 * size), "float32") in text
  assert hlo.shape_text((layers, size, 2 * size)) not in text


def test_1f1b_keeps_as_many_inputs_as_there_are_stages():
  def memory(schedule, count):
    return compiled(schedule, count).memory_analysis().temp_size_in_bytes

  one = 32 * pipeline.SIZE * 4  # what goes from a device to the next
  few, many = 8, 40
  assert memory("gpipe", many) - memory("gpipe", few) >= (many - few) * one
  assert memory("1f1b", many) - memory("1f1b", few) < one
  assert memory("gpipe", many) > memory("1f1b", many)


def test_program_compares_schedules_and_one_device(capsys, tmp_path):
  pipeline.main(["--steps=3", f"--plot={tmp_path / 'pipeline.png'}"])
  said = capsys.readouterr().out
  assert "1f1b: " in said and "(2, 32, 64) a device" in said
  assert (tmp_path / "pipeline.png").exists()


def test_microbatches_that_do_not_divide_the_batch():
  with pytest.raises(SystemExit, match="--microbatches must divide 64"):
    pipeline.main(["--microbatches=5"])
