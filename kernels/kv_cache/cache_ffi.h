// From XLA FFI buffers to the plain structs of cache_layout.h. Checks
// everything that would otherwise make a kernel touch memory that is not its
// own, because a handler can be called without the Python layer.
#ifndef KERNELS_KV_CACHE_CACHE_FFI_H_
#define KERNELS_KV_CACHE_CACHE_FFI_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string_view>
#include <vector>

#include "kernels/common/ffi_util.h"
#include "kernels/kv_cache/cache_layout.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace kv_cache {

inline std::optional<Element> ElementOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return Element::kF32;
    case ffi::DataType::BF16:
      return Element::kBf16;
    case ffi::DataType::F16:
      return Element::kF16;
    case ffi::DataType::S8:
      return Element::kInt8;
    case ffi::DataType::F8E4M3FN:
      return Element::kE4m3;
    case ffi::DataType::F8E5M2:
      return Element::kE5m2;
    default:
      return std::nullopt;
  }
}

// Fails unless `buffer` has exactly these sizes.
template <typename AnyOrTypedBuffer>
ffi::Error RequireShape(std::string_view name, const AnyOrTypedBuffer& buffer,
                        std::initializer_list<int64_t> sizes) {
  const auto dims = buffer.dimensions();
  if (dims.size() != sizes.size() ||
      !std::equal(sizes.begin(), sizes.end(), dims.begin())) {
    return InvalidArgument("`", name, "` must have shape ",
                           ShapeText(std::vector<int64_t>(sizes)), ", but got ",
                           ShapeText(dims), ".");
  }
  return ffi::Error::Success();
}

// Reads element type and sizes off the caches `[..., r, s, n, h]`.
inline ffi::Error ReadCaches(const ffi::AnyBuffer& cache_k,
                             const ffi::AnyBuffer& cache_v, bool heads_first,
                             Element* element, CacheShape* shape) {
  const auto k = cache_k.dimensions();
  const auto v = cache_v.dimensions();
  KERNELS_REQUIRE(k.size() >= 4 && v.size() == k.size(),
                  "`cache_k` and `cache_v` must have 4 axes or more, but got ",
                  ShapeText(k), " and ", ShapeText(v), ".");
  const size_t lead = k.size() - 4;
  KERNELS_REQUIRE(std::equal(k.begin(), k.end() - 1, v.begin()) &&
                      cache_k.element_type() == cache_v.element_type(),
                  "`cache_k` and `cache_v` must have the same dtype and the "
                  "same shape but for the last axis, but got ",
                  DtypeName(cache_k.element_type()), ShapeText(k), " and ",
                  DtypeName(cache_v.element_type()), ShapeText(v), ".");
  const std::optional<Element> type = ElementOf(cache_k.element_type());
  KERNELS_REQUIRE(type.has_value(),
                  "`cache_k` must be float32, bfloat16, float16, int8, "
                  "float8_e4m3fn or float8_e5m2, but got ",
                  DtypeName(cache_k.element_type()), ".");
  *element = *type;
  shape->layers = DimsProduct(k, 0, lead);
  shape->blocks = k[lead];
  shape->block_size = heads_first ? k[lead + 2] : k[lead + 1];
  shape->heads = heads_first ? k[lead + 1] : k[lead + 2];
  shape->k_dim = k[lead + 3];
  shape->v_dim = v[lead + 3];
  shape->heads_first = heads_first;
  return ffi::Error::Success();
}

// Reads a number for each of `batch` sequences, or for all.
inline ffi::Error ReadPerSequence(std::string_view name,
                                  const ffi::Buffer<ffi::S32>& buffer,
                                  int64_t batch, PerSequence* out) {
  const auto dims = buffer.dimensions();
  KERNELS_REQUIRE(dims.size() == 1 && (dims[0] == batch || dims[0] == 1), "`",
                  name, "` must have shape [", batch, "] or [1], but got ",
                  ShapeText(dims), ".");
  out->data = buffer.typed_data();
  out->stride = dims[0] == 1 ? 0 : 1;
  return ffi::Error::Success();
}

// Reads the scales of `heads` of each of `batch` sequences, or of all.
inline ffi::Error ReadScales(std::string_view name,
                             const ffi::Buffer<ffi::F32>& buffer, int64_t batch,
                             int64_t heads, Scales* out) {
  const auto dims = buffer.dimensions();
  KERNELS_REQUIRE(dims.size() == 2 && (dims[0] == batch || dims[0] == 1) &&
                      (dims[1] == heads || dims[1] == 1),
                  "`", name, "` must have shape [", batch, ", ", heads,
                  "], or 1 for any of them, but got ", ShapeText(dims), ".");
  out->data = buffer.typed_data();
  out->sequence_stride = dims[0] == 1 ? 0 : dims[1];
  out->head_stride = dims[1] == 1 ? 0 : 1;
  return ffi::Error::Success();
}

// Reads what addresses the caches of `batch` sequences. Leaves out the value of
// `first_slot`, which may lie in a device's memory.
inline ffi::Error ReadAddressing(const ffi::Buffer<ffi::S32>& layer,
                                 const ffi::Buffer<ffi::S32>& table,
                                 const ffi::Buffer<ffi::S32>& first_slot,
                                 int64_t batch, int64_t ring,
                                 Addressing* addressing) {
  KERNELS_RETURN_IF_ERROR(
      ReadPerSequence("layer", layer, batch, &addressing->layer));
  const auto dims = table.dimensions();
  const bool given = dims.size() != 2 || dims[0] != 0 || dims[1] != 0;
  KERNELS_REQUIRE(!given || (dims.size() == 2 && dims[0] == batch),
                  "`table` must have shape [", batch,
                  ", m], or [0, 0] where there is none, but got ",
                  ShapeText(dims), ".");
  if (given) {
    addressing->table = table.typed_data();
    addressing->table_width = dims[1];
  }
  KERNELS_REQUIRE(first_slot.element_count() == 1,
                  "`first_slot` must be a scalar, but got ",
                  ShapeText(first_slot.dimensions()), ".");
  KERNELS_REQUIRE(ring >= 0, "`ring` must not be negative, but got ", ring,
                  ".");
  addressing->batch = batch;
  addressing->ring = ring;
  return ffi::Error::Success();
}

// XLA gives a result that aliases an operand the operand's buffer. Should it
// not, the rest of the cache still has to be there.
inline uint8_t* InPlace(const ffi::AnyBuffer& from, ffi::AnyBuffer& to) {
  if (from.untyped_data() != to.untyped_data() && from.size_bytes() > 0) {
    std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
  }
  return static_cast<uint8_t*>(to.untyped_data());
}

}  // namespace kv_cache
}  // namespace kernels

#endif  // KERNELS_KV_CACHE_CACHE_FFI_H_
