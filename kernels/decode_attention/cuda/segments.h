// Division of the work, on the device, from the lengths of the sequences:
// the steps of all sequences are numbered, one sequence after the other, and
// each worker has as many as the others. A long sequence is shared by as many
// workers as it takes, and a worker has as many short ones as it takes.
#ifndef KERNELS_DECODE_ATTENTION_CUDA_SEGMENTS_H_
#define KERNELS_DECODE_ATTENTION_CUDA_SEGMENTS_H_

#include <cstdint>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/cuda_util.h"
#include "kernels/decode_attention/cc/decode_args.h"
#include "kernels/decode_attention/cuda/decode.h"

namespace kernels {
namespace decode_attention {

// `first_slot` is that of the device's memory.
__device__ __forceinline__ cache::Addressing AddressingOf(
    const DeviceDecode& decode, int first_slot) {
  cache::Addressing addressing = decode.args.addressing;
  addressing.first_slot = first_slot;
  return addressing;
}

// Code that is needed once for many keys is out of line where it can be: to
// fetch instructions that nobody has run takes longer than to run them.

// What the queries of some tokens of a sequence need.
struct Needs {
  int first_query;
  int num_queries;
  int padding;
  int begin;  // slots
  int end;
};

inline __device__ __noinline__ Needs NeedsOf(const DeviceDecode& decode,
                                             int sequence, int first,
                                             int last) {
  const DecodeArgs& args = decode.args;
  const int first_slot = *decode.first_slot;  // comes beside the others
  const Sequence positions = SequenceOf(args, sequence);
  const Slots slots =
      NeededSlots(args.masking, args.shape, AddressingOf(decode, first_slot),
                  positions, first, last);
  return {static_cast<int>(positions.first_query),
          static_cast<int>(positions.num_queries),
          static_cast<int>(positions.padding), static_cast<int>(slots.begin),
          static_cast<int>(slots.end)};
}

// A sequence without keys has a step as well: somebody must write its result.
__device__ __forceinline__ int StepsIn(const Needs& needs) {
  const int steps = (needs.end - needs.begin + kStep - 1) / kStep;
  return steps < 1 ? 1 : steps;
}

__device__ __forceinline__ bool IsDivided(const DeviceDecode& decode,
                                          int steps) {
  return decode.parts > 0 && steps > kWholeSteps;
}

// Adds `value` over the threads before this one, and over all of them. All
// threads of the block take part.
template <int kThreads>
__device__ __forceinline__ int SumBefore(int value, int* all) {
  __shared__ int warps[kThreads / cuda::kWarp];
  const int lane = static_cast<int>(threadIdx.x) % cuda::kWarp;
  const int warp = static_cast<int>(threadIdx.x) / cuda::kWarp;
  int sum = value;
  KERNELS_UNROLL
  for (int by = 1; by < cuda::kWarp; by *= 2) {
    const int other = __shfl_up_sync(cuda::kAllLanes, sum, by);
    if (lane >= by) sum += other;
  }
  __syncthreads();  // who was here before may still read
  if (lane == cuda::kWarp - 1) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  *all = 0;
  KERNELS_UNROLL
  for (int w = 0; w < kThreads / cuda::kWarp; ++w) {
    if (w < warp) before += warps[w];
    *all += warps[w];
  }
  return before + sum - value;
}

// Consecutive steps of a worker.
struct Range {
  int sequence;  // of the first
  int offset;    // steps of that sequence which are not in it
  int count;
  int first;   // number of the first
  int length;  // of every worker's
};

// What a block works on: of one worker, some rows of one key-value head.
struct BlockPlace {
  int worker;
  int head;
  int row_begin;
  int row_end;
  int first_slot;
  bool all_rows;
};

// Blocks of a worker are neighbours, as their heads are in memory.
__device__ __forceinline__ BlockPlace PlaceOfBlock(const DeviceDecode& decode,
                                                   int rows_per_block) {
  const int rows = static_cast<int>(decode.rows());
  const uint32_t row_blocks = cuda::CeilDiv(
      static_cast<uint32_t>(rows), static_cast<uint32_t>(rows_per_block));
  const uint32_t of_worker =
      static_cast<uint32_t>(decode.args.shape.heads) * row_blocks;
  const uint32_t worker = blockIdx.x / of_worker;
  const uint32_t rest = blockIdx.x - worker * of_worker;
  const uint32_t head = rest / row_blocks;
  BlockPlace place;
  place.worker = static_cast<int>(worker);
  place.head = static_cast<int>(head);
  place.row_begin = static_cast<int>(rest - head * row_blocks) * rows_per_block;
  place.row_end = place.row_begin + rows_per_block;
  if (place.row_end > rows) place.row_end = rows;
  place.first_slot = *decode.first_slot;
  // What is read after the lengths, and comes from memory.
  cuda::Prefetch(decode.args.addressing.layer.data);
  place.all_rows = row_blocks == 1;
  return place;
}

// What a block has of one sequence: slots [begin, end), as far as they are for
// its rows.
struct Segment {
  int sequence;
  int begin;
  int end;
  int part;          // where results go; -1: they are of the whole sequence
  int first_worker;  // of the sequence
  int parts;
  int first_query;
  int num_queries;
  int padding;
  // Row of slot first_slot in the caches, of the block's head, where the
  // sequence is one block of slots; negative where that does not exist.
  int64_t base;

  __device__ __forceinline__ Sequence positions() const {
    return {first_query, num_queries, int64_t{first_query} + num_queries,
            padding};
  }
};

// Writes to `segments` what a block has of the sequence of this thread, which
// needs `steps`, `before` of them after the beginning of the range's first
// sequence; so for all threads, of neighbouring sequences. Takes them off
// `range`, and returns how many segments they are. All threads of the block
// take part; they must be done with those that were there.
template <int kThreads>
__device__ __forceinline__ int WriteSegments(const DeviceDecode& decode,
                                             const BlockPlace& place,
                                             int sequence, const Needs& needs,
                                             int steps, int before,
                                             Range* range,
                                             Segment (&segments)[kThreads]) {
  __shared__ int taken[2];  // segments, steps
  const DecodeArgs& args = decode.args;
  const int batch = static_cast<int>(args.addressing.batch);
  if (threadIdx.x == 0) taken[0] = taken[1] = 0;
  __syncthreads();
  const int number = sequence - range->sequence;
  const int offset = number == 0 ? range->offset : 0;
  const int start = before + offset - range->offset;
  const int next = before + steps - range->offset;
  if (number >= 0 && sequence < batch && start < range->count) {
    int take = steps - offset;
    if (next > range->count && IsDivided(decode, steps)) {
      take = range->count - start;
    }
    Segment segment;
    segment.sequence = sequence;
    segment.part = take == steps ? -1 : 2 * place.worker + (offset == 0);
    const int first = range->first + start - offset;  // step of the sequence
    segment.first_worker = first / range->length;
    segment.parts =
        (first + steps - 1) / range->length - segment.first_worker + 1;
    segment.begin = needs.begin + offset * kStep;
    segment.end =
        take + offset == steps ? needs.end : segment.begin + take * kStep;
    segment.first_query = needs.first_query;
    segment.num_queries = needs.num_queries;
    segment.padding = needs.padding;
    if (!place.all_rows) {
      // Fewer keys than the whole sequence needs, as far as rows can tell.
      const int group = static_cast<int>(args.group);
      const Needs of_rows = NeedsOf(decode, sequence, place.row_begin / group,
                                    (place.row_end + group - 1) / group);
      if (segment.begin < of_rows.begin) segment.begin = of_rows.begin;
      if (segment.end > of_rows.end) segment.end = of_rows.end;
    }
    segment.base = -1;
    if (args.addressing.table_width == 1) {
      segment.base = AddressingOf(decode, place.first_slot)
                         .RowOf(args.shape, sequence, place.first_slot);
      if (segment.base < 0) segment.end = segment.begin;  // there are no keys
      segment.base += place.head * args.shape.head_stride();
    }
    segments[number] = segment;
    if (number == kThreads - 1 || sequence + 1 == batch ||
        next >= range->count) {
      taken[0] = number + 1;
      taken[1] = next;
    }
  }
  __syncthreads();
  const int count = taken[0];
  range->sequence += count;
  range->offset = 0;
  range->count -= taken[1];
  range->first += taken[1];
  return count;
}

// The next segments of a block, as many as it has threads; see WriteSegments.
template <int kThreads>
__device__ __forceinline__ int TakeSegments(const DeviceDecode& decode,
                                            const BlockPlace& place,
                                            Range* range,
                                            Segment (&segments)[kThreads]) {
  const int sequence = range->sequence + static_cast<int>(threadIdx.x);
  Needs needs = {};
  int steps = 0;
  if (sequence < decode.args.addressing.batch) {
    needs = NeedsOf(decode, sequence, 0, static_cast<int>(decode.args.tokens));
    steps = StepsIn(needs);
  }
  int all;
  const int before = SumBefore<kThreads>(steps, &all);
  return WriteSegments(decode, place, sequence, needs, steps, before, range,
                       segments);
}

// The first segments of a block, and the range that is left; see WriteSegments.
template <int kThreads>
__device__ __forceinline__ int FirstSegments(const DeviceDecode& decode,
                                             const BlockPlace& place,
                                             Range* range,
                                             Segment (&segments)[kThreads]) {
  __shared__ Range found;
  const int batch = static_cast<int>(decode.args.addressing.batch);
  const int tokens = static_cast<int>(decode.args.tokens);
  // Each thread counts the steps of some neighbours.
  const int each = (batch + kThreads - 1) / kThreads;
  const int from = static_cast<int>(threadIdx.x) * each;
  const int to = from + each < batch ? from + each : batch;
  Needs needs = {};
  int mine = 0;
  for (int i = from; i < to; ++i) {
    needs = NeedsOf(decode, i, 0, tokens);
    mine += StepsIn(needs);
  }
  if (threadIdx.x == 0) found = {batch, 0, 0, 0, 1};
  int all;
  const int before = SumBefore<kThreads>(mine, &all);
  const int workers = static_cast<int>(decode.workers);
  int length = (all + workers - 1) / workers;
  if (length < kLeastSteps) length = kLeastSteps;
  const int first = place.worker * length;
  if (first >= before && first < before + mine) {
    int sequence = from, start = before, steps = mine;
    if (each > 1) {
      steps = StepsIn(NeedsOf(decode, sequence, 0, tokens));
      while (first >= start + steps) {
        start += steps;
        steps = StepsIn(NeedsOf(decode, ++sequence, 0, tokens));
      }
    }
    Range own = {sequence, first - start, length, first, length};
    if (own.offset > 0 && !IsDivided(decode, steps)) {
      // It is the worker's in whose steps it begins.
      const int rest = steps - own.offset;
      own = {sequence + 1, 0, length - rest, first + rest, length};
    }
    found = own;
  }
  __syncthreads();
  *range = found;
  if (each > 1) return TakeSegments(decode, place, range, segments);
  return WriteSegments(decode, place, from, needs, mine,
                       before - (range->first - range->offset), range,
                       segments);
}

// Where one key lies.
struct Key {
  int64_t row;   // of the head in the caches; -1: there is no key
  int position;  // -1: there is no key
};

__device__ __forceinline__ Key FindKey(const DeviceDecode& decode,
                                       const BlockPlace& place,
                                       const Segment& segment, int slot) {
  const cache::CacheShape& shape = decode.args.shape;
  Key key = {-1, -1};
  if (slot >= segment.end) return key;
  const int64_t last = int64_t{segment.first_query} + segment.num_queries - 1;
  const int64_t position = PositionIn(slot, last, decode.args.addressing.ring);
  if (position < 0 || position > last) return key;
  if (decode.args.addressing.table_width == 1) {
    key.row = segment.base + (slot - place.first_slot) * shape.slot_stride();
  } else {
    const int64_t row = AddressingOf(decode, place.first_slot)
                            .RowOf(shape, segment.sequence, slot);
    if (row < 0) return key;
    key.row = row + place.head * shape.head_stride();
  }
  key.position = static_cast<int>(position);
  return key;
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CUDA_SEGMENTS_H_
