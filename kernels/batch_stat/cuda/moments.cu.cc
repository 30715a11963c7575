// Mean and variance in one pass, or in two.

#include <cmath>
#include <cstdint>

#include "kernels/batch_stat/cc/geometry.h"
#include "kernels/batch_stat/cuda/batch_stat.h"
#include "kernels/batch_stat/cuda/reduce.h"
#include "kernels/batch_stat/cuda/walk.h"
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

// The value, if it may be subtracted: infinities and NaN minus themselves are
// NaN.
template <typename A>
__device__ __forceinline__ A FiniteOrZero(A value) {
  return value - value == 0 ? value : A{0};
}

// For kStates neighbouring channels, a number of each to take all its means
// from, or 0: they are exact to the deviation's scale then, where the mean is
// large beside it.
template <typename T, int kStates>
__device__ __forceinline__ void LoadOrigins(
    const typename T::Storage* x, const Mask& mask, const Geometry& g,
    int64_t group, int64_t channel, typename T::Compute (&origins)[kStates]) {
  const int64_t at = (group * g.outer * g.channels + channel) * g.inner;
  const auto first = LoadVector<T, kStates>(x + at);
  KERNELS_UNROLL
  for (int s = 0; s < kStates; ++s) {
    origins[s] = FiniteOrZero(ToCompute<T>(first.data[s]));
    if (mask.data != nullptr) {
      const int64_t flag =
          mask.per_channel ? at + s : group * g.outer * g.inner;
      if (mask.data[flag] == 0) origins[s] = 0;
    }
  }
}

// What follows from a channel's moments.
template <typename A>
__device__ __forceinline__ void FinishOne(const MomentsResults<A>& to,
                                          int64_t group, int64_t stat, A mean,
                                          A var) {
  if (to.new_mean != nullptr) {
    const A keep = to.momentum[group];
    to.new_mean[stat] = keep * to.old_mean[stat] + (1 - keep) * mean;
    to.new_var[stat] = keep * to.old_var[stat] + (1 - keep) * var;
  }
  if (to.mul != nullptr) {
    const A rstd = 1 / sqrt(var + to.epsilon);
    to.rstd[stat] = rstd;
    to.mul[stat] = to.scale[stat] * rstd;
  }
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
    const int64_t group = stat / geometry.channels;
    A origin[1];
    LoadOrigins<T, 1>(x, mask, geometry, group, stat % geometry.channels,
                      origin);
    const A nan = static_cast<A>(NAN);
    const A mean = count > 0 ? origin[0] + sums[1] : nan;
    const A var = count > 0 ? sums[2] / count : nan;
    to.mean[stat] = mean;
    if (to.count != nullptr) to.count[stat] = count;
    if (handed_over != nullptr) {
      handed_over[stat] = count;
      return;
    }
    to.var[stat] = var;
    FinishOne(to, group, stat, mean, var);
  }
};

// After the second pass, which sums squares about the mean.
template <typename A>
struct FinishSquares {
  MomentsResults<A> to;
  int64_t channels;
  const A* counts;

  __device__ void operator()(int64_t stat, const A (&sums)[1]) const {
    // Without values the mean is NaN already, and 0 / 0 is.
    const A var = sums[0] / counts[stat];
    to.var[stat] = var;
    FinishOne(to, stat / channels, stat, to.mean[stat], var);
  }
};

// How many values a thread sums about one of them. The sum of their squares
// about that value cannot be more than the run's length + 1 times that about
// their mean, whatever the values are, so this bounds what cancels.
constexpr int kRunValues = 256;

// A thread's sums over a run of values about the first of them: a subtraction,
// an addition and a fused multiplication for each. kSums is kVec.
template <typename A, int kStates, int kSums, bool kMasked>
struct Run {
  A about[kStates];
  A sum[kSums] = {};
  A squares[kSums] = {};
  A number[kMasked ? kStates : 1] = {};
  bool begun = false;  // under a mask: each `about` is a value that it keeps

  template <typename T>
  __device__ __forceinline__ void Begin(const Vector<T, kSums>& first) {
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) {
      about[s] = FiniteOrZero(ToCompute<T>(first.data[s]));
    }
  }

  template <typename T>
  __device__ __forceinline__ void Add(const Vector<T, kSums>& values) {
    KERNELS_UNROLL
    for (int j = 0; j < kSums; ++j) {
      const A apart =
          ToCompute<T>(values.data[j]) - about[kStates == 1 ? 0 : j];
      sum[j] += apart;
      squares[j] = fma(apart, apart, squares[j]);
    }
  }

  // Takes the first value that a mask keeps of each channel that has none yet.
  template <typename T>
  __device__ __forceinline__ void BeginKept(const Vector<T, kSums>& values,
                                            const Kept<kSums>& kept) {
    begun = true;
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) {
      bool found = number[s] > 0;
      KERNELS_UNROLL
      for (int j = s; j < (kStates == 1 ? kSums : s + 1); ++j) {
        if (found || kept.data[j] == 0) continue;
        about[s] = FiniteOrZero(ToCompute<T>(values.data[j]));
        found = true;
      }
      begun = begun && found;
    }
  }

  // As Add, for the values that a mask keeps: most often all or none of them.
  template <typename T>
  __device__ __forceinline__ void AddKept(const Vector<T, kSums>& values,
                                          const Kept<kSums>& kept) {
    if (AllAre<kSums>(kept, 0)) return;
    if (!begun) BeginKept<T>(values, kept);
    if (AllAre<kSums>(kept, 1)) {
      Add<T>(values);
      KERNELS_UNROLL
      for (int s = 0; s < kStates; ++s) number[s] += kSums / kStates;
      return;
    }
    KERNELS_UNROLL
    for (int j = 0; j < kSums; ++j) {
      const int s = kStates == 1 ? 0 : j;
      const bool counts = kept.data[j] != 0;
      const A apart = counts ? ToCompute<T>(values.data[j]) - about[s] : A{0};
      number[s] += counts ? A{1} : A{0};
      sum[j] += apart;
      squares[j] = fma(apart, apart, squares[j]);
    }
  }

  // Adds the run to the states, each (number, mean from the origin, squares).
  __device__ __forceinline__ void Fold(const A (&origins)[kStates],
                                       A (&states)[kStates][kMomentsParts]) {
    A inverse = 0, share = 0, cross = 0;
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) {
      if (kMasked || s == 0) {
        const A before = states[s][0];
        const A n = number[kMasked ? s : 0];
        inverse = n > 0 ? 1 / n : A{0};
        share = n > 0 ? n / (before + n) : A{0};
        cross = before * share;
      }
      A total = sum[s], total_squares = squares[s];
      if constexpr (kStates == 1) {
        KERNELS_UNROLL
        for (int j = 1; j < kSums; ++j) {
          total += sum[j];
          total_squares += squares[j];
        }
      }
      const A mean = total * inverse;
      const A apart = about[s] - origins[s] + mean - states[s][1];
      states[s][0] += number[kMasked ? s : 0];
      if (share > 0) {
        states[s][1] += apart * share;
        states[s][2] += total_squares - total * mean + apart * apart * cross;
      }
    }
  }
};

template <typename T, int kVec, bool kLast, bool kMasked>
__global__ void __launch_bounds__(
    kThreads, (kMomentsTuning<kStatesOf<kVec, kLast>>.blocks))
    MomentsKernel(Walk walk, const typename T::Storage* __restrict__ x,
                  Mask mask, typename T::Compute* __restrict__ partial,
                  int64_t splits, FinishMoments<T> finish) {
  using A = typename T::Compute;
  constexpr int kStates = kStatesOf<kVec, kLast>;
  // Which values count wants registers as well.
  constexpr int kUnroll = kMomentsTuning<kStates>.unroll / (kMasked ? 2 : 1);
  constexpr int kBatchValues = kLast ? kUnroll : kUnroll * kVec;
  constexpr int kRunBatches =
      kRunValues > kBatchValues ? kRunValues / kBatchValues : 1;
  cuda::LetNextBegin();
  const Part part = PartOf(walk);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  Cursor cursor = CursorOf<kVec, kLast>(walk, part, column);
  A states[kStates][kMomentsParts] = {};
  using Shared = SharedStates<kStates, kMomentsParts>;
  __shared__ A shared[kSharedNumbers<MomentsSum<A>, kLast, kStates>];
  bool begun = false;
  while (cursor.left > 0) {
    Run<A, kStates, kVec, kMasked> run = {};
    int batch = 0;
    if constexpr (!kMasked) {
      const int64_t before = cursor.left;
      for (; batch < kRunBatches && cursor.left >= kUnroll; ++batch) {
        Place places[kUnroll];
        Vector<T, kVec> values[kUnroll];
        cursor.Take<kLast>(walk, places);
        LoadAll<T, kVec, true>(x, places, kUnroll, values);
        if (batch == 0) run.template Begin<T>(values[0]);
        KERNELS_UNROLL
        for (int k = 0; k < kUnroll; ++k) run.template Add<T>(values[k]);
      }
      int64_t number = before - cursor.left;
      if (batch < kRunBatches && cursor.left > 0) {
        const int64_t count = cursor.left;
        Place places[kUnroll];
        Vector<T, kVec> values[kUnroll];
        cursor.Take<kLast>(walk, places);
        LoadAll<T, kVec, false>(x, places, count, values);
        if (batch == 0) run.template Begin<T>(values[0]);
        KERNELS_UNROLL
        for (int k = 0; k < kUnroll; ++k) {
          if (k < count) run.template Add<T>(values[k]);
        }
        number += count;
      }
      run.number[0] = static_cast<A>(kLast ? number : number * kVec);
    } else {
      for (; batch < kRunBatches && cursor.left > 0; ++batch) {
        const int64_t count = cursor.left;
        Place places[kUnroll];
        Vector<T, kVec> values[kUnroll];
        Kept<kVec> kept[kUnroll];
        cursor.Take<kLast>(walk, places);
        LoadAll<T, kVec, false>(x, places, count, values);
        LoadKept<kVec, kLast>(mask, places, count, kept);
        KERNELS_UNROLL
        for (int k = 0; k < kUnroll; ++k) {
          run.template AddKept<T>(values[k], kept[k]);
        }
      }
    }
    A origins[kStates];
    LoadOrigins<T, kStates>(x, mask, finish.geometry, column.group,
                            column.channel, origins);
    if constexpr (kLast) {
      // Between runs the states lie in shared memory: registers are scarce.
      A held[kStates][kMomentsParts] = {};
      if (begun) Shared::Load(shared, held);
      run.Fold(origins, held);
      Shared::Store(shared, held);
      begun = true;
    } else {
      run.Fold(origins, states);
    }
  }
  if constexpr (kLast) {
    if (begun) Shared::Load(shared, states);
  }
  EndReduction<MomentsSum<A>, A, kVec, kLast>(walk, part, column, splits,
                                              states, shared, partial, finish);
}

template <typename T, int kVec, bool kLast>
__global__ void __launch_bounds__(
    kThreads, (kMomentsTuning<kStatesOf<kVec, kLast>>.blocks))
    SquaresKernel(Walk walk, const typename T::Storage* __restrict__ x,
                  Mask mask, typename T::Compute* __restrict__ partial,
                  int64_t splits, FinishSquares<typename T::Compute> finish) {
  using A = typename T::Compute;
  constexpr int kStates = kStatesOf<kVec, kLast>;
  constexpr int kUnroll = kMomentsTuning<kStates>.unroll / 2;
  cuda::LetNextBegin();
  const Part part = PartOf(walk);
  const Column column = ColumnOf<kVec, kLast>(walk, part.column);
  Cursor cursor = CursorOf<kVec, kLast>(walk, part, column);
  A mean[kStates];
  LoadStats<A, kStates>(finish.to.mean, walk, column, mean);
  A states[kStates][1] = {};
  while (cursor.left > 0) {
    const int64_t count = cursor.left;
    Place places[kUnroll];
    Vector<T, kVec> values[kUnroll];
    Kept<kVec> kept[kUnroll];
    cursor.Take<kLast>(walk, places);
    LoadAll<T, kVec, false>(x, places, count, values);
    LoadKept<kVec, kLast>(mask, places, count, kept);
    A sums[kStates] = {};
    KERNELS_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      KERNELS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        const int s = kLast ? j : 0;
        const A apart = ToCompute<T>(values[k].data[j]) - mean[s];
        sums[s] += kept[k].data[j] != 0 ? apart * apart : A{0};
      }
    }
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) states[s][0] += sums[s];
  }
  using Sum = PlainSum<A, 1>;
  __shared__ A shared[kSharedNumbers<Sum, kLast, kStates>];
  EndReduction<Sum, A, kVec, kLast>(walk, part, column, splits, states, shared,
                                    partial, finish);
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
    Walk walk = MakeWalk<kVec, kLast>(geometry);
    CutInTurns<kVec, kLast>(splits, &walk);
    dim3 grid;
    KERNELS_RETURN_IF_CUDA_ERROR(GridOf(walk, &grid));
    auto* kernel = mask.data != nullptr ? MomentsKernel<T, kVec, kLast, true>
                                        : MomentsKernel<T, kVec, kLast, false>;
    KERNELS_RETURN_IF_CUDA_ERROR(cuda::Launch(kernel, grid, dim3(kThreads), 0,
                                              stream, walk, x, mask, workspace,
                                              splits, finish));
    KERNELS_RETURN_IF_CUDA_ERROR(
        LaunchFinish<MomentsSum<A>>(stream, workspace, splits, all, finish));
    if (!accurate) return cudaSuccess;
    const FinishSquares<A> finish_squares = {results, geometry.channels,
                                             counts};
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
