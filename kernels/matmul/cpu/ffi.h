// XLA FFI handlers of matmul for the platform "cpu".
//
// Common attribute: `batch_axes`, how many leading axes of all arrays are
// independent products.

#ifndef KERNELS_MATMUL_CPU_FFI_H_
#define KERNELS_MATMUL_CPU_FFI_H_

#include "xla/ffi/api/ffi.h"

namespace kernels::matmul {

// (x, w[, bias]) -> x @ w + bias
XLA_FFI_DECLARE_HANDLER_SYMBOL(MatmulMultiply);
// (x, w[, bias]) -> x @ w^T + bias
XLA_FFI_DECLARE_HANDLER_SYMBOL(MatmulMultiplyTransposed);
// (x, values, scale[, minimum][, bias]) -> x @ (values * scale + minimum) +
// bias where values are int8 or float8_e4m3fn [k, n], without a minimum, or
// uint32 [k / 8, n] of eight numbers each; scale and minimum are bfloat16 with
// a row for each group of rows.
XLA_FFI_DECLARE_HANDLER_SYMBOL(MatmulMultiplyPacked);

}  // namespace kernels::matmul

#endif  // KERNELS_MATMUL_CPU_FFI_H_
