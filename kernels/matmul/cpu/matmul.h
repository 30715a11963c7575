// Products of few rows with a matrix on the CPU, on plain pointers.
//
// The weights are read once, in the order of memory, whatever the number of
// rows of x, and multiplied in registers, so that few rows take as long as the
// memory takes to deliver them. Sums are in float32.
//
// Results do not depend on the number of threads: the work is cut by shape
// alone, and partial sums are added in a fixed order.

#ifndef KERNELS_MATMUL_CPU_MATMUL_H_
#define KERNELS_MATMUL_CPU_MATMUL_H_

#include <cstdint>

#include "kernels/common/cpu_features.h"
#include "kernels/common/parallel_for.h"
#include "kernels/matmul/cc/geometry.h"

namespace kernels::matmul {

// Of arrays of floating numbers.
enum class Element : int { kF32, kBF16, kF16 };

struct ConstArray {
  const void* data = nullptr;
  Element element = Element::kF32;
};

struct Array {
  void* data = nullptr;
  Element element = Element::kF32;
};

// How weights lie in memory. Packed ones are v * scale + minimum: v is int8 or
// float8_e4m3fn, [k, n], or of 4 bits, [k / 8, n] words of 32 bits of which the
// lowest four are the first of eight rows.
enum class Format : int { kF32, kBF16, kF16, kInt8, kE4M3, kInt4 };

struct Weights {
  const void* data = nullptr;
  Format format = Format::kF32;
  // Of packed weights: bfloat16, a row for each `group` rows of weights, which
  // is a multiple of 8 for those of 4 bits. Of others one row for all.
  const uint16_t* scale = nullptr;
  const uint16_t* minimum = nullptr;  // of 4 bits alone
  int64_t group = INT64_MAX / 2;
  // Whether the matrix lies as [n, k]; not of packed weights.
  bool transposed = false;
};

// y = x @ w + bias, each array of an element type of its own; bias is [groups,
// n], or nothing if its data is null.
void Multiply(const ParallelLoop& loop, SimdLevel level,
              const Geometry& geometry, const ConstArray& x, const Weights& w,
              const ConstArray& bias, const Array& y);

}  // namespace kernels::matmul

#endif  // KERNELS_MATMUL_CPU_MATMUL_H_
