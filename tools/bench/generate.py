"""Suite `generate`: writing text with a KV cache, against `flax.nnx`.

The model is the example's (`examples/char_transformer.py`), on both libraries
with the same weights and the same 1,024 tokens in the caches. A call writes 32
tokens, or 4 if quick:

  token_by_token  one `nnx.jit` call a token, as most programs do it; of
                  flax.nnx also with the model donated, as ours always is
  one_program     `jax.jit` of `lax.scan` over `split` and `merge`, which hides
                  all Python: what is left is the cache and the attention
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import nnx as flax_nnx
import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from examples import char_transformer
import nnx
from tools.bench import harness, models

NAME = "generate"
_SYMBOLS = 103
_CONTEXT = 1024
_TOKENS = 32
_QUICK_TOKENS = 4
_SIZES = {
  "example": char_transformer.Size(),
  "wide": char_transformer.Size(features=512, heads=8),
}
_QUICK_SIZES = {"example": char_transformer.Size(layers=1)}

Library = models.Library


def _make_models(size: char_transformer.Size) -> dict[str, Any]:
  """Makes the model on both libraries, with full caches."""
  model = models.make(
    nnx,
    lambda: char_transformer.transformer_type()(_SYMBOLS, size, nnx.Rngs(0)),
  )
  prompt = np.random.default_rng(0).integers(_SYMBOLS, size=_CONTEXT)
  char_transformer.prefill(model, prompt.astype(np.int32), size.context)
  twin = char_transformer.flax_twin(flax_nnx, model, _SYMBOLS, size)
  return {"nnx": model, "flax.nnx": twin}


def _token_by_token(
  library: Library,
  name: str,
  model: Any,
  noise: jax.Array,
  tokens: int,
  donate: bool,
) -> harness.Side:
  write = char_transformer.writer(library, donate)

  def call(first: jax.Array) -> list[jax.Array]:
    char_transformer.set_index(model, _CONTEXT)
    token, position = first, jnp.array(_CONTEXT, jnp.int32)
    written = []
    for _ in range(tokens):
      token, position = write(model, token, position, noise)
      written.append(token)
    return written

  return harness.Side(
    name=name,
    fresh=lambda: jnp.zeros((1, 1), jnp.int32),
    call=call,
    observe=lambda _, written: jnp.concatenate(written, 1),
  )


def _one_program(
  library: Library, name: str, model: Any, noise: jax.Array, tokens: int
) -> harness.Side:
  graphdef, cache, rest = library.split(model, library.Cache, ...)
  del model

  @functools.partial(jax.jit, donate_argnums=0)
  def run(cache, rest, token, noise):
    def write(carry, position):
      cache, token = carry
      model = library.merge(graphdef, cache, rest)
      token = char_transformer.next_token(model, token, position, noise)
      return (library.state(model, library.Cache), token), token

    positions = _CONTEXT + jnp.arange(tokens, dtype=jnp.int32)
    (cache, _), written = lax.scan(write, (cache, token), positions)
    return cache, written[:, :, 0].T

  def fresh() -> Any:
    # New buffers: a call donates them.
    return jax.tree.map(jnp.copy, cache)

  def back(cache: Any) -> Any:
    """Returns the caches as they were: their first tokens are still there."""
    return jax.tree.map(
      lambda x: jnp.array(_CONTEXT, x.dtype) if x.ndim == 0 else x, cache
    )

  token = jnp.zeros((1, 1), jnp.int32)
  return harness.Side(
    name=name,
    fresh=fresh,
    call=lambda cache: run(cache, rest, token, noise),
    advance=lambda _, result: back(result[0]),
    observe=lambda _, result: result[1],
  )


def _build_token_by_token(
  size: char_transformer.Size, tokens: int
) -> harness.Comparison:
  """Builds the row of one call a token."""
  made = _make_models(size)
  noise = char_transformer.noise(size, _SYMBOLS)

  def make(library: Library, name: str) -> harness.Side:
    return _token_by_token(
      library, f"{name}.jit", made[name], noise, tokens, donate=name == "nnx"
    )

  donating = _token_by_token(
    flax_nnx,
    "flax.nnx.jit, donating",
    flax_nnx.clone(made["flax.nnx"]),
    noise,
    tokens,
    donate=True,
  )
  both = models.comparison(make)
  return dataclasses.replace(both, baselines=[*both.baselines, donating])


def _build_one_program(
  size: char_transformer.Size, tokens: int
) -> harness.Comparison:
  """Builds the row of all tokens in one program."""
  made = _make_models(size)
  noise = char_transformer.noise(size, _SYMBOLS)
  return models.comparison(
    lambda library, name: _one_program(
      library, f"{name}, scanned", made[name], noise, tokens
    )
  )


_OPS = {
  "token_by_token": _build_token_by_token,
  "one_program": _build_one_program,
}


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: both ways to write, for each size of the model."""
  sizes = _QUICK_SIZES if settings.quick else _SIZES
  tokens = _QUICK_TOKENS if settings.quick else _TOKENS
  return [
    harness.Case(
      NAME,
      op,
      f"{name}, {tokens} tokens after {_CONTEXT}",
      "float32",
      functools.partial(build, size, tokens),
    )
    for op, build in _OPS.items()
    for name, size in sizes.items()
  ]
