"""The container format GGUF: what a file says, and its tensors.

The package `gguf` reads such files as well, but a vocabulary token by token in
Python, and so is asked only to dequantise.
"""

from collections.abc import Callable
import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

_STRING, _ARRAY = 8, 9
_NUMBERS = {
  0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q",
  11: "q", 12: "d",
}  # fmt: skip
# Types of tensors that need no dequantising.
_PLAIN = {0: np.float32, 1: np.float16, 28: np.float64, 30: ml_dtypes.bfloat16}

# Elements that are float32 at a time while a tensor is dequantised.
_SLAB = 1 << 22


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor lies, and as what.

  Attributes:
    shape: as NumPy counts, the axis of neighbours last.
    kind: the number of its type in `ggml`.
    offset: of its first byte, from the beginning of the tensors.
  """

  shape: tuple[int, ...]
  kind: int
  offset: int


class File:
  """An open file.

  Args:
    path: of the file.

  Attributes:
    metadata: what it says of itself, by names such as
      `general.architecture`.
    tensors: by their names, `Tensor`s.

  Raises:
    ValueError: if it is no GGUF file of version 2 or 3.
  """

  def __init__(self, path: str | pathlib.Path):
    with open(path, "rb") as file:
      self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    self._at = 0
    magic, version = self._bytes[:4], struct.unpack_from("<I", self._bytes, 4)
    if magic != b"GGUF" or version[0] not in (2, 3):
      raise ValueError(
        f"`{path}` must be a GGUF file of version 2 or 3, but begins with"
        f" {self._bytes[:8]!r}."
      )
    self._at = 8
    tensors, entries = self._numbers("Q", 2)
    self.metadata: dict[str, Any] = {}
    for _ in range(entries):
      name = self._string()
      self.metadata[name] = self._value(*self._numbers("I", 1))
    self.tensors = dict(self._tensor() for _ in range(tensors))
    alignment = self.metadata.get("general.alignment", 32)
    self._start = -(-self._at // alignment) * alignment

  def read(self, name: str, dtype: Any) -> np.ndarray:
    """Returns a tensor, dequantised.

    Args:
      name: of the tensor.
      dtype: of the result.

    Raises:
      ImportError: if it is quantised, and there is no package `gguf`.
    """
    tensor = self.tensors[name]
    start = self._start + tensor.offset
    size = math.prod(tensor.shape)
    if tensor.kind in _PLAIN:
      plain = np.frombuffer(self._bytes, _PLAIN[tensor.kind], size, start)
      return plain.reshape(tensor.shape).astype(dtype)
    elements, count, dequantize = _quantisation(tensor.kind)
    stored = np.frombuffer(
      self._bytes, np.uint8, size // elements * count, start
    )
    result = np.empty(size, dtype)
    step = _SLAB // elements  # blocks
    for i in range(0, size // elements, step):
      # In one row, since `gguf` takes a few rows at a time.
      part = stored[None, i * count : (i + step) * count]
      result[i * elements : (i + step) * elements] = dequantize(part)[0]
    return result.reshape(tensor.shape)

  def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
    layout = struct.Struct(f"<{count}{code}")
    values = layout.unpack_from(self._bytes, self._at)
    self._at += layout.size
    return values

  def _string(self) -> str:
    (size,) = self._numbers("Q", 1)
    self._at += size
    return self._bytes[self._at - size : self._at].decode("utf-8", "replace")

  def _value(self, kind: int) -> Any:
    if kind == _STRING:
      return self._string()
    if kind != _ARRAY:
      return self._numbers(_NUMBERS[kind], 1)[0]
    (kind,) = self._numbers("I", 1)
    (count,) = self._numbers("Q", 1)
    if kind in _NUMBERS:
      return list(self._numbers(_NUMBERS[kind], count))
    return [self._value(kind) for _ in range(count)]

  def _tensor(self) -> tuple[str, Tensor]:
    name = self._string()
    (axes,) = self._numbers("I", 1)
    shape = self._numbers("Q", axes)[::-1]
    (kind,) = self._numbers("I", 1)
    (offset,) = self._numbers("Q", 1)
    return name, Tensor(shape, kind, offset)


def _quantisation(
  kind: int,
) -> tuple[int, int, Callable[[np.ndarray], np.ndarray]]:
  """Returns elements and bytes of a block, and what dequantises blocks."""
  import gguf

  kind = gguf.GGMLQuantizationType(kind)
  elements, count = gguf.GGML_QUANT_SIZES[kind]
  return elements, count, lambda blocks: gguf.dequantize(blocks, kind)
