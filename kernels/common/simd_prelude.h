// What simd.inc and the bodies of foreach_simd.h need from outside.

#ifndef KERNELS_COMMON_SIMD_PRELUDE_H_
#define KERNELS_COMMON_SIMD_PRELUDE_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels/common/cpu_features.h"

// Vectors are only passed between functions that are inlined into one another,
// so the calling convention that this warning is about is never used.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define KERNELS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define KERNELS_SIMD_CALL(level, ...)     \
  do {                                    \
    switch (level) {                      \
      case ::kernels::SimdLevel::kAvx512: \
        simd_avx512::__VA_ARGS__;         \
        break;                            \
      case ::kernels::SimdLevel::kAvx2:   \
        simd_avx2::__VA_ARGS__;           \
        break;                            \
      default:                            \
        simd_baseline::__VA_ARGS__;       \
    }                                     \
  } while (false)
#else
#define KERNELS_SIMD_CALL(level, ...) \
  do {                                \
    (void)(level);                    \
    simd_baseline::__VA_ARGS__;       \
  } while (false)
#endif

namespace kernels {

// Tags for element types as they lie in memory, and what arithmetic on them is
// done in.
struct F64 {
  using Storage = double;
  using Compute = double;
};
struct F32 {
  using Storage = float;
  using Compute = float;
};
struct BF16 {
  using Storage = uint16_t;
  using Compute = float;
};
struct F16 {
  using Storage = uint16_t;
  using Compute = float;
};

}  // namespace kernels

#endif  // KERNELS_COMMON_SIMD_PRELUDE_H_
