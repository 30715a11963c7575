"""The module `bridge.module`, by the name that the documents give it."""

from bridge.module import *  # noqa: F403
