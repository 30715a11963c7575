// The inner loop of decode attention: one sequence, a range of key-value heads,
// a range of cache slots, every query row of those heads. Compiled once for
// each instruction set; plain C++, knows nothing of XLA.
#ifndef KERNELS_DECODE_ATTENTION_CPU_TILE_KERNEL_H_
#define KERNELS_DECODE_ATTENTION_CPU_TILE_KERNEL_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/decode_attention/cc/decode_args.h"

namespace kernels {
namespace decode_attention {

// Rows of the float32 copies of q, and of the accumulators, are padded to a
// multiple of what the inner loops read at a time: up to two of the widest
// vectors. The elements of a row are in the order that they are read in.
constexpr int64_t kLanes = 32;

// Of everything that the inner loops read: a vector that crosses two cache
// lines takes twice the time to load.
constexpr int64_t kAlignment = 64;

// Keys worked on at a time at most: enough to spread the cost of the softmax.
constexpr int kKeysPerTile = 64;

inline int64_t PadToLanes(int64_t n) {
  return (n + kLanes - 1) / kLanes * kLanes;
}

// Query rows that one read of a key is multiplied with at most.
constexpr int64_t kRowsAbreast = 8;

// Rows are worked on in blocks of 8, 4, 2 or 1; where the last block is not
// full, rows of zeros follow.
inline int64_t PaddedRows(int64_t rows) {
  const int64_t rest = rows % kRowsAbreast;
  const int64_t block = rest > 4 ? kRowsAbreast : rest == 3 ? 4 : rest;
  return rows - rest + block;
}

// Whether a tile is better widened and turned over, once for all query rows,
// than read anew by every block of them.
inline bool HasManyRows(int64_t rows) { return rows > kRowsAbreast; }

struct Problem {
  cache::Element element;
  const uint8_t* cache_k;
  const uint8_t* cache_v;
  cache::CacheShape shape;
  cache::Addressing addressing;
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
  int64_t row_begin, row_end;           // within one key-value head; not empty
  int64_t first_token, first_in_group;  // of row_begin
  int64_t slot_begin, slot_end;         // logical slots of the sequence
  const float* q;   // [kv_heads, PaddedRows(rows_per_head), padded k_dim]
  const float* qv;  // the same over v_dim, or null
  Partial out;      // written, not accumulated into
};

// What the elements of a cache are multiplied by when they are read, on top of
// the scales: the kernel reads e4m3 divided by 256.
inline float ReadFactor(cache::Element element) {
  return element == cache::Element::kE4m3 ? 256.0f : 1.0f;
}

// Puts a row of `padded` elements of q or qv into the order in which RunTile
// reads a cache of `element`, times `factor`.
void ArrangeRow(cache::Element element, const float* from, int64_t padded,
                float factor, float* to);

// Floats that RunTile needs for itself, aligned to kAlignment, whatever is in
// them: keys and values of a tile in rows, and again in columns.
inline int64_t ScratchSize(const Problem& problem) {
  const int64_t rows =
      PadToLanes(problem.shape.k_dim) + PadToLanes(problem.shape.v_dim);
  const int64_t copies = HasManyRows(problem.rows_per_head()) ? 2
                         : problem.rotary != nullptr          ? 1
                                                              : 0;
  return copies * kKeysPerTile * rows;
}

// Runs one task with the best instruction set of this machine. `following`, if
// not null, is the task that this thread runs next: what that reads first is
// asked for while this one ends. `scratch` is of ScratchSize.
void RunTile(const Problem& problem, const Task& task, const Task* following,
             float* scratch);

// Joins the partial results of one query row, `stride` rows apart, of `padded`
// elements: the first one's `acc` becomes the weighted mean of the values times
// `factor`, in their own order, or zeros if the row saw no key. `sink`, if not
// null, is one more logit that has no value. Returns the logarithm of the sum
// of exponentials.
float JoinRow(cache::Element element, const Partial& first, int64_t parts,
              int64_t stride, int64_t padded, float factor, const float* sink);

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CPU_TILE_KERNEL_H_
