// Decode attention for CUDA, in three launches: new rows are appended and the
// keys are divided into parts; parts are attended to; parts are joined.
//
// Parts are made on the device from the lengths of the sequences, so that each
// has about as many keys as the others, whatever the lengths: a long sequence
// has many, a short one has one, whose result is written at once.
//
// Those that attend are in attend_tensor_cuda.h and attend_rows_cuda.h.

#include "kernels/decode_attention/decode_attention_cuda.h"

#include <cstdint>

#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/attend_cuda.h"
#include "kernels/decode_attention/decode_args.h"
#include "kernels/kv_cache/cache_layout.h"
#include "kernels/kv_cache/elements_cuda.h"
#include "kernels/kv_cache/update_cuda.h"

namespace kernels {
namespace decode_attention {
namespace {

using kv_cache::Element;

// ---- Append, and divide the work.

constexpr int kPrepareThreads = 256;

// Adds `value` over the threads before this one, and over all of them. All
// threads of the block take part.
__device__ __forceinline__ int64_t SumBefore(int64_t value, int64_t* all) {
  __shared__ int64_t warps[kPrepareThreads / cuda::kWarp];
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  int64_t sum = value;
  for (int by = 1; by < cuda::kWarp; by *= 2) {
    const int64_t other = __shfl_up_sync(cuda::kAllLanes, sum, by);
    if (lane >= by) sum += other;
  }
  __syncthreads();  // who was here before may still read
  if (lane == cuda::kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int64_t before = 0;
  *all = 0;
  for (int w = 0; w < kPrepareThreads / cuda::kWarp; ++w) {
    if (w < warp) before += warps[w];
    *all += warps[w];
  }
  return before + sum - value;
}

// The slots of one sequence, and its parts: the first, and how many.
struct Share {
  int64_t first;
  int begin;
  int end;
  int parts;
};

// Writes the headers of all parts; one block.
__device__ void MakeParts(const DeviceDecode& decode) {
  __shared__ Share shares[kPrepareThreads];
  const DecodeArgs& args = decode.args;
  const int64_t b = args.addressing.batch;
  const kv_cache::Addressing addressing = AddressingOf(decode);
  const auto slots_of = [&](int64_t i) {
    return NeededSlots(args.masking, args.shape, addressing,
                       SequenceOf(args, i), 0, args.tokens);
  };
  int64_t mine = 0, total;
  for (int64_t i = threadIdx.x; i < b; i += kPrepareThreads) {
    mine += slots_of(i).size();
  }
  SumBefore(mine, &total);
  const int64_t shared = decode.shared_parts();
  int64_t length = INT32_MAX;  // of a part
  if (shared > 0) {
    length = cuda::CeilDiv(total, shared);
    if (length < kLeastPart) length = kLeastPart;
    length = cuda::CeilDiv<int64_t>(length, kPartStep) * kPartStep;
  }
  int64_t first = 0;
  for (int64_t begin = 0; begin < b; begin += kPrepareThreads) {
    const int64_t i = begin + threadIdx.x;
    Slots slots = {0, 0};
    int64_t parts = 0;
    if (i < b) {
      slots = slots_of(i);
      parts = cuda::CeilDiv(slots.size(), length);
      if (parts < 1) parts = 1;
    }
    int64_t all;
    const int64_t at = first + SumBefore(parts, &all);
    shares[threadIdx.x] = {at, static_cast<int>(slots.begin),
                           static_cast<int>(slots.end),
                           static_cast<int>(parts)};
    __syncthreads();
    const int64_t left = b - begin;
    for (int64_t p = first + threadIdx.x; p < first + all;
         p += kPrepareThreads) {
      int low = 0;
      int high =
          static_cast<int>(left < kPrepareThreads ? left : kPrepareThreads);
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (shares[middle].first <= p ? low : high) = middle;
      }
      const Share share = shares[low];
      const int64_t from = share.begin + (p - share.first) * length;
      PartHeader* header = HeaderOf(decode, p);
      header->sequence = static_cast<int>(begin + low);
      header->begin = static_cast<int>(from);
      header->end = static_cast<int>(from + length < share.end ? from + length
                                                               : share.end);
      header->parts = share.parts;
    }
    if (i < b) {
      PartHeader* header = HeaderOf(decode, i);
      header->first_part = static_cast<int>(at);
      header->num_parts = static_cast<int>(parts);
    }
    first += all;
  }
  for (int64_t p = first + threadIdx.x; p < decode.parts;
       p += kPrepareThreads) {
    HeaderOf(decode, p)->sequence = -1;
  }
  if (threadIdx.x == 0) {
    HeaderOf(decode, 0)->used_parts = static_cast<int>(first);
  }
}

// Blocks of the last y divide the work, those of y = 0 and 1 write keys and
// values.
__global__ void __launch_bounds__(kPrepareThreads)
    PrepareKernel(const DeviceDecode decode,
                  const kv_cache::DeviceUpdate update) {
  if (blockIdx.y == gridDim.y - 1) {
    if (blockIdx.x == 0) MakeParts(decode);
    return;
  }
  const kv_cache::NewRows& rows = update.rows[blockIdx.y];
  const Rotary& rotary = decode.args.rotary;
  if (blockIdx.y == 0 && rotary.cos != nullptr && !rotary.cached_keys) {
    // New keys are turned by the angles of their positions.
    ConvertRows(update, rows, blockIdx.x * kPrepareThreads + threadIdx.x,
                gridDim.x * kPrepareThreads,
                [&](const kv_cache::Row& row, const uint8_t* from,
                    Element element, int64_t i) {
                  const int64_t token =
                      row.sequence * decode.args.tokens + row.token;
                  return Turned(rotary, rotary.where[token], i, [&](int64_t j) {
                    return kv_cache::LoadElement(element, from, j);
                  });
                });
  } else {
    __shared__ kv_cache::FoundRows<kPrepareThreads> found;
    if (rows.word != 0) {
      kv_cache::UpdateByCopy(update, rows, blockIdx.x, gridDim.x, found);
    } else {
      kv_cache::UpdateByConversion(update, rows, blockIdx.x, gridDim.x, found);
    }
  }
}

// ---- Attend.

bool TensorCoresFit(const DecodeArgs& args) {
  // Weights of 8-bit numbers are rounded to 11 bits.
  const bool fine =
      kv_cache::IsQuantized(args.element) && args.out_element == Element::kF32;
  return args.element != Element::kF32 && !fine && args.qv == nullptr &&
         WideRows(args) && args.shape.k_dim <= 256 && args.shape.v_dim <= 256;
}

cudaError_t LaunchAttend(cudaStream_t stream, const DeviceDecode& decode,
                         bool tensor_cores) {
  const DecodeArgs& args = decode.args;
  const int64_t size = kv_cache::ElementSize(args.element);
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

// ---- Join the parts of a sequence.

constexpr int kJoinThreads = 256;
constexpr int kJoinWarps = kJoinThreads / cuda::kWarp;

// Blocks at most; there may be more rows.
constexpr int64_t kJoinBlocks = 2048;

// Sums the values of one row over the parts of a warp, kWide at a time: `from`
// is those of the first part, the next are `apart` floats further.
template <int kWide>
__device__ __forceinline__ void SumParts(const float* from, int64_t apart,
                                         const float* weights, int parts,
                                         int64_t dim, float* sums) {
  constexpr int kInFlight = 8;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  for (int64_t d = lane * kWide; d < dim; d += cuda::kWarp * kWide) {
    float sum[kWide] = {};
    for (int p = warp; p < parts; p += kInFlight * kJoinWarps) {
      cuda::Vector<F32, kWide> x[kInFlight];
      KERNELS_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int part = p + k * kJoinWarps;
        x[k] = {};
        if (part < parts) {
          x[k] = cuda::LoadVector<F32, kWide>(from + part * apart + d);
        }
      }
      KERNELS_UNROLL
      for (int k = 0; k < kInFlight; ++k) {
        const int part = p + k * kJoinWarps;
        const float weight = part < parts ? weights[part] : 0.0f;
        KERNELS_UNROLL
        for (int i = 0; i < kWide; ++i) sum[i] += weight * x[k].data[i];
      }
    }
    KERNELS_UNROLL
    for (int i = 0; i < kWide; ++i) sums[warp * dim + d + i] = sum[i];
  }
}

// One query row of one key-value head of one sequence: warps share the parts.
__device__ __forceinline__ void JoinRow(const DeviceDecode& decode,
                                        int64_t sequence, int64_t state,
                                        float* shared) {
  __shared__ float across[2][kJoinWarps];
  const DecodeArgs& args = decode.args;
  const int64_t dim = args.shape.v_dim;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / cuda::kWarp, lane = thread % cuda::kWarp;
  const PartHeader header = *HeaderOf(decode, sequence);
  if (header.num_parts == 1) return;  // its block has written the result
  const int parts = header.num_parts;
  float* weights = shared;                            // [parts]
  float* sums = weights + decode.shared_parts() + 1;  // [warps, dim]

  float largest = MinusInfinity();
  for (int p = thread; p < parts; p += kJoinThreads) {
    weights[p] = StatesOf(decode, header.first_part + p)[2 * state];
    largest = fmaxf(largest, weights[p]);
  }
  largest = cuda::WarpMax(largest);
  if (lane == 0) across[0][warp] = largest;
  __syncthreads();
  for (int w = 0; w < kJoinWarps; ++w) largest = fmaxf(largest, across[0][w]);
  float total = 0.0f;
  for (int p = thread; p < parts; p += kJoinThreads) {
    weights[p] = Weight(weights[p], largest);
    total +=
        weights[p] * StatesOf(decode, header.first_part + p)[2 * state + 1];
  }
  total = cuda::WarpSum(total);
  if (lane == 0) across[1][warp] = total;
  __syncthreads();
  total = 0.0f;
  for (int w = 0; w < kJoinWarps; ++w) total += across[1][w];

  const float* from = SumsOf(decode, header.first_part) + state * dim;
  if (dim % 4 == 0 && decode.part_floats % 4 == 0) {
    SumParts<4>(from, decode.part_floats, weights, parts, dim, sums);
  } else {
    SumParts<1>(from, decode.part_floats, weights, parts, dim, sums);
  }
  __syncthreads();
  const int64_t head = state / decode.rows(), row = state % decode.rows();
  const Ending ending = EndRow(args, SequenceOf(args, sequence), sequence, head,
                               row, largest, total);
  uint8_t* to = args.out + QueryRowOf(args, sequence, head, row) * dim *
                               kv_cache::ElementSize(args.out_element);
  for (int64_t d = thread; d < dim; d += kJoinThreads) {
    float sum = 0.0f;
    for (int w = 0; w < kJoinWarps; ++w) sum += sums[w * dim + d];
    const float x = ending.factor == 0.0f ? 0.0f : sum * ending.factor;
    kv_cache::StoreElement(args.out_element, to, d, x, /*scale=*/1.0f);
  }
  if (thread == 0) *LogSumOf(args, sequence, head, row) = ending.lse;
}

__global__ void __launch_bounds__(kJoinThreads)
    JoinKernel(const DeviceDecode decode) {
  KERNELS_DYNAMIC_SHARED(shared);
  const int64_t batch = decode.args.addressing.batch;
  // Where no sequence is divided, blocks have written the results.
  if (HeaderOf(decode, 0)->used_parts == batch) return;
  const int64_t states = decode.states();
  for (int64_t row = blockIdx.x; row < batch * states; row += gridDim.x) {
    __syncthreads();  // who is at the row before may still read
    JoinRow(decode, row / states, row % states,
            reinterpret_cast<float*>(shared));
  }
}

cudaError_t LaunchPrepare(cudaStream_t stream, const DeviceDecode& decode,
                          const kv_cache::DeviceUpdate* update) {
  dim3 grid(1, 1);
  if (update != nullptr) {
    const uint32_t blocks = kv_cache::UpdateBlocks<kPrepareThreads>(*update);
    grid = dim3(blocks < 1 ? 1 : blocks, 3);
  }
  return cuda::Launch(PrepareKernel, grid, dim3(kPrepareThreads),
                      /*shared_bytes=*/0, stream, decode,
                      update != nullptr ? *update : kv_cache::DeviceUpdate{});
}

cudaError_t LaunchJoin(cudaStream_t stream, const DeviceDecode& decode) {
  const int64_t rows = decode.args.addressing.batch * decode.states();
  const int64_t blocks = rows < kJoinBlocks ? rows : kJoinBlocks;
  const int64_t floats =
      decode.shared_parts() + 1 + kJoinWarps * decode.args.shape.v_dim;
  return cuda::Launch(JoinKernel, dim3(static_cast<unsigned>(blocks)),
                      dim3(kJoinThreads),
                      static_cast<int>(floats * sizeof(float)), stream, decode);
}

}  // namespace

cudaError_t LaunchDecode(cudaStream_t stream, const DeviceDecode& decode,
                         const kv_cache::DeviceUpdate* update) {
  if (decode.args.addressing.batch * decode.states() == 0) return cudaSuccess;
  cudaError_t error = LaunchPrepare(stream, decode, update);
  if (error != cudaSuccess) return error;
  int device, major;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  error = LaunchAttend(stream, decode, /*tensor_cores=*/major >= 8);
  if (error != cudaSuccess || decode.shared_parts() == 0) return error;
  return LaunchJoin(stream, decode);
}

}  // namespace decode_attention
}  // namespace kernels
