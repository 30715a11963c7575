// The inner loop of decode attention: one sequence, a range of key-value heads,
// a range of cache slots, every query row of those heads. Compiled once for
// each instruction set; plain C++, knows nothing of XLA.
#ifndef KERNELS_DECODE_ATTENTION_TILE_KERNEL_H_
#define KERNELS_DECODE_ATTENTION_TILE_KERNEL_H_

#include <cstdint>

#include "kernels/kv_cache/cache_layout.h"

namespace kernels {
namespace decode_attention {

// Rows of the float32 copies of q, and of the accumulators, are padded to a
// multiple of the widest vector so that the inner loops need no remainder.
constexpr int64_t kLanes = 16;

// Of everything that the inner loops read: a vector that crosses two cache
// lines takes twice the time to load.
constexpr int64_t kAlignment = 64;

inline int64_t PadToLanes(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Rows are worked on in blocks of 8, 4, 2 or 1; where the last block is not
// full, rows of zeros follow.
inline int64_t PaddedRows(int64_t rows) {
  const int64_t rest = rows % 8;
  const int64_t block = rest > 4 ? 8 : rest == 3 ? 4 : rest;
  return rows - rest + block;
}

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

struct Problem {
  kv_cache::Element element;
  const uint8_t* cache_k;
  const uint8_t* cache_v;
  kv_cache::CacheShape shape;
  kv_cache::Addressing addressing;
  int64_t q_tokens;
  int64_t q_heads;
  int64_t group;  // query heads that share one key-value head
  Masking masking;
  const Rotary* rotary;       // null: keys are used as they are
  const Sequence* sequences;  // [b]

  int64_t rows_per_head() const { return q_tokens * group; }
};

// Running softmax of some query rows: the largest logit so far, the sum of the
// exponentials relative to it, and the weighted sum of the values.
struct Partial {
  float* largest;  // [rows]
  float* sum;      // [rows]
  float* acc;      // [rows, padded v_dim]
};

// Query row `r` of key-value head `n` is token `r / group`, query head
// `n * group + r % group`; its state is row `n * rows_per_head + r` of `out`.
struct Task {
  int64_t sequence;
  int64_t head_begin, head_end;
  int64_t row_begin, row_end;    // within one key-value head
  int64_t slot_begin, slot_end;  // logical slots of the sequence
  const float* q;   // [kv_heads, PaddedRows(rows_per_head), padded k_dim]
  const float* qv;  // the same over v_dim, or null
  Partial out;      // written, not accumulated into
};

// The keys a query at `token` sees: positions in [begin, end).
struct KeyRange {
  int64_t begin;
  int64_t end;
};

inline KeyRange VisibleKeys(const Masking& m, const Sequence& s,
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

// What the elements of a cache are multiplied by when they are read, on top of
// the scales: the kernel reads e4m3 divided by 256.
inline float ReadFactor(kv_cache::Element element) {
  return element == kv_cache::Element::kE4m3 ? 256.0f : 1.0f;
}

// Runs one task with the best instruction set of this machine.
void RunTile(const Problem& problem, const Task& task);

// Joins the partial results of one query row, `stride` rows apart, and writes
// `dim` elements of float32 to `out`: the weighted mean of the values times
// `factor`, or zeros if the row saw no key. `sink`, if not null, is one more
// logit that has no value. Returns the logarithm of the sum of exponentials.
float JoinRow(const Partial& first, int64_t parts, int64_t stride, int64_t dim,
              float factor, const float* sink, float* out);

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_TILE_KERNEL_H_
