"""Which blocks of a pool are whose.

A block that nobody holds is free, but keeps what it has until it is taken for
something else: a text with the same beginning may have it back.
"""

from collections.abc import Iterable, Sequence
import hashlib

import numpy as np


def digests(
  tokens: Sequence[int], size: int, known: Sequence[bytes] = ()
) -> list[bytes]:
  """Names the full blocks of a text, each by all tokens up to its end.

  Args:
    tokens: of the text.
    size: of a block.
    known: names of its first blocks.
  """
  names = list(known)
  for i in range(len(names), len(tokens) // size):
    part = np.asarray(tokens[i * size : (i + 1) * size], np.int64).tobytes()
    before = names[-1] if names else b""
    names.append(hashlib.blake2b(before + part, digest_size=16).digest())
  return names


class Blocks:
  """The blocks of a pool: free ones, and who shares the others.

  Args:
    count: how many there are.

  Attributes:
    count: how many there are.
  """

  def __init__(self, count: int):
    self.count = count
    self._holders = [0] * count
    self._names: dict[int, bytes] = {}
    self._named: dict[bytes, int] = {}
    # In the order in which they are taken: as a dict, it keeps that order.
    self._free = dict.fromkeys(range(count))

  @property
  def free(self) -> int:
    """How many nobody holds."""
    return len(self._free)

  def find(self, names: Iterable[bytes]) -> list[int]:
    """Returns the blocks that have the beginning of a text.

    Args:
      names: of the text's blocks, from `digests`.
    """
    found = []
    for name in names:
      if name not in self._named:
        break
      found.append(self._named[name])
    return found

  def take(self, shared: Sequence[int], more: int) -> list[int] | None:
    """Takes blocks for a text.

    Args:
      shared: found ones, to hold together with who else has them.
      more: how many others.

    Returns:
      All of them in order, or None, and nothing is taken, if too few are free.
    """
    unheld = sum(not self._holders[block] for block in shared)
    if unheld + more > self.free:
      return None
    for block in shared:
      self._free.pop(block, None)
    fresh = list(self._free)[:more]
    for block in fresh:
      del self._free[block]
      self._named.pop(self._names.pop(block, b""), None)
    taken = [*shared, *fresh]
    for block in taken:
      self._holders[block] += 1
    return taken

  def name(self, block: int, name: bytes) -> None:
    """Says what a block has, once it is full.

    Args:
      block: that is held.
      name: from `digests`; what another block has already is not named twice.
    """
    if name not in self._named:
      self._named[name], self._names[block] = block, name

  def give_back(self, blocks: Sequence[int]) -> None:
    """Holds blocks no longer.

    Args:
      blocks: of one text, in order.
    """
    # Of one text, the last ones are taken first: beginnings are worth more.
    for block in reversed(blocks):
      self._holders[block] -= 1
      if not self._holders[block]:
        self._free[block] = None
