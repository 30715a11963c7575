// How a cache update is divided among the threads of a GPU. Plain C++.
#ifndef KERNELS_CACHE_CUDA_UPDATE_PLAN_H_
#define KERNELS_CACHE_CUDA_UPDATE_PLAN_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cc/update_args.h"
#include "kernels/common/host_device.h"

namespace kernels {
namespace cache {

// Divides numbers below 2^31 by multiplying: addresses would otherwise cost
// more than the copy.
class Divisor {
 public:
  Divisor() = default;
  // A divisor that no number reaches is one like another.
  explicit Divisor(int64_t divisor)
      : divisor_(static_cast<uint32_t>(
            std::clamp<int64_t>(divisor, 1, int64_t{1} << 31))) {
    int bits = 0;
    while ((uint64_t{1} << bits) < divisor_) ++bits;
    shift_ = bits - 1;
    factor_ =
        static_cast<uint32_t>((uint64_t{1} << (31 + bits)) / divisor_ + 1);
  }

  KERNELS_HOST_DEVICE uint32_t Quotient(uint32_t n) const {
    const uint64_t product = uint64_t{n} * factor_;
    return divisor_ == 1 ? n : static_cast<uint32_t>(product >> 32) >> shift_;
  }
  KERNELS_HOST_DEVICE uint32_t value() const { return divisor_; }

 private:
  uint32_t divisor_ = 1;
  uint32_t factor_ = 0;
  int shift_ = 0;
};

// The rows of K, or of V, cut into items: what one thread moves at a time.
// Items are numbered as they lie in the new rows.
struct NewRows {
  const uint8_t* from = nullptr;  // null: nothing to write
  uint8_t* to = nullptr;
  Scales scale;
  int64_t dim = 0;
  uint32_t items = 0;
  Divisor per_row;   // items of a row
  Divisor heads;     // 1 where all heads of a token are moved as one row
  int word = 0;      // bytes of an item that is copied; 0: it is converted
  int elements = 0;  // of an item that is converted
};

struct DeviceUpdate {
  UpdateArgs args;            // of device memory
  const int32_t* first_slot;  // scalar; args.addressing does not have it yet
  Divisor tokens;
  NewRows rows[2];  // K, V
};

// Items are numbered with 31 bits.
constexpr int64_t kMaxItems = (int64_t{1} << 31) - 1;

// Fills `rows`; `turn_keys` says that keys pass through a function of elements.
// Returns false where there are more than kMaxItems.
inline bool PlanUpdate(const UpdateArgs& args, const int32_t* first_slot,
                       bool turn_keys, DeviceUpdate* update) {
  const CacheShape& shape = args.shape;
  update->args = args;
  update->first_slot = first_slot;
  update->tokens = Divisor(args.tokens);
  for (int i = 0; i < 2; ++i) {
    NewRows& rows = update->rows[i];
    rows.from = i == 0 ? args.new_k : args.new_v;
    rows.to = i == 0 ? args.cache_k : args.cache_v;
    rows.scale = i == 0 ? args.k_scale : args.v_scale;
    rows.dim = i == 0 ? shape.k_dim : shape.v_dim;
    const bool turn = i == 0 && turn_keys;
    const bool convert = turn || args.element != args.new_element;
    const bool whole_token = !convert && !shape.heads_first;
    const int64_t heads = whole_token ? 1 : shape.heads;
    int64_t per_row;
    if (convert) {
      rows.elements = !turn && rows.dim % 16 == 0 ? 16 : 1;
      per_row = rows.dim / rows.elements;
    } else {
      const int64_t bytes = rows.dim * ElementSize(args.element) *
                            (whole_token ? shape.heads : 1);
      rows.word = bytes % 16 == 0 ? 16 : bytes % 4 == 0 ? 4 : 2;
      per_row = bytes / rows.word;
    }
    const int64_t items = args.addressing.batch * args.tokens * heads * per_row;
    if (items > kMaxItems) return false;
    rows.items = rows.from == nullptr ? 0 : static_cast<uint32_t>(items);
    rows.per_row = Divisor(per_row);
    rows.heads = Divisor(heads);
  }
  return true;
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CUDA_UPDATE_PLAN_H_
