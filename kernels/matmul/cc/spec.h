// What the handlers of matmul take, the same on every platform, and checks of
// it, because a handler can be called without the Python layer.

#ifndef KERNELS_MATMUL_CC_SPEC_H_
#define KERNELS_MATMUL_CC_SPEC_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/common/ffi_util.h"
#include "kernels/matmul/cc/geometry.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::matmul {

// Adds operands, attributes and results to what a platform's handler takes
// first.
template <typename Binding>
auto MultiplySpec(Binding binding) {
  return std::move(binding)
      .Attrs()                          // batch_axes
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // w
      .RemainingArgs()                  // bias
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

// Checks what MultiplySpec binds; `has_bias` says whether there is one, which
// is then in `bias`.
inline ffi::Error CheckMultiply(const ffi::Dictionary& attributes,
                                const ffi::AnyBuffer& x,
                                const ffi::AnyBuffer& w,
                                ffi::RemainingArgs rest,
                                const ffi::AnyBuffer& y, Geometry* geometry,
                                bool* has_bias, ffi::AnyBuffer* bias) {
  int64_t batch_axes = 0;
  KERNELS_RETURN_IF_ERROR(
      ReadAttributes(attributes, Attribute("batch_axes", &batch_axes)));
  const auto dims = x.dimensions();
  const auto rank = static_cast<int64_t>(dims.size());
  KERNELS_REQUIRE(0 <= batch_axes && batch_axes < rank,
                  "`batch_axes` must lie in [0, ", rank, ") for `x` ",
                  TypeText(x), ", but got ", batch_axes, ".");
  const auto context = [&] {
    return StrCat(" to go with `x` ", TypeText(x), ", `w` ", TypeText(w),
                  " and `batch_axes` ", batch_axes);
  };
  const auto w_dims = w.dimensions();
  KERNELS_REQUIRE(static_cast<int64_t>(w_dims.size()) == batch_axes + 2,
                  "`w` must have ", batch_axes + 2, " axes", context(), ".");
  const int64_t k = dims[rank - 1], n = w_dims[batch_axes + 1];
  KERNELS_RETURN_IF_ERROR(RequireElement("x", x));
  KERNELS_RETURN_IF_ERROR(RequireElement("w", w));
  KERNELS_RETURN_IF_ERROR(RequireElement("y", y));
  const std::vector<int64_t> batch(dims.begin(), dims.begin() + batch_axes);
  std::vector<int64_t> sizes = batch;
  sizes.insert(sizes.end(), {k, n});
  KERNELS_RETURN_IF_ERROR(
      RequireArray("w", w, w.element_type(), sizes, context));
  sizes.assign(dims.begin(), dims.end());
  sizes.back() = n;
  KERNELS_RETURN_IF_ERROR(
      RequireArray("y", y, y.element_type(), sizes, context));
  KERNELS_REQUIRE(rest.size() <= 1,
                  "At most one `bias` must be given, but got ", rest.size(),
                  " more operands.");
  *has_bias = rest.size() == 1;
  if (*has_bias) {
    const auto given = rest.get<ffi::AnyBuffer>(0);
    if (given.has_error()) return given.error();
    KERNELS_RETURN_IF_ERROR(RequireElement("bias", *given));
    sizes = batch;
    sizes.push_back(n);
    KERNELS_RETURN_IF_ERROR(
        RequireArray("bias", *given, given->element_type(), sizes, context));
    *bias = *given;
  }
  *geometry = {DimsProduct(dims, 0, batch_axes),
               DimsProduct(dims, batch_axes, rank - 1), k, n};
  return ffi::Error::Success();
}

}  // namespace kernels::matmul

#endif  // KERNELS_MATMUL_CC_SPEC_H_
