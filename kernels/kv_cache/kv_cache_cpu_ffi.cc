// XLA FFI binding of the cache update.

#include <cstdint>
#include <optional>

#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/kv_cache/cache_ffi.h"
#include "kernels/kv_cache/cache_layout.h"
#include "kernels/kv_cache/kv_cache_cpu.h"
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
  KERNELS_RETURN_IF_ERROR(
      ReadCaches(cache_k, cache_v, heads_first, &args.element, &args.shape));
  KERNELS_RETURN_IF_ERROR(
      ReadAddressing(layer, table, first_slot, ring, &args.addressing));
  const CacheShape& shape = args.shape;
  const int64_t b = args.addressing.batch;

  const auto dims = new_k.dimensions();
  KERNELS_REQUIRE(dims.size() == 4, "`new_k` must have 4 axes, but got ",
                  ShapeText(dims), ".");
  args.tokens = heads_first ? dims[2] : dims[1];
  const std::optional<Element> new_element = ElementOf(new_k.element_type());
  const bool quantized = IsQuantized(args.element);
  KERNELS_REQUIRE(
      new_element.has_value() &&
          (quantized ? !IsQuantized(*new_element)
                     : *new_element == args.element) &&
          new_k.element_type() == new_v.element_type(),
      "`new_k` and `new_v` must have the dtype of the cache, or be floating if "
      "that is quantised, but got ",
      DtypeName(new_k.element_type()), " and ", DtypeName(new_v.element_type()),
      " for a cache of ", DtypeName(cache_k.element_type()), ".");
  args.new_element = *new_element;
  const int64_t t = args.tokens;
  const int64_t n = shape.heads;
  KERNELS_RETURN_IF_ERROR(
      heads_first ? RequireShape("new_k", new_k, {b, n, t, shape.k_dim})
                  : RequireShape("new_k", new_k, {b, t, n, shape.k_dim}));
  KERNELS_RETURN_IF_ERROR(
      heads_first ? RequireShape("new_v", new_v, {b, n, t, shape.v_dim})
                  : RequireShape("new_v", new_v, {b, t, n, shape.v_dim}));
  KERNELS_RETURN_IF_ERROR(RequireShape("index", index, {b}));
  KERNELS_RETURN_IF_ERROR(RequireShape("count", count, {b}));
  if (quantized) {
    KERNELS_RETURN_IF_ERROR(RequireShape("k_scale", k_scale, {b, n}));
    KERNELS_RETURN_IF_ERROR(RequireShape("v_scale", v_scale, {b, n}));
  }

  args.cache_k = InPlace(cache_k, *out_k);
  args.cache_v = InPlace(cache_v, *out_v);
  args.new_k = static_cast<const uint8_t*>(new_k.untyped_data());
  args.new_v = static_cast<const uint8_t*>(new_v.untyped_data());
  args.index = index.typed_data();
  args.count = count.typed_data();
  args.k_scale = k_scale.typed_data();
  args.v_scale = v_scale.typed_data();
  Update(args, pool);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(KvCacheUpdate, UpdateImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // cache_k
                                  .Arg<ffi::AnyBuffer>()         // cache_v
                                  .Arg<ffi::AnyBuffer>()         // new_k
                                  .Arg<ffi::AnyBuffer>()         // new_v
                                  .Arg<ffi::Buffer<ffi::S32>>()  // index
                                  .Arg<ffi::Buffer<ffi::S32>>()  // count
                                  .Arg<ffi::Buffer<ffi::S32>>()  // layer
                                  .Arg<ffi::Buffer<ffi::S32>>()  // table
                                  .Arg<ffi::Buffer<ffi::S32>>()  // first_slot
                                  .Arg<ffi::Buffer<ffi::F32>>()  // k_scale
                                  .Arg<ffi::Buffer<ffi::F32>>()  // v_scale
                                  .Ret<ffi::AnyBuffer>()         // cache_k
                                  .Ret<ffi::AnyBuffer>()         // cache_v
                                  .Attr<int64_t>("ring")
                                  .Attr<bool>("heads_first"));

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
