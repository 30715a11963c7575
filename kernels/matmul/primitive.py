"""The primitive of the product: what runs where, and how it is split.

Operands and parameters are those of `reference.multiply`.
"""

import jax
from jax.interpreters import ad
import jax.numpy as jnp

from ..common import arrays, dispatch
from . import costs, ffi, reference, sharding


def _abstract_eval(x, w, *bias, batch_axes, dtype, precision):
  del precision
  shape = (*x.shape[:-1], w.shape[-1])
  given = sharding.of_result(x, w, batch_axes)
  spec = None if given is None else given.spec
  return (arrays.out_aval(shape, dtype, x, w, *bias, spec=spec),)


def _batching(op, args, dims, *, batch_axes, dtype, **params):
  x, w, *bias = args
  x_dim, w_dim, *bias_dim = dims
  if w_dim is not None:
    moved, _ = arrays.move_batch_to_front(args, dims)
    return op(*moved, batch_axes=batch_axes + 1, dtype=dtype, **params), [0]
  # Of one matrix, what is mapped over is more rows.
  params["batch_axes"] = batch_axes
  if x_dim is not None:
    x = jnp.moveaxis(x, x_dim, batch_axes)
  if not bias or bias_dim[0] is None:
    return op(x, w, *bias, dtype=dtype, **params), [batch_axes]
  wide = jnp.promote_types(dtype, jnp.float32)
  (y,) = op(x, w, dtype=wide, **params)
  if x_dim is None:
    y = jnp.expand_dims(y, batch_axes)
  each = jnp.moveaxis(bias[0], bias_dim[0], batch_axes)
  each = reference.expand_bias(each, y.ndim, batch_axes + 1)
  return [(y + each.astype(wide)).astype(dtype)], [batch_axes]


MULTIPLY = dispatch.Op(
  "matmul",
  abstract_eval=_abstract_eval,
  reference=reference.multiply,
  implementations=(
    dispatch.Implementation(
      name="cpu",
      platforms=("cpu",),
      fn=ffi.multiply,
      library=ffi.LIBRARY,
      unsupported=ffi.unsupported,
      slower=costs.multiply_on_cpu,
    ),
  ),
  batching=_batching,
  partitioning=dispatch.Partitioning(sharding.rule, sharding.partition),
)


def _jvp(primals, tangents, *, implementation, **params):
  out = MULTIPLY(*primals, implementation=implementation, **params)
  x, w = primals[:2]
  dx, dw, *dbias = tangents
  terms = []
  # In plain JAX, which can be transposed.
  if type(dx) is not ad.Zero:
    terms += reference.multiply(dx, w, **params)
  if type(dw) is not ad.Zero:
    terms += reference.multiply(x, dw, **params)
  for tangent in dbias:
    if type(tangent) is not ad.Zero:
      each = reference.expand_bias(tangent, out[0].ndim, params["batch_axes"])
      each = each.astype(params["dtype"])
      terms.append(jnp.broadcast_to(each, out[0].shape))
  return out, [sum(terms[1:], terms[0])]


ad.primitive_jvps[MULTIPLY.primitive] = _jvp


def _transpose(cotangents, *operands, implementation, **params):
  del implementation
  linear = [i for i, a in enumerate(operands) if ad.is_undefined_primal(a)]

  def call(*values):
    given = dict(zip(linear, values))
    full = (given.get(i, a) for i, a in enumerate(operands))
    return reference.multiply(*full, **params)

  shapes = (operands[i].aval for i in linear)
  back = jax.linear_transpose(call, *shapes)(
    tuple(ad.instantiate_zeros(each) for each in cotangents)
  )
  given = dict(zip(linear, back))
  return [given.get(i) for i in range(len(operands))]


ad.primitive_transposes[MULTIPLY.primitive] = _transpose
