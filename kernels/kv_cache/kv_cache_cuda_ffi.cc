// XLA FFI binding of the cache update for CUDA.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels/common/cuda_ffi_util.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/kv_cache/cache_cuda_ffi.h"
#include "kernels/kv_cache/cache_ffi.h"
#include "kernels/kv_cache/kv_cache_cuda.h"
#include "kernels/kv_cache/update_ffi.h"
#include "kernels/kv_cache/update_plan.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace kv_cache {
namespace {

ffi::Error UpdateImpl(
    cudaStream_t stream, ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v,
    ffi::AnyBuffer new_k, ffi::AnyBuffer new_v, ffi::Buffer<ffi::S32> index,
    ffi::Buffer<ffi::S32> count, ffi::Buffer<ffi::S32> layer,
    ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> first_slot,
    ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale,
    ffi::Result<ffi::AnyBuffer> out_k, ffi::Result<ffi::AnyBuffer> out_v,
    int64_t ring, bool heads_first) {
  UpdateArgs args = {};
  KERNELS_RETURN_IF_ERROR(ReadUpdate(cache_k, cache_v, new_k, new_v, index,
                                     count, layer, table, first_slot, k_scale,
                                     v_scale, ring, heads_first, &args));
  KERNELS_RETURN_IF_ERROR(
      InPlaceOnDevice(stream, cache_k, *out_k, &args.cache_k));
  KERNELS_RETURN_IF_ERROR(
      InPlaceOnDevice(stream, cache_v, *out_v, &args.cache_v));
  DeviceUpdate update;
  KERNELS_REQUIRE(PlanUpdate(args, first_slot.typed_data(),
                             /*turn_keys=*/false, &update),
                  "`new_k` and `new_v` must be written in at most ", kMaxItems,
                  " accesses, but got ", ShapeText(new_k.dimensions()),
                  ". Write them in several calls.");
  return LaunchStatus(LaunchUpdate(stream, update), "kv_cache_update");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvCacheUpdateCuda, UpdateImpl,
                              BindUpdate(ffi::Ffi::Bind().Ctx<Stream>()),
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
