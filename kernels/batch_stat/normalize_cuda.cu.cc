// Normalisation and its gradient.

#include <cmath>
#include <cstdint>

#include "kernels/batch_stat/batch_stat_cuda.h"
#include "kernels/batch_stat/geometry.h"
#include "kernels/batch_stat/reduce_cuda.h"
#include "kernels/batch_stat/walk_cuda.h"
#include "kernels/common/cuda_util.h"
#include "kernels/common/element_types.h"

namespace kernels::batch_stat {

// What Normalize gives before relu; the gradient's gate asks the same, to the
// last bit.
template <typename A>
__device__ __forceinline__ A Affine(A apart, A mul, A bias) {
  return fma(apart, mul, bias);
}

template <typename A>
struct FinishGradSums {
  A* sum_dy;
  A* sum_dyx;

  __device__ void operator()(int64_t stat,
                             const A (&sums)[kGradSumsParts]) const {
    sum_dy[stat] = sums[0];
    sum_dyx[stat] = sums[1];
  }
};

template <typename T, typename U, int kVec, bool kLast>
__global__ void __launch_bounds__(kThreads, 2)
    GradSumsKernel(Walk walk, const typename T::Storage* __restrict__ x,
                   const typename U::Storage* __restrict__ dy,
                   const typename T::Compute* __restrict__ mean_,
                   const typename T::Compute* __restrict__ mul_,
                   const typename T::Compute* __restrict__ bias_, bool relu,
                   typename T::Compute* __restrict__ partial, int64_t splits,
                   FinishGradSums<typename T::Compute> finish) {
  using A = typename T::Compute;
  constexpr int kStates = kLast ? kVec : 1;
  const Part part = PartOf(walk, splits);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  A mean[kStates], mul[kStates] = {}, bias[kStates] = {};
  LoadStats<A, kStates>(mean_, walk, column, mean);
  if (relu) {
    LoadStats<A, kStates>(mul_, walk, column, mul);
    LoadStats<A, kStates>(bias_, walk, column, bias);
  }
  A states[kStates][kGradSumsParts] = {};
  for (int64_t unit = part.first; unit < part.last; ++unit) {
    Place places[kUnroll];
    PlacesOf<kVec, kLast>(walk, column, unit, places);
    if (!places[0].inside) continue;
    Vector<T, kVec> xs[kUnroll];
    Vector<U, kVec> dys[kUnroll];
    LoadAll<T, kVec>(x, places, xs);
    LoadAll<U, kVec>(dy, places, dys);
    A sums[kStates][kGradSumsParts] = {};
    KERNELS_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      KERNELS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        const int s = kLast ? j : 0;
        const A apart = ToCompute<T>(xs[k].data[j]) - mean[s];
        A grad = static_cast<A>(ToCompute<U>(dys[k].data[j]));
        if (relu && !(Affine(apart, mul[s], bias[s]) > 0)) grad = 0;
        // Outside x, dy is 0 and so are both terms, unless mean is not finite.
        sums[s][0] += grad;
        sums[s][1] += places[k].inside ? grad * apart : A{0};
      }
    }
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) {
      PlainSum<A, kGradSumsParts>::Combine(states[s], sums[s]);
    }
  }
  EndReduction<PlainSum<A, kGradSumsParts>, A, kVec, kLast>(
      walk, part, column, splits, states, partial, finish);
}

// Which units an elementwise block does: from the end of x backwards, where the
// pass before has left what still lies in the cache.
__device__ __forceinline__ Part LatestPartOf(const Walk& walk, int64_t splits) {
  Part part;
  const int64_t block = gridDim.x - 1 - static_cast<int64_t>(blockIdx.x);
  const int64_t each = CeilDiv<int64_t>(walk.units, splits);
  const int64_t columns = walk.groups * walk.columns;
  part.column = block % columns;
  part.split = block / columns;
  part.first = part.split * each;
  part.last = part.first + each < walk.units ? part.first + each : walk.units;
  return part;
}

template <typename T, typename U, int kVec, bool kLast>
__global__ void __launch_bounds__(kThreads, 2)
    NormalizeKernel(Walk walk, int64_t splits,
                    const typename T::Storage* __restrict__ x,
                    const typename T::Compute* __restrict__ mean_,
                    const typename T::Compute* __restrict__ mul_,
                    const typename T::Compute* __restrict__ bias_, bool relu,
                    typename U::Storage* __restrict__ y) {
  using A = typename T::Compute;
  constexpr int kStates = kLast ? kVec : 1;
  const Part part = LatestPartOf(walk, splits);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  A mean[kStates], mul[kStates], bias[kStates];
  LoadStats<A, kStates>(mean_, walk, column, mean);
  LoadStats<A, kStates>(mul_, walk, column, mul);
  LoadStats<A, kStates>(bias_, walk, column, bias);
  for (int64_t unit = part.first; unit < part.last; ++unit) {
    Place places[kUnroll];
    PlacesOf<kVec, kLast>(walk, column, unit, places);
    if (!places[0].inside) continue;
    Vector<T, kVec> xs[kUnroll];
    LoadAll<T, kVec>(x, places, xs);
    KERNELS_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      Vector<U, kVec> out;
      KERNELS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        const int s = kLast ? j : 0;
        A value =
            Affine(ToCompute<T>(xs[k].data[j]) - mean[s], mul[s], bias[s]);
        // A NaN stays one.
        if (relu && value < 0) value = 0;
        out.data[j] = FromCompute<U>(static_cast<typename U::Compute>(value));
      }
      if (places[k].inside) StoreVector<U, kVec>(y + places[k].x, out);
    }
  }
}

template <typename T, typename U, int kVec, bool kLast>
__global__ void __launch_bounds__(kThreads, 2)
    GradInputKernel(Walk walk, int64_t splits,
                    const typename T::Storage* __restrict__ x,
                    const typename U::Storage* __restrict__ dy,
                    const typename T::Compute* __restrict__ mean_,
                    const typename T::Compute* __restrict__ mul_,
                    const typename T::Compute* __restrict__ bias_,
                    const typename T::Compute* __restrict__ c0_,
                    const typename T::Compute* __restrict__ c1_, Mask mask,
                    bool relu, typename T::Storage* __restrict__ dx) {
  using A = typename T::Compute;
  constexpr int kStates = kLast ? kVec : 1;
  const Part part = LatestPartOf(walk, splits);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  A mean[kStates], mul[kStates], bias[kStates] = {}, c0[kStates], c1[kStates];
  LoadStats<A, kStates>(mean_, walk, column, mean);
  LoadStats<A, kStates>(mul_, walk, column, mul);
  if (relu) LoadStats<A, kStates>(bias_, walk, column, bias);
  LoadStats<A, kStates>(c0_, walk, column, c0);
  LoadStats<A, kStates>(c1_, walk, column, c1);
  for (int64_t unit = part.first; unit < part.last; ++unit) {
    Place places[kUnroll];
    PlacesOf<kVec, kLast>(walk, column, unit, places);
    if (!places[0].inside) continue;
    Vector<T, kVec> xs[kUnroll];
    Vector<U, kVec> dys[kUnroll];
    LoadAll<T, kVec>(x, places, xs);
    LoadAll<U, kVec>(dy, places, dys);
    bool kept[kUnroll][kVec];
    LoadKept<kVec, kLast>(mask, places, kept);
    KERNELS_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      Vector<T, kVec> out;
      KERNELS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        const int s = kLast ? j : 0;
        const A apart = ToCompute<T>(xs[k].data[j]) - mean[s];
        A grad = static_cast<A>(ToCompute<U>(dys[k].data[j]));
        if (relu && !(Affine(apart, mul[s], bias[s]) > 0)) grad = 0;
        const A through = kept[k][j] ? fma(c1[s], apart, c0[s]) : A{0};
        out.data[j] = FromCompute<T>(fma(mul[s], grad, through));
      }
      if (places[k].inside) StoreVector<T, kVec>(dx + places[k].x, out);
    }
  }
}

// Into how many parts to cut each column of an elementwise kernel: enough to
// fill the device several times, but with work for each.
inline cudaError_t ElementwiseSplits(const Walk& walk, int64_t* splits) {
  int multiprocessors = 0;
  const cudaError_t error = cuda::MultiprocessorCount(&multiprocessors);
  const int64_t wanted = CeilDiv<int64_t>(int64_t{32} * multiprocessors,
                                          walk.groups * walk.columns);
  const int64_t each = CeilDiv<int64_t>(walk.units, wanted);
  *splits = CeilDiv<int64_t>(walk.units, each < 8 ? each : 8);
  return error;
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
    const Walk walk = MakeWalk<kVec, kLast>(geometry);
    int64_t splits = 1;
    KERNELS_RETURN_IF_CUDA_ERROR(ElementwiseSplits(walk, &splits));
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(
        GridOf(walk.groups * walk.columns * splits, &grid));
    return cuda::Launch(NormalizeKernel<T, U, kVec, kLast>, grid,
                        dim3(kThreads), 0, stream, walk, splits, x, mean, mul,
                        bias, relu, y);
  };
  return DispatchWalk<T>(geometry, launch, x, mean, mul, bias, y);
}

template <typename T, typename U>
cudaError_t LaunchGradSums(
    cudaStream_t stream, const Geometry& geometry, const typename T::Storage* x,
    const typename U::Storage* dy, const typename T::Compute* mean,
    const typename T::Compute* mul, const typename T::Compute* bias, bool relu,
    typename T::Compute* sum_dy, typename T::Compute* sum_dyx,
    typename T::Compute* workspace, int64_t splits) {
  using A = typename T::Compute;
  const FinishGradSums<A> finish = {sum_dy, sum_dyx};
  const auto launch = [&](auto vec, auto last) -> cudaError_t {
    constexpr int kVec = vec();
    constexpr bool kLast = last();
    const Walk walk = MakeWalk<kVec, kLast>(geometry);
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(
        GridOf(walk.groups * walk.columns * splits, &grid));
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
    const Walk walk = MakeWalk<kVec, kLast>(geometry);
    int64_t splits = 1;
    KERNELS_RETURN_IF_CUDA_ERROR(ElementwiseSplits(walk, &splits));
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(
        GridOf(walk.groups * walk.columns * splits, &grid));
    return cuda::Launch(GradInputKernel<T, U, kVec, kLast>, grid,
                        dim3(kThreads), 0, stream, walk, splits, x, dy, mean,
                        mul, bias, c0, c1, mask, relu, dx);
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
      T::Compute*, T::Compute*, T::Compute*, int64_t);                     \
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
