#include "kernels/decode_attention/tile_kernel.h"

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/simd_prelude.h"
#include "kernels/kv_cache/cache_layout.h"

// GCC's own headers build the unused operand of many AVX-512 instructions from
// a variable that is initialised with itself.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace kernels {
namespace decode_attention {

#define KERNELS_SIMD_BODY "kernels/decode_attention/tile_simd.inc"
#include "kernels/common/foreach_simd.h"

void RunTile(const Problem& problem, const Task& task) {
  KERNELS_SIMD_CALL(CurrentSimdLevel(), RunTask(problem, task));
}

float JoinRow(const Partial& first, int64_t parts, int64_t stride, int64_t dim,
              float factor, const float* sink, float* out) {
  float result = 0.0f;
  KERNELS_SIMD_CALL(CurrentSimdLevel(), JoinParts(first, parts, stride, dim,
                                                  factor, sink, out, &result));
  return result;
}

}  // namespace decode_attention
}  // namespace kernels
