// Writing new rows into a cache, on the device: what the kernel of the update
// and that of decode attention share.
#ifndef KERNELS_CACHE_CUDA_UPDATE_H_
#define KERNELS_CACHE_CUDA_UPDATE_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/cache/cuda/elements.h"
#include "kernels/cache/cuda/update_plan.h"
#include "kernels/common/cuda_util.h"

namespace kernels {
namespace cache {

// Where a row comes from and goes to.
struct Row {
  int64_t sequence;
  int64_t token;
  int64_t head;
  uint8_t* to;  // in the cache; null: it must not be written
};

__device__ __forceinline__ Row FindRow(const DeviceUpdate& update,
                                       const NewRows& rows, uint32_t index) {
  const UpdateArgs& args = update.args;
  const CacheShape& shape = args.shape;
  const Divisor& inner = shape.heads_first ? update.tokens : rows.heads;
  const Divisor& outer = shape.heads_first ? rows.heads : update.tokens;
  const uint32_t middle = inner.Quotient(index);
  const uint32_t sequence = outer.Quotient(middle);
  const uint32_t low = index - middle * inner.value();
  const uint32_t high = middle - sequence * outer.value();
  Row row;
  row.sequence = sequence;
  row.token = shape.heads_first ? low : high;
  row.head = shape.heads_first ? high : low;
  row.to = nullptr;
  int64_t first, last;
  TokensToWrite(args, sequence, &first, &last);
  const int64_t position = int64_t{args.index[sequence]} + row.token;
  if (row.token < first || row.token >= last || position < 0) return row;
  Addressing addressing = args.addressing;
  addressing.first_slot = *update.first_slot;
  const int64_t at =
      addressing.RowOf(shape, sequence, addressing.SlotOf(position));
  if (at >= 0) {
    row.to = rows.to + (at + row.head * shape.head_stride()) * rows.dim *
                           ElementSize(args.element);
  }
  return row;
}

// Items of a thread that are on their way at a time. Those of a block are
// neighbours, so that what it moves lies in few pages of memory.
constexpr int kInFlight = 4;

// Where the rows lie that the items of a block belong to. A row has many items:
// it is looked up once for the block, not once for each.
template <int kThreads>
struct FoundRows {
  static constexpr int kMost = kInFlight * kThreads;

  uint8_t* to[kMost];
  float scale[kMost];
  uint32_t first;

  // All threads of the block: finds the rows of `items` items from `begin` on.
  __device__ __forceinline__ void Find(const DeviceUpdate& update,
                                       const NewRows& rows, uint32_t begin,
                                       uint32_t items) {
    const uint32_t end =
        items < rows.items - begin ? begin + items : rows.items;
    const uint32_t first_row = rows.per_row.Quotient(begin);
    const uint32_t count = rows.per_row.Quotient(end - 1) - first_row + 1;
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const Row row = FindRow(update, rows, first_row + i);
      to[i] = row.to;
      scale[i] = rows.scale.OrOne(row.sequence, row.head);
    }
    if (threadIdx.x == 0) first = first_row;
  }
};

// Copies the items of a block of kThreads: `block` of `blocks`.
template <int kThreads, typename Word>
__device__ __forceinline__ void CopyRows(const DeviceUpdate& update,
                                         const NewRows& rows, uint32_t block,
                                         uint32_t blocks,
                                         FoundRows<kThreads>& found) {
  constexpr int kItems = kInFlight * kThreads;
  const Word* from = reinterpret_cast<const Word*>(rows.from);
  for (uint32_t begin = block * kItems; begin < rows.items;
       begin += blocks * kItems) {
    Word words[kInFlight];
    KERNELS_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t index = begin + i * kThreads + threadIdx.x;
      if (index < rows.items) words[i] = __ldg(from + index);
    }
    __syncthreads();  // others may still read the items before
    found.Find(update, rows, begin, kItems);
    __syncthreads();
    KERNELS_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t index = begin + i * kThreads + threadIdx.x;
      if (index >= rows.items) continue;
      const uint32_t row = rows.per_row.Quotient(index);
      uint8_t* const to = found.to[row - found.first];
      if (to == nullptr) continue;
      reinterpret_cast<Word*>(to)[index - row * rows.per_row.value()] =
          words[i];
    }
  }
}

// The codes of 16 numbers over their scale.
template <Element kElement>
__device__ __forceinline__ void QuantizeEach(const float (&x)[16], float scale,
                                             uint8_t (&codes)[16]) {
  constexpr float kLeast = 0x1p-60f;  // nothing underflows
  constexpr float kMost = 0x1p20f;    // beyond all codes
  // Quotients are rounded as those of a division: a first one is corrected by
  // what it leaves (Markstein 1990).
  const float inverse = 1.0f / scale;
  float quotients[16];
  bool plain = scale > kLeast && scale < 1 / kLeast;
  KERNELS_UNROLL
  for (int i = 0; i < 16; ++i) {
    const float quotient = x[i] * inverse;
    // What is not finite would become NaN.
    plain = plain && fabsf(quotient) < kMost;
    quotients[i] = fmaf(-fmaf(quotient, scale, -x[i]), inverse, quotient);
  }
  if (!plain) {
    for (int i = 0; i < 16; ++i) codes[i] = Quantized(kElement, x[i] / scale);
    return;
  }
  KERNELS_UNROLL
  for (int i = 0; i < 16; ++i) {
    if constexpr (kElement == Element::kInt8) {
      // Below 2^22, adding 1.5 * 2^23 rounds to the nearest integer, which is
      // in the last bits.
      const float clipped = fminf(fmaxf(quotients[i], -127.0f), 127.0f);
      codes[i] = static_cast<uint8_t>(__float_as_uint(clipped + 0x1.8p23f));
    } else {
      codes[i] = Quantized(kElement, quotients[i]);
    }
  }
}

// Quantises 16 elements at a time.
template <int kThreads, Element kElement, typename T>
__device__ __forceinline__ void QuantizeRows(const DeviceUpdate& update,
                                             const NewRows& rows,
                                             uint32_t block, uint32_t blocks,
                                             FoundRows<kThreads>& found) {
  constexpr int kElements = 16;
  constexpr int kOfThread = kInFlight / 2;
  constexpr int kItems = kOfThread * kThreads;
  for (uint32_t begin = block * kItems; begin < rows.items;
       begin += blocks * kItems) {
    cuda::Vector<T, kElements> x[kOfThread];
    KERNELS_UNROLL
    for (int i = 0; i < kOfThread; ++i) {
      const uint32_t index = begin + i * kThreads + threadIdx.x;
      if (index >= rows.items) continue;
      x[i] = cuda::LoadVector<T, kElements>(As<T>(rows.from) +
                                            int64_t{index} * kElements);
    }
    __syncthreads();  // others may still read the items before
    found.Find(update, rows, begin, kItems);
    __syncthreads();
    KERNELS_UNROLL
    for (int i = 0; i < kOfThread; ++i) {
      const uint32_t index = begin + i * kThreads + threadIdx.x;
      if (index >= rows.items) continue;
      const uint32_t row = rows.per_row.Quotient(index);
      uint8_t* const to = found.to[row - found.first];
      if (to == nullptr) continue;
      float values[kElements];
      KERNELS_UNROLL
      for (int j = 0; j < kElements; ++j) {
        values[j] = cuda::ToCompute<T>(x[i].data[j]);
      }
      cuda::Vector<E4M3, kElements> codes;
      QuantizeEach<kElement>(values, found.scale[row - found.first],
                             codes.data);
      cuda::StoreVector<E4M3, kElements>(
          to + (index - row * rows.per_row.value()) * kElements, codes);
    }
  }
}

template <int kThreads, Element kElement>
__device__ __forceinline__ void QuantizeTo(const DeviceUpdate& update,
                                           const NewRows& rows, uint32_t block,
                                           uint32_t blocks,
                                           FoundRows<kThreads>& found) {
  switch (update.args.new_element) {
    case Element::kF32:
      return QuantizeRows<kThreads, kElement, F32>(update, rows, block, blocks,
                                                   found);
    case Element::kBf16:
      return QuantizeRows<kThreads, kElement, BF16>(update, rows, block, blocks,
                                                    found);
    default:
      return QuantizeRows<kThreads, kElement, F16>(update, rows, block, blocks,
                                                   found);
  }
}

// Converts elements one by one; `load(row, its new elements, their type, i)`
// gives element i.
template <typename Load>
__device__ __forceinline__ void ConvertRows(const DeviceUpdate& update,
                                            const NewRows& rows,
                                            uint32_t thread, uint32_t threads,
                                            const Load& load) {
  const UpdateArgs& args = update.args;
  for (uint32_t index = thread; index < rows.items; index += threads) {
    const uint32_t number = rows.per_row.Quotient(index);
    const Row row = FindRow(update, rows, number);
    if (row.to == nullptr) continue;
    const uint32_t i = index - number * rows.per_row.value();
    const uint8_t* from =
        rows.from + int64_t{index - i} * ElementSize(args.new_element);
    const float x = load(row, from, args.new_element, i);
    StoreElement(args.element, row.to, i, x,
                 rows.scale.OrOne(row.sequence, row.head));
  }
}

// Writes the rows of K or V where they are copied: block `block` of `blocks`.
template <int kThreads>
__device__ __forceinline__ void UpdateByCopy(const DeviceUpdate& update,
                                             const NewRows& rows,
                                             uint32_t block, uint32_t blocks,
                                             FoundRows<kThreads>& found) {
  switch (rows.word) {
    case 16:
      return CopyRows<kThreads, uint4>(update, rows, block, blocks, found);
    case 4:
      return CopyRows<kThreads, uint32_t>(update, rows, block, blocks, found);
    default:
      return CopyRows<kThreads, uint16_t>(update, rows, block, blocks, found);
  }
}

// Where they are converted.
template <int kThreads>
__device__ __forceinline__ void UpdateByConversion(const DeviceUpdate& update,
                                                   const NewRows& rows,
                                                   uint32_t block,
                                                   uint32_t blocks,
                                                   FoundRows<kThreads>& found) {
  if (rows.elements == 16) {
    switch (update.args.element) {
      case Element::kInt8:
        return QuantizeTo<kThreads, Element::kInt8>(update, rows, block, blocks,
                                                    found);
      case Element::kE4m3:
        return QuantizeTo<kThreads, Element::kE4m3>(update, rows, block, blocks,
                                                    found);
      default:
        return QuantizeTo<kThreads, Element::kE5m2>(update, rows, block, blocks,
                                                    found);
    }
  }
  ConvertRows(update, rows, block * kThreads + threadIdx.x, blocks * kThreads,
              [](const Row&, const uint8_t* from, Element element, int64_t i) {
                return LoadElement(element, from, i);
              });
}

// Blocks of kThreads that write all rows of K, or of V.
template <int kThreads>
uint32_t UpdateBlocks(const DeviceUpdate& update) {
  const uint32_t items = update.rows[0].items > update.rows[1].items
                             ? update.rows[0].items
                             : update.rows[1].items;
  return cuda::CeilDiv(items, uint32_t{kInFlight * kThreads});
}

}  // namespace cache
}  // namespace kernels

#endif  // KERNELS_CACHE_CUDA_UPDATE_H_
