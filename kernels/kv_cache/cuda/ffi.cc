// XLA FFI binding of the cache update for CUDA.

#include "kernels/cache/cuda/ffi.h"

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels/cache/cc/ffi.h"
#include "kernels/cache/cc/update_ffi.h"
#include "kernels/cache/cuda/update_plan.h"
#include "kernels/common/cuda_ffi_util.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/kv_cache/cuda/update.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace kv_cache {
namespace {

ffi::Error Run(cudaStream_t stream, const cache::UpdateArrays& x,
               cache::UpdateArgs* args) {
  KERNELS_RETURN_IF_ERROR(
      cache::InPlaceOnDevice(stream, x.cache_k, x.out_k, &args->cache_k));
  KERNELS_RETURN_IF_ERROR(
      cache::InPlaceOnDevice(stream, x.cache_v, x.out_v, &args->cache_v));
  cache::DeviceUpdate update;
  KERNELS_REQUIRE(cache::PlanUpdate(*args, cache::Data<int32_t>(x.first_slot),
                                    /*turn_keys=*/false, &update),
                  "`new_k` and `new_v` must be written in at most ",
                  cache::kMaxItems, " accesses, but got ",
                  ShapeText(x.new_k.dimensions()),
                  ". Write them in several calls.");
  return LaunchStatus(LaunchUpdate(stream, update), "kv_cache_update");
}

constexpr auto kUpdate = cache::UpdateImpl<cudaStream_t, Run>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvCacheUpdateCuda, kUpdate,
                              cache::BindUpdate(ffi::Ffi::Bind().Ctx<Stream>()),
                              {kGraphCompatible});

}  // namespace kv_cache
}  // namespace kernels

PYBIND11_MODULE(_kv_cache_cuda, module) {
  module.doc() = "XLA FFI handlers of the key-value cache for CUDA.";
  module.def(
      "kv_cache_update",
      [] {
        return kernels::HandlerCapsule(kernels::kv_cache::KvCacheUpdateCuda);
      },
      "Returns the handler of `kv_cache_update`.");
}
