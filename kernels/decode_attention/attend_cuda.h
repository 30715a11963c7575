// What the attending kernels share: which keys a block works on, what happens
// to logits, and how results leave.
#ifndef KERNELS_DECODE_ATTENTION_ATTEND_CUDA_H_
#define KERNELS_DECODE_ATTENTION_ATTEND_CUDA_H_

#include <cstdint>

#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/decode_args.h"
#include "kernels/decode_attention/decode_attention_cuda.h"
#include "kernels/kv_cache/cache_layout.h"
#include "kernels/kv_cache/elements_cuda.h"

namespace kernels {
namespace decode_attention {

// Threads of an attending block.
constexpr int kAttendThreads = 128;
constexpr int kAttendWarps = kAttendThreads / cuda::kWarp;

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

__device__ __forceinline__ PartHeader* HeaderOf(const DeviceDecode& decode,
                                                int64_t part) {
  return reinterpret_cast<PartHeader*>(decode.workspace +
                                       part * decode.part_floats);
}

// Weighted sums of one part, [states, v_dim].
__device__ __forceinline__ float* SumsOf(const DeviceDecode& decode,
                                         int64_t part) {
  return decode.workspace + part * decode.part_floats + kHeaderFloats;
}

// Base and total weight of each row of one part, [states, 2].
__device__ __forceinline__ float* StatesOf(const DeviceDecode& decode,
                                           int64_t part) {
  return SumsOf(decode, part) + decode.states() * decode.args.shape.v_dim;
}

__device__ __forceinline__ kv_cache::Addressing AddressingOf(
    const DeviceDecode& decode) {
  kv_cache::Addressing addressing = decode.args.addressing;
  addressing.first_slot = *decode.first_slot;
  return addressing;
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

// Rows [row_begin, row_end) of one key-value head and slots [begin, end) of one
// sequence: the work of a block.
struct Block {
  int64_t part;
  int64_t sequence;
  int64_t head;
  int64_t row_begin;
  int64_t row_end;
  int parts;  // of the sequence
  int begin;
  int end;
  Sequence positions;
  kv_cache::Addressing addressing;
  // Row of slot first_slot where the sequence is one block of slots; negative
  // where that block does not exist.
  int64_t base;
};

// Reads the work of this block; false if there is none. Blocks of a part are
// neighbours, as their heads are in memory.
__device__ __forceinline__ bool FindBlock(const DeviceDecode& decode,
                                          int rows_per_block, Block* block) {
  const DecodeArgs& args = decode.args;
  const int64_t rows = decode.rows();
  const uint32_t row_blocks = cuda::CeilDiv(
      static_cast<uint32_t>(rows), static_cast<uint32_t>(rows_per_block));
  const uint32_t in_part = static_cast<uint32_t>(args.shape.heads) * row_blocks;
  const uint32_t part = blockIdx.x / in_part;
  const uint32_t rest = blockIdx.x - part * in_part;
  const PartHeader header = *HeaderOf(decode, part);
  if (header.sequence < 0) return false;
  block->part = part;
  block->sequence = header.sequence;
  block->parts = header.parts;
  block->head = rest / row_blocks;
  block->row_begin = static_cast<int64_t>(rest % row_blocks) * rows_per_block;
  block->row_end = block->row_begin + rows_per_block;
  if (block->row_end > rows) block->row_end = rows;
  block->begin = header.begin;
  block->end = header.end;
  block->addressing = AddressingOf(decode);
  block->positions = SequenceOf(args, block->sequence);
  if (row_blocks > 1) {
    // Fewer keys than the whole sequence needs, as far as these rows can tell.
    const Slots needed =
        NeededSlots(args.masking, args.shape, block->addressing,
                    block->positions, block->row_begin / args.group,
                    cuda::CeilDiv(block->row_end, args.group));
    if (block->begin < needed.begin)
      block->begin = static_cast<int>(needed.begin);
    if (block->end > needed.end) block->end = static_cast<int>(needed.end);
  }
  block->base = -1;
  if (block->addressing.table_width == 1 && block->begin < block->end) {
    block->base = block->addressing.RowOf(args.shape, block->sequence,
                                          block->addressing.first_slot);
  }
  return true;
}

// Where one key lies.
struct Key {
  int64_t row;   // of the head in the caches; -1: there is no key
  int position;  // -1: there is no key
};

__device__ __forceinline__ Key FindKey(const DeviceDecode& decode,
                                       const Block& block, int slot) {
  const kv_cache::CacheShape& shape = decode.args.shape;
  const kv_cache::Addressing& addressing = block.addressing;
  Key key = {-1, -1};
  if (slot >= block.end) return key;
  const int64_t last = block.positions.num_keys - 1;
  const int64_t position = PositionIn(slot, last, addressing.ring);
  if (position < 0 || position > last) return key;
  int64_t row;
  if (addressing.table_width == 1) {
    row = block.base < 0 ? -1
                         : block.base + (slot - addressing.first_slot) *
                                            shape.slot_stride();
  } else {
    row = addressing.RowOf(shape, block.sequence, slot);
  }
  if (row < 0) return key;
  key.row = row + block.head * shape.head_stride();
  key.position = static_cast<int>(position);
  return key;
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
__device__ __forceinline__ Query FindQuery(const DeviceDecode& decode,
                                           const Block& block, int64_t row) {
  const DecodeArgs& args = decode.args;
  const Masking& masking = args.masking;
  Query query = {false, args.scale, 0, 0, 0, 0.0f, nullptr, nullptr};
  if (row >= block.row_end) return query;
  query.inside = true;
  const RowPlace place = PlaceOf(args, row);
  const int64_t token = place.token;
  const int64_t q_head = block.head * args.group + place.in_group;
  const KeyRange keys = VisibleKeys(masking, block.positions, token);
  query.begin = static_cast<int>(keys.begin);
  query.end = static_cast<int>(keys.end < INT32_MAX ? keys.end : INT32_MAX);
  query.position = static_cast<int>(block.positions.first_query + token);
  if (masking.alibi != nullptr) {
    query.slope = masking.alibi[block.sequence * masking.alibi_stride + q_head];
  }
  if (masking.bias.data != nullptr) {
    const PerLogit<float>& bias = masking.bias;
    query.bias = bias.data + block.sequence * bias.batch_stride +
                 q_head * bias.head_stride + token * bias.token_stride;
  }
  if (masking.mask.data != nullptr) {
    const PerLogit<uint8_t>& mask = masking.mask;
    query.mask = mask.data + block.sequence * mask.batch_stride +
                 q_head * mask.head_stride + token * mask.token_stride;
  }
  return query;
}

// The binary logarithm of the weight of a key, from its product with the query.
__device__ __forceinline__ float Logit(const DeviceDecode& decode,
                                       const Block& block, const Query& query,
                                       float product, int slot, int position) {
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
  const int64_t here = slot - block.addressing.first_slot;
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
                                            const Block& block, int64_t row)
      : args_(decode.args) {
    const RowPlace place = PlaceOf(args_, row);
    from_ = args_.q + QueryRow(args_, block.sequence, block.head, place.token,
                               place.in_group) *
                          args_.shape.k_dim *
                          kv_cache::ElementSize(args_.query_element);
    position_ =
        args_.rotary.cos == nullptr
            ? 0
            : args_.rotary.where[block.sequence * args_.tokens + place.token];
  }

  __device__ __forceinline__ float At(int64_t i) const {
    const auto load = [&](int64_t j) {
      return kv_cache::LoadElement(args_.query_element, from_, j);
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

// The end of a row's softmax over all of its keys: `factor` turns its weighted
// sum into the result.
struct Ending {
  float factor;
  float lse;
};

__device__ __forceinline__ Ending EndRow(const DecodeArgs& args,
                                         const Sequence& positions,
                                         int64_t sequence, int64_t head,
                                         int64_t row, float base, float total) {
  float weight = 1.0f;  // of the sums
  const RowPlace place = PlaceOf(args, row);
  if (args.sinks != nullptr && place.token < positions.num_queries) {
    const float sink = args.sinks[head * args.group + place.in_group] * kLog2E;
    const float largest = sink > base ? sink : base;
    weight = Weight(base, largest);
    total = total * weight + Weight(sink, largest);
    base = largest;
  }
  // A row without a key has the total 0; its result is 0, not 0 / 0.
  if (total == 0.0f) return {0.0f, MinusInfinity()};
  const float factor = weight / total * args.v_scale.OrOne(sequence, head);
  return {factor, (base + log2f(total)) * kLn2};
}

__device__ __forceinline__ float* LogSumOf(const DecodeArgs& args,
                                           int64_t sequence, int64_t head,
                                           int64_t row) {
  const int64_t heads = args.shape.heads * args.group;
  const RowPlace place = PlaceOf(args, row);
  const int64_t q_head = head * args.group + place.in_group;
  return args.lse + (sequence * heads + q_head) * args.tokens + place.token;
}

// Writes one row of the block: a warp. `sum(i)`, of kCount, is the weighted sum
// of element lane + 32 i; `base` and `total` are the row's.
template <int kCount, typename Sum>
__device__ __forceinline__ void WriteRow(const DeviceDecode& decode,
                                         const Block& block, int64_t row,
                                         float base, float total,
                                         const Sum& sum) {
  const DecodeArgs& args = decode.args;
  const int64_t dim = args.shape.v_dim;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  if (block.parts > 1) {
    const int64_t state = block.head * decode.rows() + row;
    float* to = SumsOf(decode, block.part) + state * dim;
    KERNELS_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const int64_t d = lane + i * cuda::kWarp;
      if (d < dim) to[d] = sum(i);
    }
    if (lane == 0) {
      float* states = StatesOf(decode, block.part) + 2 * state;
      states[0] = base;
      states[1] = total;
    }
    return;
  }
  const Ending ending = EndRow(args, block.positions, block.sequence,
                               block.head, row, base, total);
  uint8_t* to = args.out + QueryRowOf(args, block.sequence, block.head, row) *
                               dim * kv_cache::ElementSize(args.out_element);
  KERNELS_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const int64_t d = lane + i * cuda::kWarp;
    const float x = ending.factor == 0.0f ? 0.0f : sum(i) * ending.factor;
    if (d < dim) {
      kv_cache::StoreElement(args.out_element, to, d, x, /*scale=*/1.0f);
    }
  }
  if (lane == 0) {
    *LogSumOf(args, block.sequence, block.head, row) = ending.lse;
  }
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_ATTEND_CUDA_H_
