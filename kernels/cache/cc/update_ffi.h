// The cache update's XLA FFI signature, the same on every platform.
#ifndef KERNELS_CACHE_CC_UPDATE_FFI_H_
#define KERNELS_CACHE_CC_UPDATE_FFI_H_

#include <cstdint>
#include <optional>
#include <utility>

#include "kernels/cache/cc/ffi.h"
#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cc/update_args.h"
#include "kernels/common/ffi_util.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace cache {

// The arrays of the handler, in their order.
struct UpdateArrays {
  ffi::AnyBuffer cache_k;
  ffi::AnyBuffer cache_v;
  ffi::AnyBuffer new_k;
  ffi::AnyBuffer new_v;
  ffi::AnyBuffer index;
  ffi::AnyBuffer count;
  ffi::AnyBuffer layer;
  ffi::AnyBuffer table;
  ffi::AnyBuffer first_slot;
  ffi::AnyBuffer k_scale;
  ffi::AnyBuffer v_scale;
  ffi::AnyBuffer out_k;
  ffi::AnyBuffer out_v;
};

// Reads the new rows `[b, t, n, h]` or `[b, n, t, h]`.
inline ffi::Error RequireNewRows(const ffi::AnyBuffer& new_k,
                                 const ffi::AnyBuffer& new_v,
                                 ffi::DataType dtype, const CacheShape& shape,
                                 int64_t batch, int64_t tokens,
                                 const SizedBy& sized_by) {
  const int64_t n = shape.heads;
  const int64_t second = shape.heads_first ? n : tokens;
  const int64_t third = shape.heads_first ? tokens : n;
  KERNELS_RETURN_IF_ERROR(RequireArray(
      "new_k", new_k, dtype, {batch, second, third, shape.k_dim}, sized_by));
  return RequireArray("new_v", new_v, dtype,
                      {batch, second, third, shape.v_dim}, sized_by);
}

// Everything but the caches' pointers and the value of `first_slot`, which
// depend on where the memory is.
inline ffi::Error ReadUpdate(const ffi::Dictionary& attributes,
                             const UpdateArrays& x, UpdateArgs* out) {
  UpdateArgs& args = *out;
  int64_t ring = 0;
  bool heads_first = false;
  KERNELS_RETURN_IF_ERROR(
      ReadAttributes(attributes, Attribute("ring", &ring),
                     Attribute("heads_first", &heads_first)));
  KERNELS_RETURN_IF_ERROR(ReadCaches(x.cache_k, x.cache_v, heads_first,
                                     &args.element, &args.shape));
  KERNELS_RETURN_IF_ERROR(
      RequireUpdated("out_k", x.out_k, "cache_k", x.cache_k));
  KERNELS_RETURN_IF_ERROR(
      RequireUpdated("out_v", x.out_v, "cache_v", x.cache_v));
  const SizedBy sized_by = {x.cache_k, x.cache_v, "new_k", x.new_k,
                            heads_first};
  const auto dims = x.new_k.dimensions();
  KERNELS_REQUIRE(dims.size() == 4, "`new_k` must have 4 axes, but got ",
                  TypeText(x.new_k), ".");
  const int64_t b = dims[0];
  args.tokens = heads_first ? dims[2] : dims[1];
  const std::optional<Element> new_element = ElementOf(x.new_k.element_type());
  const bool quantized = IsQuantized(args.element);
  KERNELS_REQUIRE(
      new_element.has_value() && (quantized ? !IsQuantized(*new_element)
                                            : *new_element == args.element),
      "`new_k` must have the dtype of the cache, or be floating if "
      "that is quantised, but got ",
      TypeText(x.new_k), " for `cache_k` ", TypeText(x.cache_k), ".");
  args.new_element = *new_element;
  KERNELS_RETURN_IF_ERROR(RequireNewRows(x.new_k, x.new_v,
                                         x.new_k.element_type(), args.shape, b,
                                         args.tokens, sized_by));
  KERNELS_RETURN_IF_ERROR(ReadAddressing(x.layer, x.table, x.first_slot,
                                         args.shape, b, ring, sized_by,
                                         &args.addressing));
  KERNELS_RETURN_IF_ERROR(
      ReadPerSequence("index", x.index, b, sized_by, &args.index));
  KERNELS_RETURN_IF_ERROR(
      ReadPerSequence("count", x.count, b, sized_by, &args.count));
  KERNELS_RETURN_IF_ERROR(ReadScales("k_scale", x.k_scale, quantized, b,
                                     args.shape.heads, sized_by,
                                     &args.k_scale));
  KERNELS_RETURN_IF_ERROR(ReadScales("v_scale", x.v_scale, quantized, b,
                                     args.shape.heads, sized_by,
                                     &args.v_scale));
  args.new_k = Data<uint8_t>(x.new_k);
  args.new_v = Data<uint8_t>(x.new_v);
  return ffi::Error::Success();
}

// The handler; `kRun` does it in a platform's context.
template <typename Context,
          ffi::Error (*kRun)(Context, const UpdateArrays&, UpdateArgs*)>
ffi::Error UpdateImpl(Context context, ffi::AnyBuffer cache_k,
                      ffi::AnyBuffer cache_v, ffi::AnyBuffer new_k,
                      ffi::AnyBuffer new_v, ffi::AnyBuffer index,
                      ffi::AnyBuffer count, ffi::AnyBuffer layer,
                      ffi::AnyBuffer table, ffi::AnyBuffer first_slot,
                      ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale,
                      ffi::Result<ffi::AnyBuffer> out_k,
                      ffi::Result<ffi::AnyBuffer> out_v,
                      const ffi::Dictionary& attributes) {
  const UpdateArrays arrays = {cache_k, cache_v, new_k, new_v,      index,
                               count,   layer,   table, first_slot, k_scale,
                               v_scale, *out_k,  *out_v};
  UpdateArgs args = {};
  KERNELS_RETURN_IF_ERROR(ReadUpdate(attributes, arrays, &args));
  return kRun(context, arrays, &args);
}

// The arrays and options of the handler, after its context.
template <typename Binding>
auto BindUpdate(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()  // cache_k
      .template Arg<ffi::AnyBuffer>()  // cache_v
      .template Arg<ffi::AnyBuffer>()  // new_k
      .template Arg<ffi::AnyBuffer>()  // new_v
      .template Arg<ffi::AnyBuffer>()  // index
      .template Arg<ffi::AnyBuffer>()  // count
      .template Arg<ffi::AnyBuffer>()  // layer
      .template Arg<ffi::AnyBuffer>()  // table
      .template Arg<ffi::AnyBuffer>()  // first_slot
      .template Arg<ffi::AnyBuffer>()  // k_scale
      .template Arg<ffi::AnyBuffer>()  // v_scale
      .template Ret<ffi::AnyBuffer>()  // out_k
      .template Ret<ffi::AnyBuffer>()  // out_v
      .Attrs();                        // ring, heads_first
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CC_UPDATE_FFI_H_
