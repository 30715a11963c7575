// Products of few rows with a matrix on the CPU, on plain pointers.
//
// The weights are read once, row after row, whatever the number of rows of x,
// and multiplied in registers, so that few rows take as long as the memory
// takes to deliver them. Sums are in float32.
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

// y = x @ w + bias, each of an element type of its own; bias is [groups, n], or
// nothing if its data is null.
void Multiply(const ParallelLoop& loop, SimdLevel level,
              const Geometry& geometry, const ConstArray& x,
              const ConstArray& w, const ConstArray& bias, const Array& y);

}  // namespace kernels::matmul

#endif  // KERNELS_MATMUL_CPU_MATMUL_H_
