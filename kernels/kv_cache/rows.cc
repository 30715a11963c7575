#include "kernels/kv_cache/rows.h"

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/simd_prelude.h"
#include "kernels/kv_cache/cache_layout.h"

namespace kernels {
namespace kv_cache {

#define KERNELS_SIMD_BODY "kernels/kv_cache/rows_simd.inc"
#include "kernels/common/foreach_simd.h"

void ConvertRows(const RowConversion& rows) {
  KERNELS_SIMD_CALL(CurrentSimdLevel(), ConvertRows(rows));
}

void RowFromFloat(Element element, const float* from, int64_t n, float scale,
                  void* to) {
  RowConversion row;
  row.to = element;
  row.source = from;
  row.target = to;
  row.dim = n;
  row.scale = &scale;
  ConvertRows(row);
}

}  // namespace kv_cache
}  // namespace kernels
