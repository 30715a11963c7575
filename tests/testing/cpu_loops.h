// What tests of the loops on plain pointers share: how a loop is run, and a
// check that ends the test.

#ifndef TESTS_TESTING_CPU_LOOPS_H_
#define TESTS_TESTING_CPU_LOOPS_H_

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/common/parallel_for.h"

#define CHECK_THAT(condition)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

namespace kernels::testing {

// Runs every task on a thread of its own; joins them when it goes.
class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads) : num_threads_(threads) {}
  ~ThreadPool() {
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return num_threads_; }
  template <typename Task>
  void Schedule(Task&& task) {
    std::lock_guard<std::mutex> lock(mutex_);
    threads_.emplace_back(std::forward<Task>(task));
  }

 private:
  int64_t num_threads_;
  std::mutex mutex_;
  std::vector<std::thread> threads_;
};

// Two loops for a kernel to run by: on one thread, and on four whatever the
// amount of work.
inline void Serial(int64_t n, int64_t,
                   const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < n; ++i) body(i);
}

inline void Threaded(int64_t n, int64_t,
                     const std::function<void(int64_t)>& body) {
  ThreadPool pool(4);
  ParallelFor(pool, n, int64_t{1} << 40, body);
}

}  // namespace kernels::testing

#endif  // TESTS_TESTING_CPU_LOOPS_H_
