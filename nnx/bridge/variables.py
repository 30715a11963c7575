"""The module `bridge.variables`, by the name that the documents give it."""

from bridge.variables import *  # noqa: F403
