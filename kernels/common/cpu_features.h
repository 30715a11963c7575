// Which instruction set the machine that runs this code has.
//
// Nothing is assumed at build time. Kernels are compiled once for each level
// (see foreach_simd.h) and chosen through a plain switch: no ifunc resolvers,
// which run before the sanitizers' runtimes are ready.

#ifndef KERNELS_COMMON_CPU_FEATURES_H_
#define KERNELS_COMMON_CPU_FEATURES_H_

#include <cstdint>
#include <string>
#include <string_view>

namespace kernels {

// Ordered: a machine that has one level has all those before it.
enum class SimdLevel : int {
  kBaseline = 0,  // SSE2 on x86-64, NEON on arm64
  kAvx2 = 1,      // AVX2, FMA, F16C
  kAvx512 = 2,    // AVX-512 F, BW, DQ, VL on top of it
  // Its products of pairs of bfloat16, summed in float32.
  kAvx512Bf16 = 3,
};

// The best level of this machine, capped by `SetSimdLevel`.
SimdLevel CurrentSimdLevel();

// Caps the level, for tests of every code path on one machine: the name of one,
// or "auto". Returns false, and changes nothing, for another
// name or for a level that this machine lacks.
bool SetSimdLevel(std::string_view name);

// "baseline", "avx2", "avx512" or "avx512_bf16".
std::string SimdLevelName(SimdLevel level);

}  // namespace kernels

#endif  // KERNELS_COMMON_CPU_FEATURES_H_
