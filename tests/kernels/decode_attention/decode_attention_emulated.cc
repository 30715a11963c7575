// The CUDA handlers of decode attention, emulated on the CPU.

#include "tests/testing/cuda_emulation_ffi.h"

// In this order: the kernels, then what calls them.
#include "kernels/decode_attention/attend_single_cuda.cu.cc"
#include "kernels/decode_attention/attend_tensor_bf16_cuda.cu.cc"
#include "kernels/decode_attention/attend_tensor_e4m3_cuda.cu.cc"
#include "kernels/decode_attention/attend_tensor_e5m2_cuda.cu.cc"
#include "kernels/decode_attention/attend_tensor_f16_cuda.cu.cc"
#include "kernels/decode_attention/attend_tensor_int8_cuda.cu.cc"
#include "kernels/decode_attention/attend_wide_16bit_cuda.cu.cc"
#include "kernels/decode_attention/attend_wide_32bit_cuda.cu.cc"
#include "kernels/decode_attention/attend_wide_8bit_cuda.cu.cc"
#include "kernels/decode_attention/decode_attention_cuda.cu.cc"
#include "kernels/decode_attention/decode_attention_cuda_ffi.cc"
