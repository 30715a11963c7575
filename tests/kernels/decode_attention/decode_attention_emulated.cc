// The CUDA handlers of decode attention, emulated on the CPU.

#include "tests/testing/cuda_emulation_ffi.h"

// In this order: the kernels, then what calls them.
#include "kernels/decode_attention/attend_tensor_cuda.cu.cc"
#include "kernels/decode_attention/decode_attention_cuda.cu.cc"
#include "kernels/decode_attention/decode_attention_cuda_ffi.cc"
