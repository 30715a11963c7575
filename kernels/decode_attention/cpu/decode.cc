#include "kernels/decode_attention/cpu/decode.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cpu/rows.h"
#include "kernels/cache/cpu/update.h"
#include "kernels/decode_attention/cpu/tile_kernel.h"

namespace kernels {
namespace decode_attention {
namespace {

using cache::ElementSize;

// Query rows of a head that a task takes at most, where there are many.
constexpr int64_t kRowBlock = 128;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Decode::Buffer Decode::MakeBuffer(int64_t count) {
  const int64_t bytes = std::max<int64_t>(count, 1) * sizeof(float);
  return Buffer(
      static_cast<float*>(::operator new(bytes, std::align_val_t{kAlignment})));
}

float* Decode::Allocate(int64_t count) {
  buffers_.push_back(MakeBuffer(count));
  return buffers_.back().get();
}

Decode::Decode(const DecodeArgs& args) : args_(args) {
  const cache::CacheShape& shape = args_.shape;
  const int64_t b = batch();
  sequences_.resize(b);
  for (int64_t i = 0; i < b; ++i) sequences_[i] = SequenceOf(args_, i);
  problem_.element = args_.element;
  problem_.cache_k = args_.cache_k;
  problem_.cache_v = args_.cache_v;
  problem_.shape = shape;
  problem_.addressing = args_.addressing;
  problem_.q_tokens = args_.tokens;
  problem_.q_heads = shape.heads * args_.group;
  problem_.group = args_.group;
  problem_.masking = args_.masking;
  problem_.rotary = args_.rotary.cached_keys ? &args_.rotary : nullptr;
  problem_.sequences = sequences_.data();

  const int64_t rows = PaddedRows(problem_.rows_per_head());
  q_ = Allocate(b * shape.heads * rows * PadToLanes(shape.k_dim));
  if (args_.qv != nullptr) {
    qv_ = Allocate(b * shape.heads * rows * PadToLanes(shape.v_dim));
  }
  const int64_t new_keys = b * args_.tokens * shape.heads * shape.k_dim;
  rotate_new_keys_ = args_.rotary.cos != nullptr && !args_.rotary.cached_keys &&
                     args_.new_k != nullptr;
  if (rotate_new_keys_) {
    rotated_ = Allocate(new_keys);
  }
  append_bytes_ =
      new_keys * (4 + args_.group) * ElementSize(args_.query_element);
  PlanTasks();
}

void Decode::PlanTasks() {
  const cache::CacheShape& shape = args_.shape;
  const int64_t b = batch();
  const int64_t rows = problem_.rows_per_head();
  // With few query rows a head, a task takes all heads and reads each key once,
  // straight from the cache; with many, one head and a block of rows.
  const bool narrow = !HasManyRows(rows);
  const int64_t row_bytes =
      (shape.k_dim + shape.v_dim) * ElementSize(args_.element);
  // With the heads of a slot side by side, a task streams through all of them.
  const int64_t heads_per_task = narrow && !shape.heads_first ? shape.heads : 1;
  // Blocks of about one size: `abreast` units of rows are dealt out to them.
  const int64_t abreast = CeilDiv(rows, kRowsAbreast);
  const int64_t row_blocks = narrow ? 1 : CeilDiv(rows, kRowBlock);
  const auto first_row = [&](int64_t block) {
    return std::min(rows, block * abreast / row_blocks * kRowsAbreast);
  };

  std::vector<Slots> slots(b);
  int64_t total = 0;
  for (int64_t i = 0; i < b; ++i) {
    slots[i] = NeededSlots(args_.masking, shape, args_.addressing,
                           sequences_[i], 0, args_.tokens);
    total += slots[i].size();
  }
  attend_bytes_ = total * shape.heads * row_bytes * (narrow ? 1 : abreast);

  // Parts of a sequence: by size alone, so that the result does not depend on
  // the number of threads. Enough for threads to share the work evenly, few
  // enough that joining them costs nothing.
  int64_t chunk;
  if (narrow) {
    const int64_t bytes = std::clamp<int64_t>(
        attend_bytes_ / 32, int64_t{64} << 10, int64_t{4} << 20);
    chunk = bytes / std::max<int64_t>(1, heads_per_task * row_bytes);
  } else {
    const int64_t units = std::max<int64_t>(1, b * shape.heads * row_blocks);
    const int64_t parts = CeilDiv(16, units);
    chunk = CeilDiv(total, std::max<int64_t>(1, b) * parts);
  }
  chunk = std::max<int64_t>(CeilDiv(chunk, 32) * 32, narrow ? 32 : 256);

  first_part_.resize(b + 1);
  first_part_[0] = 0;
  for (int64_t i = 0; i < b; ++i) {
    first_part_[i + 1] =
        first_part_[i] + std::max<int64_t>(1, CeilDiv(slots[i].size(), chunk));
  }
  const int64_t states = shape.heads * rows;
  const int64_t v_pad = PadToLanes(shape.v_dim);
  const int64_t parts = first_part_[b];
  partials_.largest = Allocate(parts * states);
  partials_.sum = Allocate(parts * states);
  partials_.acc = Allocate(parts * states * v_pad);
  join_bytes_ = parts * states * v_pad * 4;

  if (rows == 0) return;
  const int64_t k_pad = PadToLanes(shape.k_dim);
  tasks_.reserve(parts * (shape.heads / std::max<int64_t>(1, heads_per_task)) *
                 row_blocks);
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t part = first_part_[i]; part < first_part_[i + 1]; ++part) {
      Task task = {};
      task.sequence = i;
      task.q = q_ + i * shape.heads * PaddedRows(rows) * k_pad;
      task.qv = qv_ == nullptr
                    ? nullptr
                    : qv_ + i * shape.heads * PaddedRows(rows) * v_pad;
      task.out.largest = partials_.largest + part * states;
      task.out.sum = partials_.sum + part * states;
      task.out.acc = partials_.acc + part * states * v_pad;
      const int64_t begin = slots[i].begin + (part - first_part_[i]) * chunk;
      const int64_t end = std::min(begin + chunk, slots[i].end);
      for (int64_t block = 0; block < row_blocks; ++block) {
        task.row_begin = first_row(block);
        task.row_end = first_row(block + 1);
        task.first_token = task.row_begin / args_.group;
        task.first_in_group = task.row_begin % args_.group;
        task.slot_begin = begin;
        task.slot_end = end;
        if (!narrow && args_.addressing.ring == 0) {
          const Slots needed =
              NeededSlots(args_.masking, shape, args_.addressing, sequences_[i],
                          task.first_token, CeilDiv(task.row_end, args_.group));
          task.slot_begin = std::max(begin, needed.begin);
          task.slot_end = std::min(end, needed.end);
        }
        for (int64_t n = 0; n < shape.heads; n += heads_per_task) {
          task.head_begin = n;
          task.head_end = n + heads_per_task;
          tasks_.push_back(task);
        }
      }
    }
  }
}

void Decode::Rotate(int64_t sequence, int64_t token, float* row) const {
  const Rotary& rotary = args_.rotary;
  rotary.Turn(rotary.where[sequence * args_.tokens + token], row);
}

void Decode::PrepareQueries(int64_t sequence, const uint8_t* from, int64_t dim,
                            bool rotate, const cache::Scales& scale,
                            float* to) const {
  const int64_t rows = problem_.rows_per_head();
  const int64_t padded_rows = PaddedRows(rows);
  const int64_t pad = PadToLanes(dim);
  const int64_t q_heads = problem_.q_heads;
  std::vector<float> natural(q_heads * pad);
  cache::RowConversion token_rows;  // of all query heads
  token_rows.from = args_.query_element;
  token_rows.target = natural.data();
  token_rows.rows = q_heads;
  token_rows.dim = dim;
  token_rows.source_stride = QueryStride(args_) * dim;
  token_rows.target_stride = pad;
  to += sequence * heads() * padded_rows * pad;
  for (int64_t token = 0; token < args_.tokens; ++token) {
    token_rows.source = from + QueryRow(args_, sequence, 0, token, 0) * dim *
                                   ElementSize(args_.query_element);
    cache::ConvertRows(token_rows);
    for (int64_t q_head = 0; q_head < q_heads; ++q_head) {
      const int64_t n = q_head / args_.group;
      const int64_t row = token * args_.group + q_head - n * args_.group;
      const float factor =
          args_.scale * ReadFactor(args_.element) * scale.OrOne(sequence, n);
      float* one = natural.data() + q_head * pad;
      if (rotate) Rotate(sequence, token, one);
      ArrangeRow(args_.element, one, pad, factor,
                 to + (n * padded_rows + row) * pad);
    }
  }
  for (int64_t n = 0; n < heads(); ++n) {
    float* head = to + n * padded_rows * pad;
    std::fill(head + rows * pad, head + padded_rows * pad, 0.0f);
  }
}

std::vector<int64_t> Decode::Runs(int64_t threads) const {
  std::vector<int64_t> ends = {0};
  for (int64_t left = num_tasks(); left > 0; left = num_tasks() - ends.back()) {
    ends.push_back(ends.back() +
                   CeilDiv(left, 2 * std::max<int64_t>(threads, 1)));
  }
  return ends;
}

void Decode::Attend(int64_t begin, int64_t end) const {
  const Buffer scratch = MakeBuffer(ScratchSize(problem_));
  for (int64_t i = begin; i < end; ++i) {
    RunTile(problem_, tasks_[i], i + 1 < end ? &tasks_[i + 1] : nullptr,
            scratch.get());
  }
}

void Decode::Append(int64_t sequence) {
  const cache::CacheShape& shape = args_.shape;
  const bool rotate = args_.rotary.cos != nullptr;
  PrepareQueries(sequence, args_.q, shape.k_dim, rotate, args_.k_scale, q_);
  if (qv_ != nullptr) {
    PrepareQueries(sequence, args_.qv, shape.v_dim, /*rotate=*/false,
                   args_.v_scale, qv_);
  }
  if (args_.new_k == nullptr) return;

  cache::UpdateArgs update = {};
  update.element = args_.element;
  update.new_element = args_.query_element;
  update.shape = shape;
  update.addressing = args_.addressing;
  update.cache_k = args_.cache_k;
  update.cache_v = args_.cache_v;
  update.new_k = rotate_new_keys_ ? nullptr : args_.new_k;
  update.new_v = args_.new_v;
  update.tokens = args_.tokens;
  update.index = args_.index;
  update.count = args_.count;
  update.k_scale = args_.k_scale;
  update.v_scale = args_.v_scale;
  int64_t first, last;
  cache::TokensToWrite(update, sequence, &first, &last);
  cache::UpdateTokens(update, sequence, first, last);
  if (!rotate_new_keys_) return;

  const int64_t stride = cache::NewHeadStride(update) * shape.k_dim;
  cache::RowConversion keys;  // of all heads of a token
  keys.from = args_.query_element;
  keys.rows = heads();
  keys.dim = shape.k_dim;
  keys.source_stride = keys.target_stride = stride;
  for (int64_t token = first; token < last; ++token) {
    const int64_t at = cache::NewRow(update, sequence, token) * shape.k_dim;
    keys.source = args_.new_k + at * ElementSize(args_.query_element);
    keys.target = rotated_ + at;
    cache::ConvertRows(keys);
    for (int64_t n = 0; n < heads(); ++n) {
      Rotate(sequence, token, rotated_ + at + n * stride);
    }
  }
  update.new_element = cache::Element::kF32;
  update.new_k = reinterpret_cast<const uint8_t*>(rotated_);
  update.new_v = nullptr;
  cache::UpdateTokens(update, sequence, first, last);
}

void Decode::Join(int64_t sequence, int64_t head) const {
  const cache::CacheShape& shape = args_.shape;
  const int64_t rows = problem_.rows_per_head();
  const int64_t states = shape.heads * rows;
  const int64_t v_pad = PadToLanes(shape.v_dim);
  const int64_t part = first_part_[sequence];
  const int64_t parts = first_part_[sequence + 1] - part;
  const float factor =
      ReadFactor(args_.element) * args_.v_scale.OrOne(sequence, head);
  const int64_t bytes = shape.v_dim * ElementSize(args_.out_element);
  int64_t state = part * states + head * rows;
  for (int64_t token = 0; token < args_.tokens; ++token) {
    const bool counts = token < sequences_[sequence].num_queries;
    for (int64_t g = 0; g < args_.group; ++g, ++state) {
      const Partial first = {partials_.largest + state, partials_.sum + state,
                             partials_.acc + state * v_pad};
      const int64_t q_head = head * args_.group + g;
      const float* sink =
          args_.sinks == nullptr || !counts ? nullptr : args_.sinks + q_head;
      const float lse =
          JoinRow(args_.element, first, parts, states, v_pad, factor, sink);
      const int64_t row = QueryRow(args_, sequence, head, token, g);
      cache::RowFromFloat(args_.out_element, first.acc, shape.v_dim, 1.0f,
                          args_.out + row * bytes);
      args_.lse[(sequence * problem_.q_heads + q_head) * args_.tokens + token] =
          lse;
    }
  }
}

}  // namespace decode_attention
}  // namespace kernels
