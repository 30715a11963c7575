"""The package `bridge`, by the name that the documents give it.

It imports flax, so only when asked for; the one place where `nnx` looks up to a
package above it.
"""

import sys

# Its modules too, or `import nnx.bridge.variables` would make them anew.
sys.modules |= {
  f"nnx.{name}": module
  for name, module in sys.modules.items()
  if name == "bridge" or name.startswith("bridge.")
}
