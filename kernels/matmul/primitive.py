"""The primitives of the product: what runs where, and how they are split.

Operands and parameters are those of the functions in `reference`.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.interpreters import ad
import jax.numpy as jnp

from ..common import arrays, dispatch, jax_private
from . import costs, ffi, operands, reference, sharding


def _abstract_eval(*avals, form, batch_axes, dtype, precision):
  del batch_axes, precision
  x, weights, _ = form.parts(avals)
  _, n = form.matrix(weights[0].shape)
  shape = (*x.shape[:-1], n)
  return (arrays.out_aval(shape, dtype, *avals),)


def _batching(op, args, dims, *, form, batch_axes, dtype, **params):
  x, weights, bias = form.parts(args)
  x_dim, *w_dims = dims[: 1 + len(weights)]
  if any(dim is not None for dim in w_dims):
    moved, _ = arrays.move_batch_to_front(args, dims)
    return op(*moved, batch_axes=batch_axes + 1, dtype=dtype, **params), [0]
  # Of one matrix, what is mapped over is more rows.
  params["batch_axes"] = batch_axes
  if x_dim is not None:
    x = jnp.moveaxis(x, x_dim, batch_axes)
  if bias is None or dims[-1] is None:
    biases = () if bias is None else (bias,)
    return op(x, *weights, *biases, dtype=dtype, **params), [batch_axes]
  wide = jnp.promote_types(dtype, jnp.float32)
  (y,) = op(x, *weights, dtype=wide, **params)
  if x_dim is None:
    y = jnp.expand_dims(y, batch_axes)
  each = jnp.moveaxis(bias, dims[-1], batch_axes)
  each = operands.expand_bias(each, y.ndim, batch_axes + 1)
  return [(y + each.astype(wide)).astype(dtype)], [batch_axes]


def _jvp(op, primals, tangents, *, implementation, **params):
  out = op(*primals, implementation=implementation, **params)
  known = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

  def of_known(*given):
    full = list(primals)
    for i, array in zip(known, given):
      full[i] = array
    return op.reference(*full, **params)

  # In plain JAX, which can be transposed.
  _, tangent = jax.jvp(
    of_known, [primals[i] for i in known], [tangents[i] for i in known]
  )
  return out, list(tangent)


def _transpose(op, cotangents, *args, implementation, **params):
  del implementation
  linear = [i for i, arg in enumerate(args) if ad.is_undefined_primal(arg)]

  def of_linear(*given):
    full = list(args)
    for i, array in zip(linear, given):
      full[i] = array
    return op.reference(*full, **params)

  back = jax.linear_transpose(of_linear, *(args[i].aval for i in linear))(
    tuple(ad.instantiate_zeros(each) for each in cotangents)
  )
  given = dict(zip(linear, back))
  return [given.get(i) for i in range(len(args))]


def _op(name: str, form: operands.Form, fn: Callable[..., Any]) -> dispatch.Op:
  """Defines a product with weights of one form."""
  bound = functools.partial
  op = dispatch.Op(
    name,
    abstract_eval=bound(_abstract_eval, form=form),
    reference=getattr(reference, fn.__name__),
    implementations=(
      dispatch.Implementation(
        name="cpu",
        platforms=("cpu",),
        fn=fn,
        library=ffi.LIBRARY,
        unsupported=bound(ffi.unsupported, form=form),
        slower=bound(costs.on_cpu, form=form),
      ),
    ),
    batching=bound(_batching, form=form),
    partitioning=dispatch.Partitioning(
      bound(sharding.rule, form=form),
      bound(sharding.partition, form=form),
    ),
  )
  ad.primitive_jvps[op.primitive] = bound(_jvp, op)
  ad.primitive_transposes[op.primitive] = bound(_transpose, op)
  jax_private.add_checkify_rule(op.primitive, results=True)
  return op


MULTIPLY = _op("matmul", operands.Form.MATRIX, ffi.multiply)
MULTIPLY_TRANSPOSED = _op(
  "matmul_transposed", operands.Form.TRANSPOSED, ffi.multiply_transposed
)
MULTIPLY_PACKED = _op(
  "matmul_packed", operands.Form.PACKED, ffi.multiply_packed
)
