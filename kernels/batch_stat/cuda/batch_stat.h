// Batch-norm kernels for CUDA, on plain pointers to device memory.
//
// T is the element type of x and dx, U that of y and dy: float64 and float32
// with themselves, bfloat16 and float16 with themselves or float32. Arrays are
// as geometry.h says.
//
// Sums are cut into `splits` parts by the shape of x alone and combined in a
// fixed order, so that results repeat to the bit and do not depend on the
// device. The parts meet in `workspace`: nothing is allocated here.

#ifndef KERNELS_BATCH_STAT_CUDA_BATCH_STAT_H_
#define KERNELS_BATCH_STAT_CUDA_BATCH_STAT_H_

#include <cstdint>

#include "kernels/batch_stat/cc/geometry.h"

#if !defined(KERNELS_CUDA_EMULATION)
#include <cuda_runtime_api.h>
#endif

namespace kernels::batch_stat {

// Numbers for each part and each channel that the workspaces hold. That of the
// moments has one part more, for what the two passes hand over.
constexpr int64_t kMomentsParts = 3;
constexpr int64_t kGradSumsParts = 2;

// Where the results of LaunchMoments go, each [groups, channels]. What is null
// is left out: the running averages all together, and so what x is normalised
// with.
template <typename A>
struct MomentsResults {
  A* mean;
  A* var;
  A* count;
  const A* momentum;  // [groups]
  const A* old_mean;  // may be new_mean
  const A* old_var;   // may be new_var
  A* new_mean;
  A* new_var;
  A epsilon;
  const A* scale;
  A* rstd;  // 1 / sqrt(var + epsilon)
  A* mul;   // scale * rstd
};

// Mean, biased variance and number of values of each channel, the running
// averages, and what x is normalised with; a channel without values gets NaN,
// NaN and 0. With `accurate`, the variance comes from a second pass over x
// about the mean of the first one.
template <typename T>
cudaError_t LaunchMoments(
    cudaStream_t stream, const Geometry& geometry, const typename T::Storage* x,
    const Mask& mask, bool accurate,
    const MomentsResults<typename T::Compute>& results,
    typename T::Compute* workspace,  // [splits + 1, 3, groups, channels]
    int64_t splits);

// y = (x - mean) * mul + bias; with `relu`, not below 0.
template <typename T, typename U>
cudaError_t LaunchNormalize(cudaStream_t stream, const Geometry& geometry,
                            const typename T::Storage* x,
                            const typename T::Compute* mean,
                            const typename T::Compute* mul,
                            const typename T::Compute* bias, bool relu,
                            typename U::Storage* y);

// Where the results of LaunchGradSums go, and what of the channels they want,
// each [groups, channels].
template <typename A>
struct GradSumsResults {
  const A* mul;
  const A* rstd;
  const A* count;  // of the values that mean and variance were taken of
  A* sum_dy;       // sum of dy
  A* dscale;       // rstd * sum of dy * (x - mean)
  A* c0;           // -mul * sum_dy / count
  A* c1;           // -mul * rstd * dscale / count
};

// Sums over all positions or, with `relu`, over those where LaunchNormalize
// gives a positive value.
template <typename T, typename U>
cudaError_t LaunchGradSums(
    cudaStream_t stream, const Geometry& geometry, const typename T::Storage* x,
    const typename U::Storage* dy, const typename T::Compute* mean,
    const typename T::Compute* mul, const typename T::Compute* bias, bool relu,
    const GradSumsResults<typename T::Compute>& results,
    typename T::Compute* workspace,  // [splits, 2, groups, channels]
    int64_t splits);

// dx = mul * dy + kept * (c0 + c1 * (x - mean)), where kept is what the mask
// says; dy is gated as in LaunchGradSums.
template <typename T, typename U>
cudaError_t LaunchGradInput(
    cudaStream_t stream, const Geometry& geometry, const typename T::Storage* x,
    const typename U::Storage* dy, const typename T::Compute* mean,
    const typename T::Compute* mul, const typename T::Compute* bias,
    const typename T::Compute* c0, const typename T::Compute* c1,
    const Mask& mask, bool relu, typename T::Storage* dx);

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_CUDA_BATCH_STAT_H_
