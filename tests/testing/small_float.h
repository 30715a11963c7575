// Floating-point numbers of 8 and 16 bits, in plain integer arithmetic: what a
// GPU's instructions do, for kernels that run under cuda_emulation.h.

#ifndef TESTS_TESTING_SMALL_FLOAT_H_
#define TESTS_TESTING_SMALL_FLOAT_H_

#include <cmath>
#include <cstdint>

namespace kernels::emulation {

// IEEE-like numbers; without infinities, only the largest code is NaN, as in
// float8_e4m3fn.
template <int kExponentBits, int kMantissaBits, bool kHasInfinity>
struct SmallFloat {
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr uint32_t kMantissa = (1u << kMantissaBits) - 1;
  static constexpr uint32_t kExponents = (1u << kExponentBits) - 1;
  static constexpr uint32_t kSign = 1u << (kExponentBits + kMantissaBits);
  // The smallest code, without sign, that is no finite number.
  static constexpr uint32_t kNotFinite =
      kHasInfinity ? kExponents << kMantissaBits : kSign - 1;

  static float Decode(uint32_t bits) {
    const uint32_t code = bits & (kSign - 1);
    const float sign = (bits & kSign) ? -1.0f : 1.0f;
    if (code >= kNotFinite) {
      return kHasInfinity && code == kNotFinite ? sign * INFINITY : NAN;
    }
    const int exponent = static_cast<int>(code >> kMantissaBits);
    const auto mantissa = static_cast<float>(code & kMantissa);
    if (exponent == 0) {
      return sign * std::ldexp(mantissa, 1 - kBias - kMantissaBits);
    }
    return sign * std::ldexp(mantissa + (kMantissa + 1),
                             exponent - kBias - kMantissaBits);
  }

  // To nearest, ties to even.
  static uint32_t Encode(float value) {
    const uint32_t sign = std::signbit(value) ? kSign : 0;
    // A NaN with the topmost bit of the mantissa set.
    const uint32_t nan =
        kHasInfinity ? kNotFinite | 1u << (kMantissaBits - 1) : kNotFinite;
    if (std::isnan(value)) return sign | nan;
    const float size = std::fabs(value);
    const uint32_t overflow = sign | (kHasInfinity ? kNotFinite : nan);
    if (std::isinf(value)) return overflow;
    if (size == 0) return sign;
    int exponent = std::ilogb(size);
    if (exponent < 1 - kBias) exponent = 1 - kBias;
    // In units of the last place; rint rounds ties to even.
    const auto units = static_cast<uint32_t>(
        std::rint(std::ldexp(size, kMantissaBits - exponent)));
    // A carry out of the mantissa moves on into the exponent by itself.
    const int64_t code =
        (static_cast<int64_t>(exponent + kBias - 1) << kMantissaBits) + units;
    return code >= kNotFinite ? overflow : sign | static_cast<uint32_t>(code);
  }
};

using BFloat16 = SmallFloat<8, 7, true>;
using Float16 = SmallFloat<5, 10, true>;
using Float8E4M3 = SmallFloat<4, 3, false>;
using Float8E5M2 = SmallFloat<5, 2, true>;

}  // namespace kernels::emulation

#endif  // TESTS_TESTING_SMALL_FLOAT_H_
