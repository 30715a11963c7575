// How a block of batch-norm threads goes over x.
//
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

#ifndef KERNELS_BATCH_STAT_WALK_CUDA_H_
#define KERNELS_BATCH_STAT_WALK_CUDA_H_

#include <cstdint>
#include <type_traits>

#include "kernels/batch_stat/geometry.h"
#include "kernels/common/cuda_util.h"
#include "kernels/common/element_types.h"

namespace kernels::batch_stat {

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

inline int64_t PowerOfTwoFrom(int64_t n, int64_t most) {
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

inline cudaError_t GridOf(int64_t blocks, dim3* grid) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  *grid = dim3(static_cast<unsigned>(blocks));
  return cudaSuccess;
}

}  // namespace kernels::batch_stat

#define KERNELS_RETURN_IF_CUDA_ERROR(expression) \
  do {                                           \
    const cudaError_t error = (expression);      \
    if (error != cudaSuccess) return error;      \
  } while (false)

#endif  // KERNELS_BATCH_STAT_WALK_CUDA_H_
