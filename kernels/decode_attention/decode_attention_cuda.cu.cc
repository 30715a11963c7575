// Decode attention for CUDA, in three launches: new rows are appended and the
// keys are divided into parts; parts are attended to; parts are joined.
//
// Parts are made on the device from the lengths of the sequences, so that each
// has about as many keys as the others, whatever the lengths: a long sequence
// has many, a short one has one, whose result is written at once.
//
// This file has the kernel for float32 and for whatever tensor cores are not
// used for. A group of lanes reads a key and a value, 16 bytes a lane, several
// keys in flight, and keeps its own running softmax.

#include "kernels/decode_attention/decode_attention_cuda.h"

#include <cstdint>

#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/attend_cuda.h"
#include "kernels/decode_attention/decode_args.h"
#include "kernels/kv_cache/cache_layout.h"
#include "kernels/kv_cache/elements_cuda.h"
#include "kernels/kv_cache/update_cuda.h"

namespace kernels {
namespace decode_attention {
namespace {

using kv_cache::Element;

// ---- Append, and divide the work.

constexpr int kPrepareThreads = 256;
constexpr int kPrepareBlocksPerMultiprocessor = 4;

// Adds `value` over the threads before this one, and over all of them. All
// threads of the block take part.
__device__ __forceinline__ int64_t SumBefore(int64_t value, int64_t* all) {
  __shared__ int64_t warps[kPrepareThreads / cuda::kWarp];
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  int64_t sum = value;
  for (int by = 1; by < cuda::kWarp; by *= 2) {
    const int64_t other = __shfl_up_sync(cuda::kAllLanes, sum, by);
    if (lane >= by) sum += other;
  }
  __syncthreads();  // who was here before may still read
  if (lane == cuda::kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  *all = 0;
  for (int w = 0; w < kPrepareThreads / cuda::kWarp; ++w) {
    if (w < warp) before += warps[w];
    *all += warps[w];
  }
  return before + sum - value;
}

// Writes the headers of all parts; one block.
__device__ void MakeParts(const DeviceDecode& decode) {
  const DecodeArgs& args = decode.args;
  const int64_t b = args.addressing.batch;
  const kv_cache::Addressing addressing = AddressingOf(decode);
  const auto slots_of = [&](int64_t i) {
    return NeededSlots(args.masking, args.shape, addressing,
                       SequenceOf(args, i), 0, args.tokens);
  };
  int64_t mine = 0, total;
  for (int64_t i = threadIdx.x; i < b; i += kPrepareThreads) {
    mine += slots_of(i).size();
  }
  SumBefore(mine, &total);
  const int64_t shared = decode.shared_parts();
  int64_t length = INT32_MAX;  // of a part
  if (shared > 0) {
    length = cuda::CeilDiv(total, shared);
    if (length < kLeastPart) length = kLeastPart;
    length = cuda::CeilDiv<int64_t>(length, kPartStep) * kPartStep;
  }
  int64_t first = 0;
  for (int64_t begin = 0; begin < b; begin += kPrepareThreads) {
    const int64_t i = begin + threadIdx.x;
    Slots slots = {0, 0};
    int64_t parts = 0;
    if (i < b) {
      slots = slots_of(i);
      parts = cuda::CeilDiv(slots.size(), length);
      if (parts < 1) parts = 1;
    }
    int64_t all;
    const int64_t at = first + SumBefore(parts, &all);
    for (int64_t p = 0; p < parts; ++p) {
      PartHeader* header = HeaderOf(decode, at + p);
      const int64_t end = slots.begin + (p + 1) * length;
      header->sequence = static_cast<int>(i);
      header->begin = static_cast<int>(slots.begin + p * length);
      header->end = static_cast<int>(end < slots.end ? end : slots.end);
      header->parts = static_cast<int>(parts);
    }
    if (i < b) {
      PartHeader* header = HeaderOf(decode, i);
      header->first_part = static_cast<int>(at);
      header->num_parts = static_cast<int>(parts);
    }
    first += all;
  }
  for (int64_t p = first + threadIdx.x; p < decode.parts;
       p += kPrepareThreads) {
    HeaderOf(decode, p)->sequence = -1;
  }
}

// Blocks of the last y divide the work, those of y = 0 and 1 write keys and
// values.
__global__ void __launch_bounds__(kPrepareThreads)
    PrepareKernel(const DeviceDecode decode,
                  const kv_cache::DeviceUpdate update) {
  if (blockIdx.y == gridDim.y - 1) {
    if (blockIdx.x == 0) MakeParts(decode);
    return;
  }
  const uint32_t thread = blockIdx.x * kPrepareThreads + threadIdx.x;
  const uint32_t threads = gridDim.x * kPrepareThreads;
  const kv_cache::NewRows& rows = update.rows[blockIdx.y];
  const Rotary& rotary = decode.args.rotary;
  if (blockIdx.y == 0 && rotary.cos != nullptr && !rotary.cached_keys) {
    // New keys are turned by the angles of their positions.
    const int64_t tokens = decode.args.tokens;
    ConvertRows(update, rows, thread, threads,
                [&](const kv_cache::Item& item, const uint8_t* row,
                    Element element, int64_t i) {
                  const int64_t token = item.sequence * tokens + item.token;
                  return Turned(rotary, rotary.where[token], i, [&](int64_t j) {
                    return kv_cache::LoadElement(element, row, j);
                  });
                });
  } else {
    UpdateRows(update, rows, thread, threads);
  }
}

// ---- Attend without tensor cores.

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
  static __device__ __forceinline__ Raw Load(const DeviceDecode&,
                                             const uint8_t* cache, int64_t row,
                                             int64_t dim, int at, const Key&,
                                             bool) {
    return row >= 0 && at < dim ? __ldg(reinterpret_cast<const uint4*>(
                                      cache + (row * dim + at) * kElementBytes))
                                : make_uint4(0, 0, 0, 0);
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
  static __device__ __forceinline__ Raw Load(const DeviceDecode& decode,
                                             const uint8_t* cache, int64_t row,
                                             int64_t dim, int at,
                                             const Key& key, bool is_key) {
    if (row < 0 || at >= dim) return 0.0f;
    const DecodeArgs& args = decode.args;
    const uint8_t* from =
        cache + row * dim * kv_cache::ElementSize(args.element);
    const auto load = [&](int64_t j) {
      return kv_cache::LoadElement(args.element, from, j);
    };
    return is_key && args.rotary.cached_keys
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

template <typename Read, int kRows>
__global__ void __launch_bounds__(kAttendThreads)
    AttendKernel(const DeviceDecode decode) {
  constexpr int kLanes = Read::kLanes;
  constexpr int kLoads = Read::kLoads;
  constexpr int kCount = Read::kCount;
  // Keys of a group that are in flight: as many as registers allow.
  constexpr int kKeys = kLoads > 2 ? 1 : kLoads == 2 ? 2 : kRows == 1 ? 8 : 4;
  constexpr int kLogits = kRows * kKeys;    // of a group
  constexpr int kShare = kLanes / kLogits;  // lanes that have the same one
  constexpr int kGroups = kAttendThreads / kLanes;
  static_assert(kShare >= 1);
  KERNELS_DYNAMIC_SHARED(shared);
  __shared__ float bases[kGroups][kRows];
  __shared__ float totals[kGroups][kRows];
  Block block;
  if (!FindBlock(decode, kRows, &block)) return;
  const DecodeArgs& args = decode.args;
  const int64_t k_dim = args.shape.k_dim, v_dim = args.shape.v_dim;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / cuda::kWarp;
  const int group = thread / kLanes, lane = thread % kLanes;

  // [kRows, kMostDim] each: q, qv, and in the end the sums.
  float* q = reinterpret_cast<float*>(shared);
  float* qv = q + kRows * Read::kMostDim;
  const int64_t scales = block.sequence * args.shape.heads + block.head;
  const float k_scale = args.k_scale == nullptr ? 1.0f : args.k_scale[scales];
  const float v_scale = args.v_scale == nullptr ? 1.0f : args.v_scale[scales];
  for (int i = thread; i < kRows * Read::kMostDim; i += kAttendThreads) {
    const int64_t row = block.row_begin + i / Read::kMostDim;
    const int d = i % Read::kMostDim;
    const bool inside = row < block.row_end;
    q[i] = inside && d < k_dim ? QueryElement(decode, block, row, d) * k_scale
                               : 0.0f;
    if (args.qv == nullptr) continue;
    const uint8_t* from =
        args.qv + QueryRow(args, block.sequence, block.head, row) * v_dim *
                      kv_cache::ElementSize(args.query_element);
    qv[i] = inside && d < v_dim
                ? kv_cache::LoadElement(args.query_element, from, d) * v_scale
                : 0.0f;
  }
  __syncthreads();

  // After SumEach, a lane has the logit of this row and this key of the group.
  const int my_row = lane / kShare / kKeys;
  const int my_key = lane / kShare % kKeys;
  const Query query = FindQuery(decode, block, block.row_begin + my_row);
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

  for (int slot = block.begin; slot < block.end; slot += kGroups * kKeys) {
    typename Read::Raw keys[kKeys][kLoads], values[kKeys][kLoads];
    int my_position = -1;
    KERNELS_UNROLL
    for (int u = 0; u < kKeys; ++u) {
      const Key key = FindKey(decode, block, slot + u * kGroups + group);
      if (u == my_key) my_position = key.position;
      KERNELS_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int at = Read::First(lane, i);
        keys[u][i] = Read::Load(decode, args.cache_k, key.row, k_dim, at, key,
                                /*is_key=*/true);
        values[u][i] = Read::Load(decode, args.cache_v, key.row, v_dim, at, key,
                                  /*is_key=*/false);
      }
    }

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
          Read::ToFloat(args.element, keys[u][i], x);
          KERNELS_UNROLL
          for (int c = 0; c < kCount; ++c) {
            logits[r * kKeys + u] += row[c] * x[c];
          }
          if (args.qv == nullptr) continue;
          Read::ToFloat(args.element, values[u][i], x);
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
        Logit(decode, block, query, logits[0], my_slot, my_position);
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
        Read::ToFloat(args.element, values[u][i], v);
        KERNELS_UNROLL
        for (int r = 0; r < kRows; ++r) {
          KERNELS_UNROLL
          for (int c = 0; c < kCount; ++c) sums[r][i][c] += weights[r] * v[c];
        }
      }
    }
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
    const int64_t row = block.row_begin + r;
    if (row >= block.row_end) continue;
    float largest = MinusInfinity();
    for (int i = 0; i < kGroups; ++i) largest = fmaxf(largest, bases[i][r]);
    float all = 0.0f;
    for (int i = 0; i < kGroups; ++i) {
      all += totals[i][r] * Weight(bases[i][r], largest);
    }
    WriteRow(decode, block, row, largest, all, q + r * Read::kMostDim);
  }
}

template <typename Read, int kRows>
cudaError_t LaunchAttendWith(cudaStream_t stream, const DeviceDecode& decode) {
  const int64_t row_blocks = cuda::CeilDiv<int64_t>(decode.rows(), kRows);
  const int64_t blocks = decode.parts * decode.args.shape.heads * row_blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kBytes =
      2 * kRows * Read::kMostDim * static_cast<int>(sizeof(float));
  static_assert(kBytes <= 48 << 10, "more would have to be asked for");
  return cuda::Launch(AttendKernel<Read, kRows>,
                      dim3(static_cast<unsigned>(blocks)), dim3(kAttendThreads),
                      kBytes, stream, decode);
}

cudaError_t LaunchAttend(cudaStream_t stream, const DeviceDecode& decode) {
  const DecodeArgs& args = decode.args;
  const kv_cache::CacheShape& shape = args.shape;
  const int64_t dim = shape.k_dim > shape.v_dim ? shape.k_dim : shape.v_dim;
  const int64_t size = kv_cache::ElementSize(args.element);
  if (!WideRows(args)) {
    return dim <= Single<8>::kMostDim
               ? LaunchAttendWith<Single<8>, 1>(stream, decode)
               : LaunchAttendWith<Single<16>, 1>(stream, decode);
  }
  const int64_t bytes = dim * size;
  if (size == 4) {
    const bool one = decode.rows() == 1;
    if (bytes <= 256) {
      return one ? LaunchAttendWith<Wide<4, 16, 1>, 1>(stream, decode)
                 : LaunchAttendWith<Wide<4, 16, 1>, 4>(stream, decode);
    }
    if (bytes <= 512) {
      return one ? LaunchAttendWith<Wide<4, 32, 1>, 1>(stream, decode)
                 : LaunchAttendWith<Wide<4, 32, 1>, 4>(stream, decode);
    }
    return bytes <= 1024 ? LaunchAttendWith<Wide<4, 32, 2>, 4>(stream, decode)
                         : LaunchAttendWith<Wide<4, 32, 4>, 4>(stream, decode);
  }
  if (size == 2) {
    return bytes <= 512 ? LaunchAttendWith<Wide<2, 32, 1>, 4>(stream, decode)
           : bytes <= 1024
               ? LaunchAttendWith<Wide<2, 32, 2>, 4>(stream, decode)
               : LaunchAttendWith<Wide<2, 32, 4>, 4>(stream, decode);
  }
  return bytes <= 512 ? LaunchAttendWith<Wide<1, 32, 1>, 4>(stream, decode)
                      : LaunchAttendWith<Wide<1, 32, 2>, 4>(stream, decode);
}

// ---- Join the parts of a sequence.

constexpr int kJoinThreads = 256;
constexpr int kJoinWarps = kJoinThreads / cuda::kWarp;

// One query row of one key-value head of one sequence: warps share the parts.
__global__ void __launch_bounds__(kJoinThreads)
    JoinKernel(const DeviceDecode decode) {
  KERNELS_DYNAMIC_SHARED(shared);
  __shared__ float across[2][kJoinWarps];
  const DecodeArgs& args = decode.args;
  const int64_t states = decode.states();
  const int64_t sequence = blockIdx.x / states;
  const int64_t state = blockIdx.x % states;
  const int64_t dim = args.shape.v_dim;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / cuda::kWarp, lane = thread % cuda::kWarp;
  const PartHeader header = *HeaderOf(decode, sequence);
  if (header.num_parts == 1) return;  // its block has written the result
  const int parts = header.num_parts;
  float* weights = reinterpret_cast<float*>(shared);  // [parts]
  float* sums = weights + decode.shared_parts() + 1;  // [warps, dim]

  float largest = MinusInfinity();
  for (int p = thread; p < parts; p += kJoinThreads) {
    weights[p] = StatesOf(decode, header.first_part + p)[2 * state];
    largest = fmaxf(largest, weights[p]);
  }
  largest = cuda::WarpMax(largest);
  if (lane == 0) across[0][warp] = largest;
  __syncthreads();
  for (int w = 0; w < kJoinWarps; ++w) largest = fmaxf(largest, across[0][w]);
  float total = 0.0f;
  for (int p = thread; p < parts; p += kJoinThreads) {
    weights[p] = Weight(weights[p], largest);
    total +=
        weights[p] * StatesOf(decode, header.first_part + p)[2 * state + 1];
  }
  total = cuda::WarpSum(total);
  if (lane == 0) across[1][warp] = total;
  __syncthreads();
  total = 0.0f;
  for (int w = 0; w < kJoinWarps; ++w) total += across[1][w];

  for (int64_t d = lane; d < dim; d += cuda::kWarp) {
    float sum = 0.0f;
    KERNELS_UNROLL
    for (int p = warp; p < parts; p += kJoinWarps) {
      sum +=
          weights[p] * SumsOf(decode, header.first_part + p)[state * dim + d];
    }
    sums[warp * dim + d] = sum;
  }
  __syncthreads();
  const int64_t head = state / decode.rows(), row = state % decode.rows();
  const Ending ending = EndRow(args, SequenceOf(args, sequence), sequence, head,
                               row, largest, total);
  uint8_t* to = args.out + QueryRow(args, sequence, head, row) * dim *
                               kv_cache::ElementSize(args.out_element);
  for (int64_t d = thread; d < dim; d += kJoinThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kJoinWarps; ++w) sum += sums[w * dim + d];
    const float x = ending.factor == 0.0f ? 0.0f : sum * ending.factor;
    kv_cache::StoreElement(args.out_element, to, d, x, /*scale=*/1.0f);
  }
  if (thread == 0) *LogSumOf(args, sequence, head, row) = ending.lse;
}

cudaError_t LaunchPrepare(cudaStream_t stream, const DeviceDecode& decode,
                          const kv_cache::DeviceUpdate* update) {
  int multiprocessors;
  const cudaError_t error = cuda::MultiprocessorCount(&multiprocessors);
  if (error != cudaSuccess) return error;
  dim3 grid(1, 1);
  if (update != nullptr) {
    const uint32_t items = update->rows[0].items > update->rows[1].items
                               ? update->rows[0].items
                               : update->rows[1].items;
    const uint32_t most = static_cast<uint32_t>(multiprocessors) *
                          kPrepareBlocksPerMultiprocessor;
    const uint32_t blocks = cuda::CeilDiv(items, uint32_t{kPrepareThreads});
    grid = dim3(blocks < 1 ? 1 : blocks < most ? blocks : most, 3);
  }
  return cuda::Launch(PrepareKernel, grid, dim3(kPrepareThreads),
                      /*shared_bytes=*/0, stream, decode,
                      update != nullptr ? *update : kv_cache::DeviceUpdate{});
}

cudaError_t LaunchJoin(cudaStream_t stream, const DeviceDecode& decode) {
  const int64_t blocks = decode.args.addressing.batch * decode.states();
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int64_t floats =
      decode.shared_parts() + 1 + kJoinWarps * decode.args.shape.v_dim;
  return cuda::Launch(JoinKernel, dim3(static_cast<unsigned>(blocks)),
                      dim3(kJoinThreads),
                      static_cast<int>(floats * sizeof(float)), stream, decode);
}

}  // namespace

cudaError_t LaunchDecode(cudaStream_t stream, const DeviceDecode& decode,
                         const kv_cache::DeviceUpdate* update) {
  if (decode.args.addressing.batch * decode.states() == 0) return cudaSuccess;
  cudaError_t error = LaunchPrepare(stream, decode, update);
  if (error != cudaSuccess) return error;
  int device, major;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = major >= 8 && TensorCoresFit(decode.args)
              ? LaunchAttendTensor(stream, decode)
              : LaunchAttend(stream, decode);
  if (error != cudaSuccess || decode.shared_parts() == 0) return error;
  return LaunchJoin(stream, decode);
}

}  // namespace decode_attention
}  // namespace kernels
