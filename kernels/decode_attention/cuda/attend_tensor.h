// Attending on tensor cores, for caches of bfloat16, float16 and 8-bit numbers.
//
// Rounding to 16 bits would lose bits of q, where it is rotated or wider than
// the cache, and of the weights p: both are split into a part that is rounded
// and the rest, and multiplied with both. Weights of 8-bit caches have no rest
// where results have no more bits than what is rounded.
//
// A product has 16 rows on one side and 8 columns on the other. Where there are
// few query rows, up to 8, the parts of q are the 16 rows of the product with
// the keys, and the weights are the 8 columns of that with the values, whose
// elements are its rows. Else a warp takes 16 query rows, and their rests are
// products of their own.
#ifndef KERNELS_DECODE_ATTENTION_CUDA_ATTEND_TENSOR_H_
#define KERNELS_DECODE_ATTENTION_CUDA_ATTEND_TENSOR_H_

#include <cstdint>
#include <cstring>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cuda/attend.h"
#include "kernels/decode_attention/cuda/decode.h"
#include "kernels/decode_attention/cuda/tensor_cores.h"
#include "kernels/decode_attention/cuda/tensor_ring.h"

namespace kernels {
namespace decode_attention {

// Query rows that are few.
constexpr int kFewRows = 8;

// Weights lie in [0, 2^kWeightBits], as far from float16's smallest numbers as
// its range allows.
constexpr float kWeightBits = 12.0f;
// Query rows are scaled by a power of two so that their largest element lies in
// [2^kQueryBits, 2^(kQueryBits + 1)).
constexpr int kQueryBits = 10;

// What a warp works on at a time.
template <cache::Element kElement, int kDim, bool kFew>
struct Work {
  using S = Sizes<kElement, kDim>;
  static constexpr int kRows = kFew ? kFewRows : 16;
  static constexpr int kRowsOfLane = kRows / 8;
  // Products of a lane with 16 bytes of its values.
  static constexpr int kProducts = kFew ? S::kElements / 2 : S::kElements;
  static constexpr bool kHoldQueries = kDim <= 128;
  // Blocks of a multiprocessor, which have registers for their queries.
  static constexpr int kBlocks = !kHoldQueries && !kFew ? 1 : 2;

  // Words that the rounded parts of a warp's queries take, and the rests.
  static constexpr int kQueryWords = kRows * kDim / 2;
  static constexpr int kSumBytes =
      kRows * kDim * static_cast<int>(sizeof(float));
  static constexpr int kRingBytes = S::kRing * S::kHalfBytes;
  // Sums lie beside a ring that goes on, else in its place.
  static constexpr int kWarpBytes = kFew ? kRingBytes + kSumBytes
                                    : kRingBytes > kSumBytes ? kRingBytes
                                                             : kSumBytes;
  static constexpr int kSumsAt = kFew ? kRingBytes : 0;

  static __host__ __device__ int QueryBytes(int row_warps) {
    return row_warps * 2 * kQueryWords * static_cast<int>(sizeof(uint32_t));
  }
  static int SharedBytes(int row_warps) {
    return QueryBytes(row_warps) + kAttendWarps * kWarpBytes;
  }
};

// Warps of a block that have rows of their own; the others split the keys.
inline int RowWarps(int64_t rows) {
  return rows <= 16 ? 1 : rows <= 32 ? 2 : 4;
}

// Rows of q on their way to where products want them: words [row warps, steps,
// lanes, 4] of the rounded part and of the rest. The block's warps share them,
// neighbouring elements a lane.
template <cache::Element kElement, int kDim, bool kFew>
class Queries {
 public:
  using S = Sizes<kElement, kDim>;
  using W = Work<kElement, kDim, kFew>;
  using T = typename Multiplied<kElement>::Type;

  // Starts reading the rows of row warp `row_warp`; zeros where there are none.
  __device__ __forceinline__ void Load(const DeviceDecode& decode,
                                       const BlockPlace& block, int sequence,
                                       int row_warp) {
    const DecodeArgs& args = decode.args;
    sequence_ = sequence;
    if (args.rotary.cos != nullptr) return;
    const int64_t size = cache::ElementSize(args.query_element);
    const int d = Lane() * kCount;
    KERNELS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int row = RowOf(block, row_warp, i);
      raw_[i] = {};
      if (row >= block.row_end || d >= args.shape.k_dim) continue;
      const uint8_t* const from =
          args.q +
          (QueryRowOf(args, sequence, block.head, row) * args.shape.k_dim + d) *
              size;
      if (S::kBytes == 1 && args.query_element == cache::Element::kF32) {
        raw_[i] = cuda::LoadVector<F32, kRawFloats>(
            reinterpret_cast<const float*>(from));
      } else {
        const auto half = cuda::LoadVector<T, kCount>(cache::As<T>(from));
        std::memcpy(&raw_[i], &half, sizeof(half));
      }
    }
  }

  // Writes them, the rests of many rows `rest` words further on. `shifts` gets
  // what each row's products must be multiplied with.
  __device__ __forceinline__ void Store(const DeviceDecode& decode,
                                        const BlockPlace& block, int row_warp,
                                        int rest, uint32_t* shared,
                                        float* shifts) const {
    constexpr int E = S::kElements;
    const DecodeArgs& args = decode.args;
    KERNELS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int r = i * kAttendWarps + Warp();
      float x[kCount];
      if (args.rotary.cos != nullptr) {
        const int row = RowOf(block, row_warp, i);
        const bool inside = row < block.row_end;
        const QueryRowReader q(decode, sequence_, block.head,
                               inside ? row : block.row_begin);
        KERNELS_UNROLL
        for (int j = 0; j < kCount; ++j) {
          const int d = Lane() * kCount + j;
          x[j] = inside && d < args.shape.k_dim ? q.At(d) : 0.0f;
        }
      } else if (S::kBytes == 1 && args.query_element == cache::Element::kF32) {
        KERNELS_UNROLL
        for (int j = 0; j < kCount; ++j) x[j] = raw_[i].data[j % kRawFloats];
      } else {
        cuda::Vector<T, kCount> half;
        std::memcpy(&half, &raw_[i], sizeof(half));
        const bool bf16 =
            S::kBytes == 1 && args.query_element == cache::Element::kBf16;
        KERNELS_UNROLL
        for (int j = 0; j < kCount; ++j) {
          x[j] = bf16 ? cuda::ToCompute<BF16>(half.data[j])
                      : cuda::ToCompute<T>(half.data[j]);
        }
      }
      float largest = 0.0f;
      KERNELS_UNROLL
      for (int j = 0; j < kCount; ++j) {
        largest = fmaxf(largest, fabsf(x[j]));
      }
      largest = cuda::WarpMax(largest);
      const int exponent =
          static_cast<int>(__float_as_uint(largest) >> 23) - 127;
      // Leave alone what is all zero, tiny or not finite.
      const bool scaled = exponent > -100 && exponent < 100;
      const int shift = scaled ? kQueryBits - exponent : 0;
      const float up = __int_as_float((127 + shift) << 23);
      if (Lane() == 0) {
        shifts[row_warp * W::kRows + r] = __int_as_float((127 - shift) << 23);
      }
      KERNELS_UNROLL
      for (int j = 0; j < kCount; j += 2) {
        const int d = Lane() * kCount + j;
        const float low = x[j] * up, high = x[j + 1] * up;
        const uint32_t pair = Pair<T>(low, high);
        const int in_load = d % E;
        const int step = d / (4 * E) * (E / 4) + in_load / 4;
        const int to_lane = r % 8 * 4 + d % (4 * E) / E;
        const int word = in_load % 4 / 2 * 2 + r / 8;
        const int at =
            ((row_warp * S::kSteps + step) * cuda::kWarp + to_lane) * 4 + word;
        shared[at] = pair;
        shared[at + (kFew ? 1 : rest)] =
            Pair<T>(low - LowerOf<T>(pair), high - UpperOf<T>(pair));
      }
    }
  }

 private:
  static constexpr int kRows = W::kRows / kAttendWarps;
  static constexpr int kCount = kDim / cuda::kWarp;

  // As they lie in memory: what is not rotated has the dtype of a cache of 16
  // bits.
  static constexpr int kRawFloats = S::kBytes == 1 ? kCount : kCount / 2;

  // Row `i` of this warp.
  static __device__ __forceinline__ int RowOf(const BlockPlace& block,
                                              int row_warp, int i) {
    return block.row_begin + row_warp * W::kRows + i * kAttendWarps + Warp();
  }
  static __device__ __forceinline__ int Warp() {
    return static_cast<int>(threadIdx.x) / cuda::kWarp;
  }
  static __device__ __forceinline__ int Lane() {
    return static_cast<int>(threadIdx.x) % cuda::kWarp;
  }

  int sequence_;
  cuda::Vector<F32, kRawFloats> raw_[kRows];
};

// The online softmax of a lane's rows.
template <typename T, int kRows, bool kHasRest>
struct Softmax {
  float best[kRows];
  float total[kRows];
  float correction[kRows];  // of what came before the last tile
  // Weights of the last tile, rounded, and what that leaves: of each row those
  // of keys 2t and 2t + 1, and of 2t + 8 and 2t + 9.
  uint32_t rounded[kRows][2];
  uint32_t rest[kRows][2];

  __device__ __forceinline__ Softmax() {
    KERNELS_UNROLL
    for (int h = 0; h < kRows; ++h) {
      best[h] = MinusInfinity();
      total[h] = 0.0f;
    }
  }

  // Takes in the binary logarithms of a tile's weights. Returns whether, in any
  // lane, what came before must be corrected.
  __device__ __forceinline__ bool Add(float (&x)[kRows][4]) {
    bool moved = false;
    KERNELS_UNROLL
    for (int h = 0; h < kRows; ++h) {
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
        rounded[h][c] = pair;
        if constexpr (kHasRest) {
          rest[h][c] = Pair<T>(x[h][2 * c] - LowerOf<T>(pair),
                               x[h][2 * c + 1] - UpperOf<T>(pair));
        }
      }
    }
    return __any_sync(cuda::kAllLanes, moved);
  }

  // The lane's share of the totals becomes the whole.
  __device__ __forceinline__ void SumTotals() {
    KERNELS_UNROLL
    for (int h = 0; h < kRows; ++h) {
      total[h] += __shfl_xor_sync(cuda::kAllLanes, total[h], 1);
      total[h] += __shfl_xor_sync(cuda::kAllLanes, total[h], 2);
    }
  }
};

// The queries of a block over a share of the keys. One long function, since its
// three stages (load queries; walk over keys; join and write) work on the same
// registers and shared arrays: as functions, each would take some twenty
// references.
template <cache::Element kElement, int kDim, bool kPlain, bool kFew>
__global__ void __launch_bounds__(kAttendThreads,
                                  (Work<kElement, kDim, kFew>::kBlocks))
    AttendTensorKernel(const __grid_constant__ DeviceDecode decode,
                       const int row_warps) {
  using S = Sizes<kElement, kDim>;
  using W = Work<kElement, kDim, kFew>;
  using T = typename Multiplied<kElement>::Type;
  using Copies = Ring<kElement, kDim, kPlain>;
  constexpr int E = S::kElements;
  constexpr int R = W::kRowsOfLane;
  constexpr bool kHasRest = S::kBytes == 2;  // see TensorCoresFit
  KERNELS_DYNAMIC_SHARED(shared);
  __shared__ float shifts[kAttendWarps * W::kRows];
  __shared__ float bases[kAttendWarps * W::kRows];
  __shared__ float totals[kAttendWarps * W::kRows];
  __shared__ typename Copies::Found found[kAttendWarps];
  __shared__ Segment segments[kAttendThreads];
  const DecodeArgs& args = decode.args;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int g = lane / 4, t = lane % 4;
  const int row_warp = warp % row_warps;
  const int key_warp = warp / row_warps;
  const int key_warps = kAttendWarps / row_warps;
  uint32_t* const q_words = reinterpret_cast<uint32_t*>(shared);
  const int rest_words = row_warps * W::kQueryWords;
  unsigned char* const rings = shared + W::QueryBytes(row_warps);
  unsigned char* const my_ring = rings + warp * W::kWarpBytes;

  const BlockPlace place = PlaceOfBlock(decode, row_warps * W::kRows);
  Range range;
  Copies ring(decode, place, key_warp * kTile, key_warps * kTile, my_ring,
              &found[warp]);
  int count = FirstSegments(decode, place, &range, segments);
  for (; count > 0; count = TakeSegments(decode, place, &range, segments)) {
    // Where sums lie in the place of the ring, it ends with each segment.
    if constexpr (kFew) ring.Start(segments, count);
    Queries<kElement, kDim, kFew> rows;
    if (kFew) rows.Load(decode, place, segments[0].sequence, 0);
    for (int now = 0; now < count; ++now) {
      const Segment& segment = segments[now];
      if constexpr (kFew) {
        rows.Store(decode, place, 0, rest_words, q_words, shifts);
        // The next rows come meanwhile.
        if (now + 1 < count) {
          rows.Load(decode, place, segments[now + 1].sequence, 0);
        }
      } else {
        ring.Start(&segment, 1);
        for (int i = 0; i < row_warps; ++i) {
          rows.Load(decode, place, segment.sequence, i);
          rows.Store(decode, place, i, rest_words, q_words, shifts);
        }
      }
      __syncthreads();

      Query queries[R];  // rows g and g + 8
      // The slots that all rows of the warp see: their logits are products and
      // a factor. Rows that do not exist see everything.
      int seen_begin = 0, seen_end = segment.end;
      KERNELS_UNROLL
      for (int h = 0; h < R; ++h) {
        const int r = row_warp * W::kRows + g + 8 * h;
        queries[h] = FindQuery(decode, place, segment, place.row_begin + r);
        queries[h].factor *= shifts[r];
        queries[h].factor *= args.k_scale.OrOne(segment.sequence, place.head);
        if constexpr (kPlain) {
          queries[h].factor *= kLog2E;
          if (queries[h].end > segment.end) queries[h].end = segment.end;
          if (!queries[h].inside) continue;
          if (queries[h].begin > seen_begin) seen_begin = queries[h].begin;
          if (queries[h].end < seen_end) seen_end = queries[h].end;
        }
      }
      if constexpr (kPlain) {
        seen_begin = cuda::WarpMax(seen_begin);
        seen_end = -cuda::WarpMax(-seen_end);
      }
      // q is its rounded part, unless it has been turned or was wider. (Scaled
      // as it is, float16 takes bfloat16 numbers down to 2^-24 of the largest.)
      const bool has_rest =
          args.rotary.cos != nullptr ||
          args.query_element == cache::Element::kF32 ||
          (kElement == cache::Element::kBf16 && args.query_element != kElement);
      const uint4* q = reinterpret_cast<const uint4*>(q_words) +
                       row_warp * S::kSteps * cuda::kWarp + lane;
      uint4 q_held[W::kHoldQueries ? S::kSteps : 1];
      if constexpr (W::kHoldQueries) {
        KERNELS_UNROLL
        for (int i = 0; i < S::kSteps; ++i) q_held[i] = q[i * cuda::kWarp];
      }

      Softmax<T, R, kHasRest> softmax;
      float sums[S::kValueLoads][W::kProducts][4];
      KERNELS_UNROLL
      for (int i = 0; i < S::kValueLoads; ++i) {
        KERNELS_UNROLL
        for (int j = 0; j < W::kProducts; ++j) {
          KERNELS_UNROLL
          for (int c = 0; c < 4; ++c) sums[i][j][c] = 0.0f;
        }
      }

      const int end = segment.end;
      for (int slot = segment.begin + key_warp * kTile; slot < end;
           slot += key_warps * kTile) {
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
                Multiply<T>(
                    (i * (E / 4) + s) % 2 == 0 ? products[n] : others[n], a,
                    pairs[n][2 * s], pairs[n][2 * s + 1]);
              }
            }
          }
        };
        multiply([&](int step) {
          if constexpr (W::kHoldQueries) {
            return q_held[step];
          } else {
            return q[step * cuda::kWarp];
          }
        });
        if (!kFew && has_rest) {
          multiply(
              [&](int step) { return q[rest_words / 4 + step * cuda::kWarp]; });
        }
        KERNELS_UNROLL
        for (int n = 0; n < 2; ++n) {
          KERNELS_UNROLL
          for (int c = 0; c < 4; ++c) products[n][c] += others[n][c];
          if constexpr (kFew) {
            products[n][0] += products[n][2];
            products[n][1] += products[n][3];
          }
        }

        float x[R][4];  // of keys 2t, 2t + 1, 2t + 8, 2t + 9
        const bool all_seen =
            kPlain && slot >= seen_begin && slot + kTile <= seen_end;
        KERNELS_UNROLL
        for (int h = 0; h < R; ++h) {
          KERNELS_UNROLL
          for (int c = 0; c < 4; ++c) {
            const float product = products[c / 2][2 * h + c % 2];
            const int i = 2 * t + c % 2 + c / 2 * 8;
            if constexpr (kPlain) {
              const bool seen = all_seen || (slot + i >= queries[h].begin &&
                                             slot + i < queries[h].end);
              x[h][c] = seen ? product * queries[h].factor : MinusInfinity();
            } else {
              x[h][c] = Logit(decode, place, queries[h], product, slot + i,
                              ring.PositionOf(i));
            }
          }
        }
        if (softmax.Add(x)) {
          // Of the rows that each of the four sums of a product belongs to.
          float correction[4];
          KERNELS_UNROLL
          for (int c = 0; c < 4; ++c) {
            if constexpr (kFew) {
              correction[c] =
                  c < 2 ? __shfl_sync(cuda::kAllLanes, softmax.correction[0],
                                      (2 * t + c) * 4)
                        : correction[c - 2];
            } else {
              correction[c] = softmax.correction[c / 2];
            }
          }
          KERNELS_UNROLL
          for (int i = 0; i < S::kValueLoads; ++i) {
            KERNELS_UNROLL
            for (int j = 0; j < W::kProducts; ++j) {
              KERNELS_UNROLL
              for (int c = 0; c < 4; ++c) sums[i][j][c] *= correction[c];
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
            PairUp<kElement>(ring.ValuePart(2 * n, i),
                             ring.ValuePart(2 * n + 1, i), pairs[n]);
          }
          KERNELS_UNROLL
          for (int j = 0; j < W::kProducts; ++j) {
            const auto add = [&](const uint32_t (&weights)[R][2]) {
              if constexpr (kFew) {
                Multiply<T>(sums[i][j],
                            make_uint4(pairs[0][2 * j], pairs[0][2 * j + 1],
                                       pairs[1][2 * j], pairs[1][2 * j + 1]),
                            weights[0][0], weights[0][1]);
              } else {
                Multiply<T>(sums[i][j],
                            make_uint4(weights[0][0], weights[1][0],
                                       weights[0][1], weights[1][1]),
                            pairs[0][j], pairs[1][j]);
              }
            };
            add(softmax.rounded);
            if constexpr (kHasRest) add(softmax.rest);
          }
        }
      }

      // Joins the warps that have worked on the same rows: sums [rows, kDim] of
      // each.
      softmax.SumTotals();
      KERNELS_UNROLL
      for (int h = 0; h < R; ++h) {
        if (t == 0) {
          bases[warp * W::kRows + g + 8 * h] = softmax.best[h];
          totals[warp * W::kRows + g + 8 * h] = softmax.total[h];
        }
      }
      if constexpr (!kFew) {
        cuda::WaitForCopies<0>();
        __syncwarp();
      }
      float* const mine = reinterpret_cast<float*>(my_ring + W::kSumsAt);
      KERNELS_UNROLL
      for (int i = 0; i < S::kValueLoads; ++i) {
        // The lane's neighbouring elements of two rows, or of two columns of
        // two rows.
        KERNELS_UNROLL
        for (int c = 0; c < (kFew ? 2 : 4); ++c) {
          const int d = 8 * E * i + (kFew ? g : 2 * t + c % 2) * E;
          const int r = kFew ? 2 * t + c : g + 8 * (c / 2);
          const int row = place.row_begin + row_warp * W::kRows + r;
          if (d >= kDim || row >= place.row_end) continue;
          const auto sum = [&](int j) {
            return kFew ? sums[i][j / 2][j % 2 * 2 + c] : sums[i][j][c];
          };
          KERNELS_UNROLL
          for (int j = 0; j < E; j += 4) {
            *reinterpret_cast<float4*>(mine + r * kDim + d + j) =
                make_float4(sum(j), sum(j + 1), sum(j + 2), sum(j + 3));
          }
        }
      }
      __syncthreads();
      for (int r = warp; r < row_warps * W::kRows; r += kAttendWarps) {
        const int row = place.row_begin + r;
        if (row >= place.row_end) continue;
        // The warps that have this row: r / rows, and every row_warps after it.
        const int at = r % W::kRows;
        float largest = MinusInfinity();
        for (int w = r / W::kRows; w < kAttendWarps; w += row_warps) {
          largest = fmaxf(largest, bases[w * W::kRows + at]);
        }
        float all = 0.0f;
        constexpr int kCount = kDim / cuda::kWarp;
        OfLane<kCount> joined = {};
        for (int w = r / W::kRows; w < kAttendWarps; w += row_warps) {
          const float weight = Weight(bases[w * W::kRows + at], largest);
          all += totals[w * W::kRows + at] * weight;
          const float* from = reinterpret_cast<const float*>(
                                  rings + w * W::kWarpBytes + W::kSumsAt) +
                              at * kDim + lane * kCount;
          KERNELS_UNROLL
          for (int i = 0; i < kCount; ++i) joined.x[i] += from[i] * weight;
        }
        WriteRow<kCount>(decode, place, segment, row, largest - kWeightBits,
                         all, joined);
      }
      if (segment.part >= 0) {
        ring.WaitForNewRows();
        JoinIfLast(decode, place, segment);
      }
      if (!kFew || now + 1 == count) {
        __syncthreads();  // others may still read what is written next
      }
    }
  }
  ring.WaitForNewRows();
}

template <cache::Element kElement, int kDim, bool kPlain, bool kFew>
cudaError_t LaunchRows(cudaStream_t stream, DeviceDecode decode) {
  int device, most;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 device);
  if (error != cudaSuccess) return error;
  using W = Work<kElement, kDim, kFew>;
  // Beside what the kernel declares.
  most -= static_cast<int>(kAttendThreads * sizeof(Segment)) + (1 << 10);
  most -=
      kAttendWarps *
      static_cast<int>(3 * W::kRows * sizeof(float) +
                       sizeof(typename Ring<kElement, kDim, kPlain>::Found));
  if constexpr (kFew) {
    // The sums of few rows want room of their own.
    if (W::SharedBytes(1) > most) {
      return LaunchRows<kElement, kDim, kPlain, false>(stream, decode);
    }
  }
  int row_warps = kFew ? 1 : RowWarps(decode.rows());
  while (row_warps > 1 && W::SharedBytes(row_warps) > most) row_warps /= 2;
  return LaunchWorkers(AttendTensorKernel<kElement, kDim, kPlain, kFew>,
                       row_warps * W::kRows, W::SharedBytes(row_warps), stream,
                       decode, row_warps);
}

template <cache::Element kElement, int kDim>
cudaError_t LaunchDim(cudaStream_t stream, DeviceDecode decode) {
  const bool plain = IsPlain(decode.args);
  if (decode.rows() <= kFewRows) {
    return plain ? LaunchRows<kElement, kDim, true, true>(stream, decode)
                 : LaunchRows<kElement, kDim, false, true>(stream, decode);
  }
  return plain ? LaunchRows<kElement, kDim, true, false>(stream, decode)
               : LaunchRows<kElement, kDim, false, false>(stream, decode);
}

template <cache::Element kElement>
cudaError_t LaunchAttendTensor(cudaStream_t stream, DeviceDecode decode) {
  const cache::CacheShape& shape = decode.args.shape;
  const int64_t dim = shape.k_dim > shape.v_dim ? shape.k_dim : shape.v_dim;
  if (dim <= 64) return LaunchDim<kElement, 64>(stream, decode);
  if (dim <= 128) return LaunchDim<kElement, 128>(stream, decode);
  return LaunchDim<kElement, 256>(stream, decode);
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CUDA_ATTEND_TENSOR_H_
