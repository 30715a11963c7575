#include "kernels/matmul/cpu/ffi.h"

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/subnormals.h"
#include "kernels/matmul/cc/geometry.h"
#include "kernels/matmul/cc/spec.h"
#include "kernels/matmul/cpu/matmul.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::matmul {
namespace {

Element ElementOf(const ffi::AnyBuffer& array) {
  switch (array.element_type()) {
    case ffi::DataType::BF16:
      return Element::kBF16;
    case ffi::DataType::F16:
      return Element::kF16;
    default:
      return Element::kF32;
  }
}

ConstArray ArrayOf(const ffi::AnyBuffer& array) {
  return {array.untyped_data(), ElementOf(array)};
}

Format FormatOf(const ffi::AnyBuffer& weights) {
  switch (weights.element_type()) {
    case ffi::DataType::S8:
      return Format::kInt8;
    case ffi::DataType::F8E4M3FN:
      return Format::kE4M3;
    case ffi::DataType::U32:
      return Format::kInt4;
    case ffi::DataType::BF16:
      return Format::kBF16;
    case ffi::DataType::F16:
      return Format::kF16;
    default:
      return Format::kF32;
  }
}

ffi::Error Run(ffi::ThreadPool& pool, const Geometry& geometry,
               const ffi::AnyBuffer& x, const Weights& w,
               const ffi::AnyBuffer* bias, const ffi::AnyBuffer& y) {
  Multiply(MakeParallelLoop(pool), CurrentSimdLevel(), geometry, ArrayOf(x), w,
           bias == nullptr ? ConstArray{} : ArrayOf(*bias),
           {y.untyped_data(), ElementOf(y)});
  return ffi::Error::Success();
}

template <bool kTransposed>
ffi::Error MatmulMultiplyImpl(ffi::ThreadPool pool,
                              const ffi::Dictionary& attributes,
                              ffi::AnyBuffer x, ffi::AnyBuffer w,
                              ffi::RemainingArgs rest,
                              ffi::Result<ffi::AnyBuffer> y) {
  const WithSubnormals subnormals;
  return CheckMultiply(
      attributes, x, w, rest, *y, kTransposed,
      [&](const Geometry& geometry, const ffi::AnyBuffer* bias) {
        Weights weights;
        weights.data = w.untyped_data();
        weights.format = FormatOf(w);
        weights.transposed = kTransposed;
        return Run(pool, geometry, x, weights, bias, *y);
      });
}

ffi::Error MatmulMultiplyPackedImpl(ffi::ThreadPool pool,
                                    const ffi::Dictionary& attributes,
                                    ffi::AnyBuffer x, ffi::AnyBuffer values,
                                    ffi::AnyBuffer scale,
                                    ffi::RemainingArgs rest,
                                    ffi::Result<ffi::AnyBuffer> y) {
  const WithSubnormals subnormals;
  return CheckMultiplyPacked(
      attributes, x, values, scale, rest, *y,
      [&](const Geometry& geometry, int64_t group,
          const ffi::AnyBuffer* minimum, const ffi::AnyBuffer* bias) {
        Weights weights;
        weights.data = values.untyped_data();
        weights.format = FormatOf(values);
        weights.scale = static_cast<const uint16_t*>(scale.untyped_data());
        if (minimum != nullptr) {
          weights.minimum =
              static_cast<const uint16_t*>(minimum->untyped_data());
        }
        weights.group = group;
        return Run(pool, geometry, x, weights, bias, *y);
      });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MatmulMultiply, MatmulMultiplyImpl<false>,
    MultiplySpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MatmulMultiplyTransposed, MatmulMultiplyImpl<true>,
    MultiplySpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MatmulMultiplyPacked, MatmulMultiplyPackedImpl,
    MultiplyPackedSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace kernels::matmul
