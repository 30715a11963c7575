// Lets the XLA FFI binding of a CUDA kernel run on the CPU, with the kernel in
// cuda_emulation.h: include this, the kernel's `.cu.cc`, then its binding.

#ifndef TESTS_TESTING_CUDA_EMULATION_FFI_H_
#define TESTS_TESTING_CUDA_EMULATION_FFI_H_

#include <optional>

#include "tests/testing/cuda_emulation.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::emulation {

// Stands for the stream that a CPU does not have.
struct Stream {};

}  // namespace kernels::emulation

template <>
struct xla::ffi::CtxDecoding<kernels::emulation::Stream> {
  using Type = cudaStream_t;

  static std::optional<Type> Decode(const XLA_FFI_Api*,
                                    XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};

#endif  // TESTS_TESTING_CUDA_EMULATION_FFI_H_
