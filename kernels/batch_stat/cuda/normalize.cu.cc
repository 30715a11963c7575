// Normalisation and its gradient.

#include <cmath>
#include <cstdint>

#include "kernels/batch_stat/cc/geometry.h"
#include "kernels/batch_stat/cuda/batch_stat.h"
#include "kernels/batch_stat/cuda/reduce.h"
#include "kernels/batch_stat/cuda/walk.h"
#include "kernels/common/cuda_util.h"
#include "kernels/common/element_types.h"

namespace kernels::batch_stat {

// What Normalize gives before relu; the gates of the gradient's kernels ask the
// same, to the last bit.
template <typename A>
__device__ __forceinline__ A Affine(A apart, A mul, A bias) {
  return fma(apart, mul, bias);
}

template <typename A>
struct FinishGradSums {
  GradSumsResults<A> to;

  __device__ void operator()(int64_t stat,
                             const A (&sums)[kGradSumsParts]) const {
    const A rstd = to.rstd[stat];
    const A count = to.count[stat];
    const A dscale = rstd * sums[1];
    const A share = -to.mul[stat] / (count > 1 ? count : A{1});
    to.sum_dy[stat] = sums[0];
    to.dscale[stat] = dscale;
    to.c0[stat] = share * sums[0];
    to.c1[stat] = share * rstd * dscale;
  }
};

template <typename T, typename U, int kVec, bool kLast>
__global__ void __launch_bounds__(
    kThreads, (kGradSumsTuning<kStatesOf<kVec, kLast>>.blocks))
    GradSumsKernel(Walk walk, const typename T::Storage* __restrict__ x,
                   const typename U::Storage* __restrict__ dy,
                   const typename T::Compute* __restrict__ mean_,
                   const typename T::Compute* __restrict__ mul_,
                   const typename T::Compute* __restrict__ bias_, bool relu,
                   typename T::Compute* __restrict__ partial, int64_t splits,
                   FinishGradSums<typename T::Compute> finish) {
  using A = typename T::Compute;
  constexpr int kStates = kStatesOf<kVec, kLast>;
  constexpr int kUnroll = kGradSumsTuning<kStates>.unroll;
  cuda::LetNextBegin();
  const Part part = PartOf(walk);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  Cursor cursor = CursorOf<kVec, kLast>(walk, part, column);
  A mean[kStates], mul[kStates] = {}, bias[kStates] = {};
  LoadStats<A, kStates>(mean_, walk, column, mean);
  if (relu) {
    LoadStats<A, kStates>(mul_, walk, column, mul);
    LoadStats<A, kStates>(bias_, walk, column, bias);
  }
  A sums[kVec][kGradSumsParts] = {};
  const auto add = [&](const Vector<T, kVec>& xs, const Vector<U, kVec>& dys) {
    KERNELS_UNROLL
    for (int j = 0; j < kVec; ++j) {
      const int s = kLast ? j : 0;
      const A apart = ToCompute<T>(xs.data[j]) - mean[s];
      A grad = static_cast<A>(ToCompute<U>(dys.data[j]));
      if (relu && !(Affine(apart, mul[s], bias[s]) > 0)) grad = 0;
      sums[j][0] += grad;
      sums[j][1] = fma(grad, apart, sums[j][1]);
    }
  };
  while (cursor.left > 0) {
    const int64_t count = cursor.left;
    Place places[kUnroll];
    Vector<T, kVec> xs[kUnroll];
    Vector<U, kVec> dys[kUnroll];
    cursor.Take<kLast>(walk, places);
    if (count >= kUnroll) {
      LoadAll<T, kVec, true>(x, places, kUnroll, xs);
      LoadAll<U, kVec, true>(dy, places, kUnroll, dys);
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) add(xs[k], dys[k]);
    } else {
      LoadAll<T, kVec, false>(x, places, count, xs);
      LoadAll<U, kVec, false>(dy, places, count, dys);
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        if (k < count) add(xs[k], dys[k]);
      }
    }
  }
  A states[kStates][kGradSumsParts] = {};
  KERNELS_UNROLL
  for (int j = 0; j < kVec; ++j) {
    PlainSum<A, kGradSumsParts>::Combine(states[kLast ? j : 0], sums[j]);
  }
  using Sum = PlainSum<A, kGradSumsParts>;
  __shared__ A shared[kSharedNumbers<Sum, kLast, kStates>];
  EndReduction<Sum, A, kVec, kLast>(walk, part, column, splits, states, shared,
                                    partial, finish);
}

template <typename T, typename U, int kVec, bool kLast>
__global__ void __launch_bounds__(
    kThreads, (kNormalizeTuning<kStatesOf<kVec, kLast>>.blocks))
    NormalizeKernel(Walk walk, const typename T::Storage* __restrict__ x,
                    const typename T::Compute* __restrict__ mean_,
                    const typename T::Compute* __restrict__ mul_,
                    const typename T::Compute* __restrict__ bias_, bool relu,
                    typename U::Storage* __restrict__ y) {
  using A = typename T::Compute;
  constexpr int kStates = kStatesOf<kVec, kLast>;
  constexpr int kUnroll = kNormalizeTuning<kStates>.unroll;
  const Part part = PartOf(walk);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  Cursor cursor = CursorOf<kVec, kLast>(walk, part, column);
  A mean[kStates], mul[kStates], bias[kStates];
  LoadStats<A, kStates>(mean_, walk, column, mean);
  LoadStats<A, kStates>(mul_, walk, column, mul);
  LoadStats<A, kStates>(bias_, walk, column, bias);
  const auto write = [&](const Place& place, const Vector<T, kVec>& xs) {
    typename U::Compute out[kVec];
    KERNELS_UNROLL
    for (int j = 0; j < kVec; ++j) {
      const int s = kLast ? j : 0;
      A value = Affine(ToCompute<T>(xs.data[j]) - mean[s], mul[s], bias[s]);
      // A NaN stays one.
      if (relu && value < 0) value = 0;
      out[j] = static_cast<typename U::Compute>(value);
    }
    StreamVector<U, kVec>(y + place.x, VectorFromCompute<U, kVec>(out));
  };
  while (cursor.left > 0) {
    const int64_t count = cursor.left;
    Place places[kUnroll];
    Vector<T, kVec> xs[kUnroll];
    cursor.Take<kLast>(walk, places);
    if (count >= kUnroll) {
      LoadAll<T, kVec, true>(x, places, kUnroll, xs);
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) write(places[k], xs[k]);
    } else {
      LoadAll<T, kVec, false>(x, places, count, xs);
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        if (k < count) write(places[k], xs[k]);
      }
    }
  }
}

template <typename T, typename U, int kVec, bool kLast, bool kMasked>
__global__ void __launch_bounds__(
    kThreads, (kGradInputTuning<kStatesOf<kVec, kLast>>.blocks))
    GradInputKernel(Walk walk, const typename T::Storage* __restrict__ x,
                    const typename U::Storage* __restrict__ dy,
                    const typename T::Compute* __restrict__ mean_,
                    const typename T::Compute* __restrict__ mul_,
                    const typename T::Compute* __restrict__ bias_,
                    const typename T::Compute* __restrict__ c0_,
                    const typename T::Compute* __restrict__ c1_, Mask mask,
                    bool relu, typename T::Storage* __restrict__ dx) {
  using A = typename T::Compute;
  constexpr int kStates = kStatesOf<kVec, kLast>;
  constexpr int kFull = kGradInputTuning<kStates>.unroll;
  // Which values count wants registers as well.
  constexpr int kUnroll = kMasked ? (kFull + 1) / 2 : kFull;
  const Part part = PartOf(walk);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  Cursor cursor = CursorOf<kVec, kLast>(walk, part, column);
  A mean[kStates], mul[kStates], bias[kStates] = {}, c0[kStates], c1[kStates];
  LoadStats<A, kStates>(mean_, walk, column, mean);
  LoadStats<A, kStates>(mul_, walk, column, mul);
  if (relu) LoadStats<A, kStates>(bias_, walk, column, bias);
  LoadStats<A, kStates>(c0_, walk, column, c0);
  LoadStats<A, kStates>(c1_, walk, column, c1);
  const auto write = [&](const Place& place, const Vector<T, kVec>& xs,
                         const Vector<U, kVec>& dys, const Kept<kVec>& kept) {
    A out[kVec];
    KERNELS_UNROLL
    for (int j = 0; j < kVec; ++j) {
      const int s = kLast ? j : 0;
      const A apart = ToCompute<T>(xs.data[j]) - mean[s];
      A grad = static_cast<A>(ToCompute<U>(dys.data[j]));
      if (relu && !(Affine(apart, mul[s], bias[s]) > 0)) grad = 0;
      const A through =
          !kMasked || kept.data[j] != 0 ? fma(c1[s], apart, c0[s]) : A{0};
      out[j] = fma(mul[s], grad, through);
    }
    StreamVector<T, kVec>(dx + place.x, VectorFromCompute<T, kVec>(out));
  };
  while (cursor.left > 0) {
    const int64_t count = cursor.left;
    Place places[kUnroll];
    Vector<T, kVec> xs[kUnroll];
    Vector<U, kVec> dys[kUnroll];
    Kept<kVec> kept[kUnroll] = {};
    cursor.Take<kLast>(walk, places);
    if (count >= kUnroll) {
      LoadAll<T, kVec, true>(x, places, kUnroll, xs);
      LoadAll<U, kVec, true>(dy, places, kUnroll, dys);
      if constexpr (kMasked) LoadKept<kVec, kLast>(mask, places, count, kept);
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        write(places[k], xs[k], dys[k], kept[k]);
      }
    } else {
      LoadAll<T, kVec, false>(x, places, count, xs);
      LoadAll<U, kVec, false>(dy, places, count, dys);
      if constexpr (kMasked) LoadKept<kVec, kLast>(mask, places, count, kept);
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        if (k < count) write(places[k], xs[k], dys[k], kept[k]);
      }
    }
  }
}

// Cuts each column of an elementwise kernel into parts, whole batches of
// `unroll` steps: enough to fill the device several times, but with work for
// each.
template <int kVec, bool kLast>
cudaError_t CutElementwise(int unroll, Walk* walk) {
  int multiprocessors = 0;
  KERNELS_RETURN_IF_CUDA_ERROR(cuda::MultiprocessorCount(&multiprocessors));
  const int64_t wanted = CeilDiv<int64_t>(int64_t{32} * multiprocessors,
                                          walk->groups * walk->columns);
  const int64_t each = CeilDiv<int64_t>(walk->steps, wanted);
  CutInOrder<kVec, kLast>(
      CeilDiv<int64_t>(each < kElementwiseSteps ? each : kElementwiseSteps,
                       unroll) *
          unroll,
      walk);
  return cudaSuccess;
}

template <typename T, typename U>
cudaError_t LaunchNormalize(cudaStream_t stream, const Geometry& geometry,
                            const typename T::Storage* x,
                            const typename T::Compute* mean,
                            const typename T::Compute* mul,
                            const typename T::Compute* bias, bool relu,
                            typename U::Storage* y) {
  const auto launch = [&](auto vec, auto last) -> cudaError_t {
    constexpr int kVec = vec();
    constexpr bool kLast = last();
    Walk walk = MakeWalk<kVec, kLast>(geometry);
    KERNELS_RETURN_IF_CUDA_ERROR((CutElementwise<kVec, kLast>(
        kNormalizeTuning<kStatesOf<kVec, kLast>>.unroll, &walk)));
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(GridOf(walk, &grid));
    return cuda::Launch(NormalizeKernel<T, U, kVec, kLast>, grid,
                        dim3(kThreads), 0, stream, walk, x, mean, mul, bias,
                        relu, y);
  };
  return DispatchWalk<T>(geometry, launch, x, mean, mul, bias, y);
}

template <typename T, typename U>
cudaError_t LaunchGradSums(cudaStream_t stream, const Geometry& geometry,
                           const typename T::Storage* x,
                           const typename U::Storage* dy,
                           const typename T::Compute* mean,
                           const typename T::Compute* mul,
                           const typename T::Compute* bias, bool relu,
                           const GradSumsResults<typename T::Compute>& results,
                           typename T::Compute* workspace, int64_t splits) {
  using A = typename T::Compute;
  const FinishGradSums<A> finish = {results};
  const auto launch = [&](auto vec, auto last) -> cudaError_t {
    constexpr int kVec = vec();
    constexpr bool kLast = last();
    Walk walk = MakeWalk<kVec, kLast>(geometry);
    CutInTurns<kVec, kLast>(splits, &walk);
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(GridOf(walk, &grid));
    KERNELS_RETURN_IF_CUDA_ERROR(cuda::Launch(
        GradSumsKernel<T, U, kVec, kLast>, grid, dim3(kThreads), 0, stream,
        walk, x, dy, mean, mul, bias, relu, workspace, splits, finish));
    return LaunchFinish<PlainSum<A, kGradSumsParts>>(
        stream, workspace, splits, geometry.groups * geometry.channels, finish);
  };
  return DispatchWalk<T>(geometry, launch, x, dy, mean, mul, bias);
}

template <typename T, typename U>
cudaError_t LaunchGradInput(
    cudaStream_t stream, const Geometry& geometry, const typename T::Storage* x,
    const typename U::Storage* dy, const typename T::Compute* mean,
    const typename T::Compute* mul, const typename T::Compute* bias,
    const typename T::Compute* c0, const typename T::Compute* c1,
    const Mask& mask, bool relu, typename T::Storage* dx) {
  const auto launch = [&](auto vec, auto last) -> cudaError_t {
    constexpr int kVec = vec();
    constexpr bool kLast = last();
    Walk walk = MakeWalk<kVec, kLast>(geometry);
    KERNELS_RETURN_IF_CUDA_ERROR((CutElementwise<kVec, kLast>(
        kGradInputTuning<kStatesOf<kVec, kLast>>.unroll, &walk)));
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(GridOf(walk, &grid));
    auto* kernel = mask.data != nullptr
                       ? GradInputKernel<T, U, kVec, kLast, true>
                       : GradInputKernel<T, U, kVec, kLast, false>;
    return cuda::Launch(kernel, grid, dim3(kThreads), 0, stream, walk, x, dy,
                        mean, mul, bias, c0, c1, mask, relu, dx);
  };
  return DispatchWalk<T>(geometry, launch, x, dy, mean, mul, bias, c0, c1,
                         mask.data, dx);
}

#define KERNELS_INSTANTIATE_PAIR(T, U)                                     \
  template cudaError_t LaunchNormalize<T, U>(                              \
      cudaStream_t, const Geometry&, const T::Storage*, const T::Compute*, \
      const T::Compute*, const T::Compute*, bool, U::Storage*);            \
  template cudaError_t LaunchGradSums<T, U>(                               \
      cudaStream_t, const Geometry&, const T::Storage*, const U::Storage*, \
      const T::Compute*, const T::Compute*, const T::Compute*, bool,       \
      const GradSumsResults<T::Compute>&, T::Compute*, int64_t);           \
  template cudaError_t LaunchGradInput<T, U>(                              \
      cudaStream_t, const Geometry&, const T::Storage*, const U::Storage*, \
      const T::Compute*, const T::Compute*, const T::Compute*,             \
      const T::Compute*, const T::Compute*, const Mask&, bool, T::Storage*)
KERNELS_INSTANTIATE_PAIR(F64, F64);
KERNELS_INSTANTIATE_PAIR(F32, F32);
KERNELS_INSTANTIATE_PAIR(BF16, BF16);
KERNELS_INSTANTIATE_PAIR(BF16, F32);
KERNELS_INSTANTIATE_PAIR(F16, F16);
KERNELS_INSTANTIATE_PAIR(F16, F32);

}  // namespace kernels::batch_stat
