// How a block of batch-norm threads goes over x.
//
// Batch norm moves data: a pass reads or writes every array once, in accesses
// of 16 bytes, several of them in flight for each thread.
//
// A block of 256 threads walks down one column of x, or a part of it, step by
// step: in a step every thread makes one access. There are two ways of walking:
//
// - features last (inner is 1): a column is bx vectors of neighbouring
//   channels, a step takes `by` rows, and a thread keeps sums for the channels
//   of its vector;
// - features further in front: a column is one channel, and a step takes the
//   next 256 vectors of its positions, whatever rows of `inner` they lie in, so
//   that no thread is idle where rows are short or end within a step.
//
// Sums go from the end of x to its start, all parts at the same pace, and what
// is elementwise from the start to the end. So where all columns run at once,
// each of them begins with what the one before has left in the cache, and so
// does a kernel of XLA's, which goes from the start to the end, before or
// after.

#ifndef KERNELS_BATCH_STAT_CUDA_WALK_H_
#define KERNELS_BATCH_STAT_CUDA_WALK_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/batch_stat/cc/geometry.h"
#include "kernels/common/cuda_util.h"
#include "kernels/common/element_types.h"

namespace kernels::batch_stat {

using cuda::CeilDiv;
using cuda::LoadVector;
using cuda::StreamVector;
using cuda::ToCompute;
using cuda::Vector;
using cuda::VectorFromCompute;

constexpr int kThreads = 256;

// How many accesses a thread has in flight, for each array that it reads, and
// how many blocks a multiprocessor must have room for: bytes in flight against
// registers, of which threads that have numbers of 8 channels to keep want
// more.
struct Tuning {
  int unroll;
  int blocks;
};
template <int kStates>
constexpr Tuning kMomentsTuning = kStates > 4 ? Tuning{8, 2} : Tuning{8, 3};
template <int kStates>
constexpr Tuning kGradSumsTuning = kStates > 4 ? Tuning{4, 2} : Tuning{2, 3};
template <int kStates>
constexpr Tuning kNormalizeTuning = Tuning{4, 3};
template <int kStates>
constexpr Tuning kGradInputTuning = Tuning{2, 3};
// How many steps a block of an elementwise kernel does at most.
constexpr int kElementwiseSteps = 8;

// For how many channels a thread keeps numbers.
template <int kVec, bool kLast>
constexpr int kStatesOf = kLast ? kVec : 1;

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
  int64_t steps;    // of each column
  int64_t vectors;  // of each row of `inner`; features in front only
  int64_t splits;   // parts of each column
  // Parts of `each` steps, one after the other from the start; or, where that
  // is 0, parts that take turns, step by step, from the end.
  int64_t each;
  // What going on adds to a Cursor, and what the end of a row adds to `x`.
  int64_t step_x;
  int64_t step_shared;
  int64_t step_vector;
  int64_t wrap_x;
};

inline int64_t PowerOfTwoFrom(int64_t n, int64_t most) {
  int64_t power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

// The walk over columns, still without parts.
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
    walk.steps = CeilDiv<int64_t>(g.outer, walk.by);
  } else {
    walk.bx = kThreads;
    walk.by = 1;
    walk.columns = g.channels;
    walk.vectors = g.inner / kVec;
    walk.steps = CeilDiv<int64_t>(g.outer * walk.vectors, kThreads);
    walk.wrap_x = (g.channels - 1) * g.inner;
  }
  return walk;
}

// Lets a part go on by `steps` of the column's, back where that is negative.
template <int kVec, bool kLast>
void SetPace(int64_t steps, Walk* walk) {
  if constexpr (kLast) {
    walk->step_x = steps * walk->by * walk->channels;
    walk->step_shared = steps * walk->by;
  } else {
    const int64_t positions = steps * kThreads;
    // Back by some vectors is a row more back and the others forward.
    int64_t forward = positions % walk->vectors;
    if (forward < 0) forward += walk->vectors;
    walk->step_vector = forward;
    walk->step_x =
        (positions - forward) / walk->vectors * walk->channels * walk->inner +
        forward * kVec;
    walk->step_shared = positions * kVec;
  }
}

// Cuts each column into parts of `each` steps, from the start to the end.
template <int kVec, bool kLast>
void CutInOrder(int64_t each, Walk* walk) {
  walk->each = each;
  walk->splits = CeilDiv<int64_t>(walk->steps, each);
  SetPace<kVec, kLast>(1, walk);
}

// Cuts each column into `splits` parts that take turns, from the end to the
// start.
template <int kVec, bool kLast>
void CutInTurns(int64_t splits, Walk* walk) {
  walk->each = 0;
  walk->splits = splits;
  SetPace<kVec, kLast>(-splits, walk);
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

// What a block has to do: its column, and which of its parts.
struct Part {
  int64_t column;
  int64_t split;
};

// Blocks that follow one another have neighbouring columns.
__device__ __forceinline__ Part PartOf(const Walk& walk) {
  const unsigned columns = static_cast<unsigned>(walk.groups * walk.columns);
  return {blockIdx.x % columns, blockIdx.x / columns};
}

// Where one access goes: offsets into x and into a mask that the channels
// share.
struct Place {
  int64_t x;
  int64_t shared;
};

// The places of one thread, one after the other: going on is a few additions.
struct Cursor {
  Place place;
  int64_t vector;  // in its row of `inner`; features in front only
  int64_t left;    // how many more places there are

  template <bool kLast>
  __device__ __forceinline__ Place Next(const Walk& walk) {
    const Place out = place;
    place.x += walk.step_x;
    place.shared += walk.step_shared;
    if constexpr (!kLast) {
      vector += walk.step_vector;
      if (vector >= walk.vectors) {
        vector -= walk.vectors;
        place.x += walk.wrap_x;
      }
    }
    --left;
    return out;
  }

  // The next places, of which those that are left are inside x.
  template <bool kLast, int kCount>
  __device__ __forceinline__ void Take(const Walk& walk,
                                       Place (&places)[kCount]) {
    KERNELS_UNROLL
    for (int k = 0; k < kCount; ++k) places[k] = Next<kLast>(walk);
  }
};

template <int kVec, bool kLast>
__device__ __forceinline__ Cursor CursorOf(const Walk& walk, const Part& part,
                                           const Column& column) {
  const int me = static_cast<int>(threadIdx.x);
  // Of the column, rows or vectors of positions: in a step, and all.
  const int64_t unit = kLast ? walk.by : kThreads;
  const int64_t all = kLast ? walk.outer : walk.outer * walk.vectors;
  int64_t at = kLast ? me / walk.bx : me;
  Cursor cursor = {};
  if (walk.each > 0) {
    at += part.split * walk.each * unit;
    const int64_t end = (part.split + 1) * walk.each * unit;
    const int64_t count = (end < all ? end : all) - at;
    if (count > 0) cursor.left = CeilDiv<int64_t>(count, unit);
  } else {
    int64_t step = walk.steps - 1 - part.split;
    if (step * unit + at >= all) step -= walk.splits;
    if (step >= 0) cursor.left = step / walk.splits + 1;
    at += step * unit;
  }
  if constexpr (kLast) {
    at += column.group * walk.outer;
    cursor.place.x = at * walk.channels + column.channel;
    cursor.place.shared = at;
    if (!column.inside) cursor.left = 0;
  } else {
    const int64_t row = at / walk.vectors;
    cursor.vector = at % walk.vectors;
    cursor.place.x =
        ((column.group * walk.outer + row) * walk.channels + column.channel) *
            walk.inner +
        cursor.vector * kVec;
    cursor.place.shared = column.group * walk.outer * walk.inner + at * kVec;
  }
  return cursor;
}

// Reads the first `count` of the places, or all of them with kAll.
template <typename T, int kVec, bool kAll, int kCount>
__device__ __forceinline__ void LoadAll(const typename T::Storage* from,
                                        const Place (&places)[kCount],
                                        int64_t count,
                                        Vector<T, kVec> (&values)[kCount]) {
  KERNELS_UNROLL
  for (int k = 0; k < kCount; ++k) {
    if (kAll || k < count) {
      values[k] = LoadVector<T, kVec>(from + places[k].x);
    } else {
      values[k] = {};
    }
  }
}

// Which elements of an access count: bytes, which are 0 where one does not, and
// of a mask of XLA's 1 where it does.
template <int kVec>
using Kept = Vector<Bool, kVec>;

template <int kVec>
__device__ __forceinline__ bool AllAre(const Kept<kVec>& kept, uint8_t byte) {
  Kept<kVec> same;
  KERNELS_UNROLL
  for (int j = 0; j < kVec; ++j) same.data[j] = byte;
  uint64_t words[2] = {};
  static_assert(sizeof(kept) <= sizeof(words[0]));
  std::memcpy(&words[0], &kept, sizeof(kept));
  std::memcpy(&words[1], &same, sizeof(same));
  return words[0] == words[1];
}

// Whether each element of the places counts: it is one of the first `count`
// places, and the mask keeps it.
template <int kVec, bool kLast, int kCount>
__device__ __forceinline__ void LoadKept(const Mask& mask,
                                         const Place (&places)[kCount],
                                         int64_t count,
                                         Kept<kVec> (&kept)[kCount]) {
  KERNELS_UNROLL
  for (int k = 0; k < kCount; ++k) {
    Kept<kVec>& bytes = kept[k];
    bytes = {};
    if (k < count) {
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

inline bool Aligned(const void* pointer) {
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

// The grid of so many blocks.
inline cudaError_t GridOf(int64_t blocks, dim3* grid) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  *grid = dim3(static_cast<unsigned>(blocks));
  return cudaSuccess;
}

// The grid that has a block for each part.
inline cudaError_t GridOf(const Walk& walk, dim3* grid) {
  return GridOf(walk.groups * walk.columns * walk.splits, grid);
}

}  // namespace kernels::batch_stat

#define KERNELS_RETURN_IF_CUDA_ERROR(expression) \
  do {                                           \
    const cudaError_t error = (expression);      \
    if (error != cudaSuccess) return error;      \
  } while (false)

#endif  // KERNELS_BATCH_STAT_CUDA_WALK_H_
