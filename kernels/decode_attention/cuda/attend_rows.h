// Attending without tensor cores, for float32 and for whatever those are not
// used for. A group of lanes reads keys and values, 16 bytes a lane, and keeps
// its own running softmax. Lanes copy what they read next into a place of their
// own in shared memory while they work on what they have.
#ifndef KERNELS_DECODE_ATTENTION_CUDA_ATTEND_ROWS_H_
#define KERNELS_DECODE_ATTENTION_CUDA_ATTEND_ROWS_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cuda/elements.h"
#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cuda/attend.h"
#include "kernels/decode_attention/cuda/decode.h"

namespace kernels {
namespace decode_attention {

using cache::Element;

template <int kBytes>
struct Words;  // 16 bytes of a cache
template <>
struct Words<4> {
  static constexpr int kCount = 4;
  static __device__ __forceinline__ void ToFloat(Element, const uint4& words,
                                                 float (&x)[4]) {
    x[0] = __uint_as_float(words.x);
    x[1] = __uint_as_float(words.y);
    x[2] = __uint_as_float(words.z);
    x[3] = __uint_as_float(words.w);
  }
};
template <>
struct Words<2> {
  static constexpr int kCount = 8;
  static __device__ __forceinline__ void ToFloat(Element element,
                                                 const uint4& words,
                                                 float (&x)[8]) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    KERNELS_UNROLL
    for (int i = 0; i < 8; ++i) {
      const auto half = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
      x[i] = element == Element::kBf16 ? cuda::ToCompute<BF16>(half)
                                       : cuda::ToCompute<F16>(half);
    }
  }
};
template <>
struct Words<1> {
  static constexpr int kCount = 16;
  static __device__ __forceinline__ void ToFloat(Element element,
                                                 const uint4& words,
                                                 float (&x)[16]) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    KERNELS_UNROLL
    for (int i = 0; i < 16; ++i) {
      const auto code = static_cast<uint8_t>(word[i / 4] >> (i % 4 * 8));
      x[i] = element == Element::kInt8
                 ? cuda::ToCompute<Int8>(static_cast<int8_t>(code))
             : element == Element::kE4m3 ? cuda::ToCompute<E4M3>(code)
                                         : cuda::ToCompute<E5M2>(code);
    }
  }
};

// How a group of kLanes lanes reads a row of a cache: kLoads times 16 bytes a
// lane.
template <int kElementBytes, int kGroupLanes, int kLoadsPerLane>
struct Wide {
  static constexpr int kLanes = kGroupLanes;
  static constexpr int kLoads = kLoadsPerLane;
  static constexpr int kCount = Words<kElementBytes>::kCount;  // of a load
  static constexpr int kMostDim = kLanes * kLoads * kCount;
  using Raw = uint4;

  static __device__ __forceinline__ int First(int lane, int load) {
    return (load * kLanes + lane) * kCount;
  }
  static __device__ __forceinline__ void Fetch(const DeviceDecode&,
                                               const uint8_t* cache,
                                               int64_t row, int64_t dim, int at,
                                               const Key&, bool, Raw* to) {
    const bool valid = row >= 0 && at < dim;
    const uint8_t* from = cache + (valid ? row * dim + at : 0) * kElementBytes;
    cuda::CopyAsync<kReadOnce<kElementBytes>>(
        to, reinterpret_cast<const uint4*>(from), valid);
  }
  static __device__ __forceinline__ void ToFloat(Element element,
                                                 const Raw& raw,
                                                 float (&x)[kCount]) {
    Words<kElementBytes>::ToFloat(element, raw, x);
  }
};

// A warp reads a row one element a lane: for rows of any length, and for keys
// that are turned when they are read.
template <int kLoadsPerLane>
struct Single {
  static constexpr int kLanes = cuda::kWarp;
  static constexpr int kLoads = kLoadsPerLane;
  static constexpr int kCount = 1;
  static constexpr int kMostDim = kLanes * kLoads;
  using Raw = float;

  static __device__ __forceinline__ int First(int lane, int load) {
    return load * kLanes + lane;
  }
  static __device__ __forceinline__ void Fetch(const DeviceDecode& decode,
                                               const uint8_t* cache,
                                               int64_t row, int64_t dim, int at,
                                               const Key& key, bool is_key,
                                               Raw* to) {
    *to = 0.0f;
    if (row < 0 || at >= dim) return;
    const DecodeArgs& args = decode.args;
    const uint8_t* from = cache + row * dim * cache::ElementSize(args.element);
    const auto load = [&](int64_t j) {
      return cache::LoadElement(args.element, from, j);
    };
    *to = is_key && args.rotary.cached_keys
              ? Turned(args.rotary, key.position, at, load)
              : load(at);
  }
  static __device__ __forceinline__ void ToFloat(Element, const Raw& raw,
                                                 float (&x)[1]) {
    x[0] = raw;
  }
};

// Adds up each of kCount values over the kLanes lanes of a group. The lanes
// share the work: afterwards value[0] of a lane is sum number lane / (kLanes /
// kCount).
template <int kCount, int kLanes>
__device__ __forceinline__ void SumEach(float (&value)[kCount], int lane) {
  int lanes = kLanes / 2;
  KERNELS_UNROLL
  for (int left = kCount; left > 1; left /= 2) {
    const bool upper = (lane & lanes) != 0;
    KERNELS_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= left / 2) continue;
      const float keep = upper ? value[i + left / 2] : value[i];
      const float give = upper ? value[i] : value[i + left / 2];
      value[i] = keep + __shfl_xor_sync(cuda::kAllLanes, give, lanes);
    }
    lanes /= 2;
  }
  for (; lanes > 0; lanes /= 2) {
    value[0] += __shfl_xor_sync(cuda::kAllLanes, value[0], lanes);
  }
}

// Keys of a group that are worked on at a time.
template <typename Read>
constexpr int kKeysAtATime = Read::kLoads > 2                        ? 1
                             : Read::kLoads == 2 && Read::kCount > 8 ? 1
                             : Read::kLoads == 2                     ? 2
                                                                     : 4;

// Floats that a block has of q, and of qv, [kRows, kMostDim].
template <typename Read, int kRows>
constexpr int kQueryFloats = kRows * Read::kMostDim;

// All keys of a block of rows. All threads of the block take part. One long
// function, since all of it works on the same registers.
template <typename Read, int kRows>
__device__ __forceinline__ void AttendRows(const DeviceDecode& decode,
                                           const BlockPlace& place,
                                           const Segment segment) {
  constexpr int kLanes = Read::kLanes;
  constexpr int kLoads = Read::kLoads;
  constexpr int kCount = Read::kCount;
  constexpr int kKeys = kKeysAtATime<Read>;
  constexpr int kLogits = kRows * kKeys;    // of a group
  constexpr int kShare = kLanes / kLogits;  // lanes that have the same one
  constexpr int kGroups = kAttendThreads / kLanes;
  static_assert(kShare >= 1);
  KERNELS_DYNAMIC_SHARED(shared);
  __shared__ float bases[kGroups][kRows];
  __shared__ float totals[kGroups][kRows];
  const DecodeArgs& args = decode.args;
  const int64_t k_dim = args.shape.k_dim, v_dim = args.shape.v_dim;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / cuda::kWarp;
  const int group = thread / kLanes, lane = thread % kLanes;

  // q and in the end the sums; qv.
  float* q = reinterpret_cast<float*>(shared);
  float* qv = q + kQueryFloats<Read, kRows>;
  // What this lane reads: [2, kKeys, kLoads, 2], one half being copied.
  typename Read::Raw* const mine =
      reinterpret_cast<typename Read::Raw*>(
          qv + (args.qv == nullptr ? 0 : kQueryFloats<Read, kRows>)) +
      thread;
  const auto fetched = [&](int half, int key, int load, bool value) {
    return mine + (((half * kKeys + key) * kLoads + load) * 2 + value) *
                      kAttendThreads;
  };
  // After SumEach, a lane has the logit of this row and this key of the group.
  const int my_row = lane / kShare / kKeys;
  const int my_key = lane / kShare % kKeys;
  // Starts copying the keys from `slot` on, and their values; returns the
  // position of my_key.
  const auto fetch = [&](int slot, int half) {
    int my_position = -1;
    if (slot < segment.end) {
      KERNELS_UNROLL
      for (int u = 0; u < kKeys; ++u) {
        const Key key =
            FindKey(decode, place, segment, slot + u * kGroups + group);
        if (u == my_key) my_position = key.position;
        KERNELS_UNROLL
        for (int i = 0; i < kLoads; ++i) {
          const int at = Read::First(lane, i);
          Read::Fetch(decode, args.cache_k, key.row, k_dim, at, key,
                      /*is_key=*/true, fetched(half, u, i, false));
          Read::Fetch(decode, args.cache_v, key.row, v_dim, at, key,
                      /*is_key=*/false, fetched(half, u, i, true));
        }
      }
    }
    cuda::CommitCopies();
    return my_position;
  };
  int next_position = fetch(segment.begin, 0);

  const float k_scale = args.k_scale.OrOne(segment.sequence, place.head);
  const float v_scale = args.v_scale.OrOne(segment.sequence, place.head);
  for (int i = thread; i < kRows * Read::kMostDim; i += kAttendThreads) {
    const int row = place.row_begin + i / Read::kMostDim;
    const int d = i % Read::kMostDim;
    const bool inside = row < place.row_end;
    q[i] =
        inside && d < k_dim
            ? QueryRowReader(decode, segment.sequence, place.head, row).At(d) *
                  k_scale
            : 0.0f;
    if (args.qv == nullptr) continue;
    const uint8_t* from =
        args.qv + QueryRowOf(args, segment.sequence, place.head, row) * v_dim *
                      cache::ElementSize(args.query_element);
    qv[i] = inside && d < v_dim
                ? cache::LoadElement(args.query_element, from, d) * v_scale
                : 0.0f;
  }
  __syncthreads();

  // A copy may stay in registers, what a function returns may not.
  Query query;
  query = FindQuery(decode, place, segment, place.row_begin + my_row);
  const int first_lane = thread % cuda::kWarp / kLanes * kLanes;

  float best = MinusInfinity();
  float total = 0.0f;
  float sums[kRows][kLoads][kCount];
  KERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    KERNELS_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      KERNELS_UNROLL
      for (int c = 0; c < kCount; ++c) sums[r][i][c] = 0.0f;
    }
  }

  int half = 0;
  for (int slot = segment.begin; slot < segment.end; slot += kGroups * kKeys) {
    const int my_position = next_position;
    next_position = fetch(slot + kGroups * kKeys, half ^ 1);
    cuda::WaitForCopies<1>();

    float logits[kLogits] = {};
    KERNELS_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      KERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float* row = q + r * Read::kMostDim + Read::First(lane, i);
        const float* row_v = qv + r * Read::kMostDim + Read::First(lane, i);
        KERNELS_UNROLL
        for (int u = 0; u < kKeys; ++u) {
          float x[kCount];
          Read::ToFloat(args.element, *fetched(half, u, i, false), x);
          KERNELS_UNROLL
          for (int c = 0; c < kCount; ++c) {
            logits[r * kKeys + u] += row[c] * x[c];
          }
          if (args.qv == nullptr) continue;
          Read::ToFloat(args.element, *fetched(half, u, i, true), x);
          KERNELS_UNROLL
          for (int c = 0; c < kCount; ++c) {
            logits[r * kKeys + u] += row_v[c] * x[c];
          }
        }
      }
    }
    SumEach<kLogits, kLanes>(logits, lane);

    const int my_slot = slot + my_key * kGroups + group;
    const float x =
        Logit(decode, place, query, logits[0], my_slot, my_position);
    float highest = x;
    KERNELS_UNROLL
    for (int lanes = kShare; lanes < kShare * kKeys; lanes *= 2) {
      highest =
          fmaxf(highest, __shfl_xor_sync(cuda::kAllLanes, highest, lanes));
    }
    const float now = fmaxf(best, highest);
    const float correction = Weight(best, now);
    const bool moved = now > best;
    best = now;
    const float weight = Weight(x, now);
    total = total * correction + weight;
    if (__any_sync(cuda::kAllLanes, moved)) {
      KERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float by = __shfl_sync(cuda::kAllLanes, correction,
                                     first_lane + r * kKeys * kShare);
        KERNELS_UNROLL
        for (int i = 0; i < kLoads; ++i) {
          KERNELS_UNROLL
          for (int c = 0; c < kCount; ++c) sums[r][i][c] *= by;
        }
      }
    }
    KERNELS_UNROLL
    for (int u = 0; u < kKeys; ++u) {
      float weights[kRows];
      KERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        weights[r] = __shfl_sync(cuda::kAllLanes, weight,
                                 first_lane + (r * kKeys + u) * kShare);
      }
      KERNELS_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        float v[kCount];
        Read::ToFloat(args.element, *fetched(half, u, i, true), v);
        KERNELS_UNROLL
        for (int r = 0; r < kRows; ++r) {
          KERNELS_UNROLL
          for (int c = 0; c < kCount; ++c) sums[r][i][c] += weights[r] * v[c];
        }
      }
    }
    half ^= 1;
  }

  // Joins the groups.
  KERNELS_UNROLL
  for (int lanes = kShare; lanes < kShare * kKeys; lanes *= 2) {
    total += __shfl_xor_sync(cuda::kAllLanes, total, lanes);
  }
  if (lane % (kShare * kKeys) == 0) {
    bases[group][my_row] = best;
    totals[group][my_row] = total;
  }
  __syncthreads();
  float scale[kRows];
  KERNELS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float largest = MinusInfinity();
    for (int i = 0; i < kGroups; ++i) largest = fmaxf(largest, bases[i][r]);
    scale[r] = Weight(bases[group][r], largest);
  }
  for (int turn = 0; turn < kGroups; ++turn) {
    if (turn == group) {
      KERNELS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        KERNELS_UNROLL
        for (int i = 0; i < kLoads; ++i) {
          float* to = q + r * Read::kMostDim + Read::First(lane, i);
          KERNELS_UNROLL
          for (int c = 0; c < kCount; ++c) {
            const float x = sums[r][i][c] * scale[r];
            to[c] = turn == 0 ? x : to[c] + x;
          }
        }
      }
    }
    __syncthreads();
  }
  for (int r = warp; r < kRows; r += kAttendWarps) {
    const int row = place.row_begin + r;
    if (row >= place.row_end) continue;
    float largest = MinusInfinity();
    for (int i = 0; i < kGroups; ++i) largest = fmaxf(largest, bases[i][r]);
    float all = 0.0f;
    for (int i = 0; i < kGroups; ++i) {
      all += totals[i][r] * Weight(bases[i][r], largest);
    }
    constexpr int kCountOfLane = Read::kMostDim / cuda::kWarp;
    OfLane<kCountOfLane> sums_of_lane;
    KERNELS_UNROLL
    for (int i = 0; i < kCountOfLane; ++i) {
      sums_of_lane.x[i] =
          q[r * Read::kMostDim + thread % cuda::kWarp * kCountOfLane + i];
    }
    WriteRow<kCountOfLane>(decode, place, segment, row, largest, all,
                           sums_of_lane);
  }
}

template <typename Read, int kRows>
__global__ void __launch_bounds__(kAttendThreads, Read::kLoads == 1 ? 4 : 1)
    AttendKernel(const __grid_constant__ DeviceDecode decode) {
  const BlockPlace place = PlaceOfBlock(decode, kRows);
  Range range;
  __shared__ Segment segments[kAttendThreads];
  cuda::WaitForPrevious();
  int count = FirstSegments(decode, place, &range, segments);
  for (; count > 0; count = TakeSegments(decode, place, &range, segments)) {
    for (int i = 0; i < count; ++i) {
      AttendRows<Read, kRows>(decode, place, segments[i]);
      if (segments[i].part >= 0) JoinIfLast(decode, place, segments[i]);
      __syncthreads();  // others may still read what is written next
    }
  }
}

template <typename Read, int kRows>
cudaError_t LaunchAttendWith(cudaStream_t stream, DeviceDecode decode) {
  constexpr int kQueryBytes =
      kQueryFloats<Read, kRows> * static_cast<int>(sizeof(float));
  constexpr int kFetchedBytes = 2 * kKeysAtATime<Read> * Read::kLoads * 2 *
                                kAttendThreads *
                                static_cast<int>(sizeof(typename Read::Raw));
  // Devices of compute capability 7.5 have 64 KB, with what kernels declare.
  static_assert(2 * kQueryBytes + kFetchedBytes < 55 << 10);
  const int queries = decode.args.qv == nullptr ? 1 : 2;
  return LaunchWorkers(AttendKernel<Read, kRows>, kRows,
                       queries * kQueryBytes + kFetchedBytes, stream, decode);
}

template <int kBytes>
cudaError_t LaunchAttendWide(cudaStream_t stream, DeviceDecode decode) {
  const cache::CacheShape& shape = decode.args.shape;
  const int64_t dim = shape.k_dim > shape.v_dim ? shape.k_dim : shape.v_dim;
  const int64_t bytes = dim * kBytes;
  if constexpr (kBytes == 4) {
    const bool one = decode.rows() == 1;
    if (bytes <= 256) {
      return one ? LaunchAttendWith<Wide<4, 16, 1>, 1>(stream, decode)
                 : LaunchAttendWith<Wide<4, 16, 1>, 4>(stream, decode);
    }
    if (bytes <= 512 && one) {
      return LaunchAttendWith<Wide<4, 32, 1>, 1>(stream, decode);
    }
  }
  if (bytes <= 512) {
    return LaunchAttendWith<Wide<kBytes, 32, 1>, 4>(stream, decode);
  }
  if (bytes <= 1024) {
    return LaunchAttendWith<Wide<kBytes, 32, 2>, 4>(stream, decode);
  }
  return LaunchAttendWith<Wide<kBytes, 32, 4>, kBytes>(stream, decode);
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CUDA_ATTEND_ROWS_H_
