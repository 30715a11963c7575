// Decode attention in a GPU's memory: append, attend in parts, join the parts.
#ifndef KERNELS_DECODE_ATTENTION_CUDA_DECODE_H_
#define KERNELS_DECODE_ATTENTION_CUDA_DECODE_H_

#include <cstdint>

#include "kernels/cache/cuda/update_plan.h"
#include "kernels/decode_attention/cc/decode_args.h"

#if !defined(KERNELS_CUDA_EMULATION)
#include <cuda_runtime_api.h>
#endif

namespace kernels {
namespace decode_attention {

// Keys are divided among workers in steps of so many, and a worker has so many
// steps or more.
constexpr int kStep = 64;
constexpr int kLeastSteps = 2;
// Sequences of no more stay whole: parts of them would cost more than they
// spread.
constexpr int kWholeSteps = 4;
// Largest rows of a head, in bytes; in elements, where they are no multiple of
// 16 bytes or keys are turned when they are read.
constexpr int kMaxRowBytes = 2048;
constexpr int kMaxOddDim = 512;

struct DeviceDecode {
  DecodeArgs args;            // of device memory
  const int32_t* first_slot;  // scalar; args.addressing does not have it yet
  // [parts, part_floats], two for each worker: what it has of a sequence that
  // it goes on with, and of one that it leaves to the next. In each, for each
  // query row of each key-value head, a weighted sum of values; then for each
  // of them the logarithm that the sum is relative to, and the sum of the
  // weights; then how many parts of the sequence have come, an int32.
  float* workspace;
  int64_t parts;  // 0: no sequence is divided
  int64_t part_floats;
  // Those who share the keys of all sequences, for each head and block of rows.
  int64_t workers;
  bool prepared;  // whether a kernel before appends or empties the workspace

  // Rows of one key-value head, which share its keys.
  KERNELS_HOST_DEVICE int64_t rows() const { return args.tokens * args.group; }
  KERNELS_HOST_DEVICE int64_t states() const {
    return args.shape.heads * rows();
  }
  KERNELS_HOST_DEVICE int64_t slots() const {
    return args.addressing.table_width * args.shape.block_size;
  }
};

// Whether rows can be read 16 bytes at a time.
inline bool WideRows(const DecodeArgs& args) {
  const int64_t size = cache::ElementSize(args.element);
  const int64_t k = args.shape.k_dim * size, v = args.shape.v_dim * size;
  return !args.rotary.cached_keys && k % 16 == 0 && v % 16 == 0 &&
         k <= kMaxRowBytes && v <= kMaxRowBytes;
}

// Whether there is a kernel for `args`.
inline bool CudaFits(const DecodeArgs& args) {
  return WideRows(args) ||
         (args.shape.k_dim <= kMaxOddDim && args.shape.v_dim <= kMaxOddDim);
}

// Starts everything; `update` is null where nothing is appended.
cudaError_t LaunchDecode(cudaStream_t stream, DeviceDecode decode,
                         const cache::DeviceUpdate* update);

// The part of it that attends, a file for each kind of cache: compiling takes
// long. On tensor cores, which compute capability 8.0 has, for WideRows of up
// to 256 elements, without qv.
template <cache::Element kElement>
cudaError_t LaunchAttendTensor(cudaStream_t stream, DeviceDecode decode);

// On other cores: for WideRows, and for the rest.
template <int kBytes>
cudaError_t LaunchAttendWide(cudaStream_t stream, DeviceDecode decode);
cudaError_t LaunchAttendSingle(cudaStream_t stream, DeviceDecode decode);

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CUDA_DECODE_H_
