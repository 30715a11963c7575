// What the loops of matmul work on, whatever runs them.
//
// For each of `groups` independent products, x is [rows, k], the weights are
// [k, n] and y is [rows, n], all dense and in this order.

#ifndef KERNELS_MATMUL_CC_GEOMETRY_H_
#define KERNELS_MATMUL_CC_GEOMETRY_H_

#include <cstdint>

namespace kernels::matmul {

struct Geometry {
  int64_t groups;
  int64_t rows;
  int64_t k;
  int64_t n;
};

}  // namespace kernels::matmul

#endif  // KERNELS_MATMUL_CC_GEOMETRY_H_
