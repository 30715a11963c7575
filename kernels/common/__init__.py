"""What the ops share: dispatch in Python, and headers for C++ kernels."""
