// The CUDA handlers of decode attention, emulated on the CPU.

#include "tests/testing/cuda_emulation_ffi.h"

// In this order: the kernels, then what calls them.
#include "kernels/decode_attention/cuda/attend_single.cu.cc"
#include "kernels/decode_attention/cuda/attend_tensor_bf16.cu.cc"
#include "kernels/decode_attention/cuda/attend_tensor_e4m3.cu.cc"
#include "kernels/decode_attention/cuda/attend_tensor_e5m2.cu.cc"
#include "kernels/decode_attention/cuda/attend_tensor_f16.cu.cc"
#include "kernels/decode_attention/cuda/attend_tensor_int8.cu.cc"
#include "kernels/decode_attention/cuda/attend_wide_16bit.cu.cc"
#include "kernels/decode_attention/cuda/attend_wide_32bit.cu.cc"
#include "kernels/decode_attention/cuda/attend_wide_8bit.cu.cc"
#include "kernels/decode_attention/cuda/decode.cu.cc"
#include "kernels/decode_attention/cuda/ffi.cc"
