"""A step of training takes its state once, as a user would find by default."""

import os
import subprocess
import sys

_PROGRAM = """
import pathlib
import jax, jax.numpy as jnp, optax
import nnx

class Model(nnx.Module):
  def __init__(self):
    self.kernel = nnx.Param(jnp.ones((4096, 4096)))  # 64 MiB

@nnx.jit
def step(model, optimizer, x):
  def loss(model):
    return jnp.mean((x @ model.kernel) ** 2)
  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value

model = Model()
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
x = jnp.ones((8, 4096)) / 4096
own = pathlib.Path("/proc/self")
for i in range(4):
  if i == 2:  # The first has copied what it was given; now peaks count anew.
    own.joinpath("clear_refs").write_text("5")
  value = step(model, optimizer, x).block_until_ready()
(peak,) = (
  line.split()[1]
  for line in own.joinpath("status").read_text().splitlines()
  if line.startswith("VmHWM")
)
print(int(peak) // 1024, value)
"""


def _run(**environment: str) -> tuple[int, float]:
  """Returns the peak of a process's memory, in MiB, and the last loss."""
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM],
    env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  peak, loss = done.stdout.split()
  return int(peak), float(loss)


def test_a_step_of_training_takes_its_state_once():
  in_place, loss = _run()
  copying, same_loss = _run(NNX_UPDATES_IN_PLACE="false")
  assert loss == same_loss
  # The Param and Adam's two moments are 192 MiB, of which the gradient, 64 MiB,
  # takes what of new ones is not written yet.
  assert copying - in_place > 96, (copying, in_place)
