"""What the ops share: dispatch in Python, and headers for C++ kernels."""

import jax as _jax

if _jax.__version_info__ < (0, 10, 2):
  raise ImportError(
    f"`kernels` need jax 0.10.2 or later, but this is jax {_jax.__version__}:"
    " run `pip install --upgrade jax`."
  )
