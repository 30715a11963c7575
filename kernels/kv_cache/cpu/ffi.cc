// XLA FFI binding of the cache update.

#include "kernels/cache/cc/ffi.h"

#include <cstdint>

#include "kernels/cache/cc/update_ffi.h"
#include "kernels/cache/cpu/update.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/common/subnormals.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace kv_cache {
namespace {

ffi::Error Run(ffi::ThreadPool pool, const cache::UpdateArrays& x,
               cache::UpdateArgs* args) {
  const WithSubnormals subnormals;
  args->addressing.first_slot = *cache::Data<int32_t>(x.first_slot);
  args->cache_k = cache::InPlace(x.cache_k, x.out_k);
  args->cache_v = cache::InPlace(x.cache_v, x.out_v);
  cache::Update(*args, pool);
  return ffi::Error::Success();
}

constexpr auto kUpdate = cache::UpdateImpl<ffi::ThreadPool, Run>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    KvCacheUpdate, kUpdate,
    cache::BindUpdate(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

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
