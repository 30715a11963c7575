#include "kernels/decode_attention/cpu/tile_kernel.h"

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/cpu_features.h"
#include "kernels/common/simd_prelude.h"
#include "kernels/decode_attention/cpu/tile_levels.h"

namespace kernels {
namespace decode_attention {

void RunTile(const Problem& problem, const Task& task, const Task* following,
             float* scratch) {
  KERNELS_SIMD_CALL(CurrentSimdLevel(),
                    RunTask(problem, task, following, scratch));
}

void ArrangeRow(cache::Element element, const float* from, int64_t padded,
                float factor, float* to) {
  KERNELS_SIMD_CALL(CurrentSimdLevel(),
                    ArrangeRow(element, from, padded, factor, to));
}

float JoinRow(cache::Element element, const Partial& first, int64_t parts,
              int64_t stride, int64_t padded, float factor, const float* sink) {
  float result = 0.0f;
  KERNELS_SIMD_CALL(
      CurrentSimdLevel(),
      JoinParts(element, first, parts, stride, padded, factor, sink, &result));
  return result;
}

}  // namespace decode_attention
}  // namespace kernels
