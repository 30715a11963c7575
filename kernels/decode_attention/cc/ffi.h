// Decode attention's XLA FFI signatures, the same on every platform.
#ifndef KERNELS_DECODE_ATTENTION_CC_FFI_H_
#define KERNELS_DECODE_ATTENTION_CC_FFI_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/cache/cc/ffi.h"
#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cc/update_ffi.h"
#include "kernels/common/ffi_util.h"
#include "kernels/decode_attention/cc/decode_args.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace decode_attention {

using cache::Data;
using cache::Element;
using cache::ElementOf;
using cache::Given;
using cache::IsQuantized;
using cache::SizedBy;

// Everything but the new rows and the caches' results, which only the call
// that appends has. Operands that are not used have no elements; nor has a
// `table`, of shape [0, 0], where each sequence has the block of its number.
struct Operands {
  ffi::AnyBuffer q;
  ffi::AnyBuffer index;
  ffi::AnyBuffer count;
  ffi::AnyBuffer layer;
  ffi::AnyBuffer table;
  ffi::AnyBuffer first_slot;
  ffi::AnyBuffer k_scale;
  ffi::AnyBuffer v_scale;
  ffi::AnyBuffer cos;
  ffi::AnyBuffer sin;
  ffi::AnyBuffer rope_positions;
  ffi::AnyBuffer padding;
  ffi::AnyBuffer alibi;
  ffi::AnyBuffer sinks;
  ffi::AnyBuffer bias;
  ffi::AnyBuffer mask;
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

inline ffi::Error ReadOptions(const ffi::Dictionary& attributes,
                              Options* options) {
  KERNELS_RETURN_IF_ERROR(ReadAttributes(
      attributes, Attribute("ring", &options->ring),
      Attribute("window_left", &options->window_left),
      Attribute("window_right", &options->window_right),
      Attribute("chunk", &options->chunk), Attribute("scale", &options->scale),
      Attribute("softcap", &options->softcap),
      Attribute("heads_first", &options->heads_first),
      Attribute("causal", &options->causal),
      Attribute("interleaved", &options->interleaved),
      Attribute("rotate_keys", &options->rotate_keys)));
  // Positions are below 2^31; what is larger would leave int64 behind.
  const auto fits = [](int64_t number, int64_t least) {
    return least <= number && number <= INT32_MAX;
  };
  KERNELS_REQUIRE(fits(options->window_left, -1),
                  "`window_left` must lie in [0, 2^31), or be -1 for no limit, "
                  "but got ",
                  options->window_left, ".");
  KERNELS_REQUIRE(fits(options->window_right, -1),
                  "`window_right` must lie in [0, 2^31), or be -1 for no "
                  "limit, but got ",
                  options->window_right, ".");
  KERNELS_REQUIRE(fits(options->chunk, 0),
                  "`chunk` must lie in [1, 2^31), or be 0 for none, but got ",
                  options->chunk, ".");
  KERNELS_REQUIRE(std::isfinite(options->scale),
                  "`scale` must be finite, but got ", options->scale, ".");
  KERNELS_REQUIRE(options->softcap >= 0.0f && std::isfinite(options->softcap),
                  "`softcap` must be positive and finite, or 0 for none, but "
                  "got ",
                  options->softcap, ".");
  return ffi::Error::Success();
}

// Reads an operand over [b, n, g, t, slots] whose axes may have size 1.
template <typename T>
ffi::Error ReadPerLogit(std::string_view name, const ffi::AnyBuffer& array,
                        ffi::DataType dtype, const DecodeArgs& args,
                        int64_t slots, const SizedBy& sized_by,
                        PerLogit<T>* out) {
  std::vector<int64_t> sizes = {args.addressing.batch, args.shape.heads,
                                args.group, args.tokens, slots};
  const auto dims = array.dimensions();
  const bool all_heads = dims.size() == 5 && dims[1] * dims[2] == 1;
  for (size_t i = 0; i < dims.size() && i < 5; ++i) {
    const bool heads = i == 1 || i == 2;
    if (dims[i] == 1 && (!heads || all_heads)) sizes[i] = 1;
  }
  KERNELS_RETURN_IF_ERROR(RequireArray(name, array, dtype, sizes, sized_by));
  out->data = Data<T>(array);
  out->slot_stride = dims[4] == 1 ? 0 : 1;
  out->token_stride = dims[3] == 1 ? 0 : dims[4];
  out->head_stride = all_heads ? 0 : dims[3] * dims[4];
  out->batch_stride = dims[0] == 1 ? 0 : dims[1] * dims[2] * dims[3] * dims[4];
  return ffi::Error::Success();
}

// Reads the tables of rotary embedding, and the rows of them to use.
inline ffi::Error ReadRotary(const Operands& x, const Options& options,
                             const DecodeArgs& args, const SizedBy& sized_by,
                             Rotary* rotary) {
  if (!Given(x.cos)) {
    KERNELS_RETURN_IF_ERROR(
        RequireArray("rope_cos", x.cos, ffi::DataType::F32, {0, 0}, sized_by));
    const auto without = [] { return " where `rope_cos` has no elements"; };
    KERNELS_RETURN_IF_ERROR(
        RequireArray("rope_sin", x.sin, ffi::DataType::F32, {0, 0}, without));
    KERNELS_RETURN_IF_ERROR(RequireArray("rope_positions", x.rope_positions,
                                         ffi::DataType::S32, {0, 0}, without));
    KERNELS_REQUIRE(!options.rotate_keys, "`rotate_keys` must be false",
                    without(), ".");
    KERNELS_REQUIRE(!options.interleaved, "`interleaved` must be false",
                    without(), ".");
    return ffi::Error::Success();
  }
  const auto dims = x.cos.dimensions();
  KERNELS_REQUIRE(
      x.cos.element_type() == ffi::DataType::F32 && dims.size() == 2 &&
          dims[0] > 0 && dims[1] * 2 <= args.shape.k_dim,
      "`rope_cos` must be float32[positions, pairs] with at least "
      "1 position and at most ",
      args.shape.k_dim / 2, " pairs, but got ", TypeText(x.cos), ".");
  KERNELS_RETURN_IF_ERROR(
      RequireArray("rope_sin", x.sin, ffi::DataType::F32, dims,
                   [&] { return StrCat(" like `rope_cos`"); }));
  KERNELS_RETURN_IF_ERROR(
      RequireArray("rope_positions", x.rope_positions, ffi::DataType::S32,
                   {args.addressing.batch, args.tokens}, sized_by));
  rotary->cos = Data<float>(x.cos);
  rotary->sin = Data<float>(x.sin);
  rotary->positions = dims[0];
  rotary->pairs = dims[1];
  rotary->interleaved = options.interleaved;
  rotary->cached_keys = options.rotate_keys;
  rotary->where = Data<int32_t>(x.rope_positions);
  return ffi::Error::Success();
}

// One call of either handler. The new rows and the caches' results are null
// where nothing is appended.
struct Call {
  const ffi::AnyBuffer& cache_k;
  const ffi::AnyBuffer& cache_v;
  const Operands& x;
  const ffi::AnyBuffer* new_k;
  const ffi::AnyBuffer* new_v;
  const ffi::AnyBuffer* out_k;
  const ffi::AnyBuffer* out_v;
  const ffi::AnyBuffer& out;
  const ffi::AnyBuffer& lse;
  // What only CUDA has: float32 [parts, floats of a part].
  const ffi::RemainingRets& workspace;
  const ffi::Dictionary& attributes;
};

// Reads what may be left out.
inline ffi::Error ReadOptional(const Operands& x, const Options& options,
                               const SizedBy& sized_by, DecodeArgs* decode) {
  DecodeArgs& args = *decode;
  Masking& masking = args.masking;
  const int64_t b = args.addressing.batch;
  const int64_t n = args.shape.heads;
  const int64_t slots = args.addressing.table_width * args.shape.block_size;
  constexpr ffi::DataType kF32 = ffi::DataType::F32;
  constexpr ffi::DataType kS32 = ffi::DataType::S32;
  const auto require = [&](std::string_view name, const ffi::AnyBuffer& array,
                           ffi::DataType dtype, std::vector<int64_t> sizes) {
    if (!Given(array)) std::fill(sizes.begin(), sizes.end(), 0);
    return RequireArray(name, array, dtype, sizes, sized_by);
  };
  const bool quantized = IsQuantized(args.element);
  KERNELS_RETURN_IF_ERROR(cache::ReadScales("k_scale", x.k_scale, quantized, b,
                                            n, sized_by, &args.k_scale));
  KERNELS_RETURN_IF_ERROR(cache::ReadScales("v_scale", x.v_scale, quantized, b,
                                            n, sized_by, &args.v_scale));
  KERNELS_RETURN_IF_ERROR(ReadRotary(x, options, args, sized_by, &args.rotary));
  KERNELS_RETURN_IF_ERROR(require("left_padding", x.padding, kS32, {b}));
  if (Given(x.padding)) args.padding = Data<int32_t>(x.padding);
  const auto slopes = x.alibi.dimensions();
  const bool shared = slopes.size() == 3 && slopes[0] == 1;
  KERNELS_RETURN_IF_ERROR(
      require("alibi_slopes", x.alibi, kF32, {shared ? 1 : b, n, args.group}));
  if (Given(x.alibi)) {
    masking.alibi = Data<float>(x.alibi);
    masking.alibi_stride = shared ? 0 : n * args.group;
  }
  KERNELS_RETURN_IF_ERROR(require("sinks", x.sinks, kF32, {n, args.group}));
  if (Given(x.sinks)) args.sinks = Data<float>(x.sinks);
  KERNELS_RETURN_IF_ERROR(Given(x.bias)
                              ? ReadPerLogit("bias", x.bias, kF32, args, slots,
                                             sized_by, &masking.bias)
                              : require("bias", x.bias, kF32, {0, 0, 0, 0, 0}));
  return Given(x.mask)
             ? ReadPerLogit("mask", x.mask, ffi::DataType::PRED, args, slots,
                            sized_by, &masking.mask)
             : require("mask", x.mask, ffi::DataType::PRED, {0, 0, 0, 0, 0});
}

// Reads q, the result and what else has a row for each query.
inline ffi::Error ReadQueries(const Call& call, const SizedBy& sized_by,
                              DecodeArgs* decode) {
  DecodeArgs& args = *decode;
  const Operands& x = call.x;
  const cache::CacheShape& shape = args.shape;
  const int64_t b = args.addressing.batch;
  const int64_t n = shape.heads, t = args.tokens, g = args.group;
  const ffi::DataType dtype = x.q.element_type();
  const std::optional<Element> query = ElementOf(dtype);
  const std::optional<Element> result = ElementOf(call.out.element_type());
  KERNELS_REQUIRE(query.has_value() && !IsQuantized(*query) &&
                      (IsQuantized(args.element) || *query == args.element),
                  "`q` must have the dtype of the cache, or be floating if "
                  "that is quantised, but got ",
                  TypeText(x.q), " for `cache_k` ", TypeText(call.cache_k),
                  ".");
  KERNELS_REQUIRE(result.has_value() && !IsQuantized(*result),
                  "`out` must be float32, bfloat16 or float16, but got ",
                  TypeText(call.out), ".");
  args.query_element = *query;
  args.out_element = *result;
  const auto require_rows = [&](std::string_view name,
                                const ffi::AnyBuffer& rows,
                                ffi::DataType row_dtype, int64_t dim) {
    return shape.heads_first ? RequireArray(name, rows, row_dtype,
                                            {b, n, g, t, dim}, sized_by)
                             : RequireArray(name, rows, row_dtype,
                                            {b, t, n, g, dim}, sized_by);
  };
  KERNELS_RETURN_IF_ERROR(require_rows("q", x.q, dtype, shape.k_dim));
  KERNELS_RETURN_IF_ERROR(
      require_rows("out", call.out, call.out.element_type(), shape.v_dim));
  KERNELS_RETURN_IF_ERROR(RequireArray("lse", call.lse, ffi::DataType::F32,
                                       {b, n, g, t}, sized_by));
  if (Given(x.qv)) {
    KERNELS_RETURN_IF_ERROR(require_rows("qv", x.qv, dtype, shape.v_dim));
    args.qv = Data<uint8_t>(x.qv);
  } else {
    KERNELS_RETURN_IF_ERROR(RequireArray("qv", x.qv, ffi::DataType::F32,
                                         {0, 0, 0, 0, 0}, sized_by));
  }
  args.q = Data<uint8_t>(x.q);
  args.out = static_cast<uint8_t*>(call.out.untyped_data());
  args.lse = static_cast<float*>(call.lse.untyped_data());
  return ffi::Error::Success();
}

// Everything but the caches' pointers and the value of `first_slot`, which
// depend on where the memory is.
inline ffi::Error ReadDecode(const Call& call, DecodeArgs* decode) {
  const Operands& x = call.x;
  DecodeArgs& args = *decode;
  Options options = {};
  KERNELS_RETURN_IF_ERROR(ReadOptions(call.attributes, &options));
  const bool first = options.heads_first;
  KERNELS_RETURN_IF_ERROR(cache::ReadCaches(call.cache_k, call.cache_v, first,
                                            &args.element, &args.shape));
  const SizedBy sized_by = {call.cache_k, call.cache_v, "q", x.q, first};
  const auto dims = x.q.dimensions();
  KERNELS_REQUIRE(dims.size() == 5, "`q` must have 5 axes, but got ",
                  TypeText(x.q), ".");
  const int64_t b = dims[0];
  args.tokens = first ? dims[3] : dims[1];
  args.group = first ? dims[2] : dims[3];
  KERNELS_REQUIRE(args.shape.heads > 0 && args.group > 0,
                  "`q` must have heads, but got ", TypeText(x.q), sized_by(),
                  ".");
  args.addressing.batch = b;
  KERNELS_RETURN_IF_ERROR(ReadQueries(call, sized_by, &args));
  KERNELS_RETURN_IF_ERROR(cache::ReadAddressing(x.layer, x.table, x.first_slot,
                                                args.shape, b, options.ring,
                                                sized_by, &args.addressing));
  KERNELS_RETURN_IF_ERROR(
      cache::ReadPerSequence("index", x.index, b, sized_by, &args.index));
  KERNELS_RETURN_IF_ERROR(
      cache::ReadPerSequence("count", x.count, b, sized_by, &args.count));
  if (call.new_k != nullptr) {
    KERNELS_RETURN_IF_ERROR(
        cache::RequireNewRows(*call.new_k, *call.new_v, x.q.element_type(),
                              args.shape, b, args.tokens, sized_by));
    KERNELS_RETURN_IF_ERROR(
        cache::RequireUpdated("out_k", *call.out_k, "cache_k", call.cache_k));
    KERNELS_RETURN_IF_ERROR(
        cache::RequireUpdated("out_v", *call.out_v, "cache_v", call.cache_v));
    args.new_k = Data<uint8_t>(*call.new_k);
    args.new_v = Data<uint8_t>(*call.new_v);
  }
  KERNELS_RETURN_IF_ERROR(ReadOptional(x, options, sized_by, &args));
  Masking& masking = args.masking;
  masking.causal = options.causal;
  masking.window_left = options.window_left;
  masking.window_right = options.window_right;
  masking.chunk = options.chunk;
  masking.softcap = options.softcap;
  args.scale = options.scale;
  return ffi::Error::Success();
}

// The handler that appends and attends; `kRun` does it in a platform's context.
template <typename Context, ffi::Error (*kRun)(Context, const Call&)>
ffi::Error AppendAndAttendImpl(
    Context context, ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v,
    ffi::AnyBuffer new_k, ffi::AnyBuffer new_v, ffi::AnyBuffer q,
    ffi::AnyBuffer index, ffi::AnyBuffer count, ffi::AnyBuffer layer,
    ffi::AnyBuffer table, ffi::AnyBuffer first_slot, ffi::AnyBuffer k_scale,
    ffi::AnyBuffer v_scale, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
    ffi::AnyBuffer rope_positions, ffi::AnyBuffer padding, ffi::AnyBuffer alibi,
    ffi::AnyBuffer sinks, ffi::AnyBuffer bias, ffi::AnyBuffer mask,
    ffi::AnyBuffer qv, ffi::Result<ffi::AnyBuffer> out_k,
    ffi::Result<ffi::AnyBuffer> out_v, ffi::Result<ffi::AnyBuffer> out,
    ffi::Result<ffi::AnyBuffer> lse, ffi::RemainingRets workspace,
    const ffi::Dictionary& attributes) {
  return kRun(context, {cache_k, cache_v,
                        Operands{q, index, count, layer, table, first_slot,
                                 k_scale, v_scale, cos, sin, rope_positions,
                                 padding, alibi, sinks, bias, mask, qv},
                        &new_k, &new_v, &*out_k, &*out_v, *out, *lse, workspace,
                        attributes});
}

// The handler that attends only.
template <typename Context, ffi::Error (*kRun)(Context, const Call&)>
ffi::Error AttendImpl(
    Context context, ffi::AnyBuffer cache_k, ffi::AnyBuffer cache_v,
    ffi::AnyBuffer q, ffi::AnyBuffer index, ffi::AnyBuffer count,
    ffi::AnyBuffer layer, ffi::AnyBuffer table, ffi::AnyBuffer first_slot,
    ffi::AnyBuffer k_scale, ffi::AnyBuffer v_scale, ffi::AnyBuffer cos,
    ffi::AnyBuffer sin, ffi::AnyBuffer rope_positions, ffi::AnyBuffer padding,
    ffi::AnyBuffer alibi, ffi::AnyBuffer sinks, ffi::AnyBuffer bias,
    ffi::AnyBuffer mask, ffi::AnyBuffer qv, ffi::Result<ffi::AnyBuffer> out,
    ffi::Result<ffi::AnyBuffer> lse, ffi::RemainingRets workspace,
    const ffi::Dictionary& attributes) {
  return kRun(context, {cache_k, cache_v,
                        Operands{q, index, count, layer, table, first_slot,
                                 k_scale, v_scale, cos, sin, rope_positions,
                                 padding, alibi, sinks, bias, mask, qv},
                        nullptr, nullptr, nullptr, nullptr, *out, *lse,
                        workspace, attributes});
}

// What both calls take after the arrays that only one of them has.
template <typename Binding>
auto BindOperands(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()   // q
      .template Arg<ffi::AnyBuffer>()   // index
      .template Arg<ffi::AnyBuffer>()   // count
      .template Arg<ffi::AnyBuffer>()   // layer
      .template Arg<ffi::AnyBuffer>()   // table
      .template Arg<ffi::AnyBuffer>()   // first_slot
      .template Arg<ffi::AnyBuffer>()   // k_scale
      .template Arg<ffi::AnyBuffer>()   // v_scale
      .template Arg<ffi::AnyBuffer>()   // rope_cos
      .template Arg<ffi::AnyBuffer>()   // rope_sin
      .template Arg<ffi::AnyBuffer>()   // rope_positions
      .template Arg<ffi::AnyBuffer>()   // left_padding
      .template Arg<ffi::AnyBuffer>()   // alibi_slopes
      .template Arg<ffi::AnyBuffer>()   // sinks
      .template Arg<ffi::AnyBuffer>()   // bias
      .template Arg<ffi::AnyBuffer>()   // mask
      .template Arg<ffi::AnyBuffer>();  // qv
}

// The arrays and options of AppendAndAttendImpl, after its context.
template <typename Binding>
auto BindAppendAndAttend(Binding binding) {
  return BindOperands(std::move(binding)
                          .template Arg<ffi::AnyBuffer>()   // cache_k
                          .template Arg<ffi::AnyBuffer>()   // cache_v
                          .template Arg<ffi::AnyBuffer>()   // new_k
                          .template Arg<ffi::AnyBuffer>())  // new_v
      .template Ret<ffi::AnyBuffer>()                       // cache_k
      .template Ret<ffi::AnyBuffer>()                       // cache_v
      .template Ret<ffi::AnyBuffer>()                       // out
      .template Ret<ffi::AnyBuffer>()                       // lse
      .RemainingRets()                                      // workspace
      .Attrs();                                             // those of Options
}

// Those of AttendImpl.
template <typename Binding>
auto BindAttend(Binding binding) {
  return BindOperands(std::move(binding)
                          .template Arg<ffi::AnyBuffer>()   // cache_k
                          .template Arg<ffi::AnyBuffer>())  // cache_v
      .template Ret<ffi::AnyBuffer>()                       // out
      .template Ret<ffi::AnyBuffer>()                       // lse
      .RemainingRets()                                      // workspace
      .Attrs();                                             // those of Options
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CC_FFI_H_
