// From XLA FFI buffers to the plain structs of layout.h. Checks
// everything that would otherwise make a kernel touch memory that is not its
// own, because a handler can be called without the Python layer.
#ifndef KERNELS_CACHE_CC_FFI_H_
#define KERNELS_CACHE_CC_FFI_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/ffi_util.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace cache {

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

// The arrays that the sizes of a call are read off: with what the others are
// compared, for errors.
struct SizedBy {
  const ffi::AnyBuffer& cache_k;
  const ffi::AnyBuffer& cache_v;
  std::string_view rows_name;  // new_k or q
  const ffi::AnyBuffer& rows;
  bool heads_first;

  std::string operator()() const {
    return StrCat(" to go with `cache_k` ", TypeText(cache_k), ", `cache_v` ",
                  TypeText(cache_v), ", `", rows_name, "` ", TypeText(rows),
                  " and `heads_first` ", heads_first ? "true" : "false");
  }
};

// Whether an operand that may be left out is there.
inline bool Given(const ffi::AnyBuffer& array) {
  const auto dims = array.dimensions();
  return std::any_of(dims.begin(), dims.end(),
                     [](int64_t size) { return size != 0; });
}

template <typename T>
const T* Data(const ffi::AnyBuffer& array) {
  return static_cast<const T*>(array.untyped_data());
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

// Checks that a result is like the cache that it takes the place of.
inline ffi::Error RequireUpdated(std::string_view name,
                                 const ffi::AnyBuffer& updated,
                                 std::string_view cache_name,
                                 const ffi::AnyBuffer& cache) {
  return RequireArray(name, updated, cache.element_type(), cache.dimensions(),
                      [&] { return StrCat(" like `", cache_name, "`"); });
}

// Reads a number for each of `batch` sequences, or for all.
inline ffi::Error ReadPerSequence(std::string_view name,
                                  const ffi::AnyBuffer& array, int64_t batch,
                                  const SizedBy& sized_by, PerSequence* out) {
  const bool shared = SameShape(array.dimensions(), std::vector<int64_t>{1});
  KERNELS_RETURN_IF_ERROR(RequireArray(name, array, ffi::DataType::S32,
                                       {shared ? 1 : batch}, sized_by));
  out->data = Data<int32_t>(array);
  out->stride = shared ? 0 : 1;
  return ffi::Error::Success();
}

// Reads the scales of `heads` of each of `batch` sequences, or of all; there
// must be none where nothing is quantised.
inline ffi::Error ReadScales(std::string_view name, const ffi::AnyBuffer& array,
                             bool quantized, int64_t batch, int64_t heads,
                             const SizedBy& sized_by, Scales* out) {
  if (!quantized) {
    return RequireArray(name, array, ffi::DataType::F32, {0, 0}, sized_by);
  }
  const auto dims = array.dimensions();
  const bool of_all = dims.size() == 2 && dims[0] == 1;
  const bool of_heads = dims.size() == 2 && dims[1] == 1;
  KERNELS_RETURN_IF_ERROR(
      RequireArray(name, array, ffi::DataType::F32,
                   {of_all ? 1 : batch, of_heads ? 1 : heads}, sized_by));
  out->data = Data<float>(array);
  out->sequence_stride = of_all ? 0 : dims[1];
  out->head_stride = of_heads ? 0 : 1;
  return ffi::Error::Success();
}

// Reads what addresses the caches of `batch` sequences. Leaves out the value of
// `first_slot`, which may lie in a device's memory.
inline ffi::Error ReadAddressing(const ffi::AnyBuffer& layer,
                                 const ffi::AnyBuffer& table,
                                 const ffi::AnyBuffer& first_slot,
                                 const CacheShape& shape, int64_t batch,
                                 int64_t ring, const SizedBy& sized_by,
                                 Addressing* addressing) {
  KERNELS_RETURN_IF_ERROR(
      ReadPerSequence("layer", layer, batch, sized_by, &addressing->layer));
  const auto dims = table.dimensions();
  const bool given = dims.size() != 2 || Given(table);
  KERNELS_RETURN_IF_ERROR(RequireArray(
      "table", table, ffi::DataType::S32,
      {given ? batch : 0, dims.size() == 2 ? dims[1] : 1}, sized_by));
  KERNELS_REQUIRE(given || batch == 0 || batch == shape.blocks,
                  "`table` must not be empty where `cache_k` has ",
                  shape.blocks, " rows for ", batch, " sequences", sized_by(),
                  ".");
  if (given) {
    addressing->table = Data<int32_t>(table);
    addressing->table_width = dims[1];
  }
  KERNELS_RETURN_IF_ERROR(
      RequireArray("first_slot", first_slot, ffi::DataType::S32,
                   std::initializer_list<int64_t>{}, sized_by));
  const int64_t slots = addressing->table_width * shape.block_size;
  KERNELS_REQUIRE(ring >= 0, "`ring` must not be negative, but got ", ring,
                  ".");
  KERNELS_REQUIRE(ring == 0 || ring >= std::max<int64_t>(slots, 1),
                  "`ring` must be 0, or at least ", slots,
                  ", the slots of a sequence", sized_by(), ", but got ", ring,
                  ".");
  addressing->batch = batch;
  addressing->ring = ring;
  return ffi::Error::Success();
}

// XLA gives a result that aliases an operand the operand's buffer. Should it
// not, the rest of the cache still has to be there.
inline uint8_t* InPlace(const ffi::AnyBuffer& from, const ffi::AnyBuffer& to) {
  if (from.untyped_data() != to.untyped_data() && from.size_bytes() > 0) {
    std::memcpy(to.untyped_data(), from.untyped_data(), from.size_bytes());
  }
  return static_cast<uint8_t*>(to.untyped_data());
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CC_FFI_H_
