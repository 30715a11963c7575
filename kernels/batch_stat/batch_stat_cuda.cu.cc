// Batch norm moves data: a pass reads or writes every array once, in accesses
// of 16 bytes, kUnroll of them in flight for each thread.
//
// A block of 256 threads is bx by by, and walks down one column of x in units
// of kUnroll accesses a thread. There are two ways of walking:
//
// - features last (inner is 1): a column is bx vectors of neighbouring
// channels,
//   and a thread keeps sums for the channels of its vector;
// - features further in front: a column is one channel, whose positions a
// thread
//   reads by vectors, along one row of `inner` if that is long, else over rows.

#include "kernels/batch_stat/batch_stat_cuda.h"

#include <cstdint>

#include "kernels/batch_stat/geometry.h"
#include "kernels/common/cuda_util.h"
#include "kernels/common/element_types.h"

namespace kernels::batch_stat {
namespace {

using cuda::CeilDiv;
using cuda::FromCompute;
using cuda::LoadVector;
using cuda::StoreVector;
using cuda::ToCompute;
using cuda::Vector;

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// The tag of the statistics' type.
template <typename A>
struct StatOf {
  using Type = F32;
};
template <>
struct StatOf<double> {
  using Type = F64;
};

struct Walk {
  int64_t groups;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int32_t bx;
  int32_t by;
  int64_t columns;  // of each group
  int64_t units;    // of each column
  int64_t vectors;  // of each row of `inner`; features in front only
  int64_t chunks;   // units of each such row, or 0 for units of several rows
};

int64_t PowerOfTwoFrom(int64_t n, int64_t most) {
  int64_t power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

template <int kVec, bool kLast>
Walk MakeWalk(const Geometry& g) {
  Walk walk = {};
  walk.groups = g.groups;
  walk.outer = g.outer;
  walk.channels = g.channels;
  walk.inner = g.inner;
  if constexpr (kLast) {
    const int64_t vectors = g.channels / kVec;
    walk.bx = static_cast<int32_t>(PowerOfTwoFrom(vectors, cuda::kWarp));
    walk.by = kThreads / walk.bx;
    walk.columns = CeilDiv<int64_t>(vectors, walk.bx);
    walk.units = CeilDiv<int64_t>(g.outer, walk.by * kUnroll);
  } else {
    walk.vectors = g.inner / kVec;
    walk.bx = static_cast<int32_t>(PowerOfTwoFrom(walk.vectors, kThreads));
    walk.by = kThreads / walk.bx;
    walk.columns = g.channels;
    if (walk.vectors > kThreads) {
      walk.chunks = CeilDiv<int64_t>(walk.vectors, kThreads * kUnroll);
      walk.units = g.outer * walk.chunks;
    } else {
      walk.units = CeilDiv<int64_t>(g.outer, walk.by * kUnroll);
    }
  }
  return walk;
}

// One thread's part of a column: kVec channels, or one.
struct Column {
  int64_t group;
  int64_t channel;
  bool inside;

  __device__ int64_t stat(const Walk& walk) const {
    return group * walk.channels + channel;
  }
};

template <int kVec, bool kLast>
__device__ __forceinline__ Column ColumnOf(const Walk& walk, int64_t index) {
  Column column;
  column.group = index / walk.columns;
  column.channel = index % walk.columns;
  column.inside = true;
  if constexpr (kLast) {
    const int tx = static_cast<int>(threadIdx.x) % walk.bx;
    column.channel = (column.channel * walk.bx + tx) * kVec;
    column.inside = column.channel < walk.channels;
  }
  return column;
}

// Where one access goes: offsets into x and into a mask that the channels
// share.
struct Place {
  int64_t x;
  int64_t shared;
  bool inside;
};

template <int kVec, bool kLast>
__device__ __forceinline__ void PlacesOf(const Walk& walk, const Column& column,
                                         int64_t unit,
                                         Place (&places)[kUnroll]) {
  const int tx = static_cast<int>(threadIdx.x) % walk.bx;
  const int ty = static_cast<int>(threadIdx.x) / walk.bx;
  int64_t row = unit * kUnroll * walk.by + ty;
  int64_t vector = tx;
  int64_t rows_apart = walk.by;
  int64_t vectors_apart = 0;
  if constexpr (!kLast) {
    if (walk.chunks > 0) {
      row = unit / walk.chunks;
      vector = (unit % walk.chunks) * kUnroll * walk.bx + tx;
      rows_apart = 0;
      vectors_apart = walk.bx;
    }
  }
  KERNELS_UNROLL
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t at = column.group * walk.outer + row;
    if constexpr (kLast) {
      places[k].inside = column.inside && row < walk.outer;
      places[k].x = at * walk.channels + column.channel;
      places[k].shared = at;
    } else {
      places[k].inside = row < walk.outer && vector < walk.vectors;
      places[k].x =
          (at * walk.channels + column.channel) * walk.inner + vector * kVec;
      places[k].shared = at * walk.inner + vector * kVec;
    }
    row += rows_apart;
    vector += vectors_apart;
  }
}

template <typename T, int kVec>
__device__ __forceinline__ void LoadAll(const typename T::Storage* from,
                                        const Place (&places)[kUnroll],
                                        Vector<T, kVec> (&values)[kUnroll]) {
  KERNELS_UNROLL
  for (int k = 0; k < kUnroll; ++k) {
    values[k] = {};
    if (places[k].inside) values[k] = LoadVector<T, kVec>(from + places[k].x);
  }
}

// Whether each element of a unit counts: inside x, and kept by the mask.
template <int kVec, bool kLast>
__device__ __forceinline__ void LoadKept(const Mask& mask,
                                         const Place (&places)[kUnroll],
                                         bool (&kept)[kUnroll][kVec]) {
  KERNELS_UNROLL
  for (int k = 0; k < kUnroll; ++k) {
    Vector<Bool, kVec> bytes = {};
    if (places[k].inside) {
      if (mask.data == nullptr) {
        KERNELS_UNROLL
        for (int j = 0; j < kVec; ++j) bytes.data[j] = 1;
      } else if (mask.per_channel) {
        bytes = LoadVector<Bool, kVec>(mask.data + places[k].x);
      } else if constexpr (kLast) {
        const uint8_t byte = __ldg(mask.data + places[k].shared);
        KERNELS_UNROLL
        for (int j = 0; j < kVec; ++j) bytes.data[j] = byte;
      } else {
        bytes = LoadVector<Bool, kVec>(mask.data + places[k].shared);
      }
    }
    KERNELS_UNROLL
    for (int j = 0; j < kVec; ++j) kept[k][j] = bytes.data[j] != 0;
  }
}

// kVec neighbouring statistics, or one for all.
template <typename A, int kStates>
__device__ __forceinline__ void LoadStats(const A* stats, const Walk& walk,
                                          const Column& column,
                                          A (&out)[kStates]) {
  using Stat = typename StatOf<A>::Type;
  Vector<Stat, kStates> values = {};
  if (column.inside) {
    values = LoadVector<Stat, kStates>(stats + column.stat(walk));
  }
  KERNELS_UNROLL
  for (int j = 0; j < kStates; ++j) out[j] = values.data[j];
}

// ---- Sums of parts.

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

template <typename A, int kNumParts>
struct PlainSum {
  static constexpr int kParts = kNumParts;
  static __device__ __forceinline__ void Combine(A (&a)[kParts],
                                                 const A (&b)[kParts]) {
    KERNELS_UNROLL
    for (int p = 0; p < kParts; ++p) a[p] += b[p];
  }
};

// Combines the states of `count` threads, a power of two, that lie `apart` from
// each other; the one at `position` 0 gets the result.
template <typename Sum, typename A, int kStates>
__device__ void CombineThreads(A (&states)[kStates][Sum::kParts], A* shared,
                               int position, int count, int apart) {
  const int stride = static_cast<int>(blockDim.x);
  const int me = static_cast<int>(threadIdx.x);
  for (int half = count / 2; half > 0; half /= 2) {
    if (position >= half && position < 2 * half) {
      KERNELS_UNROLL
      for (int j = 0; j < kStates; ++j) {
        KERNELS_UNROLL
        for (int p = 0; p < Sum::kParts; ++p) {
          shared[(j * Sum::kParts + p) * stride + me] = states[j][p];
        }
      }
    }
    __syncthreads();
    if (position < half) {
      KERNELS_UNROLL
      for (int j = 0; j < kStates; ++j) {
        A other[Sum::kParts];
        KERNELS_UNROLL
        for (int p = 0; p < Sum::kParts; ++p) {
          other[p] = shared[(j * Sum::kParts + p) * stride + me + half * apart];
        }
        Sum::Combine(states[j], other);
      }
    }
    __syncthreads();
  }
}

// What a block of a reduction has to do: its column, and which of its units.
struct Part {
  int64_t column;
  int64_t split;
  int64_t first;
  int64_t last;
};

__device__ __forceinline__ Part PartOf(const Walk& walk, int64_t splits) {
  Part part;
  const int64_t block = blockIdx.x;
  const int64_t each = CeilDiv<int64_t>(walk.units, splits);
  part.column = block / splits;
  part.split = block % splits;
  part.first = part.split * each;
  part.last = part.first + each < walk.units ? part.first + each : walk.units;
  return part;
}

// Ends a reduction: adds the block's threads up, and hands the sums to `finish`
// if they are whole, or else leaves them in `partial`.
template <typename Sum, typename A, int kVec, bool kLast, int kStates,
          typename Finish>
__device__ void EndReduction(const Walk& walk, const Part& part,
                             const Column& column, int64_t splits,
                             A (&states)[kStates][Sum::kParts],
                             A* partial,  // [splits, parts, groups, channels]
                             const Finish& finish) {
  __shared__ A shared[kStates * Sum::kParts * kThreads];
  const int me = static_cast<int>(threadIdx.x);
  if constexpr (kLast) {
    CombineThreads<Sum>(states, shared, me / walk.bx, walk.by, walk.bx);
    if (me / walk.bx != 0 || !column.inside) return;
  } else {
    CombineThreads<Sum>(states, shared, me, kThreads, 1);
    if (me != 0) return;
  }
  const int64_t stat = column.stat(walk);
  const int64_t all = walk.groups * walk.channels;
  KERNELS_UNROLL
  for (int j = 0; j < kStates; ++j) {
    if (splits == 1) {
      finish(stat + j, states[j]);
    } else {
      KERNELS_UNROLL
      for (int p = 0; p < Sum::kParts; ++p) {
        partial[(part.split * Sum::kParts + p) * all + stat + j] = states[j][p];
      }
    }
  }
}

// Adds up the parts that EndReduction left; blocks are bx channels wide.
template <typename Sum, typename A, typename Finish>
__global__ void __launch_bounds__(kThreads, 2)
    FinishKernel(const A* __restrict__ partial, int64_t splits, int64_t all,
                 int bx, Finish finish) {
  __shared__ A shared[Sum::kParts * kThreads];
  const int tx = static_cast<int>(threadIdx.x) % bx;
  const int ty = static_cast<int>(threadIdx.x) / bx;
  const int by = kThreads / bx;
  const int64_t stat = static_cast<int64_t>(blockIdx.x) * bx + tx;
  A states[1][Sum::kParts] = {};
  if (stat < all) {
    for (int64_t split = ty; split < splits; split += kUnroll * by) {
      A parts[kUnroll][Sum::kParts] = {};
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        if (split + k * by < splits) {
          KERNELS_UNROLL
          for (int p = 0; p < Sum::kParts; ++p) {
            parts[k][p] =
                partial[((split + k * by) * Sum::kParts + p) * all + stat];
          }
        }
      }
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) Sum::Combine(states[0], parts[k]);
    }
  }
  CombineThreads<Sum>(states, shared, ty, by, bx);
  if (ty == 0 && stat < all) finish(stat, states[0]);
}

// ---- Moments.

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

// ---- Normalisation and its gradient.

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

// ---- Choosing, on the host.

bool Aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % cuda::kVectorBytes == 0;
}

// Calls body(kVec, kLast), as types of constants, for the widest access that
// the rows and the arrays at `pointers` allow.
template <typename T, typename Body, typename... Pointers>
cudaError_t DispatchWalk(const Geometry& g, const Body& body,
                         const Pointers*... pointers) {
  constexpr int kWide = cuda::kVectorSize<T>;
  const bool last = g.inner == 1;
  const bool wide =
      (last ? g.channels : g.inner) % kWide == 0 && (Aligned(pointers) && ...);
  using Yes = std::true_type;
  using No = std::false_type;
  using Wide = std::integral_constant<int, kWide>;
  using One = std::integral_constant<int, 1>;
  if (last) return wide ? body(Wide{}, Yes{}) : body(One{}, Yes{});
  return wide ? body(Wide{}, No{}) : body(One{}, No{});
}

cudaError_t GridOf(int64_t blocks, dim3* grid) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  *grid = dim3(static_cast<unsigned>(blocks));
  return cudaSuccess;
}

// Into how many parts to cut each column of an elementwise kernel: enough to
// fill the device several times, but with work for each.
cudaError_t ElementwiseSplits(const Walk& walk, int64_t* splits) {
  int multiprocessors = 0;
  const cudaError_t error = cuda::MultiprocessorCount(&multiprocessors);
  const int64_t wanted = CeilDiv<int64_t>(int64_t{32} * multiprocessors,
                                          walk.groups * walk.columns);
  const int64_t each = CeilDiv<int64_t>(walk.units, wanted);
  *splits = CeilDiv<int64_t>(walk.units, each < 8 ? each : 8);
  return error;
}

// The width of FinishKernel's blocks.
int FinishWidth(int64_t all) {
  return static_cast<int>(PowerOfTwoFrom(all, cuda::kWarp));
}

template <typename Sum, typename A, typename Finish>
cudaError_t LaunchFinish(cudaStream_t stream, const A* partial, int64_t splits,
                         int64_t all, const Finish& finish) {
  if (splits == 1) return cudaSuccess;
  const int bx = FinishWidth(all);
  dim3 grid;
  const cudaError_t error = GridOf(CeilDiv<int64_t>(all, bx), &grid);
  if (error != cudaSuccess) return error;
  return cuda::Launch(FinishKernel<Sum, A, Finish>, grid, dim3(kThreads), 0,
                      stream, partial, splits, all, bx, finish);
}

}  // namespace

#define KERNELS_RETURN_IF_CUDA_ERROR(expression) \
  do {                                           \
    const cudaError_t error = (expression);      \
    if (error != cudaSuccess) return error;      \
  } while (false)

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

#define KERNELS_INSTANTIATE_ONE(T)                                         \
  template cudaError_t LaunchMoments<T>(                                   \
      cudaStream_t, const Geometry&, const T::Storage*, const Mask&, bool, \
      const MomentsResults<T::Compute>&, T::Compute*, int64_t)
KERNELS_INSTANTIATE_ONE(F64);
KERNELS_INSTANTIATE_ONE(F32);
KERNELS_INSTANTIATE_ONE(BF16);
KERNELS_INSTANTIATE_ONE(F16);

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
