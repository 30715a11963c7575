// Attending on tensor cores, for caches of bfloat16, float16 and 8-bit numbers.
//
// Decoding reads the cache and does little else, so warps never wait for one
// another: each has a ring in shared memory into which it copies keys and
// values while it works on those before. A warp works on a tile of 16 query
// rows and 16 keys at a time. It copies whole rows, 16 bytes (E elements) a
// lane, to where the lane will read them that must hold them, and since a
// product may take its elements in any order, that is 16 bytes at a time as
// well:
//
//     keys:   lane (g, t) holds elements 4E * i + E * t + [0, E) of keys g and
//             g + 8; four of them make one step of the product q k
//     values: lane (g, t) holds elements 8E * i + E * g + [0, E) of keys 2t,
//             2t + 1, 2t + 8, 2t + 9; element j of all lanes makes one step of
//             the product p v, whose columns are the lanes' places
//
// Rounding to 16 bits would lose bits of q, where it is rotated or wider than
// the cache, and of the weights p: both are split into a part that is rounded
// and the rest, and multiplied twice. Products are cheap here. Weights of 8-bit
// caches have no rest where results have no more bits than what is rounded.
#ifndef KERNELS_DECODE_ATTENTION_ATTEND_TENSOR_CUDA_H_
#define KERNELS_DECODE_ATTENTION_ATTEND_TENSOR_CUDA_H_

#include <cstdint>
#include <type_traits>

#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/attend_cuda.h"
#include "kernels/decode_attention/decode_attention_cuda.h"
#include "kernels/decode_attention/tensor_cores_cuda.h"
#include "kernels/kv_cache/cache_layout.h"

namespace kernels {
namespace decode_attention {

constexpr int kTile = 16;  // rows and keys of a warp

// Weights lie in [0, 2^kWeightBits], as far from float16's smallest numbers as
// its range allows.
constexpr float kWeightBits = 12.0f;
// Query rows are scaled by a power of two so that their largest element lies in
// [2^kQueryBits, 2^(kQueryBits + 1)).
constexpr int kQueryBits = 10;

// Warps of a block that have rows of their own; the others split the keys.
inline int RowWarps(int64_t rows) {
  return rows <= 16 ? 1 : rows <= 32 ? 2 : 4;
}

// Bytes of the ring of a warp: what is on its way from memory at a time. More
// were no faster, nor were three blocks on a multiprocessor instead of two,
// which have the registers to hold their queries (H100 and H200).
constexpr int kRingBytes = 12 << 10;
template <int kDim>
constexpr bool kHoldQueries = kDim <= 128;

// What caches of a type are multiplied as, and the bytes of their elements.
template <kv_cache::Element kElement>
struct Multiplied {
  using Type =
      std::conditional_t<kElement == kv_cache::Element::kBf16, BF16, F16>;
  static constexpr int kBytes = kElement == kv_cache::Element::kBf16 ||
                                        kElement == kv_cache::Element::kF16
                                    ? 2
                                    : 1;
};

template <kv_cache::Element kElement, int kDim>
struct Sizes {
  static constexpr int kBytes = Multiplied<kElement>::kBytes;
  static constexpr int kElements = 16 / kBytes;  // E
  static constexpr int kPairs = kElements / 2;
  static constexpr int kKeyLoads = kDim / (4 * kElements);
  static constexpr int kSteps = kDim / 16;  // of the product q k
  static constexpr int kValueLoads =
      (kDim + 8 * kElements - 1) / (8 * kElements);
  // The ring goes by halves of tiles: the keys, or the values.
  static constexpr int kHalfLoads =
      2 * kKeyLoads > 4 * kValueLoads ? 2 * kKeyLoads : 4 * kValueLoads;
  static constexpr int kHalfBytes = kHalfLoads * cuda::kWarp * 16;
  // Pieces of 16 bytes of a row, and how often all lanes copy one.
  static constexpr int kPieces = kDim / kElements;
  static constexpr int kCopies = kTile * kPieces / cuda::kWarp;
  static constexpr int kRowsOfCopy = cuda::kWarp / kPieces;
  static constexpr int kRing =
      kRingBytes / kHalfBytes > 2 ? kRingBytes / kHalfBytes : 2;
  // Tiles whose keys have been found, and that are still in use.
  static constexpr int kFound = kRing / 2 + 1;

  // Of a warp: its ring, and in the end its sums.
  static constexpr int kSumBytes =
      kTile * kDim * static_cast<int>(sizeof(float));
  static constexpr int kWarpBytes =
      kRing * kHalfBytes > kSumBytes ? kRing * kHalfBytes : kSumBytes;

  // Both parts of q.
  static __host__ __device__ int QueryBytes(int row_warps) {
    return row_warps * kTile * kDim * static_cast<int>(sizeof(float));
  }
  static int SharedBytes(int row_warps) {
    return QueryBytes(row_warps) + kAttendWarps * kWarpBytes;
  }
};

__device__ __forceinline__ uint32_t WordOf(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// 16 bytes of a cache as pairs of numbers that can be multiplied.
template <kv_cache::Element kElement, int kPairs>
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
template <kv_cache::Element kElement, int kCount>
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

// kRows rows of q, kCount neighbouring elements of each a lane, all of them on
// their way at a time; zeros where there are none.
template <typename T, int kRows, int kCount>
__device__ __forceinline__ void LoadQueries(const DeviceDecode& decode,
                                            const Block& block, int64_t first,
                                            int apart,
                                            float (&x)[kRows][kCount]) {
  const DecodeArgs& args = decode.args;
  const int d = static_cast<int>(threadIdx.x) % cuda::kWarp * kCount;
  cuda::Vector<T, kCount> rows[kRows] = {};
  KERNELS_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first + i * apart;
    if (row >= block.row_end || d >= args.shape.k_dim) continue;
    rows[i] = cuda::LoadVector<T, kCount>(
        kv_cache::As<T>(args.q) +
        QueryRowOf(args, block.sequence, block.head, row) * args.shape.k_dim +
        d);
  }
  KERNELS_UNROLL
  for (int i = 0; i < kRows; ++i) {
    KERNELS_UNROLL
    for (int j = 0; j < kCount; ++j) {
      x[i][j] = cuda::ToCompute<T>(rows[i].data[j]);
    }
  }
}

// Puts the rows of q into shared memory as the product wants them: words
// [row warps, steps, lanes, 4] of the rounded part, then of the rest. `shifts`
// gets what each row's products must be multiplied with.
template <kv_cache::Element kElement, int kDim>
__device__ __forceinline__ void PrepareQueries(const DeviceDecode& decode,
                                               const Block& block,
                                               int row_warps, uint32_t* shared,
                                               float* shifts) {
  using S = Sizes<kElement, kDim>;
  using T = typename Multiplied<kElement>::Type;
  constexpr int E = S::kElements;
  constexpr int kRows = kTile / kAttendWarps;
  constexpr int kCount = kDim / cuda::kWarp;
  const DecodeArgs& args = decode.args;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int rest = row_warps * kTile * kDim / 2;
  for (int part = 0; part < row_warps; ++part) {
    const int first_row = part * kTile + warp;
    const int64_t first = block.row_begin + first_row;
    float x[kRows][kCount] = {};
    if (args.rotary.cos != nullptr) {
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = first + i * kAttendWarps;
        if (row >= block.row_end) break;
        const QueryRowReader q(decode, block, row);
        KERNELS_UNROLL
        for (int k = 0; k < kRows; ++k) {
          KERNELS_UNROLL
          for (int j = 0; j < kCount; ++j) {
            const int d = lane * kCount + j;
            if (k == i && d < args.shape.k_dim) x[k][j] = q.At(d);
          }
        }
      }
    } else if (args.query_element == kv_cache::Element::kF32) {
      LoadQueries<F32>(decode, block, first, kAttendWarps, x);
    } else if (args.query_element == kv_cache::Element::kBf16) {
      LoadQueries<BF16>(decode, block, first, kAttendWarps, x);
    } else {
      LoadQueries<F16>(decode, block, first, kAttendWarps, x);
    }
    KERNELS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int r = first_row + i * kAttendWarps;
      float largest = 0.0f;
      KERNELS_UNROLL
      for (int j = 0; j < kCount; ++j) {
        largest = fmaxf(largest, fabsf(x[i][j]));
      }
      largest = cuda::WarpMax(largest);
      const int exponent =
          static_cast<int>(__float_as_uint(largest) >> 23) - 127;
      // Leave alone what is all zero, tiny or not finite.
      const bool scaled = exponent > -100 && exponent < 100;
      const int shift = scaled ? kQueryBits - exponent : 0;
      const float up = __int_as_float((127 + shift) << 23);
      if (lane == 0) shifts[r] = __int_as_float((127 - shift) << 23);
      KERNELS_UNROLL
      for (int j = 0; j < kCount; j += 2) {
        const int d = lane * kCount + j;
        const float low = x[i][j] * up, high = x[i][j + 1] * up;
        const uint32_t pair = Pair<T>(low, high);
        const int in_load = d % E;
        const int step = d / (4 * E) * (E / 4) + in_load / 4;
        const int to_lane = r % 8 * 4 + d % (4 * E) / E;
        const int word = in_load % 4 / 2 * 2 + r % kTile / 8;
        const int at =
            ((r / kTile * S::kSteps + step) * cuda::kWarp + to_lane) * 4 + word;
        shared[at] = pair;
        shared[rest + at] =
            Pair<T>(low - LowerOf<T>(pair), high - UpperOf<T>(pair));
      }
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
// next.
template <kv_cache::Element kElement, int kDim, bool kPlain>
class Ring {
 public:
  using S = Sizes<kElement, kDim>;

  // Keys that were found, for all lanes to see.
  struct Found {
    int64_t rows[kPlain ? 1 : S::kFound][kTile];
    int positions[kPlain ? 1 : S::kFound][kTile];
  };

  // The tiles from slot `first` on, `step` slots apart, in `to`, memory of
  // the warp.
  __device__ __forceinline__ Ring(const DeviceDecode& decode,
                                  const Block& block, int first, int step,
                                  unsigned char* to, Found* found)
      : decode_(decode),
        block_(block),
        step_(step),
        slot_(first),
        found_(found) {
    const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
    const DecodeArgs& args = decode.args;
    ring_ = reinterpret_cast<uint4*>(to);
    const int k_bytes = static_cast<int>(args.shape.k_dim) * S::kBytes;
    const int v_bytes = static_cast<int>(args.shape.v_dim) * S::kBytes;
    const int piece = lane % S::kPieces;
    has_key_ = piece * 16 < k_bytes;
    has_value_ = piece * 16 < v_bytes;
    keys_ = args.cache_k + piece * 16;
    values_ = args.cache_v + piece * 16;
    if constexpr (kPlain) {
      const int64_t stride = args.shape.slot_stride();
      const int64_t row =
          block.base + block.head * args.shape.head_stride() +
          (first + lane / S::kPieces - block.addressing.first_slot) * stride;
      k_slot_ = stride * k_bytes;
      v_slot_ = stride * v_bytes;
      keys_ += row * k_bytes;
      values_ += row * v_bytes;
    }
    mine_ = ring_ + lane;
    my_values_ = ring_ + ValuePlace(lane / 4, lane % 4);
  }

  // Starts copying the keys of the next tile.
  __device__ __forceinline__ void CopyKeys() {
    const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
    const int piece = lane % S::kPieces;
    if (slot_ < block_.end) {
      if constexpr (!kPlain) {
        // Each lane finds one, for all to see.
        const Key key = FindKey(decode_, block_, slot_ + lane % kTile);
        if (lane < kTile) {
          found_->rows[found_in_][lane] = key.row;
          found_->positions[found_in_][lane] = key.position;
        }
        __syncwarp();
      }
      KERNELS_UNROLL
      for (int i = 0; i < S::kCopies; ++i) {
        const int key = i * S::kRowsOfCopy + lane / S::kPieces;
        const int load = key / 8 * S::kKeyLoads + piece / 4;
        uint4* const to = ring_ +
                          (half_in_ * S::kHalfLoads + load) * cuda::kWarp +
                          key % 8 * 4 + piece % 4;
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
    if (slot_ < block_.end) {
      KERNELS_UNROLL
      for (int i = 0; i < S::kCopies; ++i) {
        const int key = i * S::kRowsOfCopy + lane / S::kPieces;
        const int c = key % 2 + key / 8 * 2;
        const int load = c * S::kValueLoads + piece / 8;
        uint4* const to = ring_ +
                          (half_in_ * S::kHalfLoads + load) * cuda::kWarp +
                          ValuePlace(piece % 8, key % 8 / 2);
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

  // While one half is worked on, the others are on their way.
  __device__ __forceinline__ void Start() {
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
    return mine_[(half_out_ * S::kHalfLoads + n * S::kKeyLoads + load) *
                 cuda::kWarp];
  }
  __device__ __forceinline__ const uint4& ValuePart(int c, int load) const {
    return my_values_[(half_out_ * S::kHalfLoads + c * S::kValueLoads + load) *
                      cuda::kWarp];
  }

  // The slots that both of the lane's rows see, of all lanes: their logits are
  // products and a factor. Rows that do not exist see everything.
  __device__ __forceinline__ void SetSeen(const Query (&queries)[2]) {
    if constexpr (kPlain) {
      int begin = 0, end = block_.end;
      KERNELS_UNROLL
      for (int h = 0; h < 2; ++h) {
        if (!queries[h].inside) continue;
        if (queries[h].begin > begin) begin = queries[h].begin;
        if (queries[h].end < end) end = queries[h].end;
      }
      seen_begin_ = cuda::WarpMax(begin);
      seen_end_ = -cuda::WarpMax(-end);
    }
  }
  __device__ __forceinline__ bool AllSeen(int slot) const {
    return kPlain && slot >= seen_begin_ && slot + kTile <= seen_end_;
  }

  // The binary logarithm of the weight of key `i` of the tile at `slot`, whose
  // keys have been waited for, from its product with the query.
  __device__ __forceinline__ float LogWeight(const Query& query, float product,
                                             int slot, int i) const {
    if constexpr (kPlain) {
      const bool seen = slot + i >= query.begin && slot + i < query.end;
      return seen ? product * query.factor : MinusInfinity();
    } else {
      return Logit(decode_, block_, query, product, slot + i,
                   found_->positions[found_out_][i]);
    }
  }

 private:
  // Where lane (g, t) has its part of values: such that neither those who write
  // a row nor those who read meet in a bank.
  static __device__ __forceinline__ int ValuePlace(int g, int t) {
    return t * 8 + (g ^ (2 * t));
  }

  // Starts copy `i` of a half: the lane's piece of key `key`.
  __device__ __forceinline__ void Copy(uint4* to, const uint8_t* from, int i,
                                       int key, int64_t slot_bytes, int64_t dim,
                                       bool has_piece) {
    bool valid = has_piece;
    if constexpr (kPlain) {
      from += i * (S::kRowsOfCopy * slot_bytes);
      valid = valid && slot_ + key < block_.end;
    } else {
      const int64_t row = found_->rows[found_in_][key];
      from += row * dim * S::kBytes;
      valid = valid && row >= 0;
    }
    cuda::CopyAsync(to, reinterpret_cast<const uint4*>(from), valid);
  }

  const DeviceDecode& decode_;
  const Block& block_;
  const int step_;
  int slot_;     // of the tile that is copied next
  uint4* ring_;  // [kRing, kHalfLoads, lanes]
  const uint4* mine_;
  const uint4* my_values_;
  Found* found_;
  int half_in_ = 0, half_out_ = S::kRing - 1;
  int found_in_ = 0, found_out_ = S::kFound - 1;
  bool has_key_, has_value_;  // whether rows have the lane's piece
  // The lane's piece of the next tile's first row that it copies, or of row 0.
  const uint8_t* keys_;
  const uint8_t* values_;
  int64_t k_slot_, v_slot_;  // bytes from slot to slot
  int seen_begin_, seen_end_;
};

template <kv_cache::Element kElement, int kDim, bool kPlain>
__global__ void __launch_bounds__(kAttendThreads, kHoldQueries<kDim> ? 2 : 1)
    AttendTensorKernel(const DeviceDecode decode, const int row_warps) {
  using S = Sizes<kElement, kDim>;
  using T = typename Multiplied<kElement>::Type;
  constexpr int E = S::kElements;
  KERNELS_DYNAMIC_SHARED(shared);
  __shared__ float shifts[kAttendWarps * kTile];
  __shared__ float bases[kAttendWarps * kTile];
  __shared__ float totals[kAttendWarps * kTile];
  using Copies = Ring<kElement, kDim, kPlain>;
  __shared__ typename Copies::Found found[kAttendWarps];
  Block block;
  if (!FindBlock(decode, row_warps * kTile, &block)) return;
  if (kPlain && block.base < 0) block.end = block.begin;  // there are no keys
  const DecodeArgs& args = decode.args;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int g = lane / 4, t = lane % 4;
  const int row_warp = warp % row_warps;
  const int key_warp = warp / row_warps;
  const int key_warps = kAttendWarps / row_warps;
  const int first_slot = block.begin + key_warp * kTile;
  unsigned char* const rings = shared + S::QueryBytes(row_warps);
  Copies ring(decode, block, first_slot, key_warps * kTile,
              rings + warp * S::kWarpBytes, &found[warp]);
  ring.Start();

  PrepareQueries<kElement, kDim>(decode, block, row_warps,
                                 reinterpret_cast<uint32_t*>(shared), shifts);
  __syncthreads();

  Query queries[2];  // rows g and g + 8
  KERNELS_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int r = row_warp * kTile + g + 8 * h;
    queries[h] = FindQuery(decode, block, block.row_begin + r);
    queries[h].factor *= shifts[r];
    queries[h].factor *= args.k_scale.OrOne(block.sequence, block.head);
    if constexpr (kPlain) {
      queries[h].factor *= kLog2E;
      if (queries[h].end > block.end) queries[h].end = block.end;
    }
  }
  ring.SetSeen(queries);
  // q is its rounded part, unless it has been turned or was wider. (Scaled as
  // it is, float16 takes bfloat16 numbers down to 2^-24 of the largest.)
  const bool has_rest =
      args.rotary.cos != nullptr ||
      args.query_element == kv_cache::Element::kF32 ||
      (kElement == kv_cache::Element::kBf16 && args.query_element != kElement);
  constexpr bool kHasRest = S::kBytes == 2;  // see TensorCoresFit
  const uint4* q = reinterpret_cast<const uint4*>(shared) +
                   row_warp * S::kSteps * cuda::kWarp + lane;
  const uint4* q_rest = q + row_warps * S::kSteps * cuda::kWarp;

  uint4 q_held[kHoldQueries<kDim> ? S::kSteps : 1];
  if constexpr (kHoldQueries<kDim>) {
    KERNELS_UNROLL
    for (int i = 0; i < S::kSteps; ++i) q_held[i] = q[i * cuda::kWarp];
  }

  float best[2] = {MinusInfinity(), MinusInfinity()};
  float total[2] = {0.0f, 0.0f};
  float sums[S::kValueLoads][E][4];
  KERNELS_UNROLL
  for (int i = 0; i < S::kValueLoads; ++i) {
    KERNELS_UNROLL
    for (int j = 0; j < E; ++j) {
      KERNELS_UNROLL
      for (int c = 0; c < 4; ++c) sums[i][j][c] = 0.0f;
    }
  }

  for (int slot = first_slot; slot < block.end; slot += key_warps * kTile) {
    ring.template Next</*kKeys=*/true>();
    // Two sums of each product, for those of a warp to wait less for one
    // another.
    float products[2][4] = {}, others[2][4] = {};
    const auto multiply = [&](const auto& part) {
      KERNELS_UNROLL
      for (int i = 0; i < S::kKeyLoads; ++i) {
        uint32_t pairs[2][S::kPairs];
        KERNELS_UNROLL
        for (int n = 0; n < 2; ++n) {
          PairsOf<kElement>(ring.KeyPart(n, i), pairs[n]);
        }
        KERNELS_UNROLL
        for (int s = 0; s < E / 4; ++s) {
          const uint4 a = part(i * (E / 4) + s);
          KERNELS_UNROLL
          for (int n = 0; n < 2; ++n) {
            Multiply<T>((i * (E / 4) + s) % 2 == 0 ? products[n] : others[n], a,
                        pairs[n][2 * s], pairs[n][2 * s + 1]);
          }
        }
      }
    };
    multiply([&](int step) {
      if constexpr (kHoldQueries<kDim>) {
        return q_held[step];
      } else {
        return q[step * cuda::kWarp];
      }
    });
    if (has_rest)
      multiply([&](int step) { return q_rest[step * cuda::kWarp]; });
    KERNELS_UNROLL
    for (int n = 0; n < 2; ++n) {
      KERNELS_UNROLL
      for (int c = 0; c < 4; ++c) products[n][c] += others[n][c];
    }

    // One step of the online softmax for each of the lane's rows.
    float x[2][4];  // logarithms of weights, of keys 2t, 2t + 1, 2t + 8, 2t + 9
    const bool all_seen = ring.AllSeen(slot);
    KERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      KERNELS_UNROLL
      for (int c = 0; c < 4; ++c) {
        const float product = products[c / 2][2 * h + c % 2];
        x[h][c] = all_seen ? product * queries[h].factor
                           : ring.LogWeight(queries[h], product, slot,
                                            2 * t + c % 2 + c / 2 * 8);
      }
    }
    uint32_t rounded[4] = {}, rest[4] = {};  // weights, as a product's a
    bool moved = false;
    float correction[2];
    KERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      float highest = fmaxf(fmaxf(x[h][0], x[h][1]), fmaxf(x[h][2], x[h][3]));
      highest = fmaxf(highest, __shfl_xor_sync(cuda::kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(cuda::kAllLanes, highest, 2));
      const float now = fmaxf(best[h], highest);
      // Nothing has been seen: the weight of everything is 0.
      const float base = now == MinusInfinity() ? 0.0f : now;
      correction[h] = cuda::Exp2(best[h] - base);
      moved = moved || now > best[h];
      best[h] = now;
      KERNELS_UNROLL
      for (int c = 0; c < 4; ++c) {
        x[h][c] = cuda::Exp2(x[h][c] - (base - kWeightBits));
      }
      total[h] = total[h] * correction[h] +
                 ((x[h][0] + x[h][1]) + (x[h][2] + x[h][3]));
      KERNELS_UNROLL
      for (int c = 0; c < 2; ++c) {
        const uint32_t pair = Pair<T>(x[h][2 * c], x[h][2 * c + 1]);
        rounded[2 * c + h] = pair;
        if constexpr (kHasRest) {
          rest[2 * c + h] = Pair<T>(x[h][2 * c] - LowerOf<T>(pair),
                                    x[h][2 * c + 1] - UpperOf<T>(pair));
        }
      }
    }
    const uint4 weights =
        make_uint4(rounded[0], rounded[1], rounded[2], rounded[3]);
    const uint4 weights_rest = make_uint4(rest[0], rest[1], rest[2], rest[3]);
    if (__any_sync(cuda::kAllLanes, moved)) {
      KERNELS_UNROLL
      for (int i = 0; i < S::kValueLoads; ++i) {
        KERNELS_UNROLL
        for (int j = 0; j < E; ++j) {
          KERNELS_UNROLL
          for (int c = 0; c < 4; ++c) sums[i][j][c] *= correction[c / 2];
        }
      }
    }

    ring.template Next</*kKeys=*/false>();
    KERNELS_UNROLL
    for (int i = 0; i < S::kValueLoads; ++i) {
      // Element j of keys 2t and 2t + 1, and of 2t + 8 and 2t + 9.
      uint32_t pairs[2][E];
      KERNELS_UNROLL
      for (int n = 0; n < 2; ++n) {
        PairUp<kElement>(ring.ValuePart(2 * n, i), ring.ValuePart(2 * n + 1, i),
                         pairs[n]);
      }
      KERNELS_UNROLL
      for (int j = 0; j < E; ++j) {
        Multiply<T>(sums[i][j], weights, pairs[0][j], pairs[1][j]);
        if constexpr (kHasRest) {
          Multiply<T>(sums[i][j], weights_rest, pairs[0][j], pairs[1][j]);
        }
      }
    }
  }

  // Joins the warps that have worked on the same rows.
  KERNELS_UNROLL
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(cuda::kAllLanes, total[h], 1);
    total[h] += __shfl_xor_sync(cuda::kAllLanes, total[h], 2);
    if (t == 0) {
      bases[warp * kTile + g + 8 * h] = best[h];
      totals[warp * kTile + g + 8 * h] = total[h];
    }
  }
  // Sums go where the ring was, [16, kDim] of each warp.
  float* const mine = reinterpret_cast<float*>(rings + warp * S::kWarpBytes);
  cuda::WaitForCopies<0>();
  __syncwarp();
  KERNELS_UNROLL
  for (int i = 0; i < S::kValueLoads; ++i) {
    KERNELS_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int d = 8 * E * i + (2 * t + c % 2) * E;
      const int r = g + 8 * (c / 2);
      const int64_t row = block.row_begin + row_warp * kTile + r;
      if (d >= kDim || row >= block.row_end) continue;
      KERNELS_UNROLL
      for (int j = 0; j < E; j += 4) {
        *reinterpret_cast<float4*>(mine + r * kDim + d + j) =
            make_float4(sums[i][j][c], sums[i][j + 1][c], sums[i][j + 2][c],
                        sums[i][j + 3][c]);
      }
    }
  }
  __syncthreads();
  for (int r = warp; r < row_warps * kTile; r += kAttendWarps) {
    const int64_t row = block.row_begin + r;
    if (row >= block.row_end) continue;
    // The warps that have this row: r / kTile, and every row_warps after it.
    const int at = r % kTile;
    float largest = MinusInfinity();
    for (int w = r / kTile; w < kAttendWarps; w += row_warps) {
      largest = fmaxf(largest, bases[w * kTile + at]);
    }
    float all = 0.0f;
    float joined[kDim / cuda::kWarp] = {};
    for (int w = r / kTile; w < kAttendWarps; w += row_warps) {
      const float weight = Weight(bases[w * kTile + at], largest);
      all += totals[w * kTile + at] * weight;
      const float* from =
          reinterpret_cast<const float*>(rings + w * S::kWarpBytes) +
          at * kDim + lane;
      KERNELS_UNROLL
      for (int i = 0; i < kDim / cuda::kWarp; ++i) {
        joined[i] += from[i * cuda::kWarp] * weight;
      }
    }
    WriteRow<kDim / cuda::kWarp>(decode, block, row, largest - kWeightBits, all,
                                 [&](int i) { return joined[i]; });
  }
}

template <kv_cache::Element kElement, int kDim, bool kPlain>
cudaError_t LaunchPlain(cudaStream_t stream, const DeviceDecode& decode) {
  int device, most;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 device);
  if (error != cudaSuccess) return error;
  using S = Sizes<kElement, kDim>;
  // Beside what the kernel declares.
  most -=
      kAttendWarps *
      static_cast<int>(3 * kTile * sizeof(float) +
                       sizeof(typename Ring<kElement, kDim, kPlain>::Found));
  int row_warps = RowWarps(decode.rows());
  while (row_warps > 1 && S::SharedBytes(row_warps) > most) row_warps /= 2;
  const int64_t row_blocks =
      cuda::CeilDiv<int64_t>(decode.rows(), row_warps * kTile);
  const int64_t blocks = decode.parts * decode.args.shape.heads * row_blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return cuda::Launch(AttendTensorKernel<kElement, kDim, kPlain>,
                      dim3(static_cast<unsigned>(blocks)), dim3(kAttendThreads),
                      S::SharedBytes(row_warps), stream, decode, row_warps);
}

template <kv_cache::Element kElement, int kDim>
cudaError_t LaunchDim(cudaStream_t stream, const DeviceDecode& decode) {
  return IsPlain(decode.args)
             ? LaunchPlain<kElement, kDim, true>(stream, decode)
             : LaunchPlain<kElement, kDim, false>(stream, decode);
}

template <kv_cache::Element kElement>
cudaError_t LaunchAttendTensor(cudaStream_t stream,
                               const DeviceDecode& decode) {
  const kv_cache::CacheShape& shape = decode.args.shape;
  const int64_t dim = shape.k_dim > shape.v_dim ? shape.k_dim : shape.v_dim;
  if (dim <= 64) return LaunchDim<kElement, 64>(stream, decode);
  if (dim <= 128) return LaunchDim<kElement, 128>(stream, decode);
  return LaunchDim<kElement, 256>(stream, decode);
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_ATTEND_TENSOR_CUDA_H_
