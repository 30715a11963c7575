"""Trains a small transformer on Python's documentation, then lets it write.

The text comes with the standard library (`pydoc_data.topics`); nothing is
downloaded. The model sees it character by character. After about a minute of
training on two cores it reads 1,024 characters that it has not seen, all at
once, and goes on from there with the keys and values of what it has read and
written in a cache. The same weights then do the same on `flax.nnx`, and both
speeds are printed.

    bazel run //examples:char_transformer -- --plot transformer.png
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
from pydoc_data import topics
import time
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax
import tqdm

import nnx

# `nnx` or `flax.nnx`: the model and its steps use only what both have.
Library = Any

# Examples in a batch, and characters in each: short ones teach the most in a
# second, and the long ones of the last steps to use all of a long context.
_SHORT = (8, 64)
_LONG = (1, 1024)
_LONG_SHARE = 0.1
_LEARNING_RATE = 3e-3
TEMPERATURE = 0.5


@dataclasses.dataclass(frozen=True)
class Size:
  """How large a transformer is.

  Attributes:
    layers: how many blocks.
    features: of each token.
    heads: of each attention.
    context: the longest text that it sees.
  """

  layers: int = 4
  features: int = 128
  heads: int = 4
  context: int = 1280


@dataclasses.dataclass(frozen=True)
class Data:
  """Text as numbers of characters.

  Attributes:
    alphabet: the characters, by their numbers.
    train: `[...]`, int32.
    test: `[...]`, int32, text that is not in `train`.
  """

  alphabet: str
  train: np.ndarray
  test: np.ndarray

  def decode(self, numbers: Sequence[int]) -> str:
    """Returns the text of some numbers."""
    return "".join(self.alphabet[number] for number in numbers)


@dataclasses.dataclass(frozen=True)
class Speed:
  """What was written, and how fast."""

  text: np.ndarray
  seconds: float

  @property
  def tokens_per_second(self) -> float:
    """Characters written in a second."""
    return len(self.text) / self.seconds


def load() -> Data:
  """Returns the documentation, a tenth of its topics kept for the test."""
  texts = [topics.topics[name] for name in sorted(topics.topics)]
  alphabet = "".join(sorted(set("".join(texts))))
  number = {character: i for i, character in enumerate(alphabet)}
  parts = ["".join(texts[i] for i in range(len(texts)) if i % 10), ""]
  parts[1] = "".join(texts[::10])
  train, test = (
    np.array([number[character] for character in part], np.int32)
    for part in parts
  )
  return Data(alphabet, train, test)


def waves(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
  """Makes positions of sines and cosines, from which distances are learnt.

  Args:
    key: not used; initializers have one.
    shape: `(positions, features)`.
    dtype: of the result.

  Returns:
    An array of that shape, whose rows have length 1.
  """
  del key
  positions, features = shape
  rates = 1e4 ** (-jnp.arange(0, features, 2) / features)
  angles = jnp.arange(positions)[:, None] * rates
  table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
  return (table / (features / 2) ** 0.5).astype(dtype)


@functools.cache
def transformer_type(library: Library = nnx) -> type:
  """Returns the class of the model.

  Args:
    library: `nnx` or `flax.nnx`. A program needs only the former, and would
      have these classes at its top level.
  """

  class Block(library.Module):
    """Attention, then two linear maps, each added to what goes in."""

    def __init__(self, size: Size, rngs):
      self.attention_norm = library.LayerNorm(size.features, rngs=rngs)
      self.attention = library.MultiHeadAttention(
        size.heads,
        size.features,
        num_kv_heads=1,  # the cache is all that a step must read anew
        use_bias=False,
        rngs=rngs,
      )
      self.map_norm = library.LayerNorm(size.features, rngs=rngs)
      self.up = library.Linear(size.features, 4 * size.features, rngs=rngs)
      self.down = library.Linear(4 * size.features, size.features, rngs=rngs)

    def __call__(self, x: jax.Array, decode: bool) -> jax.Array:
      x = x + self.attention(
        self.attention_norm(x), decode=decode, is_causal=not decode
      )
      return x + self.down(jax.nn.gelu(self.up(self.map_norm(x))))

  class Transformer(library.Module):
    """Predicts each character from those before it."""

    def __init__(self, symbols: int, size: Size, rngs):
      self.embed = library.Embed(symbols, size.features, rngs=rngs)
      self.positions = library.Embed(
        size.context, size.features, embedding_init=waves, rngs=rngs
      )
      self.blocks = library.List(
        [Block(size, rngs) for _ in range(size.layers)]
      )
      self.norm = library.LayerNorm(size.features, rngs=rngs)
      self.head = library.Linear(size.features, symbols, rngs=rngs)

    def __call__(
      self, tokens: jax.Array, start: Any = 0, decode: bool = False
    ) -> jax.Array:
      """Applies the model.

      Args:
        tokens: `[b, t]`, int32.
        start: the position of token 0.
        decode: whether earlier tokens are in the cache, and these go there too.

      Returns:
        Logits of the next characters, `[b, t, symbols]`.
      """
      positions = start + jnp.arange(tokens.shape[1])
      x = self.embed(tokens) + self.positions(positions)[None]
      for block in self.blocks:
        x = block(x, decode)
      return self.head(self.norm(x))

  return Transformer


def set_index(model: Any, index: int) -> None:
  """Lets the caches of `model` forget all but the first `index` tokens."""
  for block in model.blocks:
    block.attention.cache_index[...] = jnp.array(index, jnp.int32)


@nnx.jit
def train_step(
  model: Any, optimizer: nnx.Optimizer, tokens: jax.Array, start: jax.Array
) -> jax.Array:
  """Takes one step of the optimizer.

  Args:
    model: updated in place.
    optimizer: updated in place.
    tokens: `[b, t + 1]`, int32.
    start: the position that their first is said to have.

  Returns:
    The loss of this batch, in nats a character.
  """

  def loss_of(model):
    return loss(model, tokens, start)

  value, gradients = nnx.value_and_grad(loss_of)(model)
  optimizer.update(model, gradients)
  return value


def loss(model: Any, tokens: jax.Array, start: Any = 0) -> jax.Array:
  """Returns the mean cross entropy of the next characters, in nats."""
  logits = model(tokens[:, :-1], start)
  return optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  ).mean()


def train(
  data: Data, *, steps: int, size: Size, seed: int = 0
) -> tuple[Any, list[float]]:
  """Trains a new model, behind a progress bar.

  Args:
    data: from `load`.
    steps: at least 1.
    size: of the model.
    seed: of the initial weights and of the order of the text.

  Returns:
    The model, and the loss of every step.

  Raises:
    ValueError: if `steps` is less than 1.
  """
  if steps < 1:
    raise ValueError(f"`steps` must be at least 1, but got {steps}.")
  model = transformer_type()(len(data.alphabet), size, nnx.Rngs(seed))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, _LEARNING_RATE, min(50, steps // 5), steps
  )
  optimizer = nnx.Optimizer(
    model,
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
    wrt=nnx.Param,
  )
  random = np.random.default_rng(seed)
  losses = []
  with tqdm.tqdm(total=steps, unit="step") as bar:
    for step in range(steps):
      batch, window = _LONG if step > (1 - _LONG_SHARE) * steps else _SHORT
      window = min(window, size.context)
      first = random.integers(len(data.train) - window, size=(batch, 1))
      tokens = data.train[first + np.arange(window + 1)]
      # Anywhere in the context, so that each position is learnt.
      start = random.integers(size.context - window + 1, dtype=np.int32)
      losses.append(train_step(model, optimizer, tokens, start))
      bar.update()
      if len(losses) % 10 == 0:
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
  return model, [float(value) for value in losses]


def prefill(model: Any, prompt: np.ndarray, context: int) -> float:
  """Fills the caches of `model` with a prompt, all at once.

  Args:
    model: on `nnx`.
    prompt: `[t]`, int32.
    context: how long prompt and answer may be.

  Returns:
    The seconds it took, without compiling.
  """
  tokens = jnp.asarray(prompt)[None]
  for block in model.blocks:
    attention = block.attention
    attention.init_cache((1, context, attention.in_features))
  fill = nnx.jit(
    lambda model, tokens: model(tokens, decode=True), donate_argnames="model"
  )
  for _ in range(2):  # the first compiles
    set_index(model, 0)
    start = time.perf_counter()
    jax.block_until_ready(fill(model, tokens))
    seconds = time.perf_counter() - start
  return seconds


def flax_twin(flax_nnx: Library, model: Any, symbols: int, size: Size) -> Any:
  """Returns the same model on `flax.nnx`, with the same weights and caches.

  Args:
    flax_nnx: `flax.nnx`.
    model: on `nnx`.
    symbols: of its alphabet.
    size: of the model.
  """
  cache = model.blocks[0].attention.cached_key

  def make():
    twin = transformer_type(flax_nnx)(symbols, size, flax_nnx.Rngs(0))
    if cache is not None:
      batch, length, *_ = cache.shape
      for block in twin.blocks:
        block.attention.init_cache((batch, length, size.features))
    return twin

  twin = flax_nnx.eval_shape(make)  # the weights are here already
  values = dict(nnx.to_flat_state(nnx.state(model)))
  flax_nnx.update(
    twin,
    flax_nnx.from_flat_state(
      (path, leaf.replace(jnp.copy(values[path][...])))
      for path, leaf in flax_nnx.to_flat_state(flax_nnx.state(twin))
    ),
  )
  return twin


def noise(size: Size, symbols: int, seed: int = 0) -> jax.Array:
  """Draws what decides, at each position, between likely tokens and others.

  All at once: random bits for one token cost as much as a layer of the model.

  Args:
    size: of the model.
    symbols: of its alphabet.
    seed: of the numbers.

  Returns:
    `[context, 1, symbols]` of Gumbel's distribution: added to logits, it makes
    the place of the largest sum a draw from their softmax.
  """
  key = jax.random.key(seed)
  return jax.random.gumbel(key, (size.context, 1, symbols))


def next_token(
  model: Any, token: jax.Array, position: jax.Array, noise: jax.Array
) -> jax.Array:
  """Draws the token after another, and appends that one to the caches.

  Args:
    model: on `nnx` or `flax.nnx`.
    token: `[b, 1]`, int32.
    position: where it stands, `[]`, int32.
    noise: `[context, b, symbols]`, of Gumbel's distribution.

  Returns:
    `[b, 1]`, int32.
  """
  logits = model(token, position, decode=True)[:, -1]
  drawn = jnp.argmax(logits / TEMPERATURE + noise[position], -1)
  return drawn[:, None].astype(jnp.int32)


@functools.cache
def writer(library: Library, donate: bool = True) -> Any:
  """Returns the compiled step that writes one character.

  Args:
    library: `nnx` or `flax.nnx`.
    donate: whether the model gives up the memory of what the step replaces, so
      that the caches are updated in place.

  Returns:
    `(model, token, position, noise) -> (token, position)`, as for `next_token`,
    and one position on.
  """

  @functools.partial(library.jit, donate_argnames="model" if donate else None)
  def write(model, token, position, noise):
    return next_token(model, token, position, noise), position + 1

  return write


def generate(
  library: Library,
  model: Any,
  last: int,
  start: int,
  tokens: int,
  noise: jax.Array,
) -> Speed:
  """Writes some text, token by token.

  Args:
    library: that of the model.
    model: with `start` tokens in its caches.
    last: the token after those.
    start: its position.
    tokens: how many to write.
    noise: for `next_token`.
  """
  write = writer(library)
  for count in (1, tokens):  # the first compiles
    set_index(model, start)
    token = jnp.full((1, 1), last, jnp.int32)
    position = jnp.array(start, jnp.int32)
    written = []
    begin = time.perf_counter()
    for _ in range(count):
      token, position = write(model, token, position, noise)
      written.append(token)
    jax.block_until_ready(written)
    seconds = time.perf_counter() - begin
  return Speed(np.concatenate(written, 1)[0], seconds)


def write_plot(
  losses: Sequence[float], speeds: dict[str, float], path: pathlib.Path
) -> None:
  """Draws the losses by step, and the speeds, into a PNG file."""
  # Imported here: a run without --plot does not pay for it.
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(figsize=(8, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.plot(range(1, len(losses) + 1), losses, color="#b5482a")
  left.set_title("training loss, nats a character")
  left.set_xlabel("step")
  left.grid(alpha=0.3)
  bars = right.bar(list(speeds), list(speeds.values()), color="#2a7f62")
  right.bar_label(bars, fmt="%.0f")
  right.set_title("characters written in a second")
  figure.savefig(path, dpi=120, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains, writes, compares, and draws it if asked to."""
  parser = argparse.ArgumentParser(
    description="Trains a character-level transformer on Python's help texts."
  )
  parser.add_argument("--steps", type=int, default=600)
  parser.add_argument("--tokens", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--plot", metavar="FILE.png", help="draw loss and speeds into this file"
  )
  options = parser.parse_args(arguments)
  if options.steps < 1:
    parser.error(f"--steps must be at least 1, but got {options.steps}")
  size = Size()
  prompt_length = 1024
  longest = size.context - prompt_length
  if not 1 <= options.tokens <= longest:
    parser.error(
      f"--tokens must be from 1 to {longest}, but got {options.tokens}"
    )
  data = load()
  begin = time.perf_counter()
  model, losses = train(data, steps=options.steps, size=size, seed=options.seed)
  seconds = time.perf_counter() - begin
  unseen = jnp.asarray(data.test[: 8 * 1025].reshape(8, 1025))
  bits = float(nnx.jit(loss)(model, unseen)) / np.log(2)
  print(f"{bits:.2f} bits a character of unseen text, {seconds:.0f} s")

  *prompt, last = data.test[: prompt_length + 1]
  seconds = prefill(model, np.array(prompt), size.context)
  print(f"read {prompt_length} characters at once in {1e3 * seconds:.1f} ms")
  # Imported here: it is there for the comparison alone.
  from flax import nnx as flax_nnx

  twin = flax_twin(flax_nnx, model, len(data.alphabet), size)
  chance = noise(size, len(data.alphabet), options.seed)
  results = {
    name: generate(
      library, written_by, last, prompt_length, options.tokens, chance
    )
    for name, library, written_by in (
      ("nnx", nnx, model),
      ("flax.nnx", flax_nnx, twin),
    )
  }
  ours, theirs = results["nnx"], results["flax.nnx"]
  print(f"{data.decode(prompt[-80:])}{data.decode([last])}")
  print(f"-- and goes on --\n{data.decode(ours.text.tolist())}\n--")
  same = "the same" if (ours.text == theirs.text).all() else "other"
  for name, speed in results.items():
    print(
      f"{name}: {speed.tokens_per_second:.0f} tokens/s after"
      f" {prompt_length} of context"
    )
  print(
    f"flax.nnx writes {same} text;"
    f" {ours.tokens_per_second / theirs.tokens_per_second:.1f}x"
  )
  if options.plot is not None:
    # Under `bazel run` the program starts in another folder.
    folder = os.environ.get("BUILD_WORKING_DIRECTORY", ".")
    path = pathlib.Path(folder, options.plot)
    write_plot(
      losses,
      {name: speed.tokens_per_second for name, speed in results.items()},
      path,
    )
    print(f"wrote {path}")


if __name__ == "__main__":
  main()
