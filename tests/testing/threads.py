"""Threads that get in each other's way."""

from collections.abc import Callable, Iterable
import sys
import threading
from typing import Any


def race(work: Callable[[Any], None], arguments: Iterable[Any]) -> None:
  """Calls a function at once for each argument, and raises its first error.

  Args:
    work: the function; a thread runs it for an argument, and is interrupted as
      often as Python lets it be.
    arguments: one a thread.
  """
  errors: list[BaseException] = []

  def run(argument: Any) -> None:
    try:
      work(argument)
    except BaseException as e:
      errors.append(e)

  threads = [threading.Thread(target=run, args=(one,)) for one in arguments]
  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  try:
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  finally:
    sys.setswitchinterval(interval)
  if errors:
    raise errors[0]
