// XLA FFI handlers of batch_stat for the platform "cpu".
//
// Common attributes: `feature_axis`, the axis of x that the statistics keep;
// `batch_axes`, how many leading axes of x are independent batches (the
// statistics keep them too). An optional last operand is the mask, bool, of x's
// shape but for a feature axis that may be 1. `momentum` is a number for each
// of those batches.

#ifndef KERNELS_BATCH_STAT_CPU_FFI_H_
#define KERNELS_BATCH_STAT_CPU_FFI_H_

#include "xla/ffi/api/ffi.h"

namespace kernels::batch_stat {

// (mean, var, momentum, x[, mask]) -> (mean, var, batch mean, batch var)
XLA_FFI_DECLARE_HANDLER_SYMBOL(BatchStatUpdate);
// (mean, var, momentum, scale, x[, mask])
//     -> (mean, var, batch mean, batch var, count, rstd, mul)
// where rstd = 1 / sqrt(batch var + `epsilon`), mul = scale * rstd
XLA_FFI_DECLARE_HANDLER_SYMBOL(BatchStatTrain);
// (x[, mask]) -> (mean, var, count)
XLA_FFI_DECLARE_HANDLER_SYMBOL(BatchStatMoments);
// (x, mean, mul, bias) -> y
XLA_FFI_DECLARE_HANDLER_SYMBOL(BatchStatNormalize);
// (x, dy, mean, mul, bias, rstd, count) -> (sum dy, dscale, c0, c1)
// where dscale = rstd * sum(dy * (x - mean)), c0 = -mul * sum(dy) / count and
// c1 = -mul * rstd * dscale / count; a count of 0 is taken for 1
XLA_FFI_DECLARE_HANDLER_SYMBOL(BatchStatGradSums);
// (x, dy, mean, mul, bias, c0, c1[, mask]) -> dx
XLA_FFI_DECLARE_HANDLER_SYMBOL(BatchStatGradInput);

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_CPU_FFI_H_
