// Tests of the headers that kernels share: the parallel loop, and conversions
// at every SIMD level that this machine has.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/simd_prelude.h"
#include "kernels/common/subnormals.h"
#include "tests/testing/cpu_loops.h"

namespace kernels {
#define KERNELS_SIMD_BODY "tests/kernels/common/simd_body.inc"
#include "kernels/common/foreach_simd.h"
}  // namespace kernels

namespace {

using kernels::testing::ThreadPool;

// Runs no task before it is told to, like a pool whose threads are all busy.
class BusyPool {
 public:
  ~BusyPool() {
    for (auto& task : tasks_) task();
  }
  int64_t num_threads() const { return 4; }
  template <typename Task>
  void Schedule(Task&& task) {
    tasks_.emplace_back(std::forward<Task>(task));
  }
  size_t size() const { return tasks_.size(); }

 private:
  std::vector<std::function<void()>> tasks_;
};

template <typename Pool>
void ExpectEachOnce(Pool& pool, int64_t n, int64_t bytes) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(n));
  kernels::ParallelFor(pool, n, bytes, [&](int64_t i) {
    seen[static_cast<size_t>(i)].fetch_add(1);
  });
  for (const auto& count : seen) CHECK_THAT(count.load() == 1);
}

void TestParallelFor() {
  for (const int64_t n : {0, 1, 2, 3, 1000}) {
    ThreadPool pool(4);
    for (int repeat = 0; repeat < 3; ++repeat) {
      ExpectEachOnce(pool, n, int64_t{1} << 30);
    }
  }
  BusyPool busy;
  ExpectEachOnce(busy, 100, int64_t{1} << 30);  // finishes without helpers
  CHECK_THAT(busy.size() == 3);
  ExpectEachOnce(busy, 100, kernels::kInlineBytes / 2);
  CHECK_THAT(busy.size() == 3);  // too little work to ask for help
}

uint32_t Bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

float Float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

double F16Value(uint16_t h) {
  const int exponent = (h >> 10) & 31;
  const int fraction = h & 1023;
  const double sign = (h & 0x8000) ? -1 : 1;
  if (exponent == 31) {
    return fraction ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

void TestConversions(kernels::SimdLevel level) {
  using namespace kernels;  // NOLINT: the macro names our namespaces
  std::vector<uint16_t> all(65536 + 3);  // a tail that is no whole vector
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  const int64_t n = static_cast<int64_t>(all.size());
  std::vector<float> wide(all.size());
  std::vector<uint16_t> back(all.size());

  KERNELS_SIMD_CALL(level, WidenBF16(all.data(), wide.data(), n));
  KERNELS_SIMD_CALL(level, NarrowBF16(wide.data(), back.data(), n));
  for (size_t i = 0; i < all.size(); ++i) {
    CHECK_THAT(Bits(wide[i]) == static_cast<uint32_t>(all[i]) << 16);
    if (std::isnan(wide[i])) {
      CHECK_THAT((back[i] & 0x7fff) > 0x7f80);
    } else {
      CHECK_THAT(back[i] == all[i]);
    }
  }

  KERNELS_SIMD_CALL(level, WidenF16(all.data(), wide.data(), n));
  KERNELS_SIMD_CALL(level, NarrowF16(wide.data(), back.data(), n));
  for (size_t i = 0; i < all.size(); ++i) {
    const double want = F16Value(all[i]);
    if (std::isnan(want)) {
      CHECK_THAT(std::isnan(wide[i]) && (back[i] & 0x7fff) > 0x7c00);
    } else {
      CHECK_THAT(wide[i] == want && back[i] == all[i]);
    }
  }

  // Rounding: the nearest, and the even one of two that are equally near.
  std::vector<float> values;
  uint32_t state = 12345;
  for (int i = 0; i < 200000; ++i) {
    state = state * 1664525u + 1013904223u;
    values.push_back(Float(state));
  }
  for (uint32_t h = 0; h < 0x7c00; ++h) {  // half-way between two halves
    const double low = F16Value(static_cast<uint16_t>(h));
    const double high =
        h + 1 == 0x7c00 ? 65536.0 : F16Value(static_cast<uint16_t>(h + 1));
    values.push_back(static_cast<float>((low + high) / 2));
    values.push_back(std::nextafterf(values.back(), 0.0f));
  }
  std::vector<uint16_t> half(values.size());
  KERNELS_SIMD_CALL(level, NarrowF16(values.data(), half.data(),
                                     static_cast<int64_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i) {
    const double x = std::fabs(static_cast<double>(values[i]));
    if (std::isnan(x)) {
      CHECK_THAT((half[i] & 0x7fff) > 0x7c00);
      continue;
    }
    const uint16_t got = half[i] & 0x7fff;
    if (x >= 65520.0) {
      CHECK_THAT(got == 0x7c00);
      continue;
    }
    CHECK_THAT(got < 0x7c00);
    const double error = std::fabs(F16Value(got) - x);
    for (const int step : {-1, 1}) {
      const int other = got + step;
      if (other < 0 || other >= 0x7c00) continue;
      const double other_error =
          std::fabs(F16Value(static_cast<uint16_t>(other)) - x);
      CHECK_THAT(error < other_error || (error == other_error && got % 2 == 0));
    }
  }
  KERNELS_SIMD_CALL(level, NarrowBF16(values.data(), half.data(),
                                      static_cast<int64_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) {
      CHECK_THAT((half[i] & 0x7fff) > 0x7f80);
      continue;
    }
    const uint32_t u = Bits(values[i]);
    const uint32_t down = u >> 16;
    const uint32_t rest = u & 0xffffu;
    const bool up = rest > 0x8000u || (rest == 0x8000u && down % 2 == 1);
    CHECK_THAT(half[i] == down + (up ? 1 : 0));
  }
}

// As XLA sets the threads that handlers run on.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  ~FlushSubnormals() {}
#endif
};

void TestLevels() {
  CHECK_THAT(!kernels::SetSimdLevel("sse9"));
  for (const char* name :
       {"baseline", "avx2", "avx512", "avx512_bf16", "auto"}) {
    if (!kernels::SetSimdLevel(name)) {
      std::printf("no %s on this machine: NOT run\n", name);
      continue;
    }
    std::printf("conversions with %s\n", name);
    TestConversions(kernels::CurrentSimdLevel());
    FlushSubnormals flush;
    TestConversions(kernels::CurrentSimdLevel());
  }
}

// Half of the smallest normal float, where the compiler cannot see it.
float Half() {
  volatile float smallest = std::numeric_limits<float>::min();
  volatile float half = smallest * 0.5f;
  return half;
}

void TestSubnormals() {
  CHECK_THAT(Bits(Half()) != 0);
  FlushSubnormals flush;
#if defined(__x86_64__)
  CHECK_THAT(Bits(Half()) == 0);
#endif
  {
    const kernels::WithSubnormals subnormals;
    CHECK_THAT(Bits(Half()) != 0);
  }
#if defined(__x86_64__)
  CHECK_THAT(Bits(Half()) == 0);
#endif
  ThreadPool pool(3);
  std::vector<uint32_t> bits(64);
  kernels::ParallelFor(pool, 64, int64_t{1} << 30, [&](int64_t i) {
    bits[static_cast<size_t>(i)] = Bits(Half());
  });
  for (const uint32_t one : bits) CHECK_THAT(one != 0);
}

}  // namespace

int main() {
  TestParallelFor();
  TestLevels();
  TestSubnormals();
  return 0;
}
