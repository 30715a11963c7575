// The cache update's XLA FFI signature, the same on every platform.
#ifndef KERNELS_KV_CACHE_UPDATE_FFI_H_
#define KERNELS_KV_CACHE_UPDATE_FFI_H_

#include <cstdint>
#include <optional>
#include <utility>

#include "kernels/common/ffi_util.h"
#include "kernels/kv_cache/cache_ffi.h"
#include "kernels/kv_cache/cache_layout.h"
#include "kernels/kv_cache/update_args.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace kv_cache {

// Everything but the caches' pointers and the value of `first_slot`, which
// depend on where the memory is.
inline ffi::Error ReadUpdate(
    const ffi::AnyBuffer& cache_k, const ffi::AnyBuffer& cache_v,
    const ffi::AnyBuffer& new_k, const ffi::AnyBuffer& new_v,
    const ffi::Buffer<ffi::S32>& index, const ffi::Buffer<ffi::S32>& count,
    const ffi::Buffer<ffi::S32>& layer, const ffi::Buffer<ffi::S32>& table,
    const ffi::Buffer<ffi::S32>& first_slot,
    const ffi::Buffer<ffi::F32>& k_scale, const ffi::Buffer<ffi::F32>& v_scale,
    int64_t ring, bool heads_first, UpdateArgs* out) {
  UpdateArgs& args = *out;
  KERNELS_RETURN_IF_ERROR(
      ReadCaches(cache_k, cache_v, heads_first, &args.element, &args.shape));
  const auto dims = new_k.dimensions();
  KERNELS_REQUIRE(dims.size() == 4, "`new_k` must have 4 axes, but got ",
                  ShapeText(dims), ".");
  const int64_t b = dims[0];
  KERNELS_RETURN_IF_ERROR(
      ReadAddressing(layer, table, first_slot, b, ring, &args.addressing));
  const CacheShape& shape = args.shape;
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
  KERNELS_RETURN_IF_ERROR(ReadPerSequence("index", index, b, &args.index));
  KERNELS_RETURN_IF_ERROR(ReadPerSequence("count", count, b, &args.count));
  if (quantized) {
    KERNELS_RETURN_IF_ERROR(
        ReadScales("k_scale", k_scale, b, n, &args.k_scale));
    KERNELS_RETURN_IF_ERROR(
        ReadScales("v_scale", v_scale, b, n, &args.v_scale));
  }

  args.new_k = static_cast<const uint8_t*>(new_k.untyped_data());
  args.new_v = static_cast<const uint8_t*>(new_v.untyped_data());
  return ffi::Error::Success();
}

// The arrays and options of the handler, after its context.
template <typename Binding>
auto BindUpdate(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()         // cache_k
      .template Arg<ffi::AnyBuffer>()         // cache_v
      .template Arg<ffi::AnyBuffer>()         // new_k
      .template Arg<ffi::AnyBuffer>()         // new_v
      .template Arg<ffi::Buffer<ffi::S32>>()  // index
      .template Arg<ffi::Buffer<ffi::S32>>()  // count
      .template Arg<ffi::Buffer<ffi::S32>>()  // layer
      .template Arg<ffi::Buffer<ffi::S32>>()  // table
      .template Arg<ffi::Buffer<ffi::S32>>()  // first_slot
      .template Arg<ffi::Buffer<ffi::F32>>()  // k_scale
      .template Arg<ffi::Buffer<ffi::F32>>()  // v_scale
      .template Ret<ffi::AnyBuffer>()         // cache_k
      .template Ret<ffi::AnyBuffer>()         // cache_v
      .template Attr<int64_t>("ring")
      .template Attr<bool>("heads_first");
}

}  // namespace kv_cache
}  // namespace kernels

#endif  // KERNELS_KV_CACHE_UPDATE_FFI_H_
