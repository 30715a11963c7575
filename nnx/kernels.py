"""The package `kernels`, by the name under which nothing else can be meant.

Importing it puts the package in the place of this module; see `neighbours`.
"""

import typing

from nnx import neighbours

if typing.TYPE_CHECKING:
  from kernels import *  # noqa: F403

neighbours.package("kernels")
