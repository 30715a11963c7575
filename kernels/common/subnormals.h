// Arithmetic on subnormal numbers.

#ifndef KERNELS_COMMON_SUBNORMALS_H_
#define KERNELS_COMMON_SUBNORMALS_H_

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace kernels {

// While this lives, this thread computes with subnormal numbers as IEEE 754
// says. XLA runs handlers, and the threads of its pool, in a mode in which they
// count as zero: the subnormal numbers of bfloat16, which are those of float32
// too, would be lost. Setting the mode takes some nanoseconds.
class WithSubnormals {
 public:
  WithSubnormals() : before_(Mode()) {
    if (before_ & kFlushes) SetMode(before_ & ~kFlushes);
  }
  ~WithSubnormals() {
    if (before_ & kFlushes) SetMode(before_);
  }
  WithSubnormals(const WithSubnormals&) = delete;
  WithSubnormals& operator=(const WithSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  using Bits = uint32_t;
  // Operands that are subnormal, and results, are taken for zero.
  static constexpr Bits kFlushes = 0x8040;
  static Bits Mode() { return _mm_getcsr(); }
  static void SetMode(Bits mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Bits = uint64_t;
  static constexpr Bits kFlushes = Bits{1} << 24;
  static Bits Mode() {
    Bits mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void SetMode(Bits mode) {
    asm volatile("msr fpcr, %0" : : "r"(mode) : "memory");
  }
#else
  using Bits = uint32_t;
  static constexpr Bits kFlushes = 0;
  static Bits Mode() { return 0; }
  static void SetMode(Bits) {}
#endif

  const Bits before_;
};

}  // namespace kernels

#endif  // KERNELS_COMMON_SUBNORMALS_H_
