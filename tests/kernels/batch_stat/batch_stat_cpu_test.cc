// Tests of the batch-norm loops on plain pointers: against double-precision
// sums, at every SIMD level, and the same to the bit on any number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "kernels/batch_stat/cpu/batch_stat.h"
#include "kernels/common/cpu_features.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/simd_prelude.h"
#include "tests/testing/cpu_loops.h"

namespace {

using kernels::F32;
using kernels::ParallelLoop;
using kernels::SimdLevel;
using kernels::batch_stat::Geometry;
using kernels::batch_stat::Mask;
using kernels::testing::Serial;
using kernels::testing::Threaded;

class Random {
 public:
  float Next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(state_ >> 40) / float{1 << 23} - 1.0f;
  }

 private:
  uint64_t state_ = 1;
};

struct Results {
  std::vector<float> mean, var, count, y, sum_dy, sum_dyx, dx;
  // To the bit, NaN as well.
  bool operator==(const Results& other) const {
    const auto same = [](const std::vector<float>& a,
                         const std::vector<float>& b) {
      return a.size() == b.size() &&
             (a.empty() ||
              std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    };
    return same(mean, other.mean) && same(var, other.var) &&
           same(count, other.count) && same(y, other.y) &&
           same(sum_dy, other.sum_dy) && same(sum_dyx, other.sum_dyx) &&
           same(dx, other.dx);
  }
};

struct Inputs {
  std::vector<float> x, dy, mul, bias, c0, c1;
  std::vector<uint8_t> mask;
};

Results Run(const ParallelLoop& loop, SimdLevel level, const Geometry& g,
            const Inputs& in, const Mask& mask, bool accurate, bool relu) {
  const auto stats = static_cast<size_t>(g.groups * g.channels);
  Results out;
  out.mean.resize(stats);
  out.var.resize(stats);
  out.count.resize(stats);
  out.sum_dy.resize(stats);
  out.sum_dyx.resize(stats);
  out.y.resize(in.x.size());
  out.dx.resize(in.x.size());
  using namespace kernels::batch_stat;  // NOLINT: five names of one header
  Moments<F32>(loop, level, g, in.x.data(), mask, accurate, out.mean.data(),
               out.var.data(), out.count.data());
  NormalizeAll<F32, F32>(loop, level, g, in.x.data(), out.mean.data(),
                         in.mul.data(), in.bias.data(), relu, out.y.data());
  GradSums<F32, F32>(loop, level, g, in.x.data(), in.dy.data(), out.mean.data(),
                     in.mul.data(), in.bias.data(), relu, out.sum_dy.data(),
                     out.sum_dyx.data());
  GradInputAll<F32, F32>(loop, level, g, in.x.data(), in.dy.data(),
                         out.mean.data(), in.mul.data(), in.bias.data(),
                         in.c0.data(), in.c1.data(), mask, relu, out.dx.data());
  return out;
}

bool Near(double got, double want, double scale) {
  return std::fabs(got - want) <= 1e-4 * scale + 1e-4 * std::fabs(want);
}

void Check(const Geometry& g, const Inputs& in, const Mask& mask, bool relu,
           const Results& got) {
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t c = 0; c < g.channels; ++c) {
      const int64_t s = group * g.channels + c;
      const auto si = static_cast<size_t>(s);
      double n = 0, sum = 0, square = 0, sum_dy = 0, sum_dyx = 0, size = 0;
      const double mean = static_cast<double>(got.mean[si]);
      const auto each = [&](const std::function<void(size_t, bool)>& body) {
        for (int64_t o = 0; o < g.outer; ++o) {
          for (int64_t i = 0; i < g.inner; ++i) {
            const int64_t row = (group * g.outer + o);
            const int64_t at = (row * g.channels + c) * g.inner + i;
            const int64_t m = mask.per_channel ? at : row * g.inner + i;
            body(static_cast<size_t>(at),
                 mask.data == nullptr || mask.data[m] != 0);
          }
        }
      };
      each([&](size_t at, bool kept) {
        if (!kept) return;
        n += 1;
        sum += static_cast<double>(in.x[at]);
      });
      CHECK_THAT(static_cast<double>(got.count[si]) == n);
      if (n == 0) {
        CHECK_THAT(std::isnan(got.mean[si]) && std::isnan(got.var[si]));
        continue;
      }
      each([&](size_t at, bool kept) {
        const double d = static_cast<double>(in.x[at]) - sum / n;
        if (kept) square += d * d;
      });
      CHECK_THAT(Near(mean, sum / n, 0.1));
      CHECK_THAT(Near(static_cast<double>(got.var[si]), square / n, 0.01));
      each([&](size_t at, bool kept) {
        const double d = static_cast<double>(in.x[at]) - mean;
        const double mul = static_cast<double>(in.mul[si]);
        const double plain = d * mul + static_cast<double>(in.bias[si]);
        const bool open = !relu || plain > 0;
        if (relu && std::fabs(plain) < 1e-5) {  // rounding decides the gate
          size += 1e4;
          return;
        }
        const double g_at = open ? static_cast<double>(in.dy[at]) : 0.0;
        sum_dy += g_at;
        sum_dyx += g_at * d;
        size += 1;
        CHECK_THAT(Near(static_cast<double>(got.y[at]), open ? plain : 0, 1));
        const double extra =
            static_cast<double>(in.c0[si]) + static_cast<double>(in.c1[si]) * d;
        CHECK_THAT(Near(static_cast<double>(got.dx[at]),
                        mul * g_at + (kept ? extra : 0), 1));
      });
      CHECK_THAT(Near(static_cast<double>(got.sum_dy[si]), sum_dy, size));
      CHECK_THAT(Near(static_cast<double>(got.sum_dyx[si]), sum_dyx, size));
    }
  }
}

template <typename A>
void CheckClose(const std::vector<A>& got, size_t i, A want) {
  const A error = std::numeric_limits<A>::epsilon() * 8;
  CHECK_THAT(std::fabs(got[i] - want) <= error * std::fabs(want));
}

// What is done once for each of `n` channels.
template <typename A>
void TestChannels(size_t n) {
  Random random;
  const auto fill = [&](A at_least) {
    std::vector<A> values(n);
    for (A& value : values) value = at_least + std::fabs(A{random.Next()});
    return values;
  };
  const std::vector<A> old = fill(-1), batch = fill(-1), var = fill(0);
  const std::vector<A> scale = fill(-1), sum_dy = fill(-1), sum_dyx = fill(-1);
  std::vector<A> count(n);
  for (size_t i = 0; i < n; ++i) count[i] = static_cast<A>(i % 3);
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (!kernels::SetSimdLevel(name)) continue;
    const SimdLevel level = kernels::CurrentSimdLevel();
    const auto channels = static_cast<int64_t>(n);
    std::vector<A> blended = old, rstd(n), mul(n), dscale = sum_dyx, c0(n),
                   c1(n);
    using namespace kernels::batch_stat;  // NOLINT: three names of one header
    Blend<A>(level, A{3} / 4, blended.data(), batch.data(), channels,
             blended.data());
    Factors<A>(level, var.data(), scale.data(), A{1} / 8, channels, rstd.data(),
               mul.data());
    GradFactors<A>(level, mul.data(), rstd.data(), count.data(), sum_dy.data(),
                   channels, dscale.data(), c0.data(), c1.data());
    for (size_t i = 0; i < n; ++i) {
      const A blend = A{3} / 4 * old[i] + A{1} / 4 * batch[i];
      CHECK_THAT(std::fabs(blended[i] - blend) <=
                 std::numeric_limits<A>::epsilon() * 4);
      const A one = 1 / std::sqrt(var[i] + A{1} / 8);
      const A share = -scale[i] * one / std::fmax(count[i], A{1});
      CheckClose(rstd, i, one);
      CheckClose(mul, i, scale[i] * one);
      CheckClose(dscale, i, sum_dyx[i] * one);
      CheckClose(c0, i, share * sum_dy[i]);
      CheckClose(c1, i, share * one * one * sum_dyx[i]);
    }
  }
}

void TestGeometry(const Geometry& g) {
  Random random;
  const auto size = static_cast<size_t>(g.elements());
  const auto stats = static_cast<size_t>(g.groups * g.channels);
  const auto fill = [&](std::vector<float>& values, size_t n) {
    values.resize(n);
    for (float& value : values) value = random.Next();
  };
  Inputs in;
  fill(in.x, size);
  fill(in.dy, size);
  for (auto* stat : {&in.mul, &in.bias, &in.c0, &in.c1}) fill(*stat, stats);
  in.mask.resize(size);
  for (uint8_t& kept : in.mask) kept = random.Next() < 0.4f ? 0x80 : 0;
  for (const int kind : {0, 1, 2}) {  // no mask, one a position, one an element
    const Mask mask{kind == 0 ? nullptr : in.mask.data(), kind == 2};
    for (const bool relu : {false, true}) {
      const bool accurate = relu;
      for (const char* name : {"baseline", "avx2", "avx512"}) {
        if (!kernels::SetSimdLevel(name)) continue;
        const SimdLevel level = kernels::CurrentSimdLevel();
        const Results serial = Run(Serial, level, g, in, mask, accurate, relu);
        Check(g, in, mask, relu, serial);
        const Results threaded =
            Run(Threaded, level, g, in, mask, accurate, relu);
        CHECK_THAT(serial == threaded);
      }
    }
  }
}

// Values that a mask drops have no part in the gradient of others, nor the
// statistics in theirs.
void TestDropped(const Geometry& g, bool per_channel) {
  Random random;
  const auto size = static_cast<size_t>(g.elements());
  std::vector<float> x(size), dx(size);
  std::vector<uint8_t> mask(size);
  for (size_t i = 0; i < size; ++i) mask[i] = random.Next() < 0.4f;
  const auto kept = [&](int64_t o, int64_t c, int64_t i) {
    const int64_t at = per_channel ? o * g.channels + c : o;
    return mask[static_cast<size_t>(at * g.inner + i)] != 0;
  };
  const auto each = [&](const std::function<void(size_t, bool)>& body) {
    for (int64_t o = 0; o < g.outer; ++o) {
      for (int64_t c = 0; c < g.channels; ++c) {
        for (int64_t i = 0; i < g.inner; ++i) {
          body(static_cast<size_t>((o * g.channels + c) * g.inner + i),
               kept(o, c, i));
        }
      }
    }
  };
  each([&](size_t at, bool keep) { x[at] = keep ? 1.0f : NAN; });
  const std::vector<float> dy(size, 0.5f);
  const std::vector<float> stat(static_cast<size_t>(g.channels), 2.0f);
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (!kernels::SetSimdLevel(name)) continue;
    kernels::batch_stat::GradInputAll<F32, F32>(
        Serial, kernels::CurrentSimdLevel(), g, x.data(), dy.data(),
        stat.data(), stat.data(), stat.data(), stat.data(), stat.data(),
        Mask{mask.data(), per_channel}, /*relu=*/false, dx.data());
    each([&](size_t at, bool keep) {
      CHECK_THAT(dx[at] == (keep ? 1.0f + 2.0f + 2.0f * -1.0f : 1.0f));
    });
  }
}

}  // namespace

int main() {
  for (const size_t n : {1, 16, 37}) {
    TestChannels<float>(n);
    TestChannels<double>(n);
  }
  for (const bool per_channel : {false, true}) {
    TestDropped({1, 50, 40, 1}, per_channel);
    TestDropped({1, 50, 7, 1}, per_channel);
    TestDropped({1, 3, 20, 30}, per_channel);
  }
  for (const Geometry& g : {
           Geometry{1, 1, 1, 1},
           Geometry{1, 700, 64, 1},
           Geometry{1, 900, 7, 1},
           Geometry{2, 331, 37, 1},
           Geometry{1, 40, 2000, 1},
           Geometry{1, 300, 1100, 1},
           Geometry{2, 200, 1031, 1},
           Geometry{1, 5000, 1, 1},
           Geometry{3, 4, 5, 49},
           Geometry{1, 16, 130, 17},
           Geometry{1, 2, 3, 20000},
           Geometry{2, 3, 1, 999},
           Geometry{1, 7, 40, 3},
           Geometry{1, 4, 0, 1},
           Geometry{1, 4, 0, 3},
           Geometry{1, 0, 1, 1},
           Geometry{1, 0, 1100, 1},
           Geometry{1, 4, 3, 0},
       }) {
    TestGeometry(g);
  }
  return 0;
}
