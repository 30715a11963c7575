# For type checkers: the package `bridge`, where `nnx.neighbours` finds it.
from bridge import *  # noqa: F403
