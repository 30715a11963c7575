// The CUDA handler of the cache update, emulated on the CPU.

#include "tests/testing/cuda_emulation_ffi.h"

// In this order: the kernel, then what calls it.
#include "kernels/kv_cache/kv_cache_cuda.cu.cc"
#include "kernels/kv_cache/kv_cache_cuda_ffi.cc"
