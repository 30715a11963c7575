// Decode attention's XLA FFI signatures, the same on every platform.
#ifndef KERNELS_DECODE_ATTENTION_DECODE_ATTENTION_FFI_H_
#define KERNELS_DECODE_ATTENTION_DECODE_ATTENTION_FFI_H_

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "kernels/common/ffi_util.h"
#include "kernels/decode_attention/decode_args.h"
#include "kernels/kv_cache/cache_ffi.h"
#include "kernels/kv_cache/cache_layout.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace decode_attention {

using kv_cache::Element;
using kv_cache::ElementOf;
using kv_cache::IsQuantized;
using kv_cache::RequireShape;
using F32Buffer = ffi::Buffer<ffi::F32>;
using I32Buffer = ffi::Buffer<ffi::S32>;

// Everything but the new rows and the caches' results, which only the call
// that appends has. Operands that are not used have no elements; nor has a
// `table`, of shape [0, 0], where each sequence has the block of its number.
struct Operands {
  ffi::AnyBuffer q;
  I32Buffer index;
  I32Buffer count;
  I32Buffer layer;
  I32Buffer table;
  I32Buffer first_slot;
  F32Buffer k_scale;
  F32Buffer v_scale;
  F32Buffer cos;
  F32Buffer sin;
  I32Buffer rope_positions;
  I32Buffer padding;
  F32Buffer alibi;
  F32Buffer sinks;
  F32Buffer bias;
  ffi::Buffer<ffi::PRED> mask;
  ffi::AnyBuffer qv;
};

struct Options {
  int64_t ring;
  int64_t window_left;
  int64_t window_right;
  int64_t chunk;
  float scale;
  float softcap;
  bool heads_first;
  bool causal;
  bool interleaved;
  bool rotate_keys;
};

template <typename Buffer>
bool Given(const Buffer& buffer) {
  return buffer.element_count() > 0;
}

// Reads an operand over [b, n, g, t, slots] whose axes may have size 1.
template <typename T, typename Buffer>
ffi::Error ReadPerLogit(std::string_view name, const Buffer& buffer,
                        const DecodeArgs& args, int64_t slots,
                        PerLogit<T>* out) {
  const auto dims = buffer.dimensions();
  const int64_t full[] = {args.addressing.batch, args.shape.heads, args.group,
                          args.tokens, slots};
  bool fits = dims.size() == 5;
  for (size_t i = 0; fits && i < 5; ++i) {
    fits = dims[i] == full[i] || dims[i] == 1;
  }
  KERNELS_REQUIRE(fits && (dims[1] * dims[2] == 1 ||
                           dims[1] * dims[2] == full[1] * full[2]),
                  "`", name,
                  "` must have shape [b, n, g, t, s], or 1 for any "
                  "of them, but got ",
                  ShapeText(dims), ".");
  out->data = reinterpret_cast<const T*>(buffer.untyped_data());
  out->slot_stride = dims[4] == 1 ? 0 : 1;
  out->token_stride = dims[3] == 1 ? 0 : dims[4];
  out->head_stride = dims[1] * dims[2] == 1 ? 0 : dims[3] * dims[4];
  out->batch_stride = dims[0] == 1 ? 0 : dims[1] * dims[2] * dims[3] * dims[4];
  return ffi::Error::Success();
}

// One call of either handler. The new rows and the caches' results are null
// where nothing is appended.
struct Call {
  const ffi::AnyBuffer& cache_k;
  const ffi::AnyBuffer& cache_v;
  const Operands& x;
  const Options& options;
  const ffi::AnyBuffer* new_k;
  const ffi::AnyBuffer* new_v;
  ffi::AnyBuffer* out_k;
  ffi::AnyBuffer* out_v;
  ffi::AnyBuffer& out;
  F32Buffer& lse;
  // What only CUDA has: float32 [parts, floats of a part].
  const ffi::RemainingRets& workspace;
};

// Everything but the caches' pointers and the value of `first_slot`, which
// depend on where the memory is.
inline ffi::Error ReadDecode(const Call& call, DecodeArgs* decode) {
  const ffi::AnyBuffer& cache_k = call.cache_k;
  const ffi::AnyBuffer& cache_v = call.cache_v;
  const Operands& x = call.x;
  const Options& options = call.options;
  const ffi::AnyBuffer* new_k = call.new_k;
  const ffi::AnyBuffer* new_v = call.new_v;
  DecodeArgs& args = *decode;
  KERNELS_RETURN_IF_ERROR(kv_cache::ReadCaches(
      cache_k, cache_v, options.heads_first, &args.element, &args.shape));
  const auto dims = x.q.dimensions();
  KERNELS_REQUIRE(dims.size() == 5, "`q` must have 5 axes, but got ",
                  ShapeText(dims), ".");
  const int64_t b = dims[0];
  KERNELS_RETURN_IF_ERROR(kv_cache::ReadAddressing(
      x.layer, x.table, x.first_slot, b, options.ring, &args.addressing));
  const kv_cache::CacheShape& shape = args.shape;
  const int64_t n = shape.heads;

  const bool first = options.heads_first;
  const int64_t t = first ? dims[3] : dims[1];
  const int64_t g = first ? dims[2] : dims[3];
  KERNELS_REQUIRE(n > 0 && g > 0, "`q` must have heads, but got ",
                  ShapeText(dims), ".");
  args.tokens = t;
  args.group = g;
  const auto require_rows = [&](std::string_view name,
                                const ffi::AnyBuffer& rows, int64_t dim) {
    return first ? RequireShape(name, rows, {b, n, g, t, dim})
                 : RequireShape(name, rows, {b, t, n, g, dim});
  };
  KERNELS_RETURN_IF_ERROR(require_rows("q", x.q, shape.k_dim));
  KERNELS_RETURN_IF_ERROR(require_rows("out", call.out, shape.v_dim));
  KERNELS_RETURN_IF_ERROR(RequireShape("lse", call.lse, {b, n, g, t}));
  KERNELS_RETURN_IF_ERROR(
      kv_cache::ReadPerSequence("index", x.index, b, &args.index));
  KERNELS_RETURN_IF_ERROR(
      kv_cache::ReadPerSequence("count", x.count, b, &args.count));

  const std::optional<Element> query = ElementOf(x.q.element_type());
  const std::optional<Element> result = ElementOf(call.out.element_type());
  KERNELS_REQUIRE(query.has_value() && !IsQuantized(*query) &&
                      (IsQuantized(args.element) || *query == args.element),
                  "`q` must have the dtype of the cache, or be floating if "
                  "that is quantised, but got ",
                  DtypeName(x.q.element_type()), " for a cache of ",
                  DtypeName(cache_k.element_type()), ".");
  KERNELS_REQUIRE(result.has_value() && !IsQuantized(*result),
                  "`out` must be float32, bfloat16 or float16, but got ",
                  DtypeName(call.out.element_type()), ".");
  args.query_element = *query;
  args.out_element = *result;
  if (new_k != nullptr) {
    KERNELS_REQUIRE(new_k->element_type() == x.q.element_type() &&
                        new_v->element_type() == x.q.element_type(),
                    "`new_k` and `new_v` must have the dtype of `q`, but got ",
                    DtypeName(new_k->element_type()), " and ",
                    DtypeName(new_v->element_type()), ".");
    KERNELS_RETURN_IF_ERROR(
        first ? RequireShape("new_k", *new_k, {b, n, t, shape.k_dim})
              : RequireShape("new_k", *new_k, {b, t, n, shape.k_dim}));
    KERNELS_RETURN_IF_ERROR(
        first ? RequireShape("new_v", *new_v, {b, n, t, shape.v_dim})
              : RequireShape("new_v", *new_v, {b, t, n, shape.v_dim}));
    args.new_k = static_cast<const uint8_t*>(new_k->untyped_data());
    args.new_v = static_cast<const uint8_t*>(new_v->untyped_data());
  }
  if (IsQuantized(args.element)) {
    KERNELS_RETURN_IF_ERROR(
        kv_cache::ReadScales("k_scale", x.k_scale, b, n, &args.k_scale));
    KERNELS_RETURN_IF_ERROR(
        kv_cache::ReadScales("v_scale", x.v_scale, b, n, &args.v_scale));
  }
  if (Given(x.qv)) {
    KERNELS_RETURN_IF_ERROR(require_rows("qv", x.qv, shape.v_dim));
    KERNELS_REQUIRE(x.qv.element_type() == x.q.element_type(),
                    "`qv` must have the dtype of `q`, but got ",
                    DtypeName(x.qv.element_type()), ".");
    args.qv = static_cast<const uint8_t*>(x.qv.untyped_data());
  }
  if (Given(x.cos)) {
    const auto angles = x.cos.dimensions();
    KERNELS_REQUIRE(angles.size() == 2 && angles[1] * 2 <= shape.k_dim,
                    "`rope_cos` must have shape [positions, pairs] with at "
                    "most ",
                    shape.k_dim / 2, " pairs, but got ", ShapeText(angles),
                    ".");
    KERNELS_RETURN_IF_ERROR(
        RequireShape("rope_sin", x.sin, {angles[0], angles[1]}));
    KERNELS_RETURN_IF_ERROR(
        RequireShape("rope_positions", x.rope_positions, {b, t}));
    args.rotary.cos = x.cos.typed_data();
    args.rotary.sin = x.sin.typed_data();
    args.rotary.positions = angles[0];
    args.rotary.pairs = angles[1];
    args.rotary.interleaved = options.interleaved;
    args.rotary.cached_keys = options.rotate_keys;
    args.rotary.where = x.rope_positions.typed_data();
  }
  if (Given(x.padding)) {
    KERNELS_RETURN_IF_ERROR(RequireShape("left_padding", x.padding, {b}));
    args.padding = x.padding.typed_data();
  }
  Masking& masking = args.masking;
  if (Given(x.alibi)) {
    const auto slopes = x.alibi.dimensions();
    const bool shared = slopes.size() == 3 && slopes[0] == 1;
    KERNELS_RETURN_IF_ERROR(
        RequireShape("alibi_slopes", x.alibi, {shared ? 1 : b, n, g}));
    masking.alibi = x.alibi.typed_data();
    masking.alibi_stride = shared ? 0 : n * g;
  }
  if (Given(x.sinks)) {
    KERNELS_RETURN_IF_ERROR(RequireShape("sinks", x.sinks, {n, g}));
    args.sinks = x.sinks.typed_data();
  }
  const int64_t slots = args.addressing.table_width * shape.block_size;
  if (Given(x.bias)) {
    KERNELS_RETURN_IF_ERROR(
        ReadPerLogit<float>("bias", x.bias, args, slots, &masking.bias));
  }
  if (Given(x.mask)) {
    KERNELS_RETURN_IF_ERROR(
        ReadPerLogit<uint8_t>("mask", x.mask, args, slots, &masking.mask));
  }
  masking.causal = options.causal;
  masking.window_left = options.window_left;
  masking.window_right = options.window_right;
  masking.chunk = options.chunk;
  masking.softcap = options.softcap;

  args.q = static_cast<const uint8_t*>(x.q.untyped_data());
  args.scale = options.scale;
  args.out = static_cast<uint8_t*>(call.out.untyped_data());
  args.lse = call.lse.typed_data();
  return ffi::Error::Success();
}

// The handler that appends and attends; `kRun` does it in a platform's context.
template <typename Context, ffi::Error (*kRun)(Context, const Call&)>
ffi::Error AppendAndAttendImpl(
    Context context, ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v,
    ffi::AnyBuffer new_k, ffi::AnyBuffer new_v, ffi::AnyBuffer q,
    I32Buffer index, I32Buffer count, I32Buffer layer, I32Buffer table,
    I32Buffer first_slot, F32Buffer k_scale, F32Buffer v_scale, F32Buffer cos,
    F32Buffer sin, I32Buffer rope_positions, I32Buffer padding, F32Buffer alibi,
    F32Buffer sinks, F32Buffer bias, ffi::Buffer<ffi::PRED> mask,
    ffi::AnyBuffer qv, ffi::Result<ffi::AnyBuffer> out_k,
    ffi::Result<ffi::AnyBuffer> out_v, ffi::Result<ffi::AnyBuffer> out,
    ffi::Result<F32Buffer> lse, ffi::RemainingRets workspace, int64_t ring,
    int64_t window_left, int64_t window_right, int64_t chunk, float scale,
    float softcap, bool heads_first, bool causal, bool interleaved,
    bool rotate_keys) {
  return kRun(context,
              {cache_k, cache_v,
               Operands{q, index, count, layer, table, first_slot, k_scale,
                        v_scale, cos, sin, rope_positions, padding, alibi,
                        sinks, bias, mask, qv},
               Options{ring, window_left, window_right, chunk, scale, softcap,
                       heads_first, causal, interleaved, rotate_keys},
               &new_k, &new_v, &*out_k, &*out_v, *out, *lse, workspace});
}

// The handler that attends only.
template <typename Context, ffi::Error (*kRun)(Context, const Call&)>
ffi::Error AttendImpl(
    Context context, ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v,
    ffi::AnyBuffer q, I32Buffer index, I32Buffer count, I32Buffer layer,
    I32Buffer table, I32Buffer first_slot, F32Buffer k_scale, F32Buffer v_scale,
    F32Buffer cos, F32Buffer sin, I32Buffer rope_positions, I32Buffer padding,
    F32Buffer alibi, F32Buffer sinks, F32Buffer bias,
    ffi::Buffer<ffi::PRED> mask, ffi::AnyBuffer qv,
    ffi::Result<ffi::AnyBuffer> out, ffi::Result<F32Buffer> lse,
    ffi::RemainingRets workspace, int64_t ring, int64_t window_left,
    int64_t window_right, int64_t chunk, float scale, float softcap,
    bool heads_first, bool causal, bool interleaved, bool rotate_keys) {
  return kRun(context,
              {cache_k, cache_v,
               Operands{q, index, count, layer, table, first_slot, k_scale,
                        v_scale, cos, sin, rope_positions, padding, alibi,
                        sinks, bias, mask, qv},
               Options{ring, window_left, window_right, chunk, scale, softcap,
                       heads_first, causal, interleaved, rotate_keys},
               nullptr, nullptr, nullptr, nullptr, *out, *lse, workspace});
}

// What both calls take after the arrays that only one of them has.
template <typename Binding>
auto BindOperands(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()          // q
      .template Arg<I32Buffer>()               // index
      .template Arg<I32Buffer>()               // count
      .template Arg<I32Buffer>()               // layer
      .template Arg<I32Buffer>()               // table
      .template Arg<I32Buffer>()               // first_slot
      .template Arg<F32Buffer>()               // k_scale
      .template Arg<F32Buffer>()               // v_scale
      .template Arg<F32Buffer>()               // rope_cos
      .template Arg<F32Buffer>()               // rope_sin
      .template Arg<I32Buffer>()               // rope_positions
      .template Arg<I32Buffer>()               // left_padding
      .template Arg<F32Buffer>()               // alibi_slopes
      .template Arg<F32Buffer>()               // sinks
      .template Arg<F32Buffer>()               // bias
      .template Arg<ffi::Buffer<ffi::PRED>>()  // mask
      .template Arg<ffi::AnyBuffer>();         // qv
}

template <typename Binding>
auto BindOptions(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("ring")
      .template Attr<int64_t>("window_left")
      .template Attr<int64_t>("window_right")
      .template Attr<int64_t>("chunk")
      .template Attr<float>("scale")
      .template Attr<float>("softcap")
      .template Attr<bool>("heads_first")
      .template Attr<bool>("causal")
      .template Attr<bool>("interleaved")
      .template Attr<bool>("rotate_keys");
}

// The arrays and options of AppendAndAttendImpl, after its context.
template <typename Binding>
auto BindAppendAndAttend(Binding binding) {
  return BindOptions(
      BindOperands(std::move(binding)
                       .template Arg<ffi::AnyBuffer>()   // cache_k
                       .template Arg<ffi::AnyBuffer>()   // cache_v
                       .template Arg<ffi::AnyBuffer>()   // new_k
                       .template Arg<ffi::AnyBuffer>())  // new_v
          .template Ret<ffi::AnyBuffer>()                // cache_k
          .template Ret<ffi::AnyBuffer>()                // cache_v
          .template Ret<ffi::AnyBuffer>()                // out
          .template Ret<F32Buffer>()                     // lse
          .RemainingRets());                             // workspace
}

// Those of AttendImpl.
template <typename Binding>
auto BindAttend(Binding binding) {
  return BindOptions(
      BindOperands(std::move(binding)
                       .template Arg<ffi::AnyBuffer>()   // cache_k
                       .template Arg<ffi::AnyBuffer>())  // cache_v
          .template Ret<ffi::AnyBuffer>()                // out
          .template Ret<F32Buffer>()                     // lse
          .RemainingRets());                             // workspace
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_DECODE_ATTENTION_FFI_H_
