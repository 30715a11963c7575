"""Trains with a library of Flax NNX, for the suite `ecosystem`, which runs it.

  python [-m nnx.as_flax] -m tools.bench.ecosystem_step PROGRAM

It prints the losses of its first steps. Then for each line that it reads, which
is a number of seconds, it trains for so long and prints the CPU seconds that a
step took this thread.
"""

from collections.abc import Callable
import gc
import json
import os
import sys
import time
from typing import Any

CHECKED_STEPS = 4


def keras_sequential() -> Callable[[], Any]:
  """Returns `train_on_batch` of six layers, whose arrays are small."""
  os.environ.update(KERAS_BACKEND="jax", KERAS_NNX_ENABLED="true")
  import keras  # pyright: ignore[reportMissingImports]
  import numpy as np

  keras.utils.set_random_seed(0)
  layers: list[Any] = [keras.layers.Input((32,))]
  for _ in range(3):
    layers.append(keras.layers.Dense(32, activation="relu"))
    layers.append(keras.layers.BatchNormalization())
  model = keras.Sequential([*layers, keras.layers.Dense(4)])
  model.compile(keras.optimizers.Adam(1e-3), "mse")
  draw = np.random.default_rng(0)
  x, y = (draw.normal(size=(8, size)).astype(np.float32) for size in (32, 4))
  return lambda: model.train_on_batch(x, y)


def tunix_lora() -> Callable[[], Any]:
  """Returns the step of a `PeftTrainer` that adapts a Llama of four layers."""
  from flax import nnx
  import jax.numpy as jnp
  import numpy as np
  import optax
  import qwix  # pyright: ignore[reportMissingImports]
  from tunix.models.llama3 import (  # pyright: ignore[reportMissingImports]
    model as llama3,
  )
  from tunix.sft import (  # pyright: ignore[reportMissingImports]
    peft_trainer,
    utils,
  )

  config = llama3.ModelConfig(
    num_layers=4,
    vocab_size=64,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
  )
  tokens = np.random.default_rng(0).integers(1, 64, (2, 8))
  model = qwix.apply_lora_to_model(
    llama3.Llama3(config, rngs=nnx.Rngs(0)),
    qwix.LoraProvider(module_path=".*q_proj|.*kv_proj", rank=4, alpha=8.0),
    input_tokens=jnp.asarray(tokens),
    positions=jnp.arange(8)[None].repeat(2, 0),
    cache=None,
    attention_mask=jnp.tril(jnp.ones((8, 8), bool))[None].repeat(2, 0),
    rngs=nnx.Rngs(1),
  )

  def inputs(given):
    mask = given.input_tokens != 0
    return {
      "input_tokens": given.input_tokens,
      "input_mask": mask,
      "positions": utils.build_positions_from_mask(mask),
      "attention_mask": utils.make_causal_attn_mask(mask),
    }

  trainer = peft_trainer.PeftTrainer(
    model,
    optax.sgd(0.1),
    peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=100),
  ).with_gen_model_input_fn(inputs)
  # As `train` asks for it.
  step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
  batch = peft_trainer.TrainingInput(
    input_tokens=jnp.asarray(tokens), input_mask=jnp.ones_like(tokens)
  )
  return lambda: step(batch)[0]


PROGRAMS = {f.__name__: f for f in (keras_sequential, tunix_lora)}


def main() -> None:
  """Trains as it is told."""
  # Libraries print too: what is for the bench has a file of its own.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  step = PROGRAMS[sys.argv[1]]()
  import jax

  losses = [float(step()) for _ in range(CHECKED_STEPS)]
  print(json.dumps(losses), file=answers, flush=True)
  gc.disable()
  for line in sys.stdin:
    gc.collect(1)
    count, end = 0, time.perf_counter() + float(line)
    start = time.thread_time()
    while not count or time.perf_counter() < end:
      jax.block_until_ready(step())
      count += 1
    seconds = (time.thread_time() - start) / count
    print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
  main()
