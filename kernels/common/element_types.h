// Tags for element types as they lie in memory, and what arithmetic on them is
// done in.

#ifndef KERNELS_COMMON_ELEMENT_TYPES_H_
#define KERNELS_COMMON_ELEMENT_TYPES_H_

#include <cstdint>

namespace kernels {

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
// float8_e4m3fn: no infinities, largest value 448.
struct E4M3 {
  using Storage = uint8_t;
  using Compute = float;
};
// float8_e5m2.
struct E5M2 {
  using Storage = uint8_t;
  using Compute = float;
};
struct Int8 {
  using Storage = int8_t;
  using Compute = float;
};
// bool, as bytes that are 0 or 1.
struct Bool {
  using Storage = uint8_t;
  using Compute = float;
};

}  // namespace kernels

#endif  // KERNELS_COMMON_ELEMENT_TYPES_H_
