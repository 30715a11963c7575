#include "kernels/matmul/cpu/matmul.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/common/cpu_features.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/simd_prelude.h"
#include "kernels/matmul/cc/geometry.h"

namespace kernels::matmul {

// So many rows of x are multiplied while a step of the weights is in registers.
constexpr int64_t kRowsAbreast = 32;
// Sums that stay in a first-level cache.
constexpr int64_t kSumsAbreast = 4096;
// After so many rows of the weights the next columns have their turn. Rows that
// are read one after the other lie on pages of their own, more of which than
// this no processor has at hand.
constexpr int64_t kDepth = 128;

// How a product is cut.
//
// The sums of a block of kRowsAbreast rows of x are kept chunk of columns by
// chunk of columns, [rows of the block, columns of the chunk]: one such piece
// stays in the first-level cache while kDepth rows of the weights are read.
struct Plan {
  int64_t rows;
  int64_t k;
  int64_t n;
  int64_t padded;   // columns with those that fill the last step
  int64_t step;     // rows of the weights that are read side by side
  int64_t chunk;    // columns of a chunk
  int64_t columns;  // columns of an item, whole chunks
  int64_t depth;    // rows of the weights of an item
  int64_t column_parts;
  int64_t k_parts;

  // Rows of x in the block that begins at row `at`.
  int64_t RowsFrom(int64_t at) const {
    return rows - at < kRowsAbreast ? rows - at : kRowsAbreast;
  }
  int64_t sums() const { return rows * padded; }
};

// A part of the weights, whose products are summed by one thread.
struct Item {
  int64_t column_begin, column_end;
  int64_t k_begin, k_end;
};

// Of many rows of bfloat16 where the processor multiplies pairs of them: of
// more than these, which take no longer than reading the weights.
constexpr int64_t kFewRows = 8;
constexpr int64_t kTileRows = 6;
constexpr int64_t kTile = 64;  // columns
constexpr int64_t kPanelDepth = 64;
constexpr int64_t kPanelColumns = 512;
constexpr int64_t kBlockTiles = 16;
// Sum of the exponents, with their biases, of the smallest factors of either
// side from which on no sum can be subnormal: every product, and so every sum,
// is a multiple of 2^-126.
constexpr int kLeastExponents = 2 * 127 + 2 * 7 - 126;

// How such a product is cut.
struct PairPlan {
  int64_t rows, k, n;
  int64_t padded;     // columns, whole tiles
  int64_t units;      // pairs of a row of x
  int64_t tile_rows;  // rows of x in a tile; the last may have fewer
  int64_t tiles;
  int64_t blocks;  // of tiles
  int64_t columns, column_parts;
  int64_t depth, k_parts;

  int64_t TileRows(int64_t tile) const {
    const int64_t left = rows - tile * tile_rows;
    return left < tile_rows ? left : tile_rows;
  }
};

// A part of the weights and a block of x.
struct PairItem {
  int64_t column_begin, column_end;
  int64_t k_begin, k_end;
  int64_t first_tile, last_tile;
};

#define KERNELS_SIMD_BF16
#define KERNELS_SIMD_BODY "kernels/matmul/cpu/matmul_simd.inc"
#include "kernels/common/foreach_simd.h"

namespace {

// Weights of an item with one row of x, and with more: those take longer, and
// each item has sums of its own.
constexpr int64_t kItemBytes = int64_t{64} << 10;
constexpr int64_t kMostItemBytes = int64_t{256} << 10;
constexpr int64_t kMaxItems = 64;
// Columns of the widest step, 2 vectors of 16.
constexpr int64_t kWidestStep = 32;
constexpr int64_t kMaxChunk = 2048;
constexpr int64_t kMinColumns = 512;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

int64_t ElementBytes(Element element) {
  return element == Element::kF32 ? 4 : 2;
}

// Bytes of so many weights.
int64_t WeightBytes(Format format, int64_t count) {
  switch (format) {
    case Format::kF32:
      return count * 4;
    case Format::kBF16:
    case Format::kF16:
      return count * 2;
    case Format::kInt8:
    case Format::kE4M3:
      return count;
    case Format::kInt4:
      return count / 2;
  }
  return 0;
}

int64_t ItemBytes(int64_t rows) {
  return std::min(kItemBytes * rows, kMostItemBytes);
}

// By shape alone, so that sums come out the same on any number of threads.
//
// An item is a range of rows of the weights, as wide as can be: what is read in
// the order of memory is read fastest. Each has sums of its own for its
// columns, so there are fewer ranges of rows and more of columns where x has
// many rows.
Plan MakePlan(const Geometry& g, Format format) {
  Plan plan{};
  plan.rows = g.rows;
  plan.k = g.k;
  plan.n = g.n;
  plan.step = format == Format::kInt4 ? 8 : 4;
  plan.padded = RoundUp(g.n, kWidestStep);
  // Packed weights have sums of a group as well.
  const int64_t abreast =
      format >= Format::kInt8 ? kSumsAbreast / 2 : kSumsAbreast;
  plan.chunk = std::min(abreast / std::min(g.rows, kRowsAbreast), kMaxChunk) /
               kWidestStep * kWidestStep;
  const int64_t chunks = CeilDiv(g.n, plan.chunk);
  const int64_t items = std::clamp<int64_t>(
      WeightBytes(format, g.k * g.n) / ItemBytes(g.rows), 1, kMaxItems);
  const int64_t widest =
      std::clamp(2 * kSumsAbreast / g.rows, kMinColumns, kMaxChunk);
  const int64_t column_parts =
      std::clamp<int64_t>(g.n / widest, 1, std::min(chunks, items));
  plan.columns = CeilDiv(chunks, column_parts) * plan.chunk;
  plan.column_parts = CeilDiv(g.n, plan.columns);
  const int64_t k_parts =
      std::clamp<int64_t>(items / plan.column_parts, 1,
                          std::max<int64_t>(CeilDiv(g.k, kDepth / 2), 1));
  plan.depth = std::max<int64_t>(RoundUp(CeilDiv(g.k, k_parts), 8), 8);
  plan.k_parts = std::max<int64_t>(CeilDiv(g.k, plan.depth), 1);
  return plan;
}

Item GetItem(const Plan& plan, int64_t column_part, int64_t k_part) {
  Item item;
  item.column_begin = column_part * plan.columns;
  item.column_end = std::min(item.column_begin + plan.columns, plan.n);
  item.k_begin = k_part * plan.depth;
  item.k_end = std::min(item.k_begin + plan.depth, plan.k);
  return item;
}

const uint8_t* At(const ConstArray& array, int64_t index) {
  return static_cast<const uint8_t*>(array.data) +
         index * ElementBytes(array.element);
}

uint8_t* At(const Array& array, int64_t index) {
  return static_cast<uint8_t*>(array.data) +
         index * ElementBytes(array.element);
}

// Adds the sums of all ranges of rows, and the bias, for one chunk of columns,
// and rounds them into y. Overwrites the sums.
void Finish(SimdLevel level, const Plan& plan, int64_t column, float* sums,
            const ConstArray& bias, const Array& y, int64_t y_offset,
            int64_t bias_offset) {
  const int64_t columns = std::min(plan.chunk, plan.n - column);
  const int64_t width = std::min(plan.chunk, plan.padded - column);
  for (int64_t at = 0; at < plan.rows; at += kRowsAbreast) {
    const int64_t rows = plan.RowsFrom(at);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = sums + at * plan.padded + column * rows + r * width;
      for (int64_t part = 1; part < plan.k_parts; ++part) {
        KERNELS_SIMD_CALL(
            level, Add(row + part * plan.sums(), Element::kF32, columns, row));
      }
      if (bias.data != nullptr) {
        KERNELS_SIMD_CALL(level, Add(At(bias, bias_offset + column),
                                     bias.element, columns, row));
      }
      void* to = At(y, y_offset + (at + r) * plan.n + column);
      KERNELS_SIMD_CALL(level, Round(row, columns, y.element, to));
    }
  }
}

// A matrix that lies as [n, k]: an item is some of its rows, and sums them to
// the end.
void MultiplyTransposed(const ParallelLoop& loop, SimdLevel level,
                        const Geometry& g, const ConstArray& x,
                        const Weights& w, const ConstArray& bias,
                        const Array& y) {
  const int64_t all_rows = g.groups * g.rows;
  std::unique_ptr<float[]> widened;
  const float* factors = static_cast<const float*>(x.data);
  if (x.element != Element::kF32) {
    widened.reset(new float[static_cast<size_t>(all_rows * g.k)]);
    factors = widened.get();
    loop(all_rows, all_rows * g.k * 8, [&](int64_t i) {
      KERNELS_SIMD_CALL(level, ArrangeRow(At(x, i * g.k), x.element, g.k, 4, 0,
                                          1, widened.get() + i * g.k));
    });
  }

  const int64_t row_bytes = WeightBytes(w.format, g.k);
  const int64_t columns =
      std::max({CeilDiv(g.n, kMaxItems),
                std::min(g.n, CeilDiv(ItemBytes(g.rows),
                                      std::max<int64_t>(row_bytes, 1))),
                int64_t{1}});
  const int64_t items = CeilDiv(g.n, columns);
  loop(g.groups * items, g.groups * g.n * row_bytes, [&](int64_t i) {
    const int64_t group = i / items;
    const int64_t begin = i % items * columns;
    const int64_t count = std::min(columns, g.n - begin);
    const uint8_t* own =
        static_cast<const uint8_t*>(w.data) + (group * g.n + begin) * row_bytes;
    float sums[kSumsAbreast];
    const int64_t width =
        std::min(kSumsAbreast / std::min(g.rows, kRowsAbreast), count);
    for (int64_t c = 0; c < count; c += width) {
      const int64_t part = std::min(width, count - c);
      for (int64_t at = 0; at < g.rows; at += kRowsAbreast) {
        const int64_t first = group * g.rows + at;
        const int64_t rows = std::min(kRowsAbreast, g.rows - at);
        KERNELS_SIMD_CALL(level,
                          SumColumns(own + c * row_bytes, w.format, g.k, part,
                                     factors + first * g.k, rows, sums, width));
        for (int64_t r = 0; r < rows; ++r) {
          float* row = sums + r * width;
          if (bias.data != nullptr) {
            KERNELS_SIMD_CALL(level, Add(At(bias, group * g.n + begin + c),
                                         bias.element, part, row));
          }
          void* to = At(y, (first + r) * g.n + begin + c);
          KERNELS_SIMD_CALL(level, Round(row, part, y.element, to));
        }
      }
    }
  });
}

#if defined(__x86_64__)

PairPlan MakePairPlan(const Geometry& g, Format format) {
  PairPlan plan{};
  plan.rows = g.rows;
  plan.k = g.k;
  plan.n = g.n;
  plan.padded = RoundUp(g.n, kTile);
  plan.units = RoundUp(g.k, 8) / 2;
  plan.tiles = CeilDiv(g.rows, kTileRows);
  plan.tile_rows = CeilDiv(g.rows, plan.tiles);
  plan.tiles = CeilDiv(g.rows, plan.tile_rows);
  plan.blocks = CeilDiv(plan.tiles, kBlockTiles);
  plan.columns = RoundUp(CeilDiv(g.n, CeilDiv(g.n, kPanelColumns)), kTile);
  plan.column_parts = CeilDiv(g.n, plan.columns);
  // Many rows make an item of fewer weights worth a thread.
  const int64_t bytes = std::max(
      ItemBytes(g.rows) * kRowsAbreast / std::max(g.rows, kRowsAbreast),
      kItemBytes / 4);
  const int64_t items =
      std::clamp<int64_t>(WeightBytes(format, g.k * g.n) / bytes, 1, kMaxItems);
  const int64_t k_parts =
      std::clamp<int64_t>(items / (plan.column_parts * plan.blocks), 1,
                          std::max<int64_t>(g.k / kDepth, 1));
  plan.depth =
      std::max(RoundUp(CeilDiv(g.k, k_parts), 2 * kPanelDepth), kPanelDepth);
  plan.k_parts = std::max<int64_t>(CeilDiv(g.k, plan.depth), 1);
  return plan;
}

// Several rows of bfloat16.
void MultiplyPairs(const ParallelLoop& loop, const Geometry& g,
                   const ConstArray& x, const Weights& w,
                   const ConstArray& bias, const Array& y) {
  namespace simd = simd_avx512_bf16;
  const PairPlan plan = MakePairPlan(g, w.format);
  const int64_t tiles = g.groups * plan.tiles;
  const std::unique_ptr<uint32_t[]> pairs(
      new uint32_t[static_cast<size_t>(g.groups * g.rows * plan.units)]);
  const std::unique_ptr<int[]> exponents(new int[static_cast<size_t>(tiles)]);
  loop(tiles, g.groups * g.rows * g.k * 4, [&](int64_t i) {
    const int64_t tile = i % plan.tiles;
    const int64_t row = i / plan.tiles * g.rows + tile * plan.tile_rows;
    exponents[static_cast<size_t>(i)] = simd::ArrangePairs(
        static_cast<const uint16_t*>(x.data) + row * g.k, g.k,
        plan.TileRows(tile), plan.units, w.format == Format::kInt4,
        pairs.get() + row * plan.units);
  });

  // The sums of all ranges of rows of the weights. Where there is one range,
  // they stay with the item.
  const bool parted = plan.k_parts > 1;
  const int64_t part_sums = g.rows * plan.padded;
  const std::unique_ptr<float[]> sums(
      parted
          ? new float[static_cast<size_t>(g.groups * plan.k_parts * part_sums)]
          : nullptr);
  // Of a tile of columns: adds the bias to the sums of some rows and rounds.
  const auto finish = [&](int64_t group, int64_t row, int64_t rows,
                          int64_t column, float* from) {
    const int64_t columns = std::min(kTile, g.n - column);
    for (const int64_t end = row + rows; row < end; ++row, from += kTile) {
      if (bias.data != nullptr) {
        simd::Add(At(bias, group * g.n + column), bias.element, columns, from);
      }
      simd::Round(from, columns, y.element,
                  At(y, (group * g.rows + row) * g.n + column));
    }
  };
  const int64_t w_bytes = WeightBytes(w.format, g.k * g.n);
  const int64_t parts = plan.k_parts * plan.column_parts * plan.blocks;
  const int64_t block = CeilDiv(plan.tiles, plan.blocks);
  loop(g.groups * parts, g.groups * w_bytes * plan.tiles, [&](int64_t i) {
    const int64_t group = i / parts, part = i % parts;
    const int64_t k_part = part / (plan.column_parts * plan.blocks);
    PairItem item;
    item.first_tile = part % plan.blocks * block;
    item.last_tile = std::min(item.first_tile + block, plan.tiles);
    item.column_begin = part / plan.blocks % plan.column_parts * plan.columns;
    item.column_end = std::min(item.column_begin + plan.columns, plan.n);
    item.k_begin = k_part * plan.depth;
    item.k_end = std::min(item.k_begin + plan.depth, plan.k);
    Weights own = w;
    own.data = static_cast<const uint8_t*>(w.data) + group * w_bytes;
    const int64_t of_scale = group * CeilDiv(g.k, w.group) * g.n;
    if (w.scale != nullptr) own.scale += of_scale;
    if (w.minimum != nullptr) own.minimum += of_scale;
    const int64_t row = item.first_tile * plan.tile_rows;
    const int64_t rows =
        std::min(item.last_tile * plan.tile_rows, plan.rows) - row;
    const uint32_t* factors = pairs.get() + group * g.rows * plan.units;
    const int* of_x = exponents.get() + group * plan.tiles;
    if (parted) {
      float* to = sums.get() + (group * plan.k_parts + k_part) * part_sums +
                  item.column_begin * g.rows + row * kTile;
      simd::SumPairItem(plan, item, own, factors, of_x, to, g.rows);
      return;
    }
    const std::unique_ptr<float[]> to(
        new float[static_cast<size_t>(rows * plan.columns)]);
    simd::SumPairItem(plan, item, own, factors, of_x, to.get(), rows);
    for (int64_t c = item.column_begin; c < item.column_end; c += kTile) {
      finish(group, row, rows, c, to.get() + (c - item.column_begin) * rows);
    }
  });
  if (!parted) return;
  const int64_t columns = plan.padded / kTile;
  loop(g.groups * columns, g.groups * plan.k_parts * part_sums * 4,
       [&](int64_t i) {
         const int64_t group = i / columns, column = i % columns * kTile;
         float* first =
             sums.get() + group * plan.k_parts * part_sums + column * g.rows;
         for (int64_t part = 1; part < plan.k_parts; ++part) {
           simd::Add(first + part * part_sums, Element::kF32, g.rows * kTile,
                     first);
         }
         finish(group, 0, g.rows, column, first);
       });
}

// Whether each weight is a number of bfloat16, without its scale.
bool IsBF16(Format format) {
  return format != Format::kF32 && format != Format::kF16;
}

#endif  // __x86_64__

}  // namespace

void Multiply(const ParallelLoop& loop, SimdLevel level,
              const Geometry& geometry, const ConstArray& x, const Weights& w,
              const ConstArray& bias, const Array& y) {
  const Geometry& g = geometry;
  if (g.groups * g.rows * g.n == 0) return;
  if (w.transposed) {
    return MultiplyTransposed(loop, level, g, x, w, bias, y);
  }
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512Bf16 && g.rows > kFewRows &&
      x.element == Element::kBF16 && IsBF16(w.format)) {
    return MultiplyPairs(loop, g, x, w, bias, y);
  }
#endif
  const Plan plan = MakePlan(g, w.format);
  const int64_t all_rows = g.groups * g.rows;

  // One row of float32 lies as it is wanted.
  std::unique_ptr<float[]> arranged;
  const float* factors = static_cast<const float*>(x.data);
  if (x.element != Element::kF32 || g.rows > 1) {
    arranged.reset(new float[static_cast<size_t>(all_rows * g.k)]);
    factors = arranged.get();
    loop(all_rows, all_rows * g.k * 8, [&](int64_t i) {
      const int64_t row = i % g.rows, at = row / kRowsAbreast * kRowsAbreast;
      float* to = arranged.get() + (i - row + at) * g.k;
      KERNELS_SIMD_CALL(
          level, ArrangeRow(At(x, i * g.k), x.element, g.k, plan.step, row - at,
                            plan.RowsFrom(at), to));
    });
  }

  const int64_t parts = plan.column_parts * plan.k_parts;
  const int64_t group_sums = plan.sums() * plan.k_parts;
  const std::unique_ptr<float[]> sums(
      new float[static_cast<size_t>(g.groups * group_sums)]);
  const int64_t w_bytes = WeightBytes(w.format, g.k * g.n);
  loop(g.groups * parts, g.groups * w_bytes, [&](int64_t i) {
    const int64_t group = i / parts;
    const int64_t k_part = i % parts / plan.column_parts;
    const Item item = GetItem(plan, i % plan.column_parts, k_part);
    Weights own = w;
    own.data = static_cast<const uint8_t*>(w.data) + group * w_bytes;
    if (w.scale != nullptr) own.scale += group * CeilDiv(g.k, w.group) * g.n;
    if (w.minimum != nullptr) {
      own.minimum += group * CeilDiv(g.k, w.group) * g.n;
    }
    KERNELS_SIMD_CALL(
        level, SumItem(plan, item, own, factors + group * g.rows * g.k,
                       sums.get() + group * group_sums + k_part * plan.sums()));
  });

  const int64_t chunks = CeilDiv(g.n, plan.chunk);
  loop(g.groups * chunks, g.groups * group_sums * 4, [&](int64_t i) {
    const int64_t group = i / chunks;
    Finish(level, plan, i % chunks * plan.chunk,
           sums.get() + group * group_sums, bias, y, group * g.rows * g.n,
           group * g.n);
  });
}

}  // namespace kernels::matmul
