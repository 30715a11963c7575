// Batch-norm loops on the CPU, on plain pointers.
//
// T is the element type of x and dx, U that of y and dy. Arrays are as
// geometry.h says.
//
// Results do not depend on the number of threads: the work is cut by shape
// alone, and partial results are combined in a fixed order.

#ifndef KERNELS_BATCH_STAT_CPU_BATCH_STAT_H_
#define KERNELS_BATCH_STAT_CPU_BATCH_STAT_H_

#include <cstdint>

#include "kernels/batch_stat/cc/geometry.h"
#include "kernels/common/cpu_features.h"
#include "kernels/common/element_types.h"
#include "kernels/common/parallel_for.h"

namespace kernels::batch_stat {

// Mean, biased variance and number of values of each channel; a channel
// without values gets NaN, NaN and 0. With `accurate`, the variance comes from
// a second pass over x about the mean that the first one found.
template <typename T>
void Moments(const ParallelLoop& loop, SimdLevel level,
             const Geometry& geometry, const typename T::Storage* x,
             const Mask& mask, bool accurate, typename T::Compute* mean,
             typename T::Compute* var, typename T::Compute* count);

// y = (x - mean) * mul + bias; with `relu`, not below 0.
template <typename T, typename U>
void NormalizeAll(const ParallelLoop& loop, SimdLevel level,
                  const Geometry& geometry, const typename T::Storage* x,
                  const typename T::Compute* mean,
                  const typename T::Compute* mul,
                  const typename T::Compute* bias, bool relu,
                  typename U::Storage* y);

// sum_dy = sum of dy, sum_dyx = sum of dy * (x - mean); with `relu`, over the
// positions where NormalizeAll gives a positive value.
template <typename T, typename U>
void GradSums(const ParallelLoop& loop, SimdLevel level,
              const Geometry& geometry, const typename T::Storage* x,
              const typename U::Storage* dy, const typename T::Compute* mean,
              const typename T::Compute* mul, const typename T::Compute* bias,
              bool relu, typename T::Compute* sum_dy,
              typename T::Compute* sum_dyx);

// dx = mul * dy + kept * (c0 + c1 * (x - mean)), where kept is what the mask
// says; dy is gated as in GradSums.
template <typename T, typename U>
void GradInputAll(const ParallelLoop& loop, SimdLevel level,
                  const Geometry& geometry, const typename T::Storage* x,
                  const typename U::Storage* dy,
                  const typename T::Compute* mean,
                  const typename T::Compute* mul,
                  const typename T::Compute* bias,
                  const typename T::Compute* c0, const typename T::Compute* c1,
                  const Mask& mask, bool relu, typename T::Storage* dx);

// blended = momentum * old + (1 - momentum) * batch, which may be in place.
template <typename A>
void Blend(SimdLevel level, A momentum, const A* old, const A* batch,
           int64_t channels, A* blended);

// rstd = 1 / sqrt(var + epsilon) and mul = scale * rstd.
template <typename A>
void Factors(SimdLevel level, const A* var, const A* scale, A epsilon,
             int64_t channels, A* rstd, A* mul);

// From the sums of GradSums, sum_dyx in `dscale`, to the gradient of the scale,
// sum_dyx * rstd, and the factors of GradInputAll: with share = -mul / count,
// or -mul without any value, c0 = share * sum_dy and c1 = share * rstd *
// dscale.
template <typename A>
void GradFactors(SimdLevel level, const A* mul, const A* rstd, const A* count,
                 const A* sum_dy, int64_t channels, A* dscale, A* c0, A* c1);

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_CPU_BATCH_STAT_H_
