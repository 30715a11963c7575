// Helpers for XLA FFI handlers: errors that are sentences, and dtype dispatch.

#ifndef KERNELS_COMMON_FFI_UTIL_H_
#define KERNELS_COMMON_FFI_UTIL_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

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

// Text of a shape: "[2, 3]".
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
    case ffi::DataType::C64:
      return "complex64";
    case ffi::DataType::C128:
      return "complex128";
    case ffi::DataType::S64:
      return "int64";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S16:
      return "int16";
    case ffi::DataType::S8:
      return "int8";
    case ffi::DataType::U64:
      return "uint64";
    case ffi::DataType::U32:
      return "uint32";
    case ffi::DataType::U16:
      return "uint16";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::PRED:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

// Text of an array's type: "float32[2, 3]".
inline std::string TypeText(const ffi::AnyBuffer& array) {
  return StrCat(DtypeName(array.element_type()), ShapeText(array.dimensions()));
}

// Everything that a handler is called with is compared with what it must be
// before any of it is used: XLA passes on what a program says, and a program
// need not come from our Python layer. A specification reads attributes by
// ReadAttributes, and then arrays by RequireArray or the like of it.
// `context()` is text that follows what an array must be: the types of the
// arrays that say so, of which it may be that they are the wrong ones.

template <typename Dims, typename Sizes>
bool SameShape(const Dims& dims, const Sizes& sizes) {
  return dims.size() == sizes.size() &&
         std::equal(sizes.begin(), sizes.end(), dims.begin());
}

template <typename Sizes>
bool IsArray(const ffi::AnyBuffer& array, ffi::DataType dtype,
             const Sizes& sizes) {
  return array.element_type() == dtype && SameShape(array.dimensions(), sizes);
}

template <typename Sizes, typename Context>
ffi::Error RequireArray(std::string_view name, const ffi::AnyBuffer& array,
                        ffi::DataType dtype, const Sizes& sizes,
                        const Context& context) {
  if (IsArray(array, dtype, sizes)) return ffi::Error::Success();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end());
  return InvalidArgument(
      "`", name, "` must ",
      shape.empty() ? "be a scalar" : "have shape " + ShapeText(shape), " of ",
      DtypeName(dtype), context(), ", but got ", TypeText(array), ".");
}

template <typename Context>
ffi::Error RequireArray(std::string_view name, const ffi::AnyBuffer& array,
                        ffi::DataType dtype,
                        std::initializer_list<int64_t> sizes,
                        const Context& context) {
  return RequireArray<std::initializer_list<int64_t>, Context>(
      name, array, dtype, sizes, context);
}

// Where to put the attribute `name`.
template <typename T>
struct Attribute {
  static_assert(std::is_same_v<T, bool> || std::is_same_v<T, int64_t> ||
                std::is_same_v<T, float> || std::is_same_v<T, double>);
  Attribute(std::string_view attribute_name, T* to)
      : name(attribute_name), value(to) {}
  std::string_view name;
  T* value;
};

template <typename T>
ffi::Error ReadAttribute(const ffi::Dictionary& given,
                         const Attribute<T>& wanted) {
  const ffi::ErrorOr<T> value = given.get<T>(wanted.name);
  if (value.has_value()) {
    *wanted.value = *value;
    return ffi::Error::Success();
  }
  return InvalidArgument("The attribute `", wanted.name,
                         "` must be a scalar of ",
                         std::is_same_v<T, bool>      ? "bool"
                         : std::is_same_v<T, int64_t> ? "int64"
                         : std::is_same_v<T, float>   ? "float32"
                                                      : "float64",
                         given.contains(wanted.name) ? ", but has another type."
                                                     : ", but is not there.");
}

// Reads all attributes of a call; another one is an error.
template <typename... T>
ffi::Error ReadAttributes(const ffi::Dictionary& given,
                          const Attribute<T>&... wanted) {
  ffi::Error error = ffi::Error::Success();
  const bool read =
      ((error = ReadAttribute(given, wanted), error.success()) && ...);
  if (!read) return error;
  if (given.size() == sizeof...(T)) return error;
  for (const std::string_view name : given) {
    if (((name != wanted.name) && ...)) {
      return InvalidArgument("There is no attribute `", name, "`.");
    }
  }
  return InvalidArgument("An attribute must not be given twice.");
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
