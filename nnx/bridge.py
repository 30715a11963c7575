"""The package `bridge`, by the name that the documents give it.

It imports flax, so only when asked for; the one place where `nnx` looks up to a
package above it.
"""

import sys

import bridge

sys.modules[__name__] = bridge
