"""Puts `nnx` in the place of `flax.nnx`, for all of a process.

    import nnx.as_flax

first of all, and from then on `flax.nnx`, whoever imports it, is `nnx`. Without
a line in the program: `python -m nnx.as_flax program.py`, `pytest -p
nnx.as_flax.pytest_plugin`, and in Bazel a dependency on `//nnx:as_flax`. There
is no way back within a process. docs/from_flax.md tells more.

Example:

  >>> import nnx.as_flax
  >>> from flax import nnx
  >>> type(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).__module__
  'nnx.nn.linear'
"""

from nnx.as_flax import switch as _switch
from nnx.as_flax.original import flax_nnx as flax_nnx

_switch.install()
