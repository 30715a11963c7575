#include "kernels/common/cpu_features.h"

#include <atomic>
#include <string>
#include <string_view>

namespace kernels {
namespace {

SimdLevel DetectSimdLevel() {
#if defined(__x86_64__)
  // These builtins also ask the operating system whether it saves the wide
  // registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") &&
                    __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return SimdLevel::kAvx512Bf16;
  }
  if (avx512) return SimdLevel::kAvx512;
  if (avx2) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kBaseline;
}

SimdLevel MachineSimdLevel() {
  static const SimdLevel level = DetectSimdLevel();
  return level;
}

constexpr SimdLevel kBest = SimdLevel::kAvx512Bf16;

std::atomic<int> g_cap{static_cast<int>(kBest)};

}  // namespace

SimdLevel CurrentSimdLevel() {
  const auto cap = static_cast<SimdLevel>(g_cap.load());
  const SimdLevel machine = MachineSimdLevel();
  return machine < cap ? machine : cap;
}

bool SetSimdLevel(std::string_view name) {
  for (const SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kAvx2,
                                SimdLevel::kAvx512, SimdLevel::kAvx512Bf16}) {
    if (name == SimdLevelName(level) && level <= MachineSimdLevel()) {
      g_cap.store(static_cast<int>(level));
      return true;
    }
  }
  if (name != "auto") return false;
  g_cap.store(static_cast<int>(kBest));
  return true;
}

std::string SimdLevelName(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512Bf16:
      return "avx512_bf16";
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    case SimdLevel::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace kernels
