// The CUDA handler of the cache update, emulated on the CPU.

#include "tests/testing/cuda_emulation_ffi.h"

// In this order: the kernel, then what calls it.
#include "kernels/kv_cache/cuda/ffi.cc"
#include "kernels/kv_cache/cuda/update.cu.cc"
