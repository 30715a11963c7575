# For type checkers: the package `kernels`, where `nnx.neighbours` finds it.
from kernels import *  # noqa: F403
