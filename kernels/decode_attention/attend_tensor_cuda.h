// Attending on tensor cores, for caches of bfloat16, float16 and 8-bit numbers.
//
// Decoding reads the cache and does little else, so keys and values go from
// global memory to registers and from there into products: no copy through
// shared memory, and warps that never wait for one another. A warp works on 16
// query rows and 16 keys at a time. A lane reads 16 bytes of a key (E elements)
// at a time, and since a product may take its elements in any order, those are
// already what the lane must hold:
//
//     keys:   lane (g, t) reads elements 4E * i + E * t + [0, E) of keys g and
//             g + 8; four of them make one step of the product q k
//     values: lane (g, t) reads elements 8E * i + E * g + [0, E) of keys 2t,
//             2t + 1, 2t + 8, 2t + 9; element j of all lanes makes one step of
//             the product p v, whose columns are the lanes' places
//
// Rounding to 16 bits would lose bits of q, where it is rotated or wider than
// the cache, and of the weights p: both are split into a part that is rounded
// and the rest, and multiplied twice. Products are cheap here.
#ifndef KERNELS_DECODE_ATTENTION_ATTEND_TENSOR_CUDA_H_
#define KERNELS_DECODE_ATTENTION_ATTEND_TENSOR_CUDA_H_

#include <cstdint>

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

template <int kBytes, int kDim>
struct Sizes {
  static constexpr int kElements = 16 / kBytes;  // E
  static constexpr int kKeyLoads = kDim / (4 * kElements);
  // Keys of 256 elements are read in halves, for want of registers.
  static constexpr int kKeyHalf = kDim <= 128 ? kKeyLoads : kKeyLoads / 2;
  static constexpr int kSteps = kDim / 16;  // of the product q k
  static constexpr int kValueLoads =
      (kDim + 8 * kElements - 1) / (8 * kElements);
};

template <int kDim>
int SharedBytes(int row_warps) {
  // Both parts of q; in the end the sums, which are as large.
  return row_warps * kTile * kDim * static_cast<int>(sizeof(float));
}

__device__ __forceinline__ uint4 Load16(const uint8_t* from, bool valid) {
  return valid ? __ldg(reinterpret_cast<const uint4*>(from))
               : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint32_t WordOf(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// 16 bytes of a cache as pairs of T: `pairs[0, E / 2)`.
template <int kBytes>
__device__ __forceinline__ void PairsOf(kv_cache::Element element,
                                        const uint4& words,
                                        uint32_t (&pairs)[8 / kBytes]) {
  KERNELS_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (kBytes == 2) {
      pairs[i] = WordOf(words, i);
    } else {
      Widen(element, WordOf(words, i), &pairs[2 * i], &pairs[2 * i + 1]);
    }
  }
}

// Puts the rows of q into shared memory as the product wants them: words
// [row warps, steps, lanes, 4] of the rounded part, then of the rest. `shifts`
// gets what each row's products must be multiplied with.
template <typename T, int kBytes, int kDim>
__device__ __forceinline__ void PrepareQueries(const DeviceDecode& decode,
                                               const Block& block,
                                               int row_warps, uint16_t* shared,
                                               float* shifts) {
  using S = Sizes<kBytes, kDim>;
  constexpr int E = S::kElements;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int64_t k_dim = decode.args.shape.k_dim;
  const int rest = row_warps * kTile * kDim;
  for (int r = warp; r < row_warps * kTile; r += kAttendWarps) {
    const int64_t row = block.row_begin + r;
    float x[kDim / cuda::kWarp];
    float largest = 0.0f;
    KERNELS_UNROLL
    for (int i = 0; i < kDim / cuda::kWarp; ++i) {
      const int d = lane + i * cuda::kWarp;
      x[i] = row < block.row_end && d < k_dim
                 ? QueryElement(decode, block, row, d)
                 : 0.0f;
      largest = fmaxf(largest, fabsf(x[i]));
    }
    largest = cuda::WarpMax(largest);
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
    // Leave alone what is all zero, tiny or not finite.
    const bool scaled = exponent > -100 && exponent < 100;
    const int shift = scaled ? kQueryBits - exponent : 0;
    const float up = __int_as_float((127 + shift) << 23);
    if (lane == 0) shifts[r] = __int_as_float((127 - shift) << 23);
    KERNELS_UNROLL
    for (int i = 0; i < kDim / cuda::kWarp; ++i) {
      const int d = lane + i * cuda::kWarp;
      const float value = x[i] * up;
      const uint16_t rounded = cuda::FromCompute<T>(value);
      const int in_load = d % E;
      const int step = d / (4 * E) * (E / 4) + in_load / 4;
      const int to_lane = r % 8 * 4 + d % (4 * E) / E;
      const int word = in_load % 4 / 2 * 2 + r % kTile / 8;
      const int at =
          ((r / kTile * S::kSteps + step) * cuda::kWarp + to_lane) * 8 +
          word * 2 + d % 2;
      shared[at] = rounded;
      shared[rest + at] =
          cuda::FromCompute<T>(value - cuda::ToCompute<T>(rounded));
    }
  }
}

template <typename T, int kBytes, int kDim>
__global__ void __launch_bounds__(kAttendThreads, kDim <= 128 ? 2 : 1)
    AttendTensorKernel(const DeviceDecode decode, const int row_warps) {
  using S = Sizes<kBytes, kDim>;
  constexpr int E = S::kElements;
  KERNELS_DYNAMIC_SHARED(shared);
  __shared__ float shifts[kAttendWarps * kTile];
  __shared__ float bases[kAttendWarps * kTile];
  __shared__ float totals[kAttendWarps * kTile];
  Block block;
  if (!FindBlock(decode, row_warps * kTile, &block)) return;
  const DecodeArgs& args = decode.args;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int g = lane / 4, t = lane % 4;
  const int row_warp = warp % row_warps;
  const int key_warp = warp / row_warps;
  const int key_warps = kAttendWarps / row_warps;
  PrepareQueries<T, kBytes, kDim>(decode, block, row_warps,
                                  reinterpret_cast<uint16_t*>(shared), shifts);
  __syncthreads();

  Query queries[2];  // rows g and g + 8
  KERNELS_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int r = row_warp * kTile + g + 8 * h;
    queries[h] = FindQuery(decode, block, block.row_begin + r);
    queries[h].factor *= shifts[r];
    if (args.k_scale != nullptr) {
      queries[h].factor *=
          args.k_scale[block.sequence * args.shape.heads + block.head];
    }
  }
  // q is its rounded part, unless it has been turned or was wider.
  const bool has_rest =
      args.rotary.cos != nullptr || args.query_element != args.element;
  const uint4* q = reinterpret_cast<const uint4*>(shared) +
                   row_warp * S::kSteps * cuda::kWarp + lane;
  const uint4* q_rest = q + row_warps * S::kSteps * cuda::kWarp;
  const int64_t k_bytes = args.shape.k_dim * kBytes;
  const int64_t v_bytes = args.shape.v_dim * kBytes;

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

  for (int slot = block.begin + key_warp * kTile; slot < block.end;
       slot += key_warps * kTile) {
    // Each lane finds one key, and learns of the others from its neighbours.
    const Key key = FindKey(decode, block, slot + lane % kTile);
    uint4 keys[2][S::kKeyHalf];
    int64_t key_rows[2];
    const auto load_keys = [&](int first) {
      KERNELS_UNROLL
      for (int n = 0; n < 2; ++n) {
        KERNELS_UNROLL
        for (int i = 0; i < S::kKeyHalf; ++i) {
          const int at = (4 * (first + i) + t) * 16;
          keys[n][i] = Load16(args.cache_k + key_rows[n] * k_bytes + at,
                              key_rows[n] >= 0 && at < k_bytes);
        }
      }
    };
    KERNELS_UNROLL
    for (int n = 0; n < 2; ++n) {
      key_rows[n] = __shfl_sync(cuda::kAllLanes, key.row, g + 8 * n);
    }
    load_keys(0);
    // Keys 2t, 2t + 1, 2t + 8, 2t + 9: of this lane's values and logits.
    int64_t rows[4];
    int positions[4];
    KERNELS_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int from = 2 * t + c % 2 + c / 2 * 8;
      rows[c] = __shfl_sync(cuda::kAllLanes, key.row, from);
      positions[c] = __shfl_sync(cuda::kAllLanes, key.position, from);
    }
    const auto load_value = [&](int i, int c) {
      const int at = (8 * i + g) * 16;
      return Load16(args.cache_v + rows[c] * v_bytes + at,
                    rows[c] >= 0 && at < v_bytes);
    };
    // Before they are needed, if there are registers for that.
    constexpr bool kEarly = kDim <= 128;
    uint4 early[kEarly ? S::kValueLoads : 1][4] = {};
    if constexpr (kEarly) {
      KERNELS_UNROLL
      for (int i = 0; i < S::kValueLoads; ++i) {
        KERNELS_UNROLL
        for (int c = 0; c < 4; ++c) early[i][c] = load_value(i, c);
      }
    }

    float products[2][4] = {};
    KERNELS_UNROLL
    for (int i = 0; i < S::kKeyLoads; ++i) {
      if (i > 0 && i == S::kKeyHalf) load_keys(i);
      uint32_t pairs[2][8 / kBytes];
      KERNELS_UNROLL
      for (int n = 0; n < 2; ++n) {
        PairsOf<kBytes>(args.element, keys[n][i % S::kKeyHalf], pairs[n]);
      }
      KERNELS_UNROLL
      for (int s = 0; s < E / 4; ++s) {
        const int step = i * (E / 4) + s;
        const uint4 a = q[step * cuda::kWarp];
        KERNELS_UNROLL
        for (int n = 0; n < 2; ++n) {
          Multiply<T>(products[n], a, pairs[n][2 * s], pairs[n][2 * s + 1]);
        }
        if (has_rest) {
          const uint4 rest = q_rest[step * cuda::kWarp];
          KERNELS_UNROLL
          for (int n = 0; n < 2; ++n) {
            Multiply<T>(products[n], rest, pairs[n][2 * s],
                        pairs[n][2 * s + 1]);
          }
        }
      }
    }

    // One step of the online softmax for each of the lane's rows.
    uint32_t rounded[4] = {}, rest[4] = {};  // weights, as a product's a
    bool moved = false;
    float correction[2];
    KERNELS_UNROLL
    for (int h = 0; h < 2; ++h) {
      float x[4];
      KERNELS_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int from = 2 * t + c % 2 + c / 2 * 8;
        x[c] = Logit(decode, block, queries[h], products[c / 2][2 * h + c % 2],
                     slot + from, positions[c]);
      }
      float highest = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
      highest = fmaxf(highest, __shfl_xor_sync(cuda::kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(cuda::kAllLanes, highest, 2));
      const float now = fmaxf(best[h], highest);
      correction[h] = Weight(best[h], now);
      moved = moved || now > best[h];
      best[h] = now;
      KERNELS_UNROLL
      for (int c = 0; c < 4; ++c) x[c] = Weight(x[c], now - kWeightBits);
      total[h] = total[h] * correction[h] + ((x[0] + x[1]) + (x[2] + x[3]));
      KERNELS_UNROLL
      for (int c = 0; c < 2; ++c) {
        const uint32_t pair = Pair<T>(x[2 * c], x[2 * c + 1]);
        rounded[2 * c + h] = pair;
        rest[2 * c + h] = Pair<T>(x[2 * c] - LowerOf<T>(pair),
                                  x[2 * c + 1] - UpperOf<T>(pair));
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

    KERNELS_UNROLL
    for (int i = 0; i < S::kValueLoads; ++i) {
      uint32_t pairs[4][8 / kBytes];
      KERNELS_UNROLL
      for (int c = 0; c < 4; ++c) {
        PairsOf<kBytes>(args.element,
                        kEarly ? early[kEarly ? i : 0][c] : load_value(i, c),
                        pairs[c]);
      }
      KERNELS_UNROLL
      for (int j = 0; j < E; ++j) {
        // Element j of two keys, from the pairs of each.
        const unsigned pick = j % 2 == 0 ? 0x5410 : 0x7632;
        const uint32_t b0 = __byte_perm(pairs[0][j / 2], pairs[1][j / 2], pick);
        const uint32_t b1 = __byte_perm(pairs[2][j / 2], pairs[3][j / 2], pick);
        Multiply<T>(sums[i][j], weights, b0, b1);
        Multiply<T>(sums[i][j], weights_rest, b0, b1);
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
  __syncthreads();  // of q as well, which the sums take the place of
  float scale[2];
  KERNELS_UNROLL
  for (int h = 0; h < 2; ++h) {
    float largest = MinusInfinity();
    for (int w = row_warp; w < kAttendWarps; w += row_warps) {
      largest = fmaxf(largest, bases[w * kTile + g + 8 * h]);
    }
    scale[h] = Weight(best[h], largest);
  }
  float* out = reinterpret_cast<float*>(shared);  // [row warps * 16, kDim]
  for (int w = 0; w < key_warps; ++w) {
    if (w == key_warp) {
      KERNELS_UNROLL
      for (int i = 0; i < S::kValueLoads; ++i) {
        KERNELS_UNROLL
        for (int c = 0; c < 4; ++c) {
          const int d = 8 * E * i + (2 * t + c % 2) * E;
          if (d >= kDim) continue;
          float* row = out + (row_warp * kTile + g + 8 * (c / 2)) * kDim + d;
          KERNELS_UNROLL
          for (int j = 0; j < E; ++j) {
            const float x = sums[i][j][c] * scale[c / 2];
            row[j] = w == 0 ? x : row[j] + x;
          }
        }
      }
    }
    __syncthreads();
  }
  for (int r = warp; r < row_warps * kTile; r += kAttendWarps) {
    const int64_t row = block.row_begin + r;
    if (row >= block.row_end) continue;
    float largest = MinusInfinity();
    for (int w = r / kTile; w < kAttendWarps; w += row_warps) {
      largest = fmaxf(largest, bases[w * kTile + r % kTile]);
    }
    float all = 0.0f;
    for (int w = r / kTile; w < kAttendWarps; w += row_warps) {
      all += totals[w * kTile + r % kTile] *
             Weight(bases[w * kTile + r % kTile], largest);
    }
    WriteRow(decode, block, row, largest - kWeightBits, all, out + r * kDim);
  }
}

template <typename T, int kBytes, int kDim>
cudaError_t LaunchDim(cudaStream_t stream, const DeviceDecode& decode) {
  const int row_warps = RowWarps(decode.rows());
  const int64_t row_blocks =
      cuda::CeilDiv<int64_t>(decode.rows(), row_warps * kTile);
  const int64_t blocks = decode.parts * decode.args.shape.heads * row_blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int bytes = SharedBytes<kDim>(row_warps);
  constexpr int kWithoutAsking = 48 << 10;
  auto* const kernel = AttendTensorKernel<T, kBytes, kDim>;
  if (bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  return cuda::Launch(kernel, dim3(static_cast<unsigned>(blocks)),
                      dim3(kAttendThreads), bytes, stream, decode, row_warps);
}

template <typename T, int kBytes>
cudaError_t LaunchAttendTensor(cudaStream_t stream,
                               const DeviceDecode& decode) {
  const kv_cache::CacheShape& shape = decode.args.shape;
  const int64_t dim = shape.k_dim > shape.v_dim ? shape.k_dim : shape.v_dim;
  if (dim <= 64) return LaunchDim<T, kBytes, 64>(stream, decode);
  if (dim <= 128) return LaunchDim<T, kBytes, 128>(stream, decode);
  return LaunchDim<T, kBytes, 256>(stream, decode);
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_ATTEND_TENSOR_CUDA_H_
