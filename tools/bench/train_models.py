"""Models of suite `train`, written once for `nnx` and for `flax.nnx`.

They compute in the dtype given, with parameters in float32. Attributes have the
names of those in `train_torch`, which has the same models.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax import numpy as jnp

from tools.bench import models

# Of what a block adds, at first. With 1 a ResNet-50 makes differences in the
# last bits of a step into per cents of the next loss.
_BLOCK_SCALE = 0.1

Library = models.Library
Batch = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class ResNet:
  """ResNet-50, by default, on images.

  Attributes:
    batch: images.
    size: of an image, its height and width.
    features: of the first stage.
    blocks: in each stage.
    classes: of images.
  """

  batch: int = 8
  size: int = 128
  features: int = 64
  blocks: tuple[int, ...] = (3, 4, 6, 3)
  classes: int = 1000


@dataclasses.dataclass(frozen=True)
class Transformer:
  """What the two transformers share.

  Attributes:
    batch: images or texts.
    features: of a token.
    heads: of attention.
    layers: so many blocks.
  """

  batch: int
  features: int = 384
  heads: int = 6
  layers: int = 6


@dataclasses.dataclass(frozen=True)
class ViT(Transformer):
  """ViT-S/16, by default, which classifies the mean of its tokens.

  Attributes:
    size: of an image, its height and width.
    patch: likewise.
    classes: of images.
  """

  batch: int = 4
  layers: int = 12
  size: int = 224
  patch: int = 16
  classes: int = 1000

  @property
  def tokens(self) -> int:
    """The number of tokens of an image."""
    return (self.size // self.patch) ** 2


@dataclasses.dataclass(frozen=True)
class GPT(Transformer):
  """A GPT of 10 million parameters, by default, beside embedding and head.

  Attributes:
    tokens: of a text.
    words: of the vocabulary.
  """

  batch: int = 4
  tokens: int = 256
  words: int = 4096


Spec = ResNet | ViT | GPT


# Classes are made once for each library: a new one would be a new structure.
@functools.cache
def _resnet_type(library: Library) -> type:
  """Returns the class of a ResNet with bottlenecks."""

  def conv(inputs: int, outputs: int, size: int, strides: int, **options: Any):
    return library.Conv(
      inputs,
      outputs,
      (size, size),
      strides,
      padding=size // 2,
      use_bias=False,
      **options,
    )

  class Bottleneck(library.Module):
    def __init__(self, inputs, features, strides, **options):
      norm = functools.partial(library.BatchNorm, momentum=0.9, **options)
      outputs = 4 * features
      self.conv1 = conv(inputs, features, 1, 1, **options)
      self.norm1 = norm(features)
      self.conv2 = conv(features, features, 3, strides, **options)
      self.norm2 = norm(features)
      self.conv3 = conv(features, outputs, 1, 1, **options)
      self.norm3 = norm(
        outputs, scale_init=jax.nn.initializers.constant(_BLOCK_SCALE)
      )
      changes = strides > 1 or inputs != outputs
      self.shortcut = (
        conv(inputs, outputs, 1, strides, **options) if changes else None
      )
      self.shortcut_norm = norm(outputs) if changes else None

    def __call__(self, x):
      y = jax.nn.relu(self.norm1(self.conv1(x)))
      y = jax.nn.relu(self.norm2(self.conv2(y)))
      y = self.norm3(self.conv3(y))
      if self.shortcut is not None and self.shortcut_norm is not None:
        x = self.shortcut_norm(self.shortcut(x))
      return jax.nn.relu(x + y)

  class Model(library.Module):
    def __init__(self, spec, **options):
      features = spec.features
      self.conv = conv(3, features, 7, 2, **options)
      self.norm = library.BatchNorm(features, momentum=0.9, **options)
      blocks, inputs = [], features
      for stage, count in enumerate(spec.blocks):
        for block in range(count):
          strides = 2 if stage and not block else 1
          blocks.append(Bottleneck(inputs, features, strides, **options))
          inputs = 4 * features
        features *= 2
      self.blocks = library.List(blocks)
      self.head = library.Linear(inputs, spec.classes, **options)

    def __call__(self, images):
      x = jax.nn.relu(self.norm(self.conv(images)))
      x = library.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
      for block in self.blocks:
        x = block(x)
      return self.head(x.mean((1, 2)))

  return Model


@functools.cache
def _block_type(library: Library) -> type:
  """Returns the class of a block of a transformer, norms first."""

  class Block(library.Module):
    def __init__(self, spec, **options):
      features = spec.features
      self.norm1 = library.LayerNorm(features, **options)
      self.attention = library.MultiHeadAttention(
        spec.heads, features, decode=False, **options
      )
      self.norm2 = library.LayerNorm(features, **options)
      self.wide = library.Linear(features, 4 * features, **options)
      self.narrow = library.Linear(4 * features, features, **options)

    def __call__(self, x, mask):
      x = x + self.attention(self.norm1(x), mask=mask)
      return x + self.narrow(jax.nn.gelu(self.wide(self.norm2(x))))

  return Block


def _positions(library: Library, spec: ViT | GPT, rngs: Any) -> Any:
  shape = (spec.tokens, spec.features)
  return library.Param(0.02 * jax.random.normal(rngs.params(), shape))


@functools.cache
def _vit_type(library: Library) -> type:
  """Returns the class of a vision transformer."""

  class Model(library.Module):
    def __init__(self, spec, **options):
      patch = (spec.patch, spec.patch)
      self.embed = library.Conv(
        3, spec.features, patch, patch, padding="VALID", **options
      )
      self.position = _positions(library, spec, options["rngs"])
      block = functools.partial(_block_type(library), spec, **options)
      self.blocks = library.List([block() for _ in range(spec.layers)])
      self.norm = library.LayerNorm(spec.features, **options)
      self.head = library.Linear(spec.features, spec.classes, **options)

    def __call__(self, images):
      x = self.embed(images)
      x = x.reshape(x.shape[0], -1, x.shape[-1])
      x = x + self.position[...].astype(x.dtype)
      for block in self.blocks:
        x = block(x, None)
      return self.head(self.norm(x).mean(1))

  return Model


@functools.cache
def _gpt_type(library: Library) -> type:
  """Returns the class of a language model."""

  class Model(library.Module):
    def __init__(self, spec, **options):
      self.embed = library.Embed(spec.words, spec.features, **options)
      self.position = _positions(library, spec, options["rngs"])
      block = functools.partial(_block_type(library), spec, **options)
      self.blocks = library.List([block() for _ in range(spec.layers)])
      self.norm = library.LayerNorm(spec.features, **options)
      self.head = library.Linear(
        spec.features, spec.words, use_bias=False, **options
      )

    def __call__(self, words):
      x = self.embed(words)
      x = x + self.position[...].astype(x.dtype)
      mask = library.make_causal_mask(words)
      for block in self.blocks:
        x = block(x, mask)
      return self.head(self.norm(x))

  return Model


_TYPES: dict[type, Callable[[Library], type]] = {
  ResNet: _resnet_type,
  ViT: _vit_type,
  GPT: _gpt_type,
}


def model(library: Library, spec: Spec, dtype: str) -> Any:
  """Makes a model of a library.

  Args:
    library: the library.
    spec: of the model.
    dtype: what it computes in.
  """
  cls = _TYPES[type(spec)](library)
  return models.make(
    library,
    lambda: cls(spec, dtype=jnp.dtype(dtype), rngs=library.Rngs(0)),
  )


def batch(spec: Spec) -> Batch:
  """Returns what a step of training takes: inputs and labels."""
  keys = jax.random.split(jax.random.key(1))
  if isinstance(spec, GPT):
    words = jax.random.randint(
      keys[0], (spec.batch, spec.tokens + 1), 0, spec.words
    )
    return words[:, :-1], words[:, 1:]
  shape = (spec.batch, spec.size, spec.size, 3)
  images = jax.random.normal(keys[0], shape)
  return images, jax.random.randint(keys[1], shape[:1], 0, spec.classes)


def describe(spec: Spec) -> str:
  """Names the batch in a row's case: `8x128x128`, or texts and tokens."""
  if isinstance(spec, GPT):
    return f"{spec.batch}x{spec.tokens}"
  return f"{spec.batch}x{spec.size}x{spec.size}"
