// Compiles one body of kernel code once for each SIMD level.
//
//   #include "kernels/common/simd_prelude.h"   // and all other headers, first
//   #define KERNELS_SIMD_BODY "kernels/my_op/cpu/my_op_simd.inc"
//   #include "kernels/common/foreach_simd.h"
//
// defines the body's functions in the namespaces `simd_baseline`, `simd_avx2`
// and `simd_avx512` of the namespace that is open where this file is included
// (the last two on x86-64 only), each beside its own copy of
// kernels/common/simd.inc. `simd_avx512_bf16` is another name of the last one,
// unless KERNELS_SIMD_BF16 is defined: then the body has code of its own for
// it. Call one through
//
//   KERNELS_SIMD_CALL(level, MyKernel(args...));
//
// A body that takes long to compile can have a source for each level, compiled
// at once: each defines KERNELS_SIMD_ONLY as 0, 1 or 2 first, and a header
// declares what is called in all three namespaces. Off x86-64 the last two are
// empty.
//
// Rules for the body: it includes nothing but its own parts, and calls nothing
// from the standard library that could be shared between levels (an inline
// function compiled for AVX-512 may be the copy that the linker keeps for
// everybody); no lambdas, which do not inherit the target on every compiler.

#ifndef KERNELS_SIMD_BODY
#error "define KERNELS_SIMD_BODY before including this file"
#endif

#if !defined(KERNELS_SIMD_ONLY) || KERNELS_SIMD_ONLY == 0
#define KERNELS_LANES 4
#define KERNELS_SIMD_LEVEL 0
namespace simd_baseline {
#include "kernels/common/simd.inc"
#include KERNELS_SIMD_BODY
}  // namespace simd_baseline
#undef KERNELS_LANES
#undef KERNELS_SIMD_LEVEL
#endif

#if defined(__x86_64__)

#if !defined(KERNELS_SIMD_ONLY) || KERNELS_SIMD_ONLY == 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define KERNELS_LANES 8
#define KERNELS_SIMD_LEVEL 1
namespace simd_avx2 {
#include "kernels/common/simd.inc"
#include KERNELS_SIMD_BODY
}  // namespace simd_avx2
#undef KERNELS_LANES
#undef KERNELS_SIMD_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if !defined(KERNELS_SIMD_ONLY) || KERNELS_SIMD_ONLY == 2
#if defined(__clang__)
#pragma clang attribute push(                                         \
    __attribute__((                                                   \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define KERNELS_LANES 16
#define KERNELS_SIMD_LEVEL 2
namespace simd_avx512 {
#include "kernels/common/simd.inc"
#include KERNELS_SIMD_BODY
}  // namespace simd_avx512
#undef KERNELS_LANES
#undef KERNELS_SIMD_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(KERNELS_SIMD_BF16)
#if defined(__clang__)
#pragma clang attribute push(                                             \
    __attribute__((target(                                                \
        "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
#define KERNELS_LANES 16
#define KERNELS_SIMD_LEVEL 3
namespace simd_avx512_bf16 {
#include "kernels/common/simd.inc"
#include KERNELS_SIMD_BODY
}  // namespace simd_avx512_bf16
#undef KERNELS_LANES
#undef KERNELS_SIMD_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#elif !defined(KERNELS_SIMD_ONLY)
namespace simd_avx512_bf16 = simd_avx512;
#endif

#endif  // __x86_64__

#undef KERNELS_SIMD_BODY
#undef KERNELS_SIMD_BF16
