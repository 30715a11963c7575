// Rows of elements between float32 and what a cache stores.
#ifndef KERNELS_CACHE_CPU_ROWS_H_
#define KERNELS_CACHE_CPU_ROWS_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"

namespace kernels {
namespace cache {

// Rows of elements to be stored as others. Strides are in elements.
struct RowConversion {
  Element from = Element::kF32;  // or kBf16 or kF16
  Element to = Element::kF32;
  const void* source = nullptr;
  void* target = nullptr;  // must not overlap the source
  int64_t rows = 1;
  int64_t dim = 0;  // elements of a row
  int64_t source_stride = 0;
  int64_t target_stride = 0;
  // Of each row, for quantised elements: they are x / scale. Null: 1.
  const float* scale = nullptr;
  int64_t scale_stride = 0;
};

// Widens, narrows or quantises rows.
void ConvertRows(const RowConversion& rows);

// Narrows, or quantises as x / scale, `n` elements; `scale` is read for the
// quantised elements only.
void RowFromFloat(Element element, const float* from, int64_t n, float scale,
                  void* to);

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CPU_ROWS_H_
