// Helpers for XLA FFI handlers: errors that are sentences, and dtype dispatch.

#ifndef KERNELS_COMMON_FFI_UTIL_H_
#define KERNELS_COMMON_FFI_UTIL_H_

#include <cstdint>
#include <sstream>
#include <string>
#include <string_view>

#include "kernels/common/element_types.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {

namespace ffi = ::xla::ffi;

// Joins its arguments into one string: StrCat("`n` is ", 3).
template <typename... Args>
std::string StrCat(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// An InvalidArgument error with the joined sentence. State what must hold, then
// what was given, then what to do.
template <typename... Args>
ffi::Error InvalidArgument(const Args&... args) {
  return ffi::Error::InvalidArgument(StrCat(args...));
}

// "float32[2, 3]"-like text of a shape: "[2, 3]".
template <typename Dims>
std::string ShapeText(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    text += StrCat(i ? ", " : "", dims[i]);
  }
  return text + "]";
}

inline std::string_view DtypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case ffi::DataType::F8E5M2:
      return "float8_e5m2";
    case ffi::DataType::S64:
      return "int64";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S8:
      return "int8";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::PRED:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

// Product of dims[begin, end).
template <typename Dims>
int64_t DimsProduct(const Dims& dims, int64_t begin, int64_t end) {
  int64_t product = 1;
  for (int64_t i = begin; i < end; ++i) product *= dims[i];
  return product;
}

// Calls `body(tag)` with the tag of element_types.h for `dtype`
// and returns its ffi::Error; for another dtype, an error that names `what`.
template <typename Body>
ffi::Error DispatchFloat(ffi::DataType dtype, std::string_view what,
                         Body&& body) {
  switch (dtype) {
    case ffi::DataType::F64:
      return body(F64{});
    case ffi::DataType::F32:
      return body(F32{});
    case ffi::DataType::BF16:
      return body(BF16{});
    case ffi::DataType::F16:
      return body(F16{});
    default:
      return InvalidArgument("`", what,
                             "` must be float64, float32, bfloat16 or float16, "
                             "but got ",
                             DtypeName(dtype), ".");
  }
}

}  // namespace kernels

// Returns from the enclosing handler with InvalidArgument(...) unless
// `condition` holds.
#define KERNELS_REQUIRE(condition, ...)               \
  do {                                                \
    if (!(condition)) {                               \
      return ::kernels::InvalidArgument(__VA_ARGS__); \
    }                                                 \
  } while (false)

// Returns from the enclosing handler if `expression` is an error.
#define KERNELS_RETURN_IF_ERROR(expression)        \
  do {                                             \
    const ::xla::ffi::Error error_ = (expression); \
    if (error_.failure()) return error_;           \
  } while (false)

#endif  // KERNELS_COMMON_FFI_UTIL_H_
