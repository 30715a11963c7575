// Tests of the products on plain pointers: against double-precision sums, in
// every format of the weights and at every SIMD level, and the same to the bit
// on any number of threads. Buffers are as long as they must be, so that the
// sanitizers see what is read beyond.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/common/parallel_for.h"
#include "kernels/matmul/cc/geometry.h"
#include "kernels/matmul/cpu/matmul.h"
#include "tests/testing/cpu_loops.h"

namespace {

using kernels::SimdLevel;
using kernels::matmul::Element;
using kernels::matmul::Format;
using kernels::matmul::Geometry;
using kernels::matmul::Weights;
using kernels::testing::Serial;
using kernels::testing::Threaded;

// Whole numbers from -limit to limit, which every format has.
class Random {
 public:
  int Next(int limit) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int>((state_ >> 33) % (2 * limit + 1)) - limit;
  }

 private:
  uint64_t state_ = 1;
};

uint16_t ToBF16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// Of a whole number below 16.
int Code(int value, int mantissa_bits, int bias) {
  const int sign = value < 0 ? 1 : 0;
  const int size = std::abs(value);
  const int exponent_bits = bias == 15 ? 5 : 4;
  if (size == 0) return sign << (exponent_bits + mantissa_bits);
  int log = 0;
  while ((2 << log) <= size) ++log;
  const int mantissa = (size << mantissa_bits >> log) - (1 << mantissa_bits);
  return (sign << (exponent_bits + mantissa_bits)) |
         ((log + bias) << mantissa_bits) | mantissa;
}

// Weights that are whole numbers, and how they lie in memory.
struct Matrix {
  Matrix(Random* random, const Geometry& g, Format format, int64_t group,
         bool transposed)
      : values(static_cast<size_t>(g.groups * g.k * g.n)) {
    const bool packed = format >= Format::kInt8;
    const int64_t groups = packed ? g.k / group : 1;
    weights.format = format;
    if (packed) {
      weights.group = group;
      scale.resize(static_cast<size_t>(g.groups * groups * g.n));
      for (uint16_t& one : scale) {
        one = ToBF16(static_cast<float>(1 << (random->Next(1) + 1)));
      }
      if (format == Format::kInt4) minimum.resize(scale.size());
      for (uint16_t& one : minimum) {
        one = ToBF16(static_cast<float>(random->Next(8)));
      }
      weights.scale = scale.data();
      if (format == Format::kInt4) weights.minimum = minimum.data();
    }
    if (format == Format::kInt4) words.resize(values.size() / 8);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const int64_t row = at / g.n, column = at % g.n;
      const size_t of = static_cast<size_t>(
          packed ? (row / g.k * groups + row % g.k / group) * g.n + column : 0);
      int value = random->Next(7);
      switch (format) {
        case Format::kF32:
          singles.push_back(static_cast<float>(value));
          break;
        case Format::kBF16:
          halves.push_back(ToBF16(static_cast<float>(value)));
          break;
        case Format::kF16:
          halves.push_back(static_cast<uint16_t>(Code(value, 10, 15)));
          break;
        case Format::kInt8:
          bytes.push_back(static_cast<uint8_t>(value));
          break;
        case Format::kE4M3:
          bytes.push_back(static_cast<uint8_t>(Code(value, 3, 7)));
          break;
        case Format::kInt4:
          value += 7;
          words[static_cast<size_t>(row / 8 * g.n + column)] |=
              static_cast<uint32_t>(value) << (4 * (row % 8));
          break;
      }
      values[i] = value;
      if (packed) values[i] *= FromBF16(scale[of]);
      if (!minimum.empty()) values[i] += FromBF16(minimum[of]);
    }
    if (transposed) {
      weights.transposed = true;
      Transpose(g, &singles);
      Transpose(g, &halves);
    }
    weights.data = !singles.empty()  ? static_cast<const void*>(singles.data())
                   : !halves.empty() ? static_cast<const void*>(halves.data())
                   : !bytes.empty()  ? static_cast<const void*>(bytes.data())
                                     : static_cast<const void*>(words.data());
  }

  template <typename T>
  static void Transpose(const Geometry& g, std::vector<T>* matrices) {
    if (matrices->empty()) return;
    const std::vector<T> from = *matrices;
    for (int64_t i = 0; i < g.groups * g.k * g.n; ++i) {
      const int64_t of = i / (g.k * g.n), row = i / g.n % g.k, column = i % g.n;
      (*matrices)[static_cast<size_t>((of * g.n + column) * g.k + row)] =
          from[static_cast<size_t>(i)];
    }
  }

  static double FromBF16(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }

  std::vector<double> values;
  std::vector<float> singles;
  std::vector<uint16_t> halves;
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> words;
  std::vector<uint16_t> scale, minimum;
  Weights weights;
};

void TestProductOf(Element element, const Geometry& g, Format format,
                   int64_t group, bool transposed) {
  Random random;
  const Matrix w(&random, g, format, group, transposed);
  std::vector<float> x(static_cast<size_t>(g.groups * g.rows * g.k));
  std::vector<float> bias(static_cast<size_t>(g.groups * g.n));
  for (float& one : x) one = static_cast<float>(random.Next(8));
  for (float& one : bias) one = static_cast<float>(random.Next(100));
  std::vector<uint16_t> halves;  // the same numbers
  for (const float one : x) halves.push_back(ToBF16(one));
  const kernels::matmul::ConstArray from{
      element == Element::kF32 ? static_cast<const void*>(x.data())
                               : static_cast<const void*>(halves.data()),
      element};
  for (const SimdLevel level : {SimdLevel::kBaseline, SimdLevel::kAvx2,
                                SimdLevel::kAvx512, SimdLevel::kAvx512Bf16}) {
    if (!kernels::SetSimdLevel(kernels::SimdLevelName(level))) continue;
    std::vector<float> y(static_cast<size_t>(g.groups * g.rows * g.n));
    std::vector<float> again(y.size());
    const auto run = [&](const kernels::ParallelLoop& loop, float* to) {
      kernels::matmul::Multiply(loop, level, g, from, w.weights,
                                {bias.data(), Element::kF32},
                                {to, Element::kF32});
    };
    run(Serial, y.data());
    run(Threaded, again.data());
    CHECK_THAT(y.empty() ||
               std::memcmp(y.data(), again.data(), y.size() * 4) == 0);
    for (int64_t i = 0; i < g.groups * g.rows; ++i) {
      const int64_t of = i / g.rows;
      for (int64_t j = 0; j < g.n; ++j) {
        double want = bias[static_cast<size_t>(of * g.n + j)];
        double size = std::abs(want);
        for (int64_t l = 0; l < g.k; ++l) {
          const double term =
              static_cast<double>(x[static_cast<size_t>(i * g.k + l)]) *
              w.values[static_cast<size_t>((of * g.k + l) * g.n + j)];
          want += term;
          size += std::abs(term);
        }
        const double got = y[static_cast<size_t>(i * g.n + j)];
        CHECK_THAT(std::abs(got - want) <= 1e-5 * (size + 1));
      }
    }
  }
}

void TestProduct(const Geometry& g, Format format, int64_t group,
                 bool transposed = false) {
  for (const Element element : {Element::kF32, Element::kBF16}) {
    TestProductOf(element, g, format, group, transposed);
  }
}

}  // namespace

int main() {
  for (const Geometry& g : {
           Geometry{1, 1, 1, 1},
           Geometry{1, 1, 37, 53},
           Geometry{2, 3, 6, 33},
           Geometry{1, 33, 130, 70},
           Geometry{1, 2, 300, 5000},
           Geometry{3, 70, 9, 20},
           Geometry{1, 103, 307, 600},
           Geometry{1, 0, 4, 4},
           Geometry{1, 2, 0, 4},
       }) {
    for (const Format format : {Format::kF32, Format::kBF16, Format::kF16}) {
      TestProduct(g, format, g.k);
      TestProduct(g, format, g.k, true);
    }
  }
  for (const Geometry& g : {
           Geometry{1, 1, 128, 53},
           Geometry{2, 3, 256, 33},
           Geometry{1, 33, 128, 70},
           Geometry{1, 1, 512, 3000},
           Geometry{2, 103, 256, 600},
       }) {
    for (const Format format : {Format::kInt8, Format::kE4M3, Format::kInt4}) {
      for (const int64_t group : {int64_t{32}, int64_t{128}, g.k}) {
        TestProduct(g, format, group);
      }
    }
  }
  return 0;
}
