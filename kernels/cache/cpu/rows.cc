#include "kernels/cache/cpu/rows.h"

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/cpu_features.h"
#include "kernels/common/simd_prelude.h"

namespace kernels {
namespace cache {

#define KERNELS_SIMD_BODY "kernels/cache/cpu/rows_simd.inc"
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

}  // namespace cache
}  // namespace kernels
