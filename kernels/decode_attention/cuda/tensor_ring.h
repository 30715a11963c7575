// Tiles of keys and values on their way to the tensor cores.
//
// Decoding reads the cache and does little else, so warps never wait for one
// another: each has a ring in shared memory into which it copies keys and
// values while it works on those before. A tile has 16 keys. A warp copies
// whole rows, 16 bytes (E elements) a lane, to where the lane will read them
// that must hold them, and since a product may take its elements in any order,
// that is 16 bytes at a time as well:
//
//     keys:   lane (g, t) holds elements 4E * i + E * t + [0, E) of keys g and
//             g + 8; four of them make one step of the product q k
//     values: lane (g, t) holds elements 8E * i + E * g + [0, E) of keys 2t,
//             2t + 1, 2t + 8, 2t + 9; element j of all lanes makes one step of
//             the product p v
#ifndef KERNELS_DECODE_ATTENTION_CUDA_TENSOR_RING_H_
#define KERNELS_DECODE_ATTENTION_CUDA_TENSOR_RING_H_

#include <cstdint>
#include <type_traits>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cuda/attend.h"
#include "kernels/decode_attention/cuda/decode.h"
#include "kernels/decode_attention/cuda/tensor_cores.h"

namespace kernels {
namespace decode_attention {

constexpr int kTile = 16;  // keys of a warp at a time

// Bytes of the ring of a warp: what is on its way from memory at a time. More
// were no faster (H100 and H200).
constexpr int kRingBytes = 12 << 10;

// What caches of a type are multiplied as, and the bytes of their elements.
template <cache::Element kElement>
struct Multiplied {
  using Type = std::conditional_t<kElement == cache::Element::kBf16, BF16, F16>;
  static constexpr int kBytes =
      kElement == cache::Element::kBf16 || kElement == cache::Element::kF16 ? 2
                                                                            : 1;
};

template <cache::Element kElement, int kDim>
struct Sizes {
  static constexpr int kBytes = Multiplied<kElement>::kBytes;
  static constexpr int kElements = 16 / kBytes;  // E
  static constexpr int kPairs = kElements / 2;
  static constexpr int kKeyLoads = kDim / (4 * kElements);
  static constexpr int kSteps = kDim / 16;  // of the product q k
  static constexpr int kValueLoads =
      (kDim + 8 * kElements - 1) / (8 * kElements);
  // Pieces of 16 bytes of a row, and how often all lanes copy one.
  static constexpr int kPieces = kDim / kElements;
  // The ring goes by halves of tiles: the keys, or the values.
  static constexpr int kHalfPieces = kTile * kPieces;
  static constexpr int kHalfBytes = kHalfPieces * 16;
  static constexpr int kCopies = kTile * kPieces / cuda::kWarp;
  static constexpr int kRowsOfCopy = cuda::kWarp / kPieces;
  static constexpr int kFits = kRingBytes / kHalfBytes;
  static constexpr int kRing = kFits < 2 ? 2 : kFits > 6 ? 6 : kFits;
  // Tiles whose keys have been found, and that are still in use.
  static constexpr int kFound = kRing / 2 + 1;
};

__device__ __forceinline__ uint32_t WordOf(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// 16 bytes of a cache as pairs of numbers that can be multiplied.
template <cache::Element kElement, int kPairs>
__device__ __forceinline__ void PairsOf(const uint4& words,
                                        uint32_t (&pairs)[kPairs]) {
  KERNELS_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (kPairs == 4) {
      pairs[i] = WordOf(words, i);
    } else {
      Widen<kElement>(WordOf(words, i), &pairs[2 * i], &pairs[2 * i + 1]);
    }
  }
}

// 16 bytes of two keys as pairs of what they have in the same place.
template <cache::Element kElement, int kCount>
__device__ __forceinline__ void PairUp(const uint4& first, const uint4& second,
                                       uint32_t (&pairs)[kCount]) {
  KERNELS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t a = WordOf(first, i), b = WordOf(second, i);
    if constexpr (kCount == 8) {
      pairs[2 * i] = __byte_perm(a, b, 0x5410);
      pairs[2 * i + 1] = __byte_perm(a, b, 0x7632);
    } else {
      Widen<kElement>(__byte_perm(a, b, 0x5140), &pairs[4 * i],
                      &pairs[4 * i + 1]);
      Widen<kElement>(__byte_perm(a, b, 0x7362), &pairs[4 * i + 2],
                      &pairs[4 * i + 3]);
    }
  }
}

// Whether keys lie in slots that are their positions, one after the other, and
// nothing but positions decides which are seen, nor changes logits.
inline bool IsPlain(const DecodeArgs& args) {
  const Masking& masking = args.masking;
  return args.addressing.table_width == 1 && args.addressing.ring == 0 &&
         masking.softcap == 0.0f && masking.alibi == nullptr &&
         masking.bias.data == nullptr && masking.mask.data == nullptr;
}

// A warp's ring of halves of tiles in shared memory, and what is copied into it
// next: tiles of some segments, those of one while the last ones of that before
// are worked on.
template <cache::Element kElement, int kDim, bool kPlain>
class Ring {
 public:
  using S = Sizes<kElement, kDim>;

  // Keys that were found, for all lanes to see.
  struct Found {
    int64_t rows[kPlain ? 1 : S::kFound][kTile];
    int positions[kPlain ? 1 : S::kFound][kTile];
  };

  // Of each segment the tiles from slot `offset` on, `step` slots apart; `to`
  // is memory of the warp.
  __device__ __forceinline__ Ring(const DeviceDecode& decode,
                                  const BlockPlace& place, int offset, int step,
                                  unsigned char* to, Found* found)
      : decode_(decode),
        place_(place),
        offset_(offset),
        step_(step),
        found_(found) {
    const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
    const DecodeArgs& args = decode.args;
    ring_ = reinterpret_cast<uint4*>(to);
    const int64_t stride = args.shape.slot_stride();
    k_slot_ = stride * args.shape.k_dim * S::kBytes;
    v_slot_ = stride * args.shape.v_dim * S::kBytes;
    const int piece = lane % S::kPieces;
    has_key_ = piece * S::kElements < args.shape.k_dim;
    has_value_ = piece * S::kElements < args.shape.v_dim;
    const int g = lane / 4, t = lane % 4;
    my_keys_[0] = ring_ + KeyPlace(g, t);
    my_keys_[1] = ring_ + KeyPlace(g, t + 4 % S::kPieces) - 4 % S::kPieces;
    my_values_ = ring_ + ValuePlace(2 * t, g % S::kPieces);
    // Where sequences share a row of the cache, new rows are not only after a
    // sequence's own.
    if (!kPlain || args.addressing.table != nullptr) WaitForNewRows();
  }

  // Begins with some segments, in shared memory. While one half is worked on,
  // the others are on their way. Nothing may be on its way before.
  __device__ __forceinline__ void Start(const Segment* segments, int count) {
    segments_ = segments;
    left_ = count;
    slot_ = end_ = 0;
    half_in_ = found_in_ = 0;
    half_out_ = S::kRing - 1;
    found_out_ = S::kFound - 1;
    KERNELS_UNROLL
    for (int i = 0; i < S::kRing - 1; ++i) {
      if (i % 2 == 0) {
        CopyKeys();
      } else {
        CopyValues();
      }
    }
  }

  // Waits for the next half, of keys or else of values, and starts copying
  // another in place of the one before.
  template <bool kKeys>
  __device__ __forceinline__ void Next() {
    cuda::WaitForCopies<S::kRing - 2>();
    __syncwarp();  // of all lanes; and they have read what is replaced
    if constexpr (kKeys == (S::kRing % 2 == 1)) {
      CopyKeys();
    } else {
      CopyValues();
    }
    half_out_ = half_out_ + 1 < S::kRing ? half_out_ + 1 : 0;
    if constexpr (kKeys) {
      found_out_ = found_out_ + 1 < S::kFound ? found_out_ + 1 : 0;
    }
  }

  // What this lane must hold of the half that has been waited for.
  __device__ __forceinline__ const uint4& KeyPart(int n, int load) const {
    return my_keys_[load % 2]
                   [half_out_ * S::kHalfPieces + n * 8 * S::kPieces + 4 * load];
  }
  __device__ __forceinline__ const uint4& ValuePart(int c, int load) const {
    return my_values_[half_out_ * S::kHalfPieces +
                      (c % 2 + c / 2 * 8) * S::kPieces + 8 * load];
  }

  // The position of key `i` of the tile that has been waited for.
  __device__ __forceinline__ int PositionOf(int i) const {
    return found_->positions[found_out_][i];
  }

  // Waits for the kernel that writes the new rows, once; see LaunchWorkers.
  __device__ __forceinline__ void WaitForNewRows() {
    if (waited_) return;
    cuda::WaitForPrevious();
    waited_ = true;
  }

 private:
  // Where a half has piece `piece` of key `key`. Rows lie one after the other,
  // as copies are fast only then; within one, pieces change places so that
  // those who read at a time, of two keys or of four, do not meet in a bank.
  static __device__ __forceinline__ int KeyPlace(int key, int piece) {
    return key * S::kPieces + (piece ^ (S::kPieces < 8 ? 0 : 4 * (key % 2)));
  }
  static __device__ __forceinline__ int ValuePlace(int key, int piece) {
    return key * S::kPieces +
           (piece ^ (2 * (key / 2) % (S::kPieces < 8 ? 4 : 8)));
  }

  // Goes on to the next segment.
  __device__ __forceinline__ void Begin() {
    const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
    const cache::CacheShape& shape = decode_.args.shape;
    const Segment& segment = *segments_++;
    --left_;
    slot_ = segment.begin + offset_;
    end_ = segment.end;
    const int piece = lane % S::kPieces * 16;
    keys_ = decode_.args.cache_k + piece;
    values_ = decode_.args.cache_v + piece;
    if constexpr (kPlain) {
      const int64_t row =
          segment.base +
          (slot_ + lane / S::kPieces - place_.first_slot) * shape.slot_stride();
      keys_ += row * shape.k_dim * S::kBytes;
      values_ += row * shape.v_dim * S::kBytes;
    }
  }

  // Starts copying the keys of the next tile.
  __device__ __forceinline__ void CopyKeys() {
    const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
    const int piece = lane % S::kPieces;
    while (slot_ >= end_ && left_ > 0) Begin();
    if (slot_ < end_) {
      if constexpr (kPlain) {
        if (slot_ + kTile > segments_[-1].first_query) WaitForNewRows();
      } else {
        // Each lane finds one, for all to see.
        const Key key =
            FindKey(decode_, place_, segments_[-1], slot_ + lane % kTile);
        if (lane < kTile) {
          found_->rows[found_in_][lane] = key.row;
          found_->positions[found_in_][lane] = key.position;
        }
        __syncwarp();
      }
      KERNELS_UNROLL
      for (int i = 0; i < S::kCopies; ++i) {
        const int key = i * S::kRowsOfCopy + lane / S::kPieces;
        uint4* const to =
            ring_ + half_in_ * S::kHalfPieces + KeyPlace(key, piece);
        Copy(to, keys_, i, key, k_slot_, decode_.args.shape.k_dim, has_key_);
      }
      if constexpr (kPlain) keys_ += step_ * k_slot_;
    }
    cuda::CommitCopies();
    half_in_ = half_in_ + 1 < S::kRing ? half_in_ + 1 : 0;
  }

  // Its values.
  __device__ __forceinline__ void CopyValues() {
    const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
    const int piece = lane % S::kPieces;
    if (slot_ < end_) {
      KERNELS_UNROLL
      for (int i = 0; i < S::kCopies; ++i) {
        const int key = i * S::kRowsOfCopy + lane / S::kPieces;
        uint4* const to =
            ring_ + half_in_ * S::kHalfPieces + ValuePlace(key, piece);
        Copy(to, values_, i, key, v_slot_, decode_.args.shape.v_dim,
             has_value_);
      }
      if constexpr (kPlain) values_ += step_ * v_slot_;
    }
    cuda::CommitCopies();
    half_in_ = half_in_ + 1 < S::kRing ? half_in_ + 1 : 0;
    found_in_ = found_in_ + 1 < S::kFound ? found_in_ + 1 : 0;
    slot_ += step_;
  }

  // Starts copy `i` of a half: the lane's piece of key `key`.
  __device__ __forceinline__ void Copy(uint4* to, const uint8_t* from, int i,
                                       int key, int64_t slot_bytes, int64_t dim,
                                       bool has_piece) {
    bool valid = has_piece;
    if constexpr (kPlain) {
      from += i * (S::kRowsOfCopy * slot_bytes);
      valid = valid && slot_ + key < end_;
    } else {
      const int64_t row = found_->rows[found_in_][key];
      from += row * dim * S::kBytes;
      valid = valid && row >= 0;
    }
    cuda::CopyAsync<kReadOnce<S::kBytes>>(
        to, reinterpret_cast<const uint4*>(from), valid);
  }

  const DeviceDecode& decode_;
  const BlockPlace& place_;
  const Segment* segments_;  // after the one that is being copied
  int left_;                 // of them
  const int offset_;
  const int step_;
  int slot_;  // of the tile that is copied next
  int end_;   // of its segment
  bool waited_ = false;
  uint4* ring_;  // [kRing, kTile, kPieces]
  // What the lane reads first of a half, as the first load and as the second.
  const uint4* my_keys_[2];
  const uint4* my_values_;
  Found* found_;
  int half_in_, half_out_;
  int found_in_, found_out_;
  bool has_key_, has_value_;  // whether rows have the lane's piece
  // The lane's piece of the next tile's first row that it copies, or of row 0.
  const uint8_t* keys_;
  const uint8_t* values_;
  int64_t k_slot_, v_slot_;  // bytes from slot to slot
};

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CUDA_TENSOR_RING_H_
