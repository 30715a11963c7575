// Products of small matrices by a warp, and the pairs of 16-bit numbers that
// they take. T is F16 or BF16.
//
// mma.m16n8k16 multiplies a [16, 16] by b [16, 8] and adds to c [16, 8]. With
// g = lane / 4 and t = lane % 4, a lane holds, in pairs of neighbouring k,
//
//     a.x: row g, k 2t;   a.y: row g + 8, k 2t;  a.z, a.w: the same at k 2t + 8
//     b0: k 2t, column g; b1: k 2t + 8, column g
//     c[0], c[1]: row g, columns 2t and 2t + 1;  c[2], c[3]: row g + 8
#ifndef KERNELS_DECODE_ATTENTION_CUDA_TENSOR_CORES_H_
#define KERNELS_DECODE_ATTENTION_CUDA_TENSOR_CORES_H_

#include <cstdint>
#include <type_traits>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/cuda_util.h"

namespace kernels {
namespace decode_attention {

// The pair (x, y) rounded to T, x in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t Pair(float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t out;
  if constexpr (std::is_same_v<T, BF16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(y), "f"(x));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(y), "f"(x));
  }
  return out;
#else
  return uint32_t{cuda::FromCompute<T>(x)} | uint32_t{cuda::FromCompute<T>(y)}
                                                 << 16;
#endif
}

template <typename T>
__device__ __forceinline__ float LowerOf(uint32_t pair) {
  return cuda::ToCompute<T>(static_cast<uint16_t>(pair));
}
template <typename T>
__device__ __forceinline__ float UpperOf(uint32_t pair) {
  return cuda::ToCompute<T>(static_cast<uint16_t>(pair >> 16));
}

// The product `c += a * b` of a warp.
template <typename T>
__device__ __forceinline__ void Multiply(float (&c)[4], const uint4& a,
                                         uint32_t b0, uint32_t b1) {
#if defined(KERNELS_CUDA_EMULATION)
  struct Fragment {
    uint32_t a[4];
    uint32_t b[2];
  };
  Fragment all[cuda::kWarp];
  emulation::WarpGather(Fragment{{a.x, a.y, a.z, a.w}, {b0, b1}}, all);
  const int lane = emulation::Lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8;
    const int column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8];
      const uint32_t right = all[column * 4 + k % 8 / 2].b[k / 8];
      c[i] += k % 2 == 0 ? LowerOf<T>(left) * LowerOf<T>(right)
                         : UpperOf<T>(left) * UpperOf<T>(right);
    }
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, BF16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
#endif
}

// Four codes of a quantised cache as two pairs of float16: exactly, but for NaN
// and the infinities of float8_e5m2, which stay what they are.
template <cache::Element kElement>
__device__ __forceinline__ void Widen(uint32_t codes, uint32_t* first,
                                      uint32_t* second) {
  if constexpr (kElement == cache::Element::kInt8) {
    // 0x6400 | u is 1024 + u in float16; u is the code plus 128.
    const uint32_t shifted = codes ^ 0x80808080u;
    *first = __byte_perm(shifted, 0x64646464u, 0x4140);
    *second = __byte_perm(shifted, 0x64646464u, 0x4342);
#if defined(KERNELS_CUDA_EMULATION)
    for (uint32_t* pair : {first, second}) {
      *pair = Pair<F16>(LowerOf<F16>(*pair) - 1152.0f,
                        UpperOf<F16>(*pair) - 1152.0f);
    }
#else
    constexpr uint32_t kOffset = 0x64806480u;  // 1152, twice
    asm("sub.f16x2 %0, %0, %1;" : "+r"(*first) : "r"(kOffset));
    asm("sub.f16x2 %0, %0, %1;" : "+r"(*second) : "r"(kOffset));
#endif
  } else if constexpr (kElement == cache::Element::kE5m2) {
    *first = __byte_perm(codes, 0, 0x1404);
    *second = __byte_perm(codes, 0, 0x3424);
  } else {
    static_assert(kElement == cache::Element::kE4m3);
#if defined(KERNELS_CUDA_EMULATION)
    float x[4];
    for (int i = 0; i < 4; ++i) {
      x[i] = cuda::ToCompute<E4M3>(static_cast<uint8_t>(codes >> (8 * i)));
    }
    *first = Pair<F16>(x[0], x[1]);
    *second = Pair<F16>(x[2], x[3]);
#else
    const auto pair = [](uint32_t two) {
      const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(
          static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
      return uint32_t{raw.x} | uint32_t{raw.y} << 16;
    };
    *first = pair(codes & 0xffffu);
    *second = pair(codes >> 16);
#endif
  }
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CUDA_TENSOR_CORES_H_
