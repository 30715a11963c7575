// Elements of caches on the device: between float32 and what is stored.
#ifndef KERNELS_CACHE_CUDA_ELEMENTS_H_
#define KERNELS_CACHE_CUDA_ELEMENTS_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/cuda_util.h"

namespace kernels {
namespace cache {

template <typename T>
__device__ __forceinline__ const typename T::Storage* As(const uint8_t* row) {
  return reinterpret_cast<const typename T::Storage*>(row);
}
template <typename T>
__device__ __forceinline__ typename T::Storage* As(uint8_t* row) {
  return reinterpret_cast<typename T::Storage*>(row);
}

// Element `i` of a row.
__device__ __forceinline__ float LoadElement(Element element,
                                             const uint8_t* row, int64_t i) {
  using cuda::ToCompute;
  switch (element) {
    case Element::kF32:
      return As<F32>(row)[i];
    case Element::kBf16:
      return ToCompute<BF16>(As<BF16>(row)[i]);
    case Element::kF16:
      return ToCompute<F16>(As<F16>(row)[i]);
    case Element::kInt8:
      return ToCompute<Int8>(As<Int8>(row)[i]);
    case Element::kE4m3:
      return ToCompute<E4M3>(row[i]);
    case Element::kE5m2:
      return ToCompute<E5M2>(row[i]);
  }
  return 0.0f;
}

// Comparisons with NaN are false: NaN stays.
__device__ __forceinline__ float Clip(float x, float limit) {
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// The code of a number that has been divided by its scale: the nearest, ties to
// even, within the finite ones; NaN becomes 0 in int8.
__device__ __forceinline__ uint8_t Quantized(Element element, float x) {
  using cuda::FromCompute;
  switch (element) {
    case Element::kInt8:
      return static_cast<uint8_t>(
          FromCompute<Int8>(x == x ? Clip(x, 127.0f) : 0.0f));
    case Element::kE4m3:
      return FromCompute<E4M3>(Clip(x, 448.0f));
    default:
      return FromCompute<E5M2>(Clip(x, 57344.0f));
  }
}

// Stores `x / scale` where elements are quantised, else `x`.
__device__ __forceinline__ void StoreElement(Element element, uint8_t* row,
                                             int64_t i, float x, float scale) {
  using cuda::FromCompute;
  switch (element) {
    case Element::kF32:
      As<F32>(row)[i] = x;
      return;
    case Element::kBf16:
      As<BF16>(row)[i] = FromCompute<BF16>(x);
      return;
    case Element::kF16:
      As<F16>(row)[i] = FromCompute<F16>(x);
      return;
    default:
      row[i] = Quantized(element, x / scale);
  }
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CUDA_ELEMENTS_H_
