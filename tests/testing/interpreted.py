"""Pallas kernels for TPUs, run on the CPU by JAX's interpreter.

It keeps fast memory, DMAs and semaphores apart as a TPU does: DMAs happen as
late as they may, memory holds NaN until it is written, reading outside of it
raises, and a race between a DMA and its waiter is found.
"""

import types
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels.common import dispatch

# What tests pass as `implementation=`.
NAME = "interpreted"

# A cache for each order in which XLA keeps one on a TPU, which is taken apart
# in its own way (see `order` in `kernels.cache.tiles_tpu`): what tests ask
# of their arguments, and the layout.
CACHES: dict[str, dict[str, Any]] = {
  "rows": {},
  "tiles": {"layout": "bnsh"},
  "columns": {"h": 64, "s": 256},
}
LAYOUTS = {name: case.get("layout", "bsnh") for name, case in CACHES.items()}

# How kernels are interpreted.
PARAMS = pltpu.InterpretParams(
  detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait"
)


class _Interpreted:
  """Stands for an op, and runs its Pallas implementation if asked to.

  Not through the op's primitive, which has no effects: the interpreter's
  callbacks are ordered ones.
  """

  def __init__(self, op: dispatch.Op):
    self._op = op

  def __getattr__(self, name: str) -> Any:
    return getattr(self._op, name)

  def check_implementation(self, implementation: str) -> None:
    if implementation != NAME:
      self._op.check_implementation(implementation)

  def __call__(self, *args: Any, implementation: str, **params: Any) -> Any:
    if implementation != NAME:
      return self._op(*args, implementation=implementation, **params)
    pallas = self._op.implementations["pallas"]
    if why := pallas.problem([jax.typeof(arg) for arg in args], params):
      raise ValueError(why)
    return pallas.fn(*args, interpret=PARAMS, **params)


def allow(module: types.ModuleType, *ops: str) -> None:
  """Lets a module's ops run on the CPU, with NAME as their implementation.

  Args:
    module: That calls them.
    *ops: Their names in it.
  """
  for name in ops:
    setattr(module, name, _Interpreted(getattr(module, name)))


def races_found() -> bool:
  """Returns whether the last kernel that was interpreted had a race."""
  races = interpret_pallas_call.races
  return races is not None and races.races_found


def reset() -> None:
  """Forgets what a kernel left behind that raised while it was interpreted."""
  interpret_pallas_call.reset_tpu_interpret_mode_state()
