// Mean and variance in one pass, or in two.

#include <cmath>
#include <cstdint>

#include "kernels/batch_stat/batch_stat_cuda.h"
#include "kernels/batch_stat/geometry.h"
#include "kernels/batch_stat/reduce_cuda.h"
#include "kernels/batch_stat/walk_cuda.h"
#include "kernels/common/cuda_util.h"
#include "kernels/common/element_types.h"

namespace kernels::batch_stat {

// Number, mean and sum of squares about the mean (Chan et al. 1979).
template <typename A>
struct MomentsSum {
  static constexpr int kParts = kMomentsParts;
  static __device__ __forceinline__ void Combine(A (&a)[kParts],
                                                 const A (&b)[kParts]) {
    const A n = a[0] + b[0];
    const A share = n > 0 ? b[0] / n : A{0};
    const A apart = b[1] - a[1];
    a[2] += b[2] + apart * apart * (a[0] * share);
    a[1] += apart * share;
    a[0] = n;
  }
};

// A number of the channel to shift all its values by, or 0: sums about it do
// not cancel where the mean is large beside the deviation.
template <typename T>
__device__ __forceinline__ typename T::Compute ShiftOf(
    const typename T::Storage* x, const Mask& mask, const Geometry& g,
    int64_t stat) {
  const int64_t group = stat / g.channels;
  const int64_t channel = stat % g.channels;
  const int64_t at = (group * g.outer * g.channels + channel) * g.inner;
  if (mask.data != nullptr) {
    const int64_t flag = mask.per_channel ? at : group * g.outer * g.inner;
    if (mask.data[flag] == 0) return 0;
  }
  const typename T::Compute first = ToCompute<T>(x[at]);
  // Infinities and NaN minus themselves are NaN.
  return first - first == 0 ? first : 0;
}

template <typename A>
__device__ __forceinline__ void BlendOne(const MomentsResults<A>& to,
                                         int64_t stat, A mean, A var) {
  if (to.new_mean == nullptr) return;
  const A keep = to.momentum[stat];
  to.new_mean[stat] = keep * to.old_mean[stat] + (1 - keep) * mean;
  to.new_var[stat] = keep * to.old_var[stat] + (1 - keep) * var;
}

// After the first pass.
template <typename T>
struct FinishMoments {
  using A = typename T::Compute;
  const typename T::Storage* x;
  Mask mask;
  Geometry geometry;
  MomentsResults<A> to;
  A* handed_over;  // the counts, if a second pass follows

  __device__ void operator()(int64_t stat,
                             const A (&sums)[kMomentsParts]) const {
    const A count = sums[0];
    const A shift = ShiftOf<T>(x, mask, geometry, stat);
    const A nan = static_cast<A>(NAN);
    const A mean = count > 0 ? shift + sums[1] : nan;
    const A var = count > 0 ? sums[2] / count : nan;
    to.mean[stat] = mean;
    if (to.count != nullptr) to.count[stat] = count;
    if (handed_over != nullptr) {
      handed_over[stat] = count;
      return;
    }
    to.var[stat] = var;
    BlendOne(to, stat, mean, var);
  }
};

// After the second pass, which sums squares about the mean.
template <typename A>
struct FinishSquares {
  MomentsResults<A> to;
  const A* counts;

  __device__ void operator()(int64_t stat, const A (&sums)[1]) const {
    // Without values the mean is NaN already, and 0 / 0 is.
    const A var = sums[0] / counts[stat];
    to.var[stat] = var;
    BlendOne(to, stat, to.mean[stat], var);
  }
};

// How much a block of values weighs beside those before it.
template <typename A>
struct Weights {
  A inverse;  // 1 / its number of values, or 0
  A share;    // its number / the new number, or 0
  A cross;    // the old number * share

  __device__ __forceinline__ Weights(A& total, A number) {
    const A before = total;
    total += number;
    inverse = number > 0 ? 1 / number : A{0};
    share = number > 0 ? number / total : A{0};
    cross = before * share;
  }
};

// Adds kCount values to a mean and a sum of squares about it: those of the
// block first, in registers, then the two together.
template <bool kAll, int kCount, typename A>
__device__ __forceinline__ void AddBlock(const A (&values)[kCount],
                                         const bool (&kept)[kCount],
                                         const Weights<A>& weights, A& mean,
                                         A& squares) {
  A sum = 0;
  KERNELS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    sum += kAll || kept[i] ? values[i] : A{0};
  }
  const A block_mean = sum * weights.inverse;
  A block_squares = 0;
  KERNELS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const A apart = kAll || kept[i] ? values[i] - block_mean : A{0};
    block_squares += apart * apart;
  }
  const A apart = block_mean - mean;
  mean += apart * weights.share;
  squares += block_squares + apart * apart * weights.cross;
}

// Adds a unit to the states, each (number, mean, squares) about `shift`.
template <typename T, int kVec, bool kLast, bool kAll, bool kPerChannel,
          int kStates, typename A>
__device__ __forceinline__ void AddUnit(
    const Vector<T, kVec> (&values)[kUnroll], const bool (&kept)[kUnroll][kVec],
    const A (&shift)[kStates], A (&states)[kStates][kMomentsParts]) {
  if constexpr (kLast) {
    A number = kUnroll;
    if constexpr (!kAll && !kPerChannel) {
      number = 0;
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) number += kept[k][0] ? 1 : 0;
    }
    A total = states[0][0];
    Weights<A> weights(total, number);
    KERNELS_UNROLL
    for (int j = 0; j < kVec; ++j) {
      A column[kUnroll];
      bool flags[kUnroll];
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        column[k] = ToCompute<T>(values[k].data[j]) - shift[j];
        flags[k] = kept[k][j];
      }
      if constexpr (kPerChannel) {
        number = 0;
        KERNELS_UNROLL
        for (int k = 0; k < kUnroll; ++k) number += flags[k] ? 1 : 0;
        total = states[j][0];
        weights = Weights<A>(total, number);
      }
      states[j][0] = total;
      AddBlock<kAll>(column, flags, weights, states[j][1], states[j][2]);
    }
  } else {
    A flat[kUnroll * kVec];
    bool flags[kUnroll * kVec];
    A number = 0;
    KERNELS_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      KERNELS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        flat[k * kVec + j] = ToCompute<T>(values[k].data[j]) - shift[0];
        flags[k * kVec + j] = kept[k][j];
        number += kAll || kept[k][j] ? 1 : 0;
      }
    }
    const Weights<A> weights(states[0][0], number);
    AddBlock<kAll>(flat, flags, weights, states[0][1], states[0][2]);
  }
}

template <typename T, int kVec, bool kLast, bool kMasked>
__global__ void __launch_bounds__(kThreads, 2)
    MomentsKernel(Walk walk, const typename T::Storage* __restrict__ x,
                  Mask mask, typename T::Compute* __restrict__ partial,
                  int64_t splits, FinishMoments<T> finish) {
  using A = typename T::Compute;
  constexpr int kStates = kLast ? kVec : 1;
  const Part part = PartOf(walk, splits);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  A states[kStates][kMomentsParts] = {};
  A shift[kStates] = {};
  if (column.inside) {
    KERNELS_UNROLL
    for (int j = 0; j < kStates; ++j) {
      shift[j] = ShiftOf<T>(x, mask, finish.geometry, column.stat(walk) + j);
    }
  }
  for (int64_t unit = part.first; unit < part.last; ++unit) {
    Place places[kUnroll];
    PlacesOf<kVec, kLast>(walk, column, unit, places);
    if (!places[0].inside) continue;
    Vector<T, kVec> values[kUnroll];
    LoadAll<T, kVec>(x, places, values);
    bool kept[kUnroll][kVec];
    // The last place is the first to be outside.
    if (!kMasked && places[kUnroll - 1].inside) {
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        KERNELS_UNROLL
        for (int j = 0; j < kVec; ++j) kept[k][j] = true;
      }
      AddUnit<T, kVec, kLast, true, false>(values, kept, shift, states);
    } else {
      LoadKept<kVec, kLast>(mask, places, kept);
      AddUnit<T, kVec, kLast, false, kMasked>(values, kept, shift, states);
    }
  }
  EndReduction<MomentsSum<A>, A, kVec, kLast>(walk, part, column, splits,
                                              states, partial, finish);
}

template <typename T, int kVec, bool kLast>
__global__ void __launch_bounds__(kThreads, 2)
    SquaresKernel(Walk walk, const typename T::Storage* __restrict__ x,
                  Mask mask, typename T::Compute* __restrict__ partial,
                  int64_t splits, FinishSquares<typename T::Compute> finish) {
  using A = typename T::Compute;
  constexpr int kStates = kLast ? kVec : 1;
  const Part part = PartOf(walk, splits);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  A mean[kStates];
  LoadStats<A, kStates>(finish.to.mean, walk, column, mean);
  A states[kStates][1] = {};
  for (int64_t unit = part.first; unit < part.last; ++unit) {
    Place places[kUnroll];
    PlacesOf<kVec, kLast>(walk, column, unit, places);
    if (!places[0].inside) continue;
    Vector<T, kVec> values[kUnroll];
    LoadAll<T, kVec>(x, places, values);
    bool kept[kUnroll][kVec];
    LoadKept<kVec, kLast>(mask, places, kept);
    A sums[kStates] = {};
    KERNELS_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      KERNELS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        const int s = kLast ? j : 0;
        const A apart = ToCompute<T>(values[k].data[j]) - mean[s];
        sums[s] += kept[k][j] ? apart * apart : A{0};
      }
    }
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) states[s][0] += sums[s];
  }
  EndReduction<PlainSum<A, 1>, A, kVec, kLast>(walk, part, column, splits,
                                               states, partial, finish);
}

template <typename T>
cudaError_t LaunchMoments(cudaStream_t stream, const Geometry& geometry,
                          const typename T::Storage* x, const Mask& mask,
                          bool accurate,
                          const MomentsResults<typename T::Compute>& results,
                          typename T::Compute* workspace, int64_t splits) {
  using A = typename T::Compute;
  const int64_t all = geometry.groups * geometry.channels;
  A* const counts = workspace + splits * kMomentsParts * all;
  const FinishMoments<T> finish = {x, mask, geometry, results,
                                   accurate ? counts : nullptr};
  const auto launch = [&](auto vec, auto last) -> cudaError_t {
    constexpr int kVec = vec();
    constexpr bool kLast = last();
    const Walk walk = MakeWalk<kVec, kLast>(geometry);
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(
        GridOf(walk.groups * walk.columns * splits, &grid));
    auto* kernel = mask.data != nullptr ? MomentsKernel<T, kVec, kLast, true>
                                        : MomentsKernel<T, kVec, kLast, false>;
    KERNELS_RETURN_IF_CUDA_ERROR(cuda::Launch(kernel, grid, dim3(kThreads), 0,
                                              stream, walk, x, mask, workspace,
                                              splits, finish));
    KERNELS_RETURN_IF_CUDA_ERROR(
        LaunchFinish<MomentsSum<A>>(stream, workspace, splits, all, finish));
    if (!accurate) return cudaSuccess;
    const FinishSquares<A> finish_squares = {results, counts};
    KERNELS_RETURN_IF_CUDA_ERROR(
        cuda::Launch(SquaresKernel<T, kVec, kLast>, grid, dim3(kThreads), 0,
                     stream, walk, x, mask, workspace, splits, finish_squares));
    return LaunchFinish<PlainSum<A, 1>>(stream, workspace, splits, all,
                                        finish_squares);
  };
  return DispatchWalk<T>(geometry, launch, x, mask.data, results.mean);
}

#define KERNELS_INSTANTIATE_ONE(T)                                         \
  template cudaError_t LaunchMoments<T>(                                   \
      cudaStream_t, const Geometry&, const T::Storage*, const Mask&, bool, \
      const MomentsResults<T::Compute>&, T::Compute*, int64_t)
KERNELS_INSTANTIATE_ONE(F64);
KERNELS_INSTANTIATE_ONE(F32);
KERNELS_INSTANTIATE_ONE(BF16);
KERNELS_INSTANTIATE_ONE(F16);

}  // namespace kernels::batch_stat
