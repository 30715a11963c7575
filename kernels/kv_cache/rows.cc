#include "kernels/kv_cache/rows.h"

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/simd_prelude.h"
#include "kernels/kv_cache/cache_layout.h"

namespace kernels {
namespace kv_cache {

#define KERNELS_SIMD_BODY "kernels/kv_cache/rows_simd.inc"
#include "kernels/common/foreach_simd.h"

void RowToFloat(Element element, const void* from, int64_t n, float* to) {
  KERNELS_SIMD_CALL(CurrentSimdLevel(), ToFloat(element, from, n, to));
}

void RowFromFloat(Element element, const float* from, int64_t n, float scale,
                  void* to) {
  KERNELS_SIMD_CALL(CurrentSimdLevel(), FromFloat(element, from, n, scale, to));
}

}  // namespace kv_cache
}  // namespace kernels
