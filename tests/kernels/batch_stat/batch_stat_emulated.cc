// The extension module tests.kernels.batch_stat._batch_stat_cuda: the CUDA
// kernels and their binding, as handlers for the CPU.

#include "tests/testing/cuda_emulation_ffi.h"

// In this order: the kernels are written in what the header above defines.
#include "kernels/batch_stat/cuda/ffi.cc"
#include "kernels/batch_stat/cuda/moments.cu.cc"
#include "kernels/batch_stat/cuda/normalize.cu.cc"
