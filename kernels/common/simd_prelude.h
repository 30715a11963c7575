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
#include "kernels/common/element_types.h"

// Vectors are only passed between functions that are inlined into one another,
// so the calling convention that this warning is about is never used.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define KERNELS_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define KERNELS_SIMD_CALL(level, ...)         \
  do {                                        \
    switch (level) {                          \
      case ::kernels::SimdLevel::kAvx512Bf16: \
        simd_avx512_bf16::__VA_ARGS__;        \
        break;                                \
      case ::kernels::SimdLevel::kAvx512:     \
        simd_avx512::__VA_ARGS__;             \
        break;                                \
      case ::kernels::SimdLevel::kAvx2:       \
        simd_avx2::__VA_ARGS__;               \
        break;                                \
      default:                                \
        simd_baseline::__VA_ARGS__;           \
    }                                         \
  } while (false)
#else
#define KERNELS_SIMD_CALL(level, ...) \
  do {                                \
    (void)(level);                    \
    simd_baseline::__VA_ARGS__;       \
  } while (false)
#endif

#endif  // KERNELS_COMMON_SIMD_PRELUDE_H_
