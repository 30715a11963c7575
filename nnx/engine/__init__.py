"""The engine: what walks graphs in C++, and the Python that it is made with.

It imports nothing of ours; everything else in `nnx` stands on it. README.md
says how it works, and `nnx.runtime` tells it what it needs to know of the rest.
"""
