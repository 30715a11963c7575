"""The package `bridge`, by the name that the documents give it.

It imports flax, so `nnx` does so only when asked for; the one place where `nnx`
looks up to a package above it.
"""

from bridge import *  # noqa: F403
from nnx.bridge import module as module
from nnx.bridge import variables as variables  # type: ignore[no-redef]
