// What the loops of batch_stat work on, whatever runs them.
//
// Arrays of x's kind are [groups, outer, channels, inner], dense; those of the
// statistics' kind are [groups, channels] in T::Compute.

#ifndef KERNELS_BATCH_STAT_CC_GEOMETRY_H_
#define KERNELS_BATCH_STAT_CC_GEOMETRY_H_

#include <cstdint>

namespace kernels::batch_stat {

struct Geometry {
  int64_t groups;
  int64_t outer;
  int64_t channels;
  int64_t inner;

  int64_t elements() const { return groups * outer * channels * inner; }
};

struct Mask {
  const uint8_t* data = nullptr;  // [groups, outer, channels or 1, inner]
  bool per_channel = false;
};

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_CC_GEOMETRY_H_
