// What the attending kernels share: queries, what happens to logits, and how
// results leave. Which keys a block works on is in segments.h.
#ifndef KERNELS_DECODE_ATTENTION_CUDA_ATTEND_H_
#define KERNELS_DECODE_ATTENTION_CUDA_ATTEND_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cuda/elements.h"
#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cc/decode_args.h"
#include "kernels/decode_attention/cuda/decode.h"
#include "kernels/decode_attention/cuda/segments.h"

namespace kernels {
namespace decode_attention {

// Threads of an attending block.
constexpr int kAttendThreads = 128;
constexpr int kAttendWarps = kAttendThreads / cuda::kWarp;

// Whether to tell the GPU's cache that elements of a size are read once. It
// makes attending 1 to 2 % faster, also for 512 query rows, whose blocks read
// the same keys one after the other; but 5 % slower where elements are 8 bits:
// there instructions are what counts (H200).
template <int kElementBytes>
constexpr bool kReadOnce = kElementBytes > 1;

// Logarithms are binary inside the kernels.
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float MinusInfinity() {
  return __int_as_float(static_cast<int>(0xff800000u));
}

// 2^(x - base), 0 where nothing has been seen (x is -inf, base may be).
__device__ __forceinline__ float Weight(float x, float base) {
  return x == MinusInfinity() ? 0.0f : cuda::Exp2(x - base);
}

// Weighted sums of one part, [states, v_dim].
__device__ __forceinline__ float* SumsOf(const DeviceDecode& decode,
                                         int64_t part) {
  return decode.workspace + part * decode.part_floats;
}

// Base and total weight of each row of one part, [states, 2].
__device__ __forceinline__ float* StatesOf(const DeviceDecode& decode,
                                           int64_t part) {
  return SumsOf(decode, part) + decode.states() * decode.args.shape.v_dim;
}

// How many parts of a sequence have come, [states], in that of its first
// worker.
__device__ __forceinline__ int* ArrivalsOf(const DeviceDecode& decode,
                                           int64_t part) {
  return reinterpret_cast<int*>(StatesOf(decode, part) + 2 * decode.states());
}

// Element `i` of a row that is turned by the angles of `position`; `load(j)`
// gives element j as it is.
template <typename Load>
__device__ __forceinline__ float Turned(const Rotary& rotary, int64_t position,
                                        int64_t i, const Load& load) {
  const float x = load(i);
  if (i >= 2 * rotary.pairs) return x;
  if (position >= rotary.positions) position = rotary.positions - 1;
  if (position < 0) position = 0;
  const bool second = rotary.interleaved ? i % 2 == 1 : i >= rotary.pairs;
  const int64_t pair =
      rotary.interleaved ? i / 2 : i - (second ? rotary.pairs : 0);
  const int64_t other = rotary.interleaved ? i ^ 1
                        : second           ? i - rotary.pairs
                                           : i + rotary.pairs;
  const float cos = rotary.cos[position * rotary.pairs + pair];
  const float sin = rotary.sin[position * rotary.pairs + pair];
  return second ? x * cos + load(other) * sin : x * cos - load(other) * sin;
}

// Query row `row` of a key-value head: the token, and the head in the group.
struct RowPlace {
  int64_t token;
  int64_t in_group;
};

__device__ __forceinline__ RowPlace PlaceOf(const DecodeArgs& args,
                                            int64_t row) {
  // 64 bits would take many times as long to divide.
  const uint32_t group = static_cast<uint32_t>(args.group);
  const uint32_t token = static_cast<uint32_t>(row) / group;
  return {token, static_cast<uint32_t>(row) - token * group};
}

__device__ __forceinline__ int64_t QueryRowOf(const DecodeArgs& args,
                                              int64_t sequence, int64_t head,
                                              int64_t row) {
  const RowPlace place = PlaceOf(args, row);
  return QueryRow(args, sequence, head, place.token, place.in_group);
}

// What the logits of one query row go through.
struct Query {
  bool inside;   // whether there is such a row
  float factor;  // of the products: `scale`, until a kernel changes it
  int begin;     // positions that it sees
  int end;
  int position;
  float slope;
  const float* bias;    // of slot first_slot, or null
  const uint8_t* mask;  // of slot first_slot, or null
};

// `row` may lie beyond the rows of the block: it sees nothing then.
inline __device__ __noinline__ Query FindQuery(const DeviceDecode& decode,
                                               const BlockPlace block,
                                               const Segment& segment,
                                               int row) {
  const DecodeArgs& args = decode.args;
  const Masking& masking = args.masking;
  Query query = {false, args.scale, 0, 0, 0, 0.0f, nullptr, nullptr};
  if (row >= block.row_end) return query;
  query.inside = true;
  const Sequence positions = segment.positions();
  const RowPlace place = PlaceOf(args, row);
  const int64_t token = place.token;
  const int64_t q_head = block.head * args.group + place.in_group;
  const KeyRange keys = VisibleKeys(masking, positions, token);
  query.begin = static_cast<int>(keys.begin);
  query.end = static_cast<int>(keys.end < INT32_MAX ? keys.end : INT32_MAX);
  query.position = static_cast<int>(positions.first_query + token);
  if (masking.alibi != nullptr) {
    query.slope =
        masking.alibi[segment.sequence * masking.alibi_stride + q_head];
  }
  if (masking.bias.data != nullptr) {
    const PerLogit<float>& bias = masking.bias;
    query.bias = bias.data + segment.sequence * bias.batch_stride +
                 q_head * bias.head_stride + token * bias.token_stride;
  }
  if (masking.mask.data != nullptr) {
    const PerLogit<uint8_t>& mask = masking.mask;
    query.mask = mask.data + segment.sequence * mask.batch_stride +
                 q_head * mask.head_stride + token * mask.token_stride;
  }
  return query;
}

// The binary logarithm of the weight of a key, from its product with the query.
__device__ __forceinline__ float Logit(const DeviceDecode& decode,
                                       const BlockPlace& block,
                                       const Query& query, float product,
                                       int slot, int position) {
  const Masking& masking = decode.args.masking;
  if (position < query.begin || position >= query.end) return MinusInfinity();
  float x = product * query.factor;
  if (masking.softcap > 0.0f) {
    x = masking.softcap * tanhf(x / masking.softcap);
  }
  if (masking.alibi != nullptr) {
    const int distance = query.position - position;
    x -= query.slope * static_cast<float>(distance < 0 ? -distance : distance);
  }
  const int64_t here = slot - block.first_slot;
  if (query.bias != nullptr) {
    x += query.bias[here * masking.bias.slot_stride];
  }
  if (query.mask != nullptr && !query.mask[here * masking.mask.slot_stride]) {
    return MinusInfinity();
  }
  return x * kLog2E;
}

// Reads a query row of the block, turned where rotary embedding is asked for.
class QueryRowReader {
 public:
  __device__ __forceinline__ QueryRowReader(const DeviceDecode& decode,
                                            int sequence, int head, int row)
      : args_(decode.args) {
    const RowPlace place = PlaceOf(args_, row);
    from_ = args_.q +
            QueryRow(args_, sequence, head, place.token, place.in_group) *
                args_.shape.k_dim * cache::ElementSize(args_.query_element);
    position_ = args_.rotary.cos == nullptr
                    ? 0
                    : args_.rotary.where[sequence * args_.tokens + place.token];
  }

  __device__ __noinline__ float At(int64_t i) const {
    const auto load = [&](int64_t j) {
      return cache::LoadElement(args_.query_element, from_, j);
    };
    return args_.rotary.cos == nullptr
               ? load(i)
               : Turned(args_.rotary, position_, i, load);
  }

 private:
  const DecodeArgs& args_;
  const uint8_t* from_;
  int64_t position_;
};

// Neighbouring elements of a row: those of a lane.
template <int kCount>
struct OfLane {
  float x[kCount];
};

// Writes those of a lane, times `factor`, to a row of `dim` elements.
template <typename T, int kCount>
__device__ __forceinline__ void StoreRow(void* row, int64_t dim, int d,
                                         float factor,
                                         const OfLane<kCount>& values) {
  typename T::Storage* const to = static_cast<typename T::Storage*>(row) + d;
  float x[kCount];
  KERNELS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    x[i] = factor == 0.0f ? 0.0f : values.x[i] * factor;
  }
  if (dim % kCount == 0) {
    if (d < dim) {
      cuda::StoreVector<T, kCount>(to, cuda::VectorFromCompute<T, kCount>(x));
    }
  } else {
    KERNELS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (d + i < dim) to[i] = cuda::FromCompute<T>(x[i]);
    }
  }
}

// Ends the softmax of a row over all of its keys, and writes elements `d` and
// after of the result, and the row's logarithm.
template <int kCount>
__device__ __forceinline__ void FinishRow(const DeviceDecode& decode,
                                          const BlockPlace& block,
                                          const Segment& segment, int row,
                                          int d, float base, float total,
                                          const OfLane<kCount>& values) {
  const DecodeArgs& args = decode.args;
  const RowPlace place = PlaceOf(args, row);
  const int sequence = segment.sequence;
  const int64_t q_head = block.head * args.group + place.in_group;
  float weight = 1.0f;  // of the sums
  if (args.sinks != nullptr && place.token < segment.num_queries) {
    const float sink = args.sinks[q_head] * kLog2E;
    const float largest = sink > base ? sink : base;
    weight = Weight(base, largest);
    total = total * weight + Weight(sink, largest);
    base = largest;
  }
  // A row without a key has the total 0; its result is 0, not 0 / 0.
  float factor = 0.0f, lse = MinusInfinity();
  if (total != 0.0f) {
    factor = weight / total * args.v_scale.OrOne(sequence, block.head);
    lse = (base + log2f(total)) * kLn2;
  }
  const int64_t dim = args.shape.v_dim;
  uint8_t* const to = args.out + QueryRow(args, sequence, block.head,
                                          place.token, place.in_group) *
                                     dim * cache::ElementSize(args.out_element);
  if (args.out_element == cache::Element::kF32) {
    StoreRow<F32>(to, dim, d, factor, values);
  } else if (args.out_element == cache::Element::kBf16) {
    StoreRow<BF16>(to, dim, d, factor, values);
  } else {
    StoreRow<F16>(to, dim, d, factor, values);
  }
  if (d == 0) {
    const int64_t heads = args.shape.heads * args.group;
    args.lse[(sequence * heads + q_head) * args.tokens + place.token] = lse;
  }
}

// Writes one row of the block: a warp, whose lanes have kCount weighted sums
// each; `base` and `total` are the row's.
template <int kCount>
__device__ __noinline__ void WriteRow(const DeviceDecode& decode,
                                      const BlockPlace block,
                                      const Segment& segment, int row,
                                      float base, float total,
                                      const OfLane<kCount> sums) {
  const DecodeArgs& args = decode.args;
  const int64_t dim = args.shape.v_dim;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int d = lane * kCount;
  if (segment.part >= 0) {
    const int64_t state = block.head * decode.rows() + row;
    float* const to = SumsOf(decode, segment.part) + state * dim;
    if (dim % 4 == 0) {
      StoreRow<F32>(to, dim, d, 1.0f, sums);
    } else {
      KERNELS_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (d + i < dim) to[d + i] = sums.x[i];
      }
    }
    if (lane == 0) {
      float* states = StatesOf(decode, segment.part) + 2 * state;
      states[0] = base;
      states[1] = total;
    }
    return;
  }
  FinishRow(decode, block, segment, row, d, base, total, sums);
}

// ---- Joining the parts of a sequence: whoever comes last does it, in the
// order of the parts.

// The index of part `i` of the sequence. The first worker leaves its part to
// the next, which go on with it.
__device__ __forceinline__ int64_t PartOf(const Segment& segment, int i) {
  return 2 * (int64_t{segment.first_worker} + i) + (i == 0);
}

// Writes a row from its parts: a warp, whose lanes have kCount neighbouring
// elements each, at a time.
template <int kCount>
__device__ __forceinline__ void JoinRow(const DeviceDecode& decode,
                                        const BlockPlace& place,
                                        const Segment& segment, int row) {
  constexpr int kInFlight = 8;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int dim = static_cast<int>(decode.args.shape.v_dim);
  const int parts = segment.parts;
  const int64_t state = place.head * decode.rows() + row;
  const float* const sums = SumsOf(decode, PartOf(segment, 0)) + state * dim;
  const float* const states = StatesOf(decode, PartOf(segment, 0)) + 2 * state;
  // From part 0 the next is one part on, the others are two apart.
  const auto part_floats = static_cast<uint32_t>(decode.part_floats);
  const auto after = [&](int part) {
    return static_cast<uint32_t>(2 * part - (part > 0)) * part_floats;
  };
  float largest = MinusInfinity();
  for (int p = lane; p < parts; p += cuda::kWarp) {
    largest = fmaxf(largest, cuda::LoadFresh(states + after(p)));
  }
  largest = cuda::WarpMax(largest);
  for (int first = 0; first < dim; first += cuda::kWarp * kCount) {
    const int d = first + lane * kCount;
    // Lanes beyond the row read what others read.
    const float* const from = sums + (d < dim ? d : 0);
    OfLane<kCount> sum = {};
    float total = 0.0f;
    for (int chunk = 0; chunk < parts; chunk += cuda::kWarp) {
      float weight = 0.0f;  // of part chunk + lane
      if (chunk + lane < parts) {
        const float* const mine = states + after(chunk + lane);
        weight = Weight(cuda::LoadFresh(mine), largest);
        total += weight * cuda::LoadFresh(mine + 1);
      }
      const int end = parts - chunk < cuda::kWarp ? parts - chunk : cuda::kWarp;
      KERNELS_NO_UNROLL
      for (int p = 0; p < end; p += kInFlight) {
        cuda::Vector<F32, kCount> x[kInFlight];
        KERNELS_UNROLL
        for (int k = 0; k < kInFlight; ++k) {
          // The last one again, for nothing, where there are no more.
          const int part = chunk + p + k < parts ? chunk + p + k : parts - 1;
          x[k] = cuda::LoadFreshVector<F32, kCount>(from + after(part));
        }
        KERNELS_UNROLL
        for (int k = 0; k < kInFlight; ++k) {
          const float w = __shfl_sync(cuda::kAllLanes, weight, p + k);
          if (chunk + p + k >= parts) continue;
          KERNELS_UNROLL
          for (int i = 0; i < kCount; ++i) sum.x[i] += w * x[k].data[i];
        }
      }
    }
    total = cuda::WarpSum(total);
    FinishRow(decode, place, segment, row, d, largest, total, sum);
  }
}

// Joins the parts of a sequence for the rows of this block if the other parts
// have come. All threads of the block take part, and have written theirs. Out
// of line, as it is needed once for many keys.
inline __device__ __noinline__ void JoinIfLast(const DeviceDecode& decode,
                                               const BlockPlace place,
                                               const Segment& segment) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    int* const arrivals = ArrivalsOf(decode, PartOf(segment, 0)) +
                          place.head * decode.rows() + place.row_begin;
    last = cuda::Arrive(arrivals) == segment.parts - 1;
  }
  __syncthreads();
  if (!last) return;
  const bool wide = decode.args.shape.v_dim % 4 == 0;
  for (int row = place.row_begin + static_cast<int>(threadIdx.x) / cuda::kWarp;
       row < place.row_end; row += kAttendWarps) {
    if (wide) {
      JoinRow<4>(decode, place, segment, row);
    } else {
      JoinRow<1>(decode, place, segment, row);
    }
  }
}

// ---- On the host.

// How many workers share the keys where blocks of a kernel have `rows` rows
// each, of which a device runs `resident` at a time; few enough for the
// workspace.
inline int64_t WorkersFor(const DeviceDecode& decode, int rows_of_block,
                          int64_t resident) {
  const int64_t rows = decode.rows();
  const int64_t blocks =
      decode.args.shape.heads * cuda::CeilDiv<int64_t>(rows, rows_of_block);
  const int64_t batch = decode.args.addressing.batch;
  // The fewest rounds that keep nearly all of the device busy to the end.
  int64_t workers = 1, best = 0;
  for (int64_t rounds = 1; rounds <= 4 && best * 20 < resident * 19; ++rounds) {
    const int64_t fit = rounds * resident / blocks;
    const int64_t busy = fit * blocks / rounds;
    if (busy <= best) continue;
    best = busy;
    workers = fit;
  }
  if (decode.parts == 0) {
    // Blocks of rows need more keys or fewer: whoever is done takes another.
    return workers < batch && rows <= rows_of_block ? workers : batch;
  }
  const int64_t most = decode.parts / 2;
  return workers < most ? workers : most;
}

// Starts an attending kernel, of kAttendThreads, with workers for each head and
// each block of `rows_of_block` rows, and says how many they are. What is in
// the cache before the new rows may be read before those are written.
template <typename Kernel, typename... Args>
cudaError_t LaunchWorkers(Kernel* kernel, int rows_of_block, int shared_bytes,
                          cudaStream_t stream, DeviceDecode decode,
                          const Args&... args) {
  int resident = 0;
  const cudaError_t error =
      cuda::ResidentBlocks(kernel, kAttendThreads, shared_bytes, &resident);
  if (error != cudaSuccess) return error;
  decode.workers = WorkersFor(decode, rows_of_block, resident);
  const int64_t blocks = decode.workers * decode.args.shape.heads *
                         cuda::CeilDiv<int64_t>(decode.rows(), rows_of_block);
  const int64_t steps = decode.args.addressing.batch *
                        (cuda::CeilDiv<int64_t>(decode.slots(), kStep) + 1);
  if (blocks > INT32_MAX || steps > INT32_MAX / 2) {
    return cudaErrorInvalidConfiguration;
  }
  const dim3 grid(static_cast<unsigned>(blocks));
  return decode.prepared
             ? cuda::LaunchEarly(kernel, grid, dim3(kAttendThreads),
                                 shared_bytes, stream, decode, args...)
             : cuda::Launch(kernel, grid, dim3(kAttendThreads), shared_bytes,
                            stream, decode, args...);
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CUDA_ATTEND_H_
