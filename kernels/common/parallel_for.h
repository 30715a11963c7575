// A blocking parallel loop over a thread pool that somebody else owns.
//
// XLA hands its intra-op pool to a handler as `xla::ffi::ThreadPool`. The pool
// may be busy, or the handler may itself run on one of its threads, so waiting
// for helpers that have not started could wait forever. Here the calling thread
// takes part and helpers only take work that is left: the loop finishes even if
// no helper ever starts.

#ifndef KERNELS_COMMON_PARALLEL_FOR_H_
#define KERNELS_COMMON_PARALLEL_FOR_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "kernels/common/subnormals.h"

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace kernels {

// Below this many bytes of memory traffic, waking another thread costs more
// than it saves: for a loop that computes something with each byte, and for one
// that copies them or goes over them once.
inline constexpr int64_t kInlineBytes = int64_t{256} << 10;
inline constexpr int64_t kInlineCopyBytes = int64_t{1} << 20;

inline constexpr int kSpins = 400;

namespace internal {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A copy of `Work` that another thread runs. Whoever scheduled it comes before
// it; but XLA's pool orders the two where ThreadSanitizer does not look, since
// jaxlib is not instrumented, and so its view of that is spelled out here: the
// last copy made is the one that runs, and running it comes after making it.
template <typename Work>
class Task {
 public:
  explicit Task(const Work& work) : work_(work) {}
  Task(const Task& other) : work_(other.work_) { Made(); }
  Task(Task&& other) noexcept : work_(std::move(other.work_)) { Made(); }

  void operator()() {
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(this);
#endif
    work_();
  }

 private:
  void Made() {
#ifdef __SANITIZE_THREAD__
    __tsan_release(this);
#endif
  }

  Work work_;
};

}  // namespace internal

// Calls `body(i)` once for every i in [0, n), in no particular order and
// possibly at the same time, and returns when all calls have returned.
// `total_bytes` is the memory traffic of the whole loop, which decides whether
// helpers are worth it: one for every `inline_bytes`. `Pool` needs `int64_t
// num_threads()` and `Schedule(task&&)`. `body` must not throw.
//
// Within `body`, arithmetic is that of WithSubnormals.
//
// The split into items is the caller's, so results do not depend on the number
// of threads as long as items are independent.
template <typename Pool, typename Body>
void ParallelFor(Pool& pool, int64_t n, int64_t total_bytes, Body&& body,
                 int64_t inline_bytes = kInlineBytes) {
  const int64_t by_size = 1 + total_bytes / inline_bytes;
  const int64_t helpers =
      n <= 1 || by_size <= 1
          ? 0
          : std::min({static_cast<int64_t>(pool.num_threads()) - 1, n - 1,
                      by_size - 1});
  if (helpers <= 0) {
    const WithSubnormals subnormals;
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  // Shared, because a helper may start after this function has returned; it
  // then finds no item left and never touches `body`.
  auto state = std::make_shared<State>();
  auto* body_ptr = &body;
  auto work = [state, body_ptr, n]() {
    const WithSubnormals subnormals;
    for (int64_t i; (i = state->next.fetch_add(1)) < n;) {
      (*body_ptr)(i);
      if (state->done.fetch_add(1) + 1 == n) {
        std::lock_guard<std::mutex> lock(state->mutex);
        state->all_done.notify_all();
      }
    }
  };
  for (int64_t h = 0; h < helpers; ++h) {
    pool.Schedule(internal::Task<decltype(work)>(work));
  }
  work();
  // Helpers are mostly at their last item by now: look a few microseconds
  // before going to sleep, because waking up costs more than that.
  for (int spin = 0; spin < kSpins; ++spin) {
    if (state->done.load(std::memory_order_acquire) == n) return;
    internal::Pause();
  }
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == n; });
}

// ParallelFor over a pool whose type the kernel need not know.
using ParallelLoop = std::function<void(
    int64_t n, int64_t total_bytes, const std::function<void(int64_t)>& body)>;

// `pool` must outlive the loop.
template <typename Pool>
ParallelLoop MakeParallelLoop(Pool& pool) {
  return [&pool](int64_t n, int64_t total_bytes,
                 const std::function<void(int64_t)>& body) {
    ParallelFor(pool, n, total_bytes, body);
  };
}

}  // namespace kernels

#endif  // KERNELS_COMMON_PARALLEL_FOR_H_
