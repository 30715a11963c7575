"""Trains a classifier, exports it, and serves it from another process.

The file holds a program with the weights in it, for batches of any size. The
other process, `server.py`, needs jax to run it and nothing of this repository.
The answers are compared with the model's own.

    bazel run //examples:serve -- --plot serve.png
"""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from urllib import request

import jax
from jax import export
import numpy as np
import optax
import tqdm

from examples import digits, shared
import nnx

SERVER = pathlib.Path(__file__).with_name("server.py")


def train(data: digits.Data, steps: int) -> shared.Mlp:
  """Returns a trained classifier in evaluation mode."""
  model = shared.Mlp(rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
  for batch in tqdm.tqdm(shared.batches(data, steps), "training", steps):
    shared.train_step(model, optimizer, *batch)
  model.eval()
  return model


def exported(model: shared.Mlp) -> bytes:
  """Returns the program that labels images, for any number of them.

  The model is merged inside of the function, so its weights are constants. What
  a program is lowered for is said here: another platform is one more name.
  """
  graphdef, state = nnx.split(model)

  def label(images):
    return nnx.merge(graphdef, state)(images).argmax(-1)

  (count,) = export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((count, 8, 8, 1), np.float32)
  program = export.export(jax.jit(label), platforms=["cpu"])(images)
  return bytes(program.serialize())


@contextlib.contextmanager
def serving(file: pathlib.Path) -> Iterator[str]:
  """Runs the server for a block, and gives its address."""
  process = subprocess.Popen(
    [sys.executable, "-P", SERVER, file],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stdout
    yield f"http://localhost:{int(process.stdout.readline())}"
  finally:
    process.kill()
    process.communicate()


def ask(address: str, images: np.ndarray) -> list[int]:
  """Returns the labels that the server gives images."""
  post = request.Request(address, images.astype(np.float32).tobytes())
  with request.urlopen(post) as answer:
    return json.load(answer)


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains, exports, serves, asks, and compares."""
  options = shared.options(__doc__, arguments, steps=200, requests=50)
  data = digits.load()
  model = train(data, options.steps)
  own = np.asarray(model(data.test_images).argmax(-1))
  milliseconds = []
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "digits.export")
    file.write_bytes(exported(model))
    print(f"exported {file.stat().st_size / 1024:.0f} KiB")
    with serving(file) as address:
      assert ask(address, data.test_images) == own.tolist()
      ask(address, data.test_images[:1])  # it compiles for each size once
      for i in tqdm.trange(options.requests, unit="request"):
        image = data.test_images[i % len(own)][None]
        start = time.perf_counter()
        (label,) = ask(address, image)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        assert label == own[i % len(own)]
  right = (own == data.test_labels).mean()
  print(
    f"all answers are those of the model; {right:.1%} of {len(own)} are right"
  )
  print(f"median of a request: {np.median(milliseconds):.1f} ms")
  lines = {"one image": milliseconds}
  shared.plot(options.plot, "milliseconds", lines, what="request")


if __name__ == "__main__":
  main()
