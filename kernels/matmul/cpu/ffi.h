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

}  // namespace kernels::matmul

#endif  // KERNELS_MATMUL_CPU_FFI_H_
