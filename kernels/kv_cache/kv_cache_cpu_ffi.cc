// XLA FFI binding of the cache update.

#include <cstdint>

#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/common/subnormals.h"
#include "kernels/kv_cache/cache_ffi.h"
#include "kernels/kv_cache/kv_cache_cpu.h"
#include "kernels/kv_cache/update_ffi.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace kv_cache {
namespace {

ffi::Error Run(ffi::ThreadPool pool, const UpdateArrays& x, UpdateArgs* args) {
  const WithSubnormals subnormals;
  args->addressing.first_slot = *Data<int32_t>(x.first_slot);
  args->cache_k = InPlace(x.cache_k, x.out_k);
  args->cache_v = InPlace(x.cache_v, x.out_v);
  Update(*args, pool);
  return ffi::Error::Success();
}

constexpr auto kUpdate = UpdateImpl<ffi::ThreadPool, Run>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    KvCacheUpdate, kUpdate,
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
