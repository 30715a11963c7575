// Rows of elements between float32 and what a cache stores.
#ifndef KERNELS_KV_CACHE_ROWS_H_
#define KERNELS_KV_CACHE_ROWS_H_

#include <cstdint>

#include "kernels/kv_cache/cache_layout.h"

namespace kernels {
namespace kv_cache {

// Widens `n` elements. `element` must be kF32, kBf16 or kF16.
void RowToFloat(Element element, const void* from, int64_t n, float* to);

// Narrows, or quantises as x / scale, `n` elements; `scale` is read for the
// quantised elements only.
void RowFromFloat(Element element, const float* from, int64_t n, float scale,
                  void* to);

}  // namespace kv_cache
}  // namespace kernels

#endif  // KERNELS_KV_CACHE_ROWS_H_
