"""A fuzzer with known faults, for the test of the workers."""

import os
import time

import numpy as np


def good(rng: np.random.Generator):
  limit = rng.integers(1, 9)

  def case(rng: np.random.Generator) -> None:
    assert rng.integers(limit) < limit

  return case


def _at_seven(fault):
  def family(rng: np.random.Generator):
    del rng

    def case(rng: np.random.Generator) -> None:
      if rng.integers(50) == 7:
        fault()

    return case

  return family


def no_program(rng: np.random.Generator):
  raise ValueError(f"no program for {rng.integers(9)}")


def _raise():
  raise ValueError("this case was a seven")


FAMILIES = {
  "good": good,
  "raises": _at_seven(_raise),
  "dies": _at_seven(os.abort),
  "leaves": _at_seven(lambda: os._exit(3)),
  "hangs": _at_seven(lambda: time.sleep(3600)),
  "no_program": no_program,
}
