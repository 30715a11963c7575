"""The models of suite `graph`, written once for `nnx` and `flax.nnx` alike.

Every function takes the library as its argument and uses what both have. The
layers are not called here, so they have the attributes of real layers and no
arithmetic.
"""

from collections.abc import Iterator
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from tools.bench import models

Library = models.Library
_WIDTH = 4
_VARIABLES_PER_BLOCK = 10


def is_float(path: Any, value: Any) -> bool:
  """Keeps Variables of floating-point arrays: a filter."""
  del path
  dtype = getattr(value, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def float_variables(library: Library, model: Any) -> Iterator[Any]:
  """Yields every floating-point Variable of `model`."""
  # The leaves of a State are the model's own Variables.
  for path, variable in library.to_flat_state(library.state(model)):
    if is_float(path, variable):
      yield variable


# One class for each library, made once: a new class would be a new structure.
@functools.cache
def _blocks_type(library: Library) -> type:
  """Returns the class of `make_blocks`."""

  class Pair(library.Module):
    """A parameter and a running average."""

    def __init__(self):
      self.kernel = library.Param(jnp.ones(_WIDTH))
      self.mean = library.BatchStat(jnp.zeros(_WIDTH))

  class Block(library.Module):
    """Five pairs."""

    def __init__(self):
      for index in range(_VARIABLES_PER_BLOCK // 2):
        setattr(self, f"pair_{index}", Pair())

  class Blocks(library.Module):
    """Blocks of ten Variables."""

    def __init__(self, blocks: int):
      for index in range(blocks):
        setattr(self, f"block_{index}", Block())

  return Blocks


def make_blocks(library: Library, variables: int) -> Any:
  """Returns a model of so many small Variables, ten in each block.

  Args:
    library: `nnx` or `flax.nnx`.
    variables: a multiple of 10.
  """
  return _blocks_type(library)(variables // _VARIABLES_PER_BLOCK)


@functools.cache
def _parts(library: Library) -> tuple[type, type, type]:
  """Returns the classes of a dense layer, a batch norm and a dropout."""

  class Linear(library.Module):
    """Attributes of a dense layer."""

    def __init__(self):
      self.kernel = library.Param(jnp.ones((_WIDTH, _WIDTH)))
      self.bias = library.Param(jnp.zeros(_WIDTH))
      self.in_features = _WIDTH
      self.out_features = _WIDTH
      self.use_bias = True
      self.dtype = None
      self.param_dtype = jnp.float32
      self.precision = None
      self.kernel_init = jax.nn.initializers.lecun_normal()
      self.bias_init = jax.nn.initializers.zeros
      self.dot_general = lax.dot_general
      self.promote_dtype = jnp.promote_types
      self.preferred_element_type = None

  class Norm(library.Module):
    """Attributes of a batch norm."""

    def __init__(self):
      self.mean = library.BatchStat(jnp.zeros(_WIDTH))
      self.var = library.BatchStat(jnp.ones(_WIDTH))
      self.scale = library.Param(jnp.ones(_WIDTH))
      self.bias = library.Param(jnp.zeros(_WIDTH))
      self.num_features = _WIDTH
      self.use_running_average = False
      self.axis = -1
      self.momentum = 0.99
      self.epsilon = 1e-5
      self.dtype = None
      self.param_dtype = jnp.float32
      self.use_bias = True
      self.use_scale = True
      self.axis_name = None
      self.axis_index_groups = None
      self.use_fast_variance = True
      self.promote_dtype = jnp.promote_types

  class Dropout(library.Module):
    """Attributes of a dropout with a stream of its own."""

    def __init__(self, rngs):
      self.rate = 0.1
      self.broadcast_dims = ()
      self.deterministic = False
      self.rng_collection = "dropout"
      self.rngs = rngs["dropout"].fork()

  return Linear, Norm, Dropout


@functools.cache
def _attention_type(library: Library) -> type:
  """Returns the class of a multi-head attention."""
  Linear, *_ = _parts(library)

  class Attention(library.Module):
    """Attributes of a multi-head attention."""

    def __init__(self):
      self.query = Linear()
      self.key = Linear()
      self.value = Linear()
      self.out = Linear()
      self.num_heads = 2
      self.num_kv_heads = 2
      self.head_dim = _WIDTH // 2
      self.in_features = _WIDTH
      self.qkv_features = _WIDTH
      self.out_features = _WIDTH
      self.dtype = None
      self.param_dtype = jnp.float32
      self.broadcast_dropout = True
      self.dropout_rate = 0.0
      self.deterministic = None
      self.precision = None
      self.kernel_init = jax.nn.initializers.lecun_normal()
      self.bias_init = jax.nn.initializers.zeros
      self.use_bias = True
      self.attention_fn = jax.nn.dot_product_attention
      self.decode = None
      self.normalize_qk = False

  return Attention


@functools.cache
def _real_layers_type(library: Library) -> type:
  """Returns the class of `make_real_layers`."""
  Linear, Norm, Dropout = _parts(library)
  Attention = _attention_type(library)

  class Layer(library.Module):
    """One layer of an encoder."""

    def __init__(self, rngs):
      self.attention = Attention()
      self.norm_in = Norm()
      self.norm_out = Norm()
      self.up = Linear()
      self.down = Linear()
      self.dropout = Dropout(rngs)
      self.activation = jax.nn.gelu

  class Encoder(library.Module):
    """A stack of layers between an embedding and a head that share weights."""

    def __init__(self, layers: int, rngs):
      self.embedding = library.Param(jnp.ones((8, _WIDTH)))
      for index in range(layers):
        setattr(self, f"layer_{index}", Layer(rngs))
      self.head = self.embedding
      self.num_embeddings = 8
      self.dtype = jnp.float32

  return Encoder


def make_real_layers(library: Library, layers: int) -> Any:
  """Returns an encoder with the attributes that real layers have.

  Args:
    library: `nnx` or `flax.nnx`.
    layers: 22 Variables each, two of them an RNG stream's.
  """
  return _real_layers_type(library)(layers, library.Rngs(0, dropout=1))
