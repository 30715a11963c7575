// The functions of tile_simd.inc, which is compiled for each instruction set by
// a source of its own: together they take longer than anything else to compile.
#ifndef KERNELS_DECODE_ATTENTION_CPU_TILE_LEVELS_H_
#define KERNELS_DECODE_ATTENTION_CPU_TILE_LEVELS_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/decode_attention/cpu/tile_kernel.h"

namespace kernels {
namespace decode_attention {

#define KERNELS_DECLARE_LEVEL(level)                                          \
  namespace level {                                                           \
  void RunTask(const Problem& problem, const Task& task,                      \
               const Task* following, float* scratch);                        \
  void ArrangeRow(cache::Element element, const float* from, int64_t padded,  \
                  float factor, float* to);                                   \
  void JoinParts(cache::Element element, const Partial& first, int64_t parts, \
                 int64_t stride, int64_t padded, float factor,                \
                 const float* sink, float* log_sum);                          \
  }

KERNELS_DECLARE_LEVEL(simd_baseline)
KERNELS_DECLARE_LEVEL(simd_avx2)
KERNELS_DECLARE_LEVEL(simd_avx512)

#undef KERNELS_DECLARE_LEVEL

#if defined(__x86_64__)
namespace simd_avx512_bf16 = simd_avx512;
#endif

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CPU_TILE_LEVELS_H_
