// Decode attention in a GPU's memory: append, attend in parts, join the parts.
#ifndef KERNELS_DECODE_ATTENTION_DECODE_ATTENTION_CUDA_H_
#define KERNELS_DECODE_ATTENTION_DECODE_ATTENTION_CUDA_H_

#include <cstdint>

#include "kernels/decode_attention/decode_args.h"
#include "kernels/kv_cache/update_plan.h"

#if !defined(KERNELS_CUDA_EMULATION)
#include <cuda_runtime_api.h>
#endif

namespace kernels {
namespace decode_attention {

// Keys of a part are a multiple of this, but for the last part of a sequence.
constexpr int kPartStep = 64;
// Parts with fewer keys would cost more than they spread.
constexpr int kLeastPart = 128;
// Largest rows of a head, in bytes; in elements, where they are no multiple of
// 16 bytes or keys are turned when they are read.
constexpr int kMaxRowBytes = 2048;
constexpr int kMaxOddDim = 512;

// What each part has in the workspace, in floats: a header, then for each query
// row of each key-value head a weighted sum of values, then for each of them
// the logarithm that the sum is relative to, and the sum of the weights.
constexpr int kHeaderFloats = 8;

struct PartHeader {
  int32_t sequence;  // -1: a part without work
  int32_t begin;     // its slots
  int32_t end;
  int32_t parts;  // of its sequence
  // Of the sequence whose number is that of this part.
  int32_t first_part;
  int32_t num_parts;
  int32_t used_parts;  // of all sequences, in the first header
};
static_assert(sizeof(PartHeader) <= kHeaderFloats * sizeof(float));

struct DeviceDecode {
  DecodeArgs args;            // of device memory
  const int32_t* first_slot;  // scalar; args.addressing does not have it yet
  float* workspace;           // [parts, part_floats]
  int64_t parts;              // the batch size, plus those that share the keys
  int64_t part_floats;

  // Rows of one key-value head, which share its keys.
  KERNELS_HOST_DEVICE int64_t rows() const { return args.tokens * args.group; }
  KERNELS_HOST_DEVICE int64_t states() const {
    return args.shape.heads * rows();
  }
  // Sequences are split where there are more parts than sequences.
  KERNELS_HOST_DEVICE int64_t shared_parts() const {
    return parts - args.addressing.batch;
  }
};

// Whether rows can be read 16 bytes at a time.
inline bool WideRows(const DecodeArgs& args) {
  const int64_t size = kv_cache::ElementSize(args.element);
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
cudaError_t LaunchDecode(cudaStream_t stream, const DeviceDecode& decode,
                         const kv_cache::DeviceUpdate* update);

// The part of it that attends, a file for each kind of cache: compiling takes
// long. On tensor cores, which compute capability 8.0 has, for WideRows of up
// to 256 elements, without qv.
template <kv_cache::Element kElement>
cudaError_t LaunchAttendTensor(cudaStream_t stream, const DeviceDecode& decode);

// On other cores: for WideRows, and for the rest.
template <int kBytes>
cudaError_t LaunchAttendWide(cudaStream_t stream, const DeviceDecode& decode);
cudaError_t LaunchAttendSingle(cudaStream_t stream, const DeviceDecode& decode);

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_DECODE_ATTENTION_CUDA_H_
