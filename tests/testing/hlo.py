"""What compiled programs are made of: calls, copies, collectives."""

from collections.abc import Sequence
import re
from typing import Any

from tools.build_defs import quick_xla

_DTYPES = {
  "float64": "f64",
  "float32": "f32",
  "bfloat16": "bf16",
  "float16": "f16",
  "int8": "s8",
  "int32": "s32",
  "bool": "pred",
  "float8_e4m3fn": "f8e4m3fn",
  "float8_e5m2": "f8e5m2",
}


def shape_text(shape: Sequence[int], dtype: Any = None) -> str:
  """Returns how HLO spells a shape: `f32[2,3]`, or `[2,3]` without dtype."""
  dims = f"[{','.join(map(str, shape))}]"
  return dims if dtype is None else _DTYPES[str(dtype)] + dims


def compiled(lowered: Any) -> Any:
  """Compiles a lowered program for the CPU to the buffers that users' have.

  Tests compile quickly (`quick_xla` of the build's macros), and among what that
  leaves out are emitters for which XLA fuses otherwise: what is copied may
  differ. Where arrays are split, and so what is sent, is decided before.
  """
  if "xla_cpu_use_fusion_emitters" not in quick_xla.options():
    return lowered.compile()
  return lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": True})


def custom_calls(text: str, target: str) -> int:
  """Counts calls of an FFI target in compiled HLO or StableHLO."""
  return len(
    re.findall(rf'custom_call_target="{re.escape(target)}"', text)
  ) + len(re.findall(rf"custom_call @{re.escape(target)}\b", text))


def instructions(
  text: str, opcode: str, shape: Sequence[int] | None = None, dtype: Any = None
) -> list[str]:
  """Lists HLO instructions, those of asynchronous pairs included.

  Args:
    text: `compiled.as_text()`.
    opcode: For example `copy`, `all-gather`, `all-reduce`.
    shape: Only those with this shape in their result.
    dtype: Of that shape; any, if None.
  """
  found = []
  for line in text.splitlines():
    match = re.match(
      rf"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) {re.escape(opcode)}(?:-start)?\(",
      line,
    )
    if match and (shape is None or shape_text(shape, dtype) in match[1]):
      found.append(line.strip())
  return found


def aliased_bytes(compiled: Any) -> int:
  """Returns how many bytes of arguments a compiled program reuses."""
  return compiled.memory_analysis().alias_size_in_bytes
