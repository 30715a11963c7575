// What decode attention is given, on any platform, and which keys each query
// sees.
#ifndef KERNELS_DECODE_ATTENTION_CC_DECODE_ARGS_H_
#define KERNELS_DECODE_ATTENTION_CC_DECODE_ARGS_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/host_device.h"

namespace kernels {
namespace decode_attention {

// An operand over [b, q_heads, q_tokens, slots]; a stride is 0 where the
// operand has size 1 on that axis, so nothing is ever broadcast in memory.
template <typename T>
struct PerLogit {
  const T* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t token_stride = 0;
  int64_t slot_stride = 0;
};

// What decides which keys a query sees and what is added to its logits.
struct Masking {
  bool causal = true;
  int64_t window_left = -1;      // keys before the query; -1: no limit
  int64_t window_right = -1;     // keys after the query; -1: no limit
  int64_t chunk = 0;             // chunked attention: keys of the query's chunk
  float softcap = 0.0f;          // 0: none
  const float* alibi = nullptr;  // [b, q_heads], or [1, q_heads]
  int64_t alibi_stride = 0;
  PerLogit<float> bias;
  PerLogit<uint8_t> mask;
};

// Positions of one sequence.
struct Sequence {
  int64_t first_query = 0;  // position of query token 0
  int64_t num_queries = 0;  // query tokens that are not padding
  int64_t num_keys = 0;     // positions below this one hold keys
  int64_t padding = 0;      // positions below this one are never seen
};

// Rotary embedding: element pairs of q and of the new keys are turned by the
// angle of their position.
struct Rotary {
  const float* cos = nullptr;  // [positions, pairs]; null: no rotation
  const float* sin = nullptr;
  int64_t positions = 0;
  int64_t pairs = 0;
  bool interleaved = false;        // pairs (2i, 2i+1), else (i, i + pairs)
  const int32_t* where = nullptr;  // [b, tokens] row of cos and sin
  bool cached_keys = false;        // keys are turned when read, not when stored

  // Turns one row by the angles of `position`.
  void Turn(int64_t position, float* row) const {
    if (position < 0) position = 0;
    if (position >= positions) position = positions - 1;
    const float* c = cos + position * pairs;
    const float* s = sin + position * pairs;
    const int64_t step = interleaved ? 2 : 1;
    const int64_t other = interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      const float x = row[i * step];
      const float y = row[i * step + other];
      row[i * step] = x * c[i] - y * s[i];
      row[i * step + other] = y * c[i] + x * s[i];
    }
  }
};

struct DecodeArgs {
  cache::Element element;        // of the caches
  cache::Element query_element;  // of q, qv, new_k and new_v
  cache::Element out_element;
  cache::CacheShape shape;
  cache::Addressing addressing;
  uint8_t* cache_k;
  uint8_t* cache_v;
  const uint8_t* q;      // [b, t, n, g, k_dim], or heads first [b, n, g, t, ..]
  const uint8_t* qv;     // like q over v_dim, or null
  const uint8_t* new_k;  // [b, t, n, k_dim] or [b, n, t, k_dim]; null: none
  const uint8_t* new_v;
  int64_t tokens;
  int64_t group;  // query heads that share a key-value head
  cache::PerSequence index;
  cache::PerSequence count;  // query tokens that are not padding
  const int32_t* padding;    // [b] positions on the left to leave out, or null
  cache::Scales k_scale;
  cache::Scales v_scale;
  float scale;         // of the logits
  const float* sinks;  // [n, g], or null
  Rotary rotary;
  Masking masking;
  uint8_t* out;  // like q over v_dim
  float* lse;    // [b, n, g, t]
};

// The keys a query at `token` sees: positions in [begin, end).
struct KeyRange {
  int64_t begin;
  int64_t end;
};

KERNELS_HOST_DEVICE inline KeyRange VisibleKeys(const Masking& m,
                                                const Sequence& s,
                                                int64_t token) {
  if (token >= s.num_queries) return {0, 0};
  const int64_t position = s.first_query + token;
  KeyRange range = {s.padding, s.num_keys};
  if (m.causal && range.end > position + 1) range.end = position + 1;
  if (m.window_right >= 0 && range.end > position + 1 + m.window_right) {
    range.end = position + 1 + m.window_right;
  }
  if (m.window_left >= 0 && range.begin < position - m.window_left) {
    range.begin = position - m.window_left;
  }
  if (m.chunk > 0 && position > 0) {
    const int64_t first = position - position % m.chunk;
    if (range.begin < first) range.begin = first;
  }
  if (range.begin < 0) range.begin = 0;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// Positions of sequence `i`.
KERNELS_HOST_DEVICE inline Sequence SequenceOf(const DecodeArgs& args,
                                               int64_t i) {
  int64_t count = args.count[i];
  count = count < 0 ? 0 : count < args.tokens ? count : args.tokens;
  Sequence s;
  s.first_query = int64_t{args.index[i]} - (args.new_k == nullptr ? count : 0);
  s.num_queries = count;
  s.num_keys = s.first_query + count;
  s.padding = args.padding == nullptr ? 0 : args.padding[i];
  return s;
}

// The newest position that lies in `slot`, of a sequence whose last key is at
// `last`; negative, or beyond `last`, where the slot holds no key.
KERNELS_HOST_DEVICE inline int64_t PositionIn(int64_t slot, int64_t last,
                                              int64_t ring) {
  if (ring == 0) return slot;
  const int64_t behind = (last - slot) % ring;
  return last - (behind < 0 ? behind + ring : behind);
}

// Index among the rows of q and out of a token's query head `in_group` of a
// key-value head.
KERNELS_HOST_DEVICE inline int64_t QueryRow(const DecodeArgs& args,
                                            int64_t sequence, int64_t head,
                                            int64_t token, int64_t in_group) {
  const int64_t heads = args.shape.heads;
  if (args.shape.heads_first) {
    return ((sequence * heads + head) * args.group + in_group) * args.tokens +
           token;
  }
  return ((sequence * args.tokens + token) * heads + head) * args.group +
         in_group;
}

// Rows between neighbouring query heads.
KERNELS_HOST_DEVICE inline int64_t QueryStride(const DecodeArgs& args) {
  return args.shape.heads_first ? args.tokens : 1;
}

// Logical slots [begin, end).
struct Slots {
  int64_t begin;
  int64_t end;
  KERNELS_HOST_DEVICE int64_t size() const { return end - begin; }
};

// The slots that the queries of tokens [first, last) need and that are here.
KERNELS_HOST_DEVICE inline Slots NeededSlots(
    const Masking& masking, const cache::CacheShape& shape,
    const cache::Addressing& addressing, const Sequence& sequence,
    int64_t first, int64_t last) {
  // Both ends of what a query sees move on with its token.
  if (last > sequence.num_queries) last = sequence.num_queries;
  if (first >= last) return {0, 0};
  int64_t begin = VisibleKeys(masking, sequence, first).begin;
  int64_t end = VisibleKeys(masking, sequence, last - 1).end;
  if (begin >= end) return {0, 0};
  const int64_t ring = addressing.ring;
  if (ring > 0) {
    begin = 0;
    end = ring < sequence.num_keys ? ring : sequence.num_keys;
  }
  const int64_t first_here = addressing.slot_begin();
  const int64_t end_here = addressing.slot_end(shape);
  if (begin < first_here) begin = first_here;
  if (end > end_here) end = end_here;
  return begin < end ? Slots{begin, end} : Slots{0, 0};
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CC_DECODE_ARGS_H_
