// Sums over the columns of walk.h, in an order that the shape alone
// decides.
//
// A kind of sum is a struct with kParts, the numbers that it keeps, and
// `Combine(a, b)`, which adds those of b to those of a. Zeros are an empty sum.

#ifndef KERNELS_BATCH_STAT_CUDA_REDUCE_H_
#define KERNELS_BATCH_STAT_CUDA_REDUCE_H_

#include <cstdint>

#include "kernels/batch_stat/cuda/walk.h"
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

// The state of the lane `lanes` further on.
template <int kParts, typename A>
__device__ __forceinline__ void ShuffleDown(const A (&state)[kParts], int lanes,
                                            A (&other)[kParts]) {
  KERNELS_UNROLL
  for (int p = 0; p < kParts; ++p) {
    other[p] = __shfl_down_sync(cuda::kAllLanes, state[p],
                                static_cast<unsigned>(lanes));
  }
}

// Combines the states of a warp's lanes that lie a multiple of `apart`, a power
// of two, from each other; the first `apart` lanes get the results.
template <typename Sum, typename A>
__device__ __forceinline__ void CombineLanes(A (&state)[Sum::kParts],
                                             int apart) {
  for (int lanes = cuda::kWarp / 2; lanes >= apart; lanes /= 2) {
    A other[Sum::kParts];
    ShuffleDown<Sum::kParts>(state, lanes, other);
    Sum::Combine(state, other);
  }
}

// How many states one thread combines one after the other.
constexpr int kSerial = 8;

// Where each thread of a block has its states in shared memory, features last:
// parts of channels lie `kApart` from each other, so that threads that read
// neighbouring channels meet in no bank.
template <int kStates, int kParts>
struct SharedStates {
  static constexpr int kApart = kThreads + cuda::kWarp / kStates;
  static constexpr int kNumbers = kParts * kStates * kApart;

  static __device__ __forceinline__ int At(int state, int part, int thread) {
    return (part * kStates + state) * kApart + thread;
  }

  template <typename A>
  static __device__ __forceinline__ void Store(
      A* shared, const A (&states)[kStates][kParts]) {
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) {
      KERNELS_UNROLL
      for (int p = 0; p < kParts; ++p) {
        shared[At(s, p, static_cast<int>(threadIdx.x))] = states[s][p];
      }
    }
  }

  template <typename A>
  static __device__ __forceinline__ void Load(const A* shared,
                                              A (&states)[kStates][kParts]) {
    KERNELS_UNROLL
    for (int s = 0; s < kStates; ++s) {
      KERNELS_UNROLL
      for (int p = 0; p < kParts; ++p) {
        states[s][p] = shared[At(s, p, static_cast<int>(threadIdx.x))];
      }
    }
  }
};

// How many numbers EndReduction wants of a block's shared memory.
template <typename Sum, bool kLast, int kStates>
constexpr int kSharedNumbers =
    kLast ? SharedStates<kStates, Sum::kParts>::kNumbers
          : kThreads / cuda::kWarp * Sum::kParts;

// Ends a reduction: adds the block's threads up, and hands the sums to `finish`
// if they are whole, or else leaves them in `partial`.
template <typename Sum, typename A, int kVec, bool kLast, int kStates,
          typename Finish>
__device__ void EndReduction(const Walk& walk, const Part& part,
                             const Column& column, int64_t splits,
                             A (&states)[kStates][Sum::kParts],
                             A* shared,   // kSharedNumbers
                             A* partial,  // [splits, parts, groups, channels]
                             const Finish& finish) {
  constexpr int kParts = Sum::kParts;
  const int me = static_cast<int>(threadIdx.x);
  const int64_t all = walk.groups * walk.channels;
  A sums[kParts];
  int64_t stat = 0;
  if constexpr (kLast) {
    using Shared = SharedStates<kStates, kParts>;
    // Halve the rows until there are few, then give each channel a thread.
    const int row = me / walk.bx;
    int rows = walk.by;
    for (; rows > kSerial; rows /= 2) {
      if (row >= rows / 2 && row < rows) Shared::Store(shared, states);
      __syncthreads();
      if (row < rows / 2) {
        KERNELS_UNROLL
        for (int j = 0; j < kStates; ++j) {
          A other[kParts];
          KERNELS_UNROLL
          for (int p = 0; p < kParts; ++p) {
            other[p] = shared[Shared::At(j, p, me + rows / 2 * walk.bx)];
          }
          Sum::Combine(states[j], other);
        }
      }
      __syncthreads();
    }
    if (row < rows) Shared::Store(shared, states);
    __syncthreads();
    if (me >= walk.bx * kStates) return;
    const int j = me % kStates;
    KERNELS_UNROLL
    for (int p = 0; p < kParts; ++p)
      sums[p] = shared[Shared::At(j, p, me / kStates)];
    for (int r = 1; r < rows; ++r) {
      A other[kParts];
      KERNELS_UNROLL
      for (int p = 0; p < kParts; ++p) {
        other[p] = shared[Shared::At(j, p, r * walk.bx + me / kStates)];
      }
      Sum::Combine(sums, other);
    }
    const int64_t first =
        part.column % walk.columns * walk.bx * kStates;  // of the channels
    if (first + me >= walk.channels) return;
    stat = column.group * walk.channels + first + me;
  } else {
    CombineLanes<Sum>(states[0], 1);
    if (me % cuda::kWarp == 0) {
      KERNELS_UNROLL
      for (int p = 0; p < kParts; ++p) {
        shared[me / cuda::kWarp * kParts + p] = states[0][p];
      }
    }
    __syncthreads();
    if (me != 0) return;
    KERNELS_UNROLL
    for (int p = 0; p < kParts; ++p) sums[p] = shared[p];
    for (int warp = 1; warp < kThreads / cuda::kWarp; ++warp) {
      A other[kParts];
      KERNELS_UNROLL
      for (int p = 0; p < kParts; ++p) other[p] = shared[warp * kParts + p];
      Sum::Combine(sums, other);
    }
    stat = column.stat(walk);
  }
  if (splits == 1) {
    finish(stat, sums);
    return;
  }
  KERNELS_UNROLL
  for (int p = 0; p < kParts; ++p) {
    partial[(part.split * kParts + p) * all + stat] = sums[p];
  }
}

// The blocks of FinishKernel: as many channels as a sector of memory holds
// numbers, so that many blocks share the work, and threads enough to read a
// channel's parts at once.
constexpr int kFinishThreads = 1024;
constexpr int kFinishChannels = 8;

// Adds up the parts that EndReduction left. Its blocks are there before they
// are needed, while `partial` is still written: it is not what the compiler may
// take for constant, as with __restrict__.
template <typename Sum, typename A, typename Finish>
__global__ void __launch_bounds__(kFinishThreads)
    FinishKernel(const A* partial, int64_t splits, int64_t all, Finish finish) {
  constexpr int kParts = Sum::kParts;
  constexpr int kUnroll = 32 / static_cast<int>(sizeof(A));
  constexpr int kWarps = kFinishThreads / cuda::kWarp;
  __shared__ A shared[kParts][kFinishChannels][kWarps];
  const int me = static_cast<int>(threadIdx.x);
  const int lane = me % cuda::kWarp;
  const int by = static_cast<int>(blockDim.x) / kFinishChannels;
  const int warps = static_cast<int>(blockDim.x) / cuda::kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kFinishChannels;
  const int64_t stat = first + me % kFinishChannels;
  A state[kParts] = {};
  cuda::WaitForPrevious();
  if (stat < all) {
    for (int64_t split = me / kFinishChannels; split < splits;
         split += kUnroll * by) {
      A parts[kUnroll][kParts] = {};
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        if (split + k * by < splits) {
          KERNELS_UNROLL
          for (int p = 0; p < kParts; ++p) {
            parts[k][p] = partial[((split + k * by) * kParts + p) * all + stat];
          }
        }
      }
      KERNELS_UNROLL
      for (int k = 0; k < kUnroll; ++k) Sum::Combine(state, parts[k]);
    }
  }
  CombineLanes<Sum>(state, kFinishChannels);
  if (lane < kFinishChannels) {
    KERNELS_UNROLL
    for (int p = 0; p < kParts; ++p) {
      shared[p][lane][me / cuda::kWarp] = state[p];
    }
  }
  __syncthreads();
  // A warp for each channel, a lane for each warp's sum.
  for (int c = me / cuda::kWarp; c < kFinishChannels; c += warps) {
    KERNELS_UNROLL
    for (int p = 0; p < kParts; ++p) {
      state[p] = lane < warps ? shared[p][c][lane] : A{0};
    }
    CombineLanes<Sum>(state, 1);
    if (lane == 0 && first + c < all) finish(first + c, state);
  }
}

// Adds up what the blocks of a reduction have left in `partial`, if they were
// not whole.
template <typename Sum, typename A, typename Finish>
cudaError_t LaunchFinish(cudaStream_t stream, const A* partial, int64_t splits,
                         int64_t all, const Finish& finish) {
  if (splits == 1) return cudaSuccess;
  // Two parts a thread, or more.
  const int64_t warps = PowerOfTwoFrom(
      CeilDiv<int64_t>(splits * kFinishChannels, 2 * cuda::kWarp),
      kFinishThreads / cuda::kWarp);
  dim3 grid;
  const cudaError_t error =
      GridOf(CeilDiv<int64_t>(all, kFinishChannels), &grid);
  if (error != cudaSuccess) return error;
  return cuda::LaunchEarly(FinishKernel<Sum, A, Finish>, grid,
                           dim3(static_cast<unsigned>(warps * cuda::kWarp)), 0,
                           stream, partial, splits, all, finish);
}

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_CUDA_REDUCE_H_
