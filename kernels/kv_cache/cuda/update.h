// Writes new keys and values into a cache in a GPU's memory.
#ifndef KERNELS_KV_CACHE_CUDA_UPDATE_H_
#define KERNELS_KV_CACHE_CUDA_UPDATE_H_

#include "kernels/cache/cuda/update_plan.h"

#if !defined(KERNELS_CUDA_EMULATION)
#include <cuda_runtime_api.h>
#endif

namespace kernels {
namespace kv_cache {

// Starts an update as cache::PlanUpdate has planned it.
cudaError_t LaunchUpdate(cudaStream_t stream,
                         const cache::DeviceUpdate& update);

}  // namespace kv_cache
}  // namespace kernels

#endif  // KERNELS_KV_CACHE_CUDA_UPDATE_H_
