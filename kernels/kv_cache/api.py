"""Writing this step's keys and values into a cache, in place."""

import jax

from ..cache import checks as cache_checks
from ..common import dispatch
from . import checks, primitive


def update(
  cache_k: jax.Array,
  cache_v: jax.Array,
  new_k: jax.Array,
  new_v: jax.Array,
  index: jax.Array | int,
  *,
  lengths: jax.Array | int | None = None,
  layer: jax.Array | int | None = None,
  layout: str = "bsnh",
  ring: bool = False,
  k_scale: jax.Array | float | None = None,
  v_scale: jax.Array | float | None = None,
  block_table: jax.Array | None = None,
  cache_batch_index: jax.Array | None = None,
  implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, jax.Array]:
  """Writes new keys and values into a cache, in place.

  With one index for all sequences, equivalent to

      cache_k.at[:, index : index + t].set(new_k)
      cache_v.at[:, index : index + t].set(new_v)

  but for positions that the cache does not have: nothing is written for them.

  Args:
    cache_k: `[b, s, n, h]`, or with layout "bnsh" `[b, n, s, h]`; float32,
      bfloat16, float16, int8, float8_e4m3fn or float8_e5m2. With `layer`, one
      more axis in front. With `block_table`, `[blocks, block_size, n, h]`.
    cache_v: Like `cache_k`; its last axis may have another size.
    new_k: `[b, t, n, h]`, or with layout "bnsh" `[b, n, t, h]`; of the dtype of
      the cache, or float32, bfloat16 or float16 if that is quantised.
    new_v: Like `new_k`, with the last axis of `cache_v`.
    index: Scalar or `[b]` integers: the position of new token 0, that is the
      number of tokens that the sequence already has.
    lengths: Scalar or `[b]` integers in [0, t]: how many of the new tokens to
      write; the rest is padding. All, if None.
    layer: Integer scalar: which layer of a stacked cache `[l, b, s, n, h]`.
    layout: "bsnh" or "bnsh", the order of the axes of the caches and of the
      new rows.
    ring: Whether position p goes to slot `p % s` (sliding window). Of more than
      s new tokens, the last s are written.
    k_scale: Scalar, `[n]` or `[b, n]`, for int8 and float8 caches: an element x
      is stored as `round(x / k_scale)`, clipped to the dtype's range.
    v_scale: Like `k_scale`.
    block_table: `[b, m]` integers, for a paged cache: position p of sequence i
      is slot `p % block_size` of block `block_table[i, p // block_size]`.
      Entries that are not needed may be negative.
    cache_batch_index: `[b]` integers: the row of the cache that each sequence
      has, where that is not its own number. Sequences that share a row must
      not write the same slot.
    implementation: "auto", "xla", "cpu", "cuda" or "pallas" (TPU).

  Returns:
    The updated caches, with the shapes and dtypes of `cache_k` and `cache_v`.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape or an option does not fit; or, where the values are
      known (outside of `jit`), if a position lies outside the cache. Under
      `checkify.checkify` the latter is an error of `user_checks`.

  Aliasing: The results take over the buffers of `cache_k` and `cache_v` where
    those are donated or are carries of a loop; else XLA copies them first.
  Batching: `vmap` folds its axis into the batch; a batched cache is not moved
    if the mapped axis is the first.
  Differentiation: Linear in the caches and the new rows, in forward and reverse
    mode; a TypeError for quantised caches.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> cache = jnp.zeros((2, 4, 1, 1))
    >>> new = jnp.array([[1.0], [2.0]])[..., None, None]
    >>> step = jax.jit(kv_cache.update, donate_argnums=(0, 1))
    >>> k, v = step(cache, cache + 0, new, new, jnp.array([0, 3]))
    >>> k[:, :, 0, 0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
  """
  request = cache_checks.Request(
    cache_k, cache_v, index, lengths, layer,
    cache_checks.canonical_layout(layout), ring, k_scale, v_scale, block_table,
    cache_batch_index,
  )  # fmt: skip
  cache, new_k, new_v = checks.canonicalize(request, new_k, new_v)
  at = cache.at
  k, v = primitive.UPDATE(
    cache.k,
    cache.v,
    new_k,
    new_v,
    *cache.addresses.values(),
    *cache.scales,
    layout=at.layout,
    ring=at.ring,
    aligned=at.aligned,
    uniform=at.uniform,
    implementation=implementation,
  )
  return k, v
