"""The package `bridge`, by the name that the documents give it.

It imports flax, so only when asked for; the one place where `nnx` looks up to a
package above it.
"""

import sys

import bridge

# Its modules too, or `import nnx.bridge.variables` would make them anew.
for _name, _module in tuple(sys.modules.items()):
  if _name.startswith("bridge."):
    sys.modules[f"nnx.{_name}"] = _module
sys.modules[__name__] = bridge
