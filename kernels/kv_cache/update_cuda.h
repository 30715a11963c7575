// Writing new rows into a cache, on the device: what the kernel of the update
// and that of decode attention share.
#ifndef KERNELS_KV_CACHE_UPDATE_CUDA_H_
#define KERNELS_KV_CACHE_UPDATE_CUDA_H_

#include <cstdint>

#include "kernels/common/cuda_util.h"
#include "kernels/kv_cache/cache_layout.h"
#include "kernels/kv_cache/elements_cuda.h"
#include "kernels/kv_cache/update_plan.h"

namespace kernels {
namespace kv_cache {

// Where an item comes from and goes to.
struct Item {
  int64_t sequence;
  int64_t token;
  int64_t head;
  int64_t part;  // of its row
  uint8_t* row;  // in the cache; null: it must not be written
};

__device__ __forceinline__ Item FindItem(const DeviceUpdate& update,
                                         const NewRows& rows, uint32_t index) {
  const UpdateArgs& args = update.args;
  const CacheShape& shape = args.shape;
  const Divisor& inner = shape.heads_first ? update.tokens : rows.heads;
  const Divisor& outer = shape.heads_first ? rows.heads : update.tokens;
  const uint32_t row = rows.per_row.Quotient(index);
  const uint32_t middle = inner.Quotient(row);
  const uint32_t sequence = outer.Quotient(middle);
  const uint32_t low = row - middle * inner.value();
  const uint32_t high = middle - sequence * outer.value();
  Item item;
  item.sequence = sequence;
  item.token = shape.heads_first ? low : high;
  item.head = shape.heads_first ? high : low;
  item.part = index - row * rows.per_row.value();
  item.row = nullptr;
  int64_t first, last;
  TokensToWrite(args, sequence, &first, &last);
  const int64_t position = int64_t{args.index[sequence]} + item.token;
  if (item.token < first || item.token >= last || position < 0) return item;
  Addressing addressing = args.addressing;
  addressing.first_slot = *update.first_slot;
  const int64_t at =
      addressing.RowOf(shape, sequence, addressing.SlotOf(position));
  if (at >= 0) {
    item.row = rows.to + (at + item.head * shape.head_stride()) * rows.dim *
                             ElementSize(args.element);
  }
  return item;
}

// Copies, with several words of each thread in flight.
template <typename Word>
__device__ __forceinline__ void CopyRows(const DeviceUpdate& update,
                                         const NewRows& rows, uint32_t thread,
                                         uint32_t threads) {
  constexpr int kInFlight = 4;
  const Word* from = reinterpret_cast<const Word*>(rows.from);
  for (uint32_t base = thread; base < rows.items; base += kInFlight * threads) {
    Word words[kInFlight];
    Word* to[kInFlight];
    KERNELS_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const uint32_t index = base + i * threads;
      to[i] = nullptr;
      if (index >= rows.items) continue;
      words[i] = __ldg(from + index);
      const Item item = FindItem(update, rows, index);
      if (item.row != nullptr) {
        to[i] = reinterpret_cast<Word*>(item.row) + item.part;
      }
    }
    KERNELS_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      if (to[i] != nullptr) *to[i] = words[i];
    }
  }
}

// Quantises 16 elements at a time.
template <typename T>
__device__ __forceinline__ void QuantizeRows(const DeviceUpdate& update,
                                             const NewRows& rows,
                                             uint32_t thread,
                                             uint32_t threads) {
  constexpr int kElements = 16;
  const CacheShape& shape = update.args.shape;
  for (uint32_t index = thread; index < rows.items; index += threads) {
    const Item item = FindItem(update, rows, index);
    if (item.row == nullptr) continue;
    const auto x = cuda::LoadVector<T, kElements>(As<T>(rows.from) +
                                                  int64_t{index} * kElements);
    const float scale = rows.scale[item.sequence * shape.heads + item.head];
    cuda::Vector<E4M3, kElements> codes;
    KERNELS_UNROLL
    for (int i = 0; i < kElements; ++i) {
      codes.data[i] =
          Quantized(update.args.element, cuda::ToCompute<T>(x.data[i]) / scale);
    }
    cuda::StoreVector<E4M3, kElements>(item.row + item.part * kElements, codes);
  }
}

// Converts elements one by one; `load(item, new row, element type, i)` gives
// element i of a row.
template <typename Load>
__device__ __forceinline__ void ConvertRows(const DeviceUpdate& update,
                                            const NewRows& rows,
                                            uint32_t thread, uint32_t threads,
                                            const Load& load) {
  const UpdateArgs& args = update.args;
  for (uint32_t index = thread; index < rows.items; index += threads) {
    const Item item = FindItem(update, rows, index);
    if (item.row == nullptr) continue;
    const uint8_t* row = rows.from + (int64_t{index} - item.part) *
                                         ElementSize(args.new_element);
    const float x = load(item, row, args.new_element, item.part);
    const float scale =
        rows.scale == nullptr
            ? 1.0f
            : rows.scale[item.sequence * args.shape.heads + item.head];
    StoreElement(args.element, item.row, item.part, x, scale);
  }
}

// Writes the rows of K or V, thread `thread` of `threads`.
__device__ __forceinline__ void UpdateRows(const DeviceUpdate& update,
                                           const NewRows& rows, uint32_t thread,
                                           uint32_t threads) {
  if (rows.word == 16) return CopyRows<uint4>(update, rows, thread, threads);
  if (rows.word == 4) return CopyRows<uint32_t>(update, rows, thread, threads);
  if (rows.word == 2) return CopyRows<uint16_t>(update, rows, thread, threads);
  if (rows.elements == 16) {
    switch (update.args.new_element) {
      case Element::kF32:
        return QuantizeRows<F32>(update, rows, thread, threads);
      case Element::kBf16:
        return QuantizeRows<BF16>(update, rows, thread, threads);
      default:
        return QuantizeRows<F16>(update, rows, thread, threads);
    }
  }
  ConvertRows(update, rows, thread, threads,
              [](const Item&, const uint8_t* row, Element element, int64_t i) {
                return LoadElement(element, row, i);
              });
}

}  // namespace kv_cache
}  // namespace kernels

#endif  // KERNELS_KV_CACHE_UPDATE_CUDA_H_
