"""How XLA compiles for the CPU quickly rather than well.

Most of what tests take is to compile programs that run once, on some numbers.
Without optimising what is emitted, and by the older emitters where a jaxlib
still has them, that takes a seventh of the time.
"""

from importlib import metadata
import os


def options() -> dict[str, bool | int]:
  """Returns the compiler options, those that the installed jaxlib knows."""
  quick: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
  version = metadata.version("jaxlib").split(".")
  if (int(version[0]), int(version[1])) < (0, 11):
    # One that does not know it ends the process.
    quick["xla_cpu_use_fusion_emitters"] = False
  return quick


def use() -> None:
  """Compiles so in this process and those it starts; before jax does."""
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      *(f"--{name}={str(value).lower()}" for name, value in options().items()),
    ]
  ).strip()
