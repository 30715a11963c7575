"""Low-rank adaptation: small trainable products beside large kernels."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes, initializers
from nnx.nn.initializers import (
  NO_METADATA,
  Initializer,
  default_lora_init,
  initialize,
)
from nnx.nn.linear import Linear
from nnx.rnglib import Rngs
from nnx.variablelib import Param, Variable

A = TypeVar("A")


class LoRAParam(Param[A], Generic[A]):
  """A parameter of a low-rank adaptation; filters select it by its type.

  Example:

    >>> import nnx
    >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    >>> list(nnx.state(layer, nnx.LoRAParam))
    ['lora']
  """


class LoRA(Module):
  """Adds a product with two thin matrices to the result of a module.

      y = x @ lora_a @ lora_b + base_module(x)

  Source: Hu et al. 2021, "LoRA: Low-rank adaptation of large language models".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> layer = nnx.LoRA(3, 2, 4, base_module=base, rngs=nnx.Rngs(1))
    >>> x = jnp.ones((5, 3))
    >>> bool((layer(x) == base(x)).all())  # `lora_b` starts at 0
    True
    >>> init = nnx.initializers.lecun_normal()  # of Flax 0.10
    >>> layer = nnx.LoRA(3, 2, 4, kernel_init=init, rngs=nnx.Rngs(1))
    >>> bool((layer.lora_b.value != 0).all())
    True

  Args:
    in_features: k, the size of the last axis of the input.
    lora_rank: r, the size between the matrices.
    out_features: c, the size of the last axis of the result.
    base_module: A callable module, to whose result the product is added; or
      None.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters.
    a_initializer: `(key, shape, dtype) -> lora_a`.
    b_initializer: `(key, shape, dtype) -> lora_b`.
    lora_param_type: The type of the parameters.
    promote_dtype: `((x, lora_a, lora_b), dtype=dtype)`; returns those three in
      the dtype to compute in.
    rngs: The stream `params` gives the keys of the matrices.
    a_metadata: Metadata of `lora_a`.
    b_metadata: Metadata of `lora_b`.
    kernel_init: Flax 0.10's word for both initializers, in place of them if not
      None.

  Attributes:
    lora_a: `LoRAParam`, `[k, r]`.
    lora_b: `LoRAParam`, `[r, c]`.
  """

  def __init__(
    self,
    in_features: int,
    lora_rank: int,
    out_features: int,
    *,
    base_module: Module | None = None,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    a_initializer: Initializer = default_lora_init,
    b_initializer: Initializer = initializers.zeros,
    lora_param_type: type[Variable[Any]] = LoRAParam,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    rngs: Rngs,
    a_metadata: Mapping[str, Any] = NO_METADATA,
    b_metadata: Mapping[str, Any] = NO_METADATA,
    kernel_init: Initializer | None = None,
  ):
    if kernel_init is not None:
      a_initializer = b_initializer = kernel_init
    checks.whole("in_features", in_features)
    checks.whole("out_features", out_features)
    checks.whole("lora_rank", lora_rank, 1)
    self.in_features = in_features
    self.out_features = out_features
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.lora_param_type = lora_param_type
    self.base_module = base_module
    self.promote_dtype = promote_dtype
    self.lora_a: Variable[jax.Array] = lora_param_type(
      initialize(
        a_initializer, checks.key(rngs), (in_features, lora_rank), param_dtype
      ),
      **a_metadata,
    )
    self.lora_b: Variable[jax.Array] = lora_param_type(
      initialize(
        b_initializer, checks.key(rngs), (lora_rank, out_features), param_dtype
      ),
      **b_metadata,
    )

  def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[..., k]`.
      **kwargs: For `base_module`, if there is one.

    Returns:
      `[..., c]`.

    Raises:
      ValueError: If `base_module` cannot be called.
    """
    base = self.base_module
    if base is not None and not callable(base):
      raise ValueError(
        "`base_module` must be callable, but it is a"
        f" `{type(base).__name__}`. Give its class a `__call__`."
      )
    a, b = self.lora_a[...], self.lora_b[...]
    try:
      if self.promote_dtype is dtypes.promote_dtype:
        promoted, y = _lora(x, a, b, self.dtype)
      else:
        promoted, a, b = self.promote_dtype((x, a, b), dtype=self.dtype)
        y = promoted @ a @ b
    except (TypeError, ValueError):
      checks.last_axis(self, "x", x, self.lora_a.shape[0])
      raise
    return y if base is None else y + base(promoted, **kwargs)


@functools.partial(eager.compiled, static=("dtype",))
def _lora(
  x: jax.Array, a: jax.Array, b: jax.Array, dtype: dtypes.Dtype | None
) -> tuple[jax.Array, jax.Array]:
  """Returns the promoted x, and its product with both matrices."""
  x, a, b = dtypes.promote_dtype((x, a, b), dtype=dtype)
  return x, x @ a @ b


class LoRALinear(Linear):
  """A `Linear` with a low-rank adaptation beside its kernel.

      y = x @ kernel + bias + x @ lora_a @ lora_b

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape, layer.lora.lora_a.shape
    ((3, 4), (3, 2))
    >>> layer(jnp.ones((5, 3))).shape
    (5, 4)
    >>> init = nnx.initializers.lecun_normal()  # of Flax 0.10
    >>> layer = nnx.LoRALinear(
    ...   3, 4, lora_rank=2, lora_kernel_init=init, rngs=nnx.Rngs(0)
    ... )
    >>> bool((layer.lora.lora_b.value != 0).all())
    True

  Args:
    in_features: k, the size of the last axis of the input.
    out_features: c, the size of the last axis of the result.
    lora_rank: r, the size between the two thin matrices.
    lora_dtype: The `dtype` of the adaptation.
    lora_param_dtype: The dtype of its parameters.
    a_initializer: `(key, shape, dtype) -> lora_a`.
    b_initializer: `(key, shape, dtype) -> lora_b`.
    lora_param_type: The type of its parameters.
    lora_promote_dtype: Its `promote_dtype`.
    rngs: The stream `params` gives all keys.
    a_metadata: Metadata of `lora_a`.
    b_metadata: Metadata of `lora_b`.
    lora_kernel_init: Flax 0.10's word for both initializers, in place of them
      if not None.
    **kwargs: The keywords of `Linear`.

  Attributes:
    kernel: `Param`, `[k, c]`.
    bias: `Param`, `[c]`, or None.
    lora: `LoRA`.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    lora_rank: int,
    lora_dtype: dtypes.Dtype | None = None,
    lora_param_dtype: dtypes.Dtype = jnp.float32,
    a_initializer: Initializer = default_lora_init,
    b_initializer: Initializer = initializers.zeros,
    lora_param_type: type[Variable[Any]] = LoRAParam,
    lora_promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    rngs: Rngs,
    a_metadata: Mapping[str, Any] = NO_METADATA,
    b_metadata: Mapping[str, Any] = NO_METADATA,
    lora_kernel_init: Initializer | None = None,
    **kwargs: Any,
  ):
    super().__init__(in_features, out_features, rngs=rngs, **kwargs)
    self.lora = LoRA(
      in_features,
      lora_rank,
      out_features,
      dtype=lora_dtype,
      param_dtype=lora_param_dtype,
      a_initializer=a_initializer,
      b_initializer=b_initializer,
      lora_param_type=lora_param_type,
      promote_dtype=lora_promote_dtype,
      rngs=rngs,
      a_metadata=a_metadata,
      b_metadata=b_metadata,
      kernel_init=lora_kernel_init,
    )

  def __call__(self, x: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[..., k]`.
      out_sharding: The sharding of the kernel's product, under a mesh with
        explicit axes.

    Returns:
      `[..., c]`.
    """
    return super().__call__(x, out_sharding=out_sharding) + self.lora(x)
