// What the CUDA bindings of the cache ops share.
#ifndef KERNELS_CACHE_CUDA_FFI_H_
#define KERNELS_CACHE_CUDA_FFI_H_

#include <cstdint>

#include "kernels/common/cuda_ffi_util.h"
#include "kernels/common/ffi_util.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace cache {

// XLA gives a result that aliases an operand the operand's buffer. Should it
// not, the rest of the cache still has to be there.
inline ffi::Error InPlaceOnDevice(cudaStream_t stream,
                                  const ffi::AnyBuffer& from,
                                  const ffi::AnyBuffer& to, uint8_t** out) {
  *out = static_cast<uint8_t*>(to.untyped_data());
  if (from.untyped_data() == to.untyped_data() || from.size_bytes() == 0) {
    return ffi::Error::Success();
  }
  return LaunchStatus(
      cudaMemcpyAsync(to.untyped_data(), from.untyped_data(), from.size_bytes(),
                      cudaMemcpyDeviceToDevice, stream),
      "the copy of a cache that is not updated in place");
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CUDA_FFI_H_
