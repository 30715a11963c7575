"""What the handlers of batch_stat are lied to about."""

import functools

import jax
import jax.numpy as jnp

from kernels import batch_stat
from kernels.batch_stat import primitive
from tests.testing import lies

_STATS = ("new_mean", "new_var", "batch_mean", "batch_var")
_UPDATE = ("mean", "var", "momentum")
_PAIR = ("mean", "mul", "bias")

# Operands and results by the handler's name in its library.
ARRAYS = {
  "update": ((*_UPDATE, "x", "mask"), _STATS),
  "train": (
    (*_UPDATE, "scale", "x", "mask"),
    (*_STATS, "count", "rstd", "mul"),
  ),
  "moments": (("x", "mask"), ("mean", "var", "count")),
  "normalize": (("x", *_PAIR), ("y",)),
  "grad_sums": (
    ("x", "dy", *_PAIR, "rstd", "count"),
    ("sum_dy", "dscale", "c0", "c1"),
  ),
  "grad_input": (("x", "dy", *_PAIR, "c0", "c1", "mask"), ("dx",)),
}
# Of those that sum, where the platform wants one.
WORKSPACE = ("update", "train", "moments", "grad_sums")

_BEYOND = (-1, 3, 99, 2**62)
VALUES = {
  "feature_axis": (0, *_BEYOND),
  "batch_axes": (1, *_BEYOND),
  "accurate": (-1, 2),
  "relu": (-1, 2),
  "epsilon": (-1e-3, float("nan"), float("inf")),
}


def _fits(dtype: str, name: str, wrong: lies.Type) -> bool:
  """Whether an array may have this type beside the one that it has."""
  if name in ("x", "y", "dy") and dtype in ("bfloat16", "float16"):
    # y and dy may be of the statistics' dtype; and x, where only sums are made.
    return wrong == lies.Type((4, 5, 3), jnp.dtype("float32"))
  # The sums may be cut into any number of parts.
  return (
    name == "workspace"
    and len(wrong.shape) == 3
    and wrong.shape[0] > 1
    and wrong.dtype == jnp.float32
  )


def _calls(implementation: str, dtype: str) -> list[lies.Call]:
  """The calls of all six handlers, for `x` `[4, 5, 3]`."""
  options = {"feature_axis": 2, "implementation": implementation}
  x, stat = jnp.ones((4, 5, 3), dtype), jnp.ones((3,))
  mask = jnp.ones((4, 5, 1), bool)
  update = functools.partial(batch_stat.update, mask=mask, **options)
  norm = functools.partial(batch_stat.batch_norm, mask=mask, **options)

  def all_of_them(x, stat):
    stats = (stat,) * 4
    moments = primitive.MOMENTS(
      x, mask, batch_axes=0, accurate=False, **options
    )
    out = jax.vjp(lambda x: norm(x, *stats).y, x)
    return update(x, stat, stat), out[0], out[1](x), moments

  calls = lies.recorded(all_of_them, x, stat)
  return list({call.target: call for call in calls}.values())


def check(
  implementation: str, dtype: str, handlers: dict[str, str], workspace: bool
) -> int:
  """Lies about each handler, in each way that there is; returns how often.

  Args:
    implementation: Which one.
    dtype: Of x.
    handlers: The handlers' names by their targets.
    workspace: Whether those that sum have one more result.
  """
  calls = _calls(implementation, dtype)
  assert {handlers[call.target] for call in calls} == {*ARRAYS}, calls
  told = 0
  for call in calls:
    name = handlers[call.target]
    operands, results = ARRAYS[name]
    if workspace and name in WORKSPACE:
      results += ("workspace",)
    told += lies.check(
      call,
      operands=operands,
      results=results,
      values={key: VALUES[key] for key in call.attributes},
      fits=functools.partial(_fits, dtype),
      optional=int("mask" in operands),
    )
  return told
