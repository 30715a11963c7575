// Appends this step's keys and values to a cache and attends over its valid
// prefix. Plain C++, knows nothing of XLA.
#ifndef KERNELS_DECODE_ATTENTION_CPU_DECODE_H_
#define KERNELS_DECODE_ATTENTION_CPU_DECODE_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels/cache/cc/layout.h"
#include "kernels/common/parallel_for.h"
#include "kernels/decode_attention/cc/decode_args.h"
#include "kernels/decode_attention/cpu/tile_kernel.h"

namespace kernels {
namespace decode_attention {

// One call in pieces that can run in parallel: `Append` for every sequence,
// then `Attend` for every run of tasks, then `Join` for every sequence and
// head.
class Decode {
 public:
  explicit Decode(const DecodeArgs& args);

  int64_t batch() const { return args_.addressing.batch; }
  int64_t heads() const { return args_.shape.heads; }
  int64_t num_tasks() const { return static_cast<int64_t>(tasks_.size()); }
  int64_t append_bytes() const { return append_bytes_; }
  int64_t attend_bytes() const { return attend_bytes_; }
  int64_t join_bytes() const { return join_bytes_; }
  // Where runs of tasks end, after a 0. A run is one thread's: it streams from
  // a task into the next, whose results stay separate. Long runs first and
  // short ones last, so that all threads finish together.
  std::vector<int64_t> Runs(int64_t threads) const;

  void Append(int64_t sequence);
  void Attend(int64_t begin, int64_t end) const;  // tasks [begin, end)
  void Join(int64_t sequence, int64_t head) const;

 private:
  struct AlignedDelete {
    void operator()(float* p) const {
      ::operator delete(p, std::align_val_t{kAlignment});
    }
  };

  using Buffer = std::unique_ptr<float, AlignedDelete>;

  static Buffer MakeBuffer(int64_t count);
  float* Allocate(int64_t count);  // lives as long as this
  void PlanTasks();
  void Rotate(int64_t sequence, int64_t token, float* row) const;
  void PrepareQueries(int64_t sequence, const uint8_t* from, int64_t dim,
                      bool rotate, const cache::Scales& scale, float* to) const;

  DecodeArgs args_;
  Problem problem_;
  std::vector<Sequence> sequences_;
  std::vector<Task> tasks_;
  std::vector<int64_t> first_part_;  // [b + 1]
  std::vector<Buffer> buffers_;
  float* q_ = nullptr;        // [b, n, PaddedRows(t * g), padded k_dim]
  float* qv_ = nullptr;       // [b, n, PaddedRows(t * g), padded v_dim]
  float* rotated_ = nullptr;  // the new keys, rotated; like new_k
  bool rotate_new_keys_ = false;
  Partial partials_ = {};  // [parts, n * t * g]
  int64_t append_bytes_ = 0;
  int64_t attend_bytes_ = 0;
  int64_t join_bytes_ = 0;
};

template <typename Pool>
void RunDecode(const DecodeArgs& args, Pool& pool) {
  Decode decode(args);
  ParallelFor(pool, decode.batch(), decode.append_bytes(),
              [&](int64_t i) { decode.Append(i); });
  const std::vector<int64_t> runs = decode.Runs(pool.num_threads());
  ParallelFor(pool, static_cast<int64_t>(runs.size()) - 1,
              decode.attend_bytes(),
              [&](int64_t i) { decode.Attend(runs[i], runs[i + 1]); });
  const int64_t heads = decode.heads();
  ParallelFor(pool, decode.batch() * heads, decode.join_bytes(),
              [&](int64_t i) {
                const int64_t sequence = i / heads;
                decode.Join(sequence, i - sequence * heads);
              });
}

}  // namespace decode_attention
}  // namespace kernels

#endif  // KERNELS_DECODE_ATTENTION_CPU_DECODE_H_
