// Decode attention for CUDA, in two launches: new rows are appended; workers
// attend. The second begins before the first has ended, and waits for it when
// it needs what that writes.
//
// Those that attend are in attend_tensor.h and attend_rows.h.

#include "kernels/decode_attention/cuda/decode.h"

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cuda/elements.h"
#include "kernels/cache/cuda/update.h"
#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cc/decode_args.h"
#include "kernels/decode_attention/cuda/attend.h"

namespace kernels {
namespace decode_attention {
namespace {

using cache::Element;

// ---- Before attending.

constexpr int kPrepareThreads = 256;

// Blocks of y = 0 and 1 write keys and values, those of the last y say that no
// part has come.
__global__ void __launch_bounds__(kPrepareThreads)
    PrepareKernel(const __grid_constant__ DeviceDecode decode,
                  const __grid_constant__ cache::DeviceUpdate update) {
  cuda::LetNextBegin();
  if (blockIdx.y == gridDim.y - 1) {
    const int64_t states = decode.states();
    const int64_t count = decode.parts / 2 * states;
    for (int64_t i = blockIdx.x * kPrepareThreads + threadIdx.x; i < count;
         i += gridDim.x * kPrepareThreads) {
      ArrivalsOf(decode, 2 * (i / states) + 1)[i % states] = 0;
    }
    return;
  }
  const cache::NewRows& rows = update.rows[blockIdx.y];
  const Rotary& rotary = decode.args.rotary;
  if (blockIdx.y == 0 && rotary.cos != nullptr && !rotary.cached_keys) {
    // New keys are turned by the angles of their positions.
    ConvertRows(update, rows, blockIdx.x * kPrepareThreads + threadIdx.x,
                gridDim.x * kPrepareThreads,
                [&](const cache::Row& row, const uint8_t* from, Element element,
                    int64_t i) {
                  const int64_t token =
                      row.sequence * decode.args.tokens + row.token;
                  return Turned(rotary, rotary.where[token], i, [&](int64_t j) {
                    return cache::LoadElement(element, from, j);
                  });
                });
  } else {
    __shared__ cache::FoundRows<kPrepareThreads> found;
    if (rows.word != 0) {
      cache::UpdateByCopy(update, rows, blockIdx.x, gridDim.x, found);
    } else {
      cache::UpdateByConversion(update, rows, blockIdx.x, gridDim.x, found);
    }
  }
}

// ---- Attend.

bool TensorCoresFit(const DecodeArgs& args) {
  // Weights of 8-bit numbers are rounded to 11 bits.
  const bool fine =
      cache::IsQuantized(args.element) && args.out_element == Element::kF32;
  return args.element != Element::kF32 && !fine && args.qv == nullptr &&
         WideRows(args) && args.shape.k_dim <= 256 && args.shape.v_dim <= 256;
}

cudaError_t LaunchAttend(cudaStream_t stream, DeviceDecode decode,
                         bool tensor_cores) {
  const DecodeArgs& args = decode.args;
  const int64_t size = cache::ElementSize(args.element);
  if (!WideRows(args)) return LaunchAttendSingle(stream, decode);
  if (tensor_cores && TensorCoresFit(args)) {
    switch (args.element) {
      case Element::kBf16:
        return LaunchAttendTensor<Element::kBf16>(stream, decode);
      case Element::kF16:
        return LaunchAttendTensor<Element::kF16>(stream, decode);
      case Element::kInt8:
        return LaunchAttendTensor<Element::kInt8>(stream, decode);
      case Element::kE4m3:
        return LaunchAttendTensor<Element::kE4m3>(stream, decode);
      case Element::kE5m2:
        return LaunchAttendTensor<Element::kE5m2>(stream, decode);
      case Element::kF32:
        break;  // it does not fit
    }
  }
  return size == 4   ? LaunchAttendWide<4>(stream, decode)
         : size == 2 ? LaunchAttendWide<2>(stream, decode)
                     : LaunchAttendWide<1>(stream, decode);
}

cudaError_t LaunchPrepare(cudaStream_t stream, const DeviceDecode& decode,
                          const cache::DeviceUpdate* update) {
  dim3 grid(1, 1);
  if (update != nullptr) {
    const uint32_t blocks = cache::UpdateBlocks<kPrepareThreads>(*update);
    grid = dim3(blocks < 1 ? 1 : blocks, 3);
  }
  return cuda::Launch(PrepareKernel, grid, dim3(kPrepareThreads),
                      /*shared_bytes=*/0, stream, decode,
                      update != nullptr ? *update : cache::DeviceUpdate{});
}

}  // namespace

cudaError_t LaunchDecode(cudaStream_t stream, DeviceDecode decode,
                         const cache::DeviceUpdate* update) {
  if (decode.args.addressing.batch * decode.states() == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  decode.prepared = update != nullptr || decode.parts > 0;
  if (decode.prepared) error = LaunchPrepare(stream, decode, update);
  if (error != cudaSuccess) return error;
  int device, major;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  return LaunchAttend(stream, decode, /*tensor_cores=*/major >= 8);
}

}  // namespace decode_attention
}  // namespace kernels
