// Sums over the columns of walk_cuda.h, in an order that the shape alone
// decides.
//
// A kind of sum is a struct with kParts, the numbers that it keeps, and
// `Combine(a, b)`, which adds those of b to those of a. Zeros are an empty sum.

#ifndef KERNELS_BATCH_STAT_REDUCE_CUDA_H_
#define KERNELS_BATCH_STAT_REDUCE_CUDA_H_

#include <cstdint>

#include "kernels/batch_stat/walk_cuda.h"
#include "kernels/common/cuda_util.h"

namespace kernels::batch_stat {

template <typename A, int kNumParts>
struct PlainSum {
  static constexpr int kParts = kNumParts;
  static __device__ __forceinline__ void Combine(A (&a)[kParts],
                                                 const A (&b)[kParts]) {
    KERNELS_UNROLL
    for (int p = 0; p < kParts; ++p) a[p] += b[p];
  }
};

// Combines the states of `count` threads, a power of two, that lie `apart` from
// each other; the one at `position` 0 gets the result.
template <typename Sum, typename A, int kStates>
__device__ void CombineThreads(A (&states)[kStates][Sum::kParts], A* shared,
                               int position, int count, int apart) {
  const int stride = static_cast<int>(blockDim.x);
  const int me = static_cast<int>(threadIdx.x);
  for (int half = count / 2; half > 0; half /= 2) {
    if (position >= half && position < 2 * half) {
      KERNELS_UNROLL
      for (int j = 0; j < kStates; ++j) {
        KERNELS_UNROLL
        for (int p = 0; p < Sum::kParts; ++p) {
          shared[(j * Sum::kParts + p) * stride + me] = states[j][p];
        }
      }
    }
    __syncthreads();
    if (position < half) {
      KERNELS_UNROLL
      for (int j = 0; j < kStates; ++j) {
        A other[Sum::kParts];
        KERNELS_UNROLL
        for (int p = 0; p < Sum::kParts; ++p) {
          other[p] = shared[(j * Sum::kParts + p) * stride + me + half * apart];
        }
        Sum::Combine(states[j], other);
      }
    }
    __syncthreads();
  }
}

// What a block of a reduction has to do: its column, and which of its units.
struct Part {
  int64_t column;
  int64_t split;
  int64_t first;
  int64_t last;
};

__device__ __forceinline__ Part PartOf(const Walk& walk, int64_t splits) {
  Part part;
  const int64_t block = blockIdx.x;
  const int64_t each = CeilDiv<int64_t>(walk.units, splits);
  part.column = block / splits;
  part.split = block % splits;
  part.first = part.split * each;
  part.last = part.first + each < walk.units ? part.first + each : walk.units;
  return part;
}

// Ends a reduction: adds the block's threads up, and hands the sums to `finish`
// if they are whole, or else leaves them in `partial`.
template <typename Sum, typename A, int kVec, bool kLast, int kStates,
          typename Finish>
__device__ void EndReduction(const Walk& walk, const Part& part,
                             const Column& column, int64_t splits,
                             A (&states)[kStates][Sum::kParts],
                             A* partial,  // [splits, parts, groups, channels]
                             const Finish& finish) {
  __shared__ A shared[kStates * Sum::kParts * kThreads];
  const int me = static_cast<int>(threadIdx.x);
  if constexpr (kLast) {
    CombineThreads<Sum>(states, shared, me / walk.bx, walk.by, walk.bx);
    if (me / walk.bx != 0 || !column.inside) return;
  } else {
    CombineThreads<Sum>(states, shared, me, kThreads, 1);
    if (me != 0) return;
  }
  const int64_t stat = column.stat(walk);
  const int64_t all = walk.groups * walk.channels;
  KERNELS_UNROLL
  for (int j = 0; j < kStates; ++j) {
    if (splits == 1) {
      finish(stat + j, states[j]);
    } else {
      KERNELS_UNROLL
      for (int p = 0; p < Sum::kParts; ++p) {
        partial[(part.split * Sum::kParts + p) * all + stat + j] = states[j][p];
      }
    }
  }
}

// Adds up the parts that EndReduction left; blocks are bx channels wide.
template <typename Sum, typename A, typename Finish>
__global__ void __launch_bounds__(kThreads, 2)
    FinishKernel(const A* __restrict__ partial, int64_t splits, int64_t all,
                 int bx, Finish finish) {
  __shared__ A shared[Sum::kParts * kThreads];
  const int tx = static_cast<int>(threadIdx.x) % bx;
  const int ty = static_cast<int>(threadIdx.x) / bx;
  const int by = kThreads / bx;
  const int64_t stat = static_cast<int64_t>(blockIdx.x) * bx + tx;
  A states[1][Sum::kParts] = {};
  if (stat < all) {
    for (int64_t split = ty; split < splits; split += kUnroll * by) {
      A parts[kUnroll][Sum::kParts] = {};
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        if (split + k * by < splits) {
          KERNELS_UNROLL
          for (int p = 0; p < Sum::kParts; ++p) {
            parts[k][p] =
                partial[((split + k * by) * Sum::kParts + p) * all + stat];
          }
        }
      }
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) Sum::Combine(states[0], parts[k]);
    }
  }
  CombineThreads<Sum>(states, shared, ty, by, bx);
  if (ty == 0 && stat < all) finish(stat, states[0]);
}

// Adds up what the blocks of a reduction have left in `partial`, if they were
// not whole.
template <typename Sum, typename A, typename Finish>
cudaError_t LaunchFinish(cudaStream_t stream, const A* partial, int64_t splits,
                         int64_t all, const Finish& finish) {
  if (splits == 1) return cudaSuccess;
  const int bx = static_cast<int>(PowerOfTwoFrom(all, cuda::kWarp));
  dim3 grid;
  const cudaError_t error = GridOf(CeilDiv<int64_t>(all, bx), &grid);
  if (error != cudaSuccess) return error;
  return cuda::Launch(FinishKernel<Sum, A, Finish>, grid, dim3(kThreads), 0,
                      stream, partial, splits, all, bx, finish);
}

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_REDUCE_CUDA_H_
