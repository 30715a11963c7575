"""The package `bridge`, by the name under which nothing else can be meant.

Importing it puts the package in the place of this module; see `neighbours`.
"""

import typing

from nnx import neighbours

if typing.TYPE_CHECKING:
  from bridge import *  # noqa: F403

neighbours.package("bridge")
