// How the work on [groups, outer, channels, inner] is cut into items.
#ifndef KERNELS_BATCH_STAT_CPU_CUTS_H_
#define KERNELS_BATCH_STAT_CPU_CUTS_H_

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "kernels/batch_stat/cc/geometry.h"

namespace kernels::batch_stat {

inline constexpr int64_t kPartBytes = int64_t{256} << 10;
inline constexpr int64_t kMaxParts = 64;
inline constexpr int64_t kMinPartRows = 32;
inline constexpr int64_t kWidestVector = 16;
// Of float32: the statistics of so many columns, and what is read of a few rows
// side by side, stay in a first-level cache.
inline constexpr int64_t kPartColumns = 512;
inline constexpr int64_t kMaxFoldedColumns = 4096;

// [n, 1] and [n, 1, m] are a single run: one long loop instead of many short
// ones.
inline Geometry Simplify(Geometry g) {
  if (g.channels == 1) {
    g.inner *= g.outer;
    g.outer = 1;
  }
  return g;
}

// How [outer, channels, inner] is cut into items of work: by shape alone, so
// that sums come out the same on any number of threads.
//
// With the features last (inner is 1), an item is a range of rows; of channels
// too where there are many and `sums` are made of them, which then stay near.
// `fold` rows are taken as one, so that rows of 7 channels become rows of 112
// that fill whole vectors; what is left over belongs to the last item.
//
// Otherwise an item is a range of channels, and of outer indices where there
// are few channels.
struct Cut {
  int64_t fold = 1;
  int64_t outer_parts = 1;
  int64_t channel_parts = 1;

  int64_t items(const Geometry& g) const {
    return g.groups * outer_parts * channel_parts;
  }
};

// A mask of rows is no longer one of folded rows.
inline bool MayFold(const Mask& mask) {
  return mask.data == nullptr || mask.per_channel;
}

inline Cut CutWork(const Geometry& g, int64_t element_bytes, bool may_fold,
                   bool sums) {
  const int64_t most_columns = sums ? 2 * kPartColumns : kMaxFoldedColumns;
  const int64_t bytes = g.outer * g.channels * g.inner * element_bytes;
  const int64_t parts = std::clamp<int64_t>(bytes / kPartBytes, 1, kMaxParts);
  Cut cut;
  if (g.inner == 1) {
    const int64_t fold = kWidestVector / std::gcd(g.channels, kWidestVector);
    if (may_fold && g.outer >= 2 * fold && g.channels * fold <= most_columns) {
      cut.fold = fold;
    } else if (sums) {
      cut.channel_parts = (g.channels + kPartColumns - 1) / kPartColumns;
    }
    // Each part has sums of its own for its channels: keep it worth them.
    cut.outer_parts =
        std::clamp<int64_t>(g.outer / cut.fold / kMinPartRows, 1,
                            std::max<int64_t>(1, parts / cut.channel_parts));
    return cut;
  }
  cut.channel_parts = std::clamp<int64_t>(parts, 1, g.channels);
  cut.outer_parts = std::clamp<int64_t>(parts / cut.channel_parts, 1, g.outer);
  return cut;
}

// One item: a group, a range of (folded) outer indices, a range of channels.
struct Item {
  int64_t group, part;
  int64_t outer_begin, outer_end;
  int64_t channel_begin, channel_end;
};

// The sums go over the items from the first to the last, and what comes after
// them `backwards`: what was read last is still in a cache.
inline Item GetItem(const Geometry& g, const Cut& cut, int64_t index,
                    bool backwards) {
  if (backwards) index = cut.items(g) - 1 - index;
  const int64_t channel_part = index % cut.channel_parts;
  const int64_t part = index / cut.channel_parts % cut.outer_parts;
  const int64_t group = index / cut.channel_parts / cut.outer_parts;
  const int64_t outer = g.outer / cut.fold;
  // Columns are cut between whole vectors.
  const int64_t unit = g.inner == 1 ? kWidestVector : 1;
  const auto channel = [&](int64_t i) {
    return i == cut.channel_parts
               ? g.channels
               : (g.channels / unit) * i / cut.channel_parts * unit;
  };
  return {group,
          part,
          outer * part / cut.outer_parts,
          outer * (part + 1) / cut.outer_parts,
          channel(channel_part),
          channel(channel_part + 1)};
}

// A stretch of rows: [rows, columns], `stride` apart, at an offset of elements;
// `row` and `channel` are its first in the whole array, and `fold` rows of that
// make one.
struct Rows {
  int64_t at, row, rows, channel, columns, stride, fold;
};

// Calls body(Rows) for the rows of an item, and for those left over.
template <typename Body>
void ForRows(const Geometry& g, const Cut& cut, const Item& item, Body&& body) {
  const int64_t first = item.group * g.outer;
  const auto stretch = [&](int64_t row, int64_t rows, int64_t fold) {
    body(Rows{row * g.channels + item.channel_begin, row, rows,
              item.channel_begin,
              (item.channel_end - item.channel_begin) * fold, g.channels * fold,
              fold});
  };
  stretch(first + item.outer_begin * cut.fold,
          item.outer_end - item.outer_begin, cut.fold);
  const int64_t whole = g.outer / cut.fold * cut.fold;
  if (item.part + 1 == cut.outer_parts && whole < g.outer) {
    stretch(first + whole, g.outer - whole, 1);
  }
}

// Calls body(channel, offset of its first run) for the channels of an item.
template <typename Body>
void ForRuns(const Geometry& g, const Item& item, Body&& body) {
  const int64_t first = item.group * g.outer + item.outer_begin;
  for (int64_t c = item.channel_begin; c < item.channel_end; ++c) {
    body(c, (first * g.channels + c) * g.inner);
  }
}

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_CPU_CUTS_H_
