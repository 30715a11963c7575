"""The name that the documents, and Flax up to 0.10, give `nnx.graphlib`."""

from nnx.graphlib import *  # noqa: F403
