// Helpers for the XLA FFI bindings of CUDA kernels; host code only.

#ifndef KERNELS_COMMON_CUDA_FFI_UTIL_H_
#define KERNELS_COMMON_CUDA_FFI_UTIL_H_

#if !defined(KERNELS_CUDA_EMULATION)
#include <cuda_runtime_api.h>
#endif

#include <string_view>

#include "kernels/common/ffi_util.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {

// The context argument of a handler, `.Ctx<Stream>()`.
#if defined(KERNELS_CUDA_EMULATION)
using Stream = emulation::Stream;
#else
using Stream = ffi::PlatformStream<cudaStream_t>;
#endif

// Kernels that allocate nothing and wait for nothing may be part of a CUDA
// graph: the last argument of XLA_FFI_DEFINE_HANDLER_SYMBOL.
inline constexpr ffi::Traits kGraphCompatible =
    ffi::Traits::kCmdBufferCompatible;

// An error that says which kernel could not be started, and what to look at.
inline ffi::Error LaunchStatus(cudaError_t status, std::string_view kernel) {
  if (status == cudaSuccess) return ffi::Error::Success();
  const bool no_image = status == cudaErrorNoKernelImageForDevice ||
                        status == cudaErrorUnsupportedPtxVersion;
  return ffi::Error::Internal(StrCat(
      "The CUDA kernel of ", kernel, " must start, but CUDA said ",
      cudaGetErrorName(status), ": ", cudaGetErrorString(status), ".",
      no_image
          ? " The extension is built for compute capability 7.5 and newer; "
            "build it with a CUDA toolkit that is not newer than the driver."
          : ""));
}

}  // namespace kernels

#endif  // KERNELS_COMMON_CUDA_FFI_UTIL_H_
