// The extension module tests.kernels.batch_stat._batch_stat_cuda: the CUDA
// kernels and their binding, as handlers for the CPU.

#include "tests/testing/cuda_emulation_ffi.h"

// In this order: the kernels are written in what the header above defines.
#include "kernels/batch_stat/batch_stat_cuda_ffi.cc"
#include "kernels/batch_stat/moments_cuda.cu.cc"
#include "kernels/batch_stat/normalize_cuda.cu.cc"
