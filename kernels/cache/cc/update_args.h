// What a cache update is given, on any platform.
#ifndef KERNELS_CACHE_CC_UPDATE_ARGS_H_
#define KERNELS_CACHE_CC_UPDATE_ARGS_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/host_device.h"

namespace kernels {
namespace cache {

struct UpdateArgs {
  Element element;      // of the caches
  Element new_element;  // of the new rows, which are converted if it differs
  CacheShape shape;
  Addressing addressing;
  uint8_t* cache_k;
  uint8_t* cache_v;
  const uint8_t* new_k;  // [b, tokens, heads, k_dim], or with heads_first
  const uint8_t* new_v;  // [b, heads, tokens, v_dim]; null: left alone
  int64_t tokens;
  PerSequence index;  // position of the first new token
  PerSequence count;  // new tokens that are not padding
  Scales k_scale;
  Scales v_scale;
};

// New tokens of `sequence` that must be written: [first, last). A ring keeps
// the newest tokens, so those that would be overwritten in this call are left
// out and every slot is written at most once.
KERNELS_HOST_DEVICE inline void TokensToWrite(const UpdateArgs& args,
                                              int64_t sequence, int64_t* first,
                                              int64_t* last) {
  const int64_t count = args.count[sequence];
  *last = count < 0 ? 0 : count < args.tokens ? count : args.tokens;
  *first = 0;
  const int64_t ring = args.addressing.ring;
  if (ring > 0 && *last > ring) *first = *last - ring;
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CC_UPDATE_ARGS_H_
