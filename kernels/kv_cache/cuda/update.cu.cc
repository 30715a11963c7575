// The cache update for CUDA: one kernel, which copies or quantises. A thread
// moves words of 16 bytes where rows allow it, several of them in flight.

#include "kernels/kv_cache/cuda/update.h"

#include <cstdint>

#include "kernels/cache/cuda/update.h"
#include "kernels/cache/cuda/update_plan.h"
#include "kernels/common/cuda_util.h"

namespace kernels {
namespace kv_cache {
namespace {

constexpr int kThreads = 256;

// Blocks of y = 0 write keys, of y = 1 values.
template <bool kCopies>
__global__ void __launch_bounds__(kThreads)
    UpdateKernel(const cache::DeviceUpdate update) {
  __shared__ cache::FoundRows<kThreads> found;
  const cache::NewRows& rows = update.rows[blockIdx.y];
  if constexpr (kCopies) {
    cache::UpdateByCopy(update, rows, blockIdx.x, gridDim.x, found);
  } else {
    cache::UpdateByConversion(update, rows, blockIdx.x, gridDim.x, found);
  }
}

}  // namespace

cudaError_t LaunchUpdate(cudaStream_t stream,
                         const cache::DeviceUpdate& update) {
  const uint32_t blocks = cache::UpdateBlocks<kThreads>(update);
  if (blocks == 0) return cudaSuccess;
  auto* const kernel = update.args.element == update.args.new_element
                           ? UpdateKernel<true>
                           : UpdateKernel<false>;
  return cuda::Launch(kernel, dim3(blocks, 2), dim3(kThreads),
                      /*shared_bytes=*/0, stream, update);
}

}  // namespace kv_cache
}  // namespace kernels
