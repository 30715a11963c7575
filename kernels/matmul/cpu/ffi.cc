#include "kernels/matmul/cpu/ffi.h"

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

ffi::Error MatmulMultiplyImpl(ffi::ThreadPool pool,
                              const ffi::Dictionary& attributes,
                              ffi::AnyBuffer x, ffi::AnyBuffer w,
                              ffi::RemainingArgs rest,
                              ffi::Result<ffi::AnyBuffer> y) {
  const WithSubnormals subnormals;
  Geometry geometry;
  bool has_bias;
  ffi::AnyBuffer bias = w;
  KERNELS_RETURN_IF_ERROR(
      CheckMultiply(attributes, x, w, rest, *y, &geometry, &has_bias, &bias));
  Multiply(MakeParallelLoop(pool), CurrentSimdLevel(), geometry, ArrayOf(x),
           ArrayOf(w), has_bias ? ArrayOf(bias) : ConstArray{},
           {y->untyped_data(), ElementOf(*y)});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    MatmulMultiply, MatmulMultiplyImpl,
    MultiplySpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace kernels::matmul
