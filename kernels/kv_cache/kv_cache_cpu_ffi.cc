// XLA FFI binding of the cache update.

#include <cstdint>

#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/kv_cache/cache_ffi.h"
#include "kernels/kv_cache/kv_cache_cpu.h"
#include "kernels/kv_cache/update_ffi.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace kv_cache {
namespace {

ffi::Error UpdateImpl(
    ffi::ThreadPool pool, ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v,
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
  args.addressing.first_slot = first_slot.typed_data()[0];
  args.cache_k = InPlace(cache_k, *out_k);
  args.cache_v = InPlace(cache_v, *out_v);
  Update(args, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    KvCacheUpdate, UpdateImpl,
    BindUpdate(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace kv_cache
}  // namespace kernels

PYBIND11_MODULE(_kv_cache_cpu, module) {
  module.doc() = "XLA FFI handlers of the key-value cache for the CPU.";
  module.def(
      "kv_cache_update",
      [] { return kernels::HandlerCapsule(kernels::kv_cache::KvCacheUpdate); },
      "Returns the handler of `kv_cache_update`.");
  kernels::AddSimdLevelFunctions(module);
}
