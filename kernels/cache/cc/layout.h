// Where one position of one sequence lies in a key or value cache. Shared by
// the cache update and by decode attention; plain C++.
#ifndef KERNELS_CACHE_CC_LAYOUT_H_
#define KERNELS_CACHE_CC_LAYOUT_H_

#include <cstdint>

#include "kernels/common/host_device.h"

namespace kernels {
namespace cache {

enum class Element { kF32, kBf16, kF16, kInt8, kE4m3, kE5m2 };

KERNELS_HOST_DEVICE inline int64_t ElementSize(Element e) {
  switch (e) {
    case Element::kF32:
      return 4;
    case Element::kBf16:
    case Element::kF16:
      return 2;
    default:
      return 1;
  }
}

KERNELS_HOST_DEVICE inline bool IsQuantized(Element e) {
  return e == Element::kInt8 || e == Element::kE4m3 || e == Element::kE5m2;
}

// [layers, blocks, block_size, heads, dim], or with `heads_first`
// [layers, blocks, heads, block_size, dim]. A cache that is not paged has one
// block for each sequence, as long as the cache.
struct CacheShape {
  int64_t layers = 1;
  int64_t blocks = 0;
  int64_t block_size = 0;
  int64_t heads = 0;
  int64_t k_dim = 0;
  int64_t v_dim = 0;
  bool heads_first = false;

  // Rows of `dim` elements between neighbouring slots, and neighbouring heads.
  KERNELS_HOST_DEVICE int64_t slot_stride() const {
    return heads_first ? 1 : heads;
  }
  KERNELS_HOST_DEVICE int64_t head_stride() const {
    return heads_first ? block_size : 1;
  }
};

// A number for each sequence, [b], or [1] for all of them.
struct PerSequence {
  const int32_t* data = nullptr;
  int64_t stride = 1;

  KERNELS_HOST_DEVICE int32_t operator[](int64_t sequence) const {
    return data[sequence * stride];
  }
};

// Scales of the heads of each sequence, [b, heads]; either axis may have size 1
// where one holds for all, and there are none where nothing is quantised.
struct Scales {
  const float* data = nullptr;
  int64_t sequence_stride = 0;
  int64_t head_stride = 0;

  KERNELS_HOST_DEVICE bool given() const { return data != nullptr; }
  // Of a sequence's first head.
  KERNELS_HOST_DEVICE const float* At(int64_t sequence) const {
    return data + sequence * sequence_stride;
  }
  KERNELS_HOST_DEVICE float Of(int64_t sequence, int64_t head) const {
    return At(sequence)[head * head_stride];
  }
  // Of those that there may be none of.
  KERNELS_HOST_DEVICE float OrOne(int64_t sequence, int64_t head) const {
    return given() ? Of(sequence, head) : 1.0f;
  }
};

// Which slot a position of a sequence goes to.
struct Addressing {
  // [b, table_width] blocks of each sequence; null: the one of its own number.
  const int32_t* table = nullptr;
  int64_t table_width = 1;
  PerSequence layer;
  int64_t batch = 0;
  // Slots of the whole sequence before the first one held here: not 0 where
  // the cache is sharded along its length.
  int64_t first_slot = 0;
  int64_t ring = 0;  // ring length, or 0 for a cache that does not wrap

  // Logical slots [begin, end) that are held here.
  KERNELS_HOST_DEVICE int64_t slot_begin() const { return first_slot; }
  KERNELS_HOST_DEVICE int64_t slot_end(const CacheShape& shape) const {
    return first_slot + table_width * shape.block_size;
  }

  KERNELS_HOST_DEVICE int64_t SlotOf(int64_t position) const {
    return ring > 0 && position >= 0 ? position % ring : position;
  }

  // Index of the row of head 0 at logical slot `slot`, or -1 where the slot is
  // not here: beyond the end, in another shard, or in a block that does not
  // exist.
  KERNELS_HOST_DEVICE int64_t RowOf(const CacheShape& shape, int64_t sequence,
                                    int64_t slot) const {
    const int64_t local = slot - first_slot;
    if (local < 0 || local >= table_width * shape.block_size) return -1;
    const int64_t entry = table_width == 1 ? 0 : local / shape.block_size;
    const int64_t offset = local - entry * shape.block_size;
    const int64_t block =
        table == nullptr ? sequence : table[sequence * table_width + entry];
    const int64_t l = layer[sequence];
    if (block < 0 || block >= shape.blocks || l < 0 || l >= shape.layers) {
      return -1;
    }
    return (l * shape.blocks + block) * shape.block_size * shape.heads +
           offset * shape.slot_stride();
  }
};

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CC_LAYOUT_H_
