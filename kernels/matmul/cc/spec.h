// What the handlers of matmul take, the same on every platform, and checks of
// it, because a handler can be called without the Python layer.

#ifndef KERNELS_MATMUL_CC_SPEC_H_
#define KERNELS_MATMUL_CC_SPEC_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/common/ffi_util.h"
#include "kernels/matmul/cc/geometry.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::matmul {

// Rows that the kernel takes at once, so that a group begins where it does.
inline constexpr int64_t kGroupUnit = 4;

// Adds operands, attributes and results to what a platform's handler takes
// first.
template <typename Binding>
auto MultiplySpec(Binding binding) {
  return std::move(binding)
      .Attrs()                          // batch_axes
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // w, or its transpose
      .RemainingArgs()                  // bias
      .template Ret<ffi::AnyBuffer>();  // y
}

template <typename Binding>
auto MultiplyPackedSpec(Binding binding) {
  return std::move(binding)
      .Attrs()                          // batch_axes
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // values
      .template Arg<ffi::AnyBuffer>()   // scale
      .RemainingArgs()                  // minimum, of 4 bits alone; bias
      .template Ret<ffi::AnyBuffer>();  // y
}

inline ffi::Error RequireElement(std::string_view name,
                                 const ffi::AnyBuffer& array) {
  switch (array.element_type()) {
    case ffi::DataType::F32:
    case ffi::DataType::BF16:
    case ffi::DataType::F16:
      return ffi::Error::Success();
    default:
      return InvalidArgument("`", name,
                             "` must be float32, bfloat16 or float16, but got ",
                             TypeText(array), ".");
  }
}

// What the arrays of a call must be like.
class Product {
 public:
  Product(const ffi::AnyBuffer& x, std::string_view w_name,
          const ffi::AnyBuffer& w, bool transposed = false)
      : x_(x), w_name_(w_name), w_(w), transposed_(transposed) {}

  // What decides that, for an error.
  std::string operator()() const {
    return StrCat(" to go with `x` ", TypeText(x_), ", `", w_name_, "` ",
                  TypeText(w_), " and `batch_axes` ", batch_axes_);
  }

  // Reads the attribute and checks the weights, `packed` rows of which are one
  // of the array, and x.
  ffi::Error Read(const ffi::Dictionary& attributes, int64_t packed) {
    KERNELS_RETURN_IF_ERROR(
        ReadAttributes(attributes, Attribute("batch_axes", &batch_axes_)));
    const auto dims = x_.dimensions();
    const auto rank = static_cast<int64_t>(dims.size());
    KERNELS_REQUIRE(0 <= batch_axes_ && batch_axes_ < rank,
                    "`batch_axes` must lie in [0, ", rank, ") for `x` ",
                    TypeText(x_), ", but got ", batch_axes_, ".");
    KERNELS_RETURN_IF_ERROR(RequireElement("x", x_));
    const auto w_dims = w_.dimensions();
    const int64_t k = dims[rank - 1];
    batch_.assign(dims.begin(), dims.begin() + batch_axes_);
    std::vector<int64_t> sizes = batch_;
    const bool fits = static_cast<int64_t>(w_dims.size()) == batch_axes_ + 2;
    const int64_t n = fits ? w_dims[batch_axes_ + (transposed_ ? 0 : 1)] : 1;
    if (transposed_) sizes.push_back(n);
    sizes.push_back(k / packed);
    if (!transposed_) sizes.push_back(n);
    const std::string rows =
        packed == 1 ? std::string("k") : StrCat("k / ", packed);
    KERNELS_REQUIRE(fits && SameShape(w_dims, sizes) && k % packed == 0, "`",
                    w_name_, "` must have shape [batch axes..., ",
                    transposed_ ? "n, k" : StrCat(rows, ", n"), "]", (*this)(),
                    ".");
    geometry_ = {DimsProduct(dims, 0, batch_axes_),
                 DimsProduct(dims, batch_axes_, rank - 1), k, n};
    return ffi::Error::Success();
  }

  ffi::Error RequireResult(const ffi::AnyBuffer& y) const {
    KERNELS_RETURN_IF_ERROR(RequireElement("y", y));
    const auto dims = x_.dimensions();
    std::vector<int64_t> sizes(dims.begin(), dims.end());
    sizes.back() = geometry_.n;
    return RequireArray("y", y, y.element_type(), sizes, *this);
  }

  ffi::Error RequireBias(const ffi::AnyBuffer& bias) const {
    KERNELS_RETURN_IF_ERROR(RequireElement("bias", bias));
    std::vector<int64_t> sizes = batch_;
    sizes.push_back(geometry_.n);
    return RequireArray("bias", bias, bias.element_type(), sizes, *this);
  }

  // A row for each group of rows of the weights, a whole number of `packed`.
  ffi::Error RequireScale(const ffi::AnyBuffer& scale, int64_t packed,
                          int64_t* group) const {
    const auto dims = scale.dimensions();
    const int64_t groups = static_cast<int64_t>(dims.size()) == batch_axes_ + 2
                               ? dims[batch_axes_]
                               : 0;
    KERNELS_RETURN_IF_ERROR(RequireOfGroups("scale", scale, groups));
    KERNELS_REQUIRE(groups > 0 && geometry_.k >= groups &&
                        geometry_.k % (groups * packed) == 0,
                    "`scale` must have a row for each group of ",
                    packed == 1 ? "" : StrCat("a multiple of ", packed, " "),
                    "rows", (*this)(), ", but got ", TypeText(scale), ".");
    *group = geometry_.k / groups;
    KERNELS_REQUIRE(groups == 1 || *group % kGroupUnit == 0,
                    "Groups must be of a multiple of ", kGroupUnit,
                    " rows, or one of all rows", (*this)(), ", but are of ",
                    *group, ".");
    return ffi::Error::Success();
  }

  ffi::Error RequireOfGroups(std::string_view name, const ffi::AnyBuffer& array,
                             int64_t groups) const {
    std::vector<int64_t> sizes = batch_;
    sizes.insert(sizes.end(), {groups, geometry_.n});
    return RequireArray(name, array, ffi::DataType::BF16, sizes, *this);
  }

  const Geometry& geometry() const { return geometry_; }

 private:
  const ffi::AnyBuffer& x_;
  const std::string_view w_name_;
  const ffi::AnyBuffer& w_;
  const bool transposed_;
  int64_t batch_axes_ = 0;
  std::vector<int64_t> batch_;
  Geometry geometry_{};
};

// Each checks what the spec of its name binds and calls
// body(geometry, bias) with null for no bias, or body(geometry, group, minimum,
// bias).
template <typename Body>
ffi::Error CheckMultiply(const ffi::Dictionary& attributes,
                         const ffi::AnyBuffer& x, const ffi::AnyBuffer& w,
                         ffi::RemainingArgs rest, const ffi::AnyBuffer& y,
                         bool transposed, Body&& body) {
  Product product(x, "w", w, transposed);
  KERNELS_RETURN_IF_ERROR(product.Read(attributes, 1));
  KERNELS_RETURN_IF_ERROR(RequireElement("w", w));
  KERNELS_RETURN_IF_ERROR(product.RequireResult(y));
  KERNELS_REQUIRE(rest.size() <= 1,
                  "At most one `bias` must be given, but got ", rest.size(),
                  " more operands.");
  if (rest.size() == 0) return body(product.geometry(), nullptr);
  const auto bias = rest.get<ffi::AnyBuffer>(0);
  if (bias.has_error()) return bias.error();
  KERNELS_RETURN_IF_ERROR(product.RequireBias(*bias));
  return body(product.geometry(), &*bias);
}

template <typename Body>
ffi::Error CheckMultiplyPacked(const ffi::Dictionary& attributes,
                               const ffi::AnyBuffer& x,
                               const ffi::AnyBuffer& values,
                               const ffi::AnyBuffer& scale,
                               ffi::RemainingArgs rest, const ffi::AnyBuffer& y,
                               Body&& body) {
  const ffi::DataType dtype = values.element_type();
  KERNELS_REQUIRE(
      dtype == ffi::DataType::S8 || dtype == ffi::DataType::F8E4M3FN ||
          dtype == ffi::DataType::U32,
      "`values` must be int8, float8_e4m3fn, or uint32 with eight numbers of 4 "
      "bits, but got ",
      TypeText(values), ".");
  const bool has_minimum = dtype == ffi::DataType::U32;
  const int64_t packed = has_minimum ? 8 : 1;
  Product product(x, "values", values);
  int64_t group = 0;
  KERNELS_RETURN_IF_ERROR(product.Read(attributes, packed));
  KERNELS_RETURN_IF_ERROR(product.RequireScale(scale, packed, &group));
  KERNELS_RETURN_IF_ERROR(product.RequireResult(y));
  const size_t needed = has_minimum ? 1 : 0;
  KERNELS_REQUIRE(needed <= rest.size() && rest.size() <= needed + 1,
                  has_minimum ? "`minimum`, and perhaps " : "At most one ",
                  "`bias` must be given, but got ", rest.size(),
                  " more operands.");
  const auto body_with_bias = [&](const ffi::AnyBuffer* minimum) -> ffi::Error {
    if (rest.size() == needed) {
      return body(product.geometry(), group, minimum, nullptr);
    }
    const auto bias = rest.get<ffi::AnyBuffer>(needed);
    if (bias.has_error()) return bias.error();
    KERNELS_RETURN_IF_ERROR(product.RequireBias(*bias));
    return body(product.geometry(), group, minimum, &*bias);
  };
  if (!has_minimum) return body_with_bias(nullptr);
  const auto minimum = rest.get<ffi::AnyBuffer>(0);
  if (minimum.has_error()) return minimum.error();
  KERNELS_RETURN_IF_ERROR(product.RequireOfGroups(
      "minimum", *minimum, product.geometry().k / group));
  return body_with_bias(&*minimum);
}

}  // namespace kernels::matmul

#endif  // KERNELS_MATMUL_CC_SPEC_H_
