// The cache update for CUDA: one kernel, which copies or quantises. A thread
// moves words of 16 bytes where rows allow it, several of them in flight; the
// grid is as large as the device holds at a time and walks over the rest.

#include "kernels/kv_cache/kv_cache_cuda.h"

#include <cstdint>

#include "kernels/common/cuda_util.h"
#include "kernels/kv_cache/update_cuda.h"
#include "kernels/kv_cache/update_plan.h"

namespace kernels {
namespace kv_cache {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;

// Blocks of y = 0 write keys, of y = 1 values.
__global__ void __launch_bounds__(kThreads)
    UpdateKernel(const DeviceUpdate update) {
  UpdateRows(update, update.rows[blockIdx.y],
             blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
}

}  // namespace

cudaError_t LaunchUpdate(cudaStream_t stream, const DeviceUpdate& update) {
  const uint32_t items = update.rows[0].items > update.rows[1].items
                             ? update.rows[0].items
                             : update.rows[1].items;
  if (items == 0) return cudaSuccess;
  int multiprocessors;
  const cudaError_t error = cuda::MultiprocessorCount(&multiprocessors);
  if (error != cudaSuccess) return error;
  const uint32_t most =
      static_cast<uint32_t>(multiprocessors) * kBlocksPerMultiprocessor;
  const uint32_t blocks = cuda::CeilDiv(items, uint32_t{kThreads});
  return cuda::Launch(UpdateKernel, dim3(blocks < most ? blocks : most, 2),
                      dim3(kThreads), /*shared_bytes=*/0, stream, update);
}

}  // namespace kv_cache
}  // namespace kernels
