#include "kernels/batch_stat/batch_stat_cpu.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/common/cpu_features.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/simd_prelude.h"

namespace kernels::batch_stat {

// Moments of one channel, in the middle of its runs.
struct RunState {
  int64_t kept;
  double mean;
  double m2;
};

#define KERNELS_SIMD_BODY "kernels/batch_stat/batch_stat_simd.inc"
#include "kernels/common/foreach_simd.h"

namespace {

// How [outer, channels, inner] is cut into items of work. By shape alone, so
// that sums come out the same on any number of threads.
struct Cut {
  int64_t outer_parts;
  int64_t channel_parts;

  int64_t items(const Geometry& g) const {
    return g.groups * outer_parts * channel_parts;
  }
};

constexpr int64_t kPartBytes = int64_t{256} << 10;
constexpr int64_t kMaxParts = 64;

Cut CutWork(const Geometry& g, int64_t element_bytes) {
  const int64_t bytes = g.outer * g.channels * g.inner * element_bytes;
  const int64_t parts =
      std::clamp<int64_t>(bytes / kPartBytes, 1, kMaxParts);
  if (g.inner == 1) {
    // Each part has sums of its own for all channels: keep it worth them.
    return {std::clamp<int64_t>(std::min(parts, g.outer / 32), 1, kMaxParts),
            1};
  }
  const int64_t outer_parts = std::clamp<int64_t>(g.outer, 1, parts);
  const int64_t channel_parts =
      std::clamp<int64_t>(parts / outer_parts, 1, g.channels);
  return {outer_parts, channel_parts};
}

// One item: a group, a range of outer indices and a range of channels.
struct Item {
  int64_t group, part;
  int64_t outer_begin, outer_end;
  int64_t channel_begin, channel_end;
};

Item GetItem(const Geometry& g, const Cut& cut, int64_t index) {
  const int64_t channel_part = index % cut.channel_parts;
  const int64_t part = index / cut.channel_parts % cut.outer_parts;
  const int64_t group = index / cut.channel_parts / cut.outer_parts;
  return {group,
          part,
          g.outer * part / cut.outer_parts,
          g.outer * (part + 1) / cut.outer_parts,
          g.channels * channel_part / cut.channel_parts,
          g.channels * (channel_part + 1) / cut.channel_parts};
}

// [n, 1] and [n, 1, m] are a single run: one long loop instead of many short
// ones.
Geometry Simplify(Geometry g) {
  if (g.channels == 1) {
    g.inner *= g.outer;
    g.outer = 1;
  }
  return g;
}

// Moments of each part, [groups, outer_parts, channels].
template <typename A>
struct Partial {
  std::vector<A> mean, rest, m2;
  std::vector<int64_t> count;  // one a part, or one a part and channel
};

template <typename T>
void PartMoments(SimdLevel level, const Geometry& g, const Item& item,
                 const typename T::Storage* x, const Mask& mask, bool given,
                 bool count_per_channel, typename T::Compute* mean,
                 typename T::Compute* rest, typename T::Compute* m2,
                 int64_t* count) {
  using A = typename T::Compute;
  const int64_t outer0 = item.group * g.outer;
  if (!count_per_channel && g.inner == 1) {
    std::vector<A> scratch(static_cast<size_t>(2 * g.channels));
    const int64_t row0 = outer0 + item.outer_begin;
    KERNELS_SIMD_CALL(
        level,
        RowMoments<T>(x + row0 * g.channels,
                      mask.data == nullptr ? nullptr : mask.data + row0,
                      item.outer_end - item.outer_begin, g.channels, given,
                      mean, rest, m2, scratch.data(), scratch.data() + g.channels,
                      count));
    return;
  }
  for (int64_t c = item.channel_begin; c < item.channel_end; ++c) {
    RunState state{0, given ? static_cast<double>(mean[c]) : 0.0, 0.0};
    for (int64_t o = item.outer_begin; o < item.outer_end; ++o) {
      const auto* run = x + ((outer0 + o) * g.channels + c) * g.inner;
      if (mask.data == nullptr) {
        KERNELS_SIMD_CALL(level, RunMoments<T>(run, g.inner, given, &state));
        continue;
      }
      const uint8_t* kept_here =
          mask.per_channel
              ? mask.data + ((outer0 + o) * g.channels + c) * g.inner
              : mask.data + (outer0 + o) * g.inner;
      KERNELS_SIMD_CALL(level, MaskedRunMoments<T>(run, kept_here, g.inner,
                                                   given, &state));
    }
    mean[c] = static_cast<A>(state.mean);
    rest[c] = static_cast<A>(state.mean - static_cast<double>(mean[c]));
    m2[c] = static_cast<A>(state.m2);
    count[count_per_channel ? c : 0] = state.kept;
  }
}

// Combines the parts of one group, in order.
template <typename A>
void CombineParts(SimdLevel level, const Cut& cut, int64_t channels,
                  bool count_per_channel, const A* mean, const A* rest,
                  const A* m2, const int64_t* count, bool keep_mean, A* out_mean, A* out_var,
                  A* out_count) {
  const auto n = static_cast<size_t>(channels);
  std::vector<double> total_mean(n), total_m2(n);
  std::vector<double> total(count_per_channel ? n : 1);
  for (int64_t part = 0; part < cut.outer_parts; ++part) {
    const A* part_mean = mean + part * channels;
    const A* part_rest = rest + part * channels;
    const A* part_m2 = m2 + part * channels;
    if (!count_per_channel) {
      const auto extra = static_cast<double>(count[part]);
      if (extra == 0) continue;
      KERNELS_SIMD_CALL(
          level, CombineMoments<A>(part_mean, part_rest, part_m2, total[0],
                                   extra, channels, total_mean.data(),
                                   total_m2.data()));
      total[0] += extra;
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const auto extra = static_cast<double>(count[part * channels + c]);
      if (extra == 0) continue;
      simd_baseline::CombineMoments<A>(
          part_mean + c, part_rest + c, part_m2 + c, total[static_cast<size_t>(c)], extra, 1,
          &total_mean[static_cast<size_t>(c)],
          &total_m2[static_cast<size_t>(c)]);
      total[static_cast<size_t>(c)] += extra;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const auto i = static_cast<size_t>(c);
    const double kept = total[count_per_channel ? i : 0];
    if (kept == 0) {
      out_mean[c] = out_var[c] = std::numeric_limits<A>::quiet_NaN();
    } else {
      if (!keep_mean) out_mean[c] = static_cast<A>(total_mean[i]);
      // Rounding may leave a constant channel a hair below zero.
      const double m2_value = total_m2[i] < 0 ? 0 : total_m2[i];
      out_var[c] = static_cast<A>(m2_value / kept);
    }
    out_count[c] = static_cast<A>(kept);
  }
}

int64_t Bytes(const Geometry& g, int64_t element_bytes) {
  return g.elements() * element_bytes;
}

}  // namespace

template <typename T>
void Moments(const ParallelLoop& loop, SimdLevel level,
             const Geometry& geometry, const typename T::Storage* x,
             const Mask& mask, bool accurate, typename T::Compute* mean,
             typename T::Compute* var, typename T::Compute* count) {
  using A = typename T::Compute;
  const Geometry g = Simplify(geometry);
  const Cut cut = CutWork(g, sizeof(typename T::Storage));
  const bool count_per_channel =
      g.inner != 1 || (mask.data != nullptr && mask.per_channel);
  const int64_t stride = cut.outer_parts * g.channels;
  const int64_t count_stride =
      count_per_channel ? stride : cut.outer_parts;
  Partial<A> partial;
  partial.mean.resize(static_cast<size_t>(g.groups * stride));
  partial.rest.resize(static_cast<size_t>(g.groups * stride));
  partial.m2.resize(static_cast<size_t>(g.groups * stride));
  partial.count.resize(static_cast<size_t>(g.groups * count_stride));
  for (const bool given : {false, true}) {
    if (given && !accurate) break;
    loop(cut.items(g), Bytes(g, sizeof(typename T::Storage)),
         [&](int64_t index) {
           const Item item = GetItem(g, cut, index);
           const int64_t part = item.group * cut.outer_parts + item.part;
           A* part_mean = partial.mean.data() + part * g.channels;
           if (given) {
             std::copy(mean + item.group * g.channels + item.channel_begin,
                       mean + item.group * g.channels + item.channel_end,
                       part_mean + item.channel_begin);
           }
           PartMoments<T>(
               level, g, item, x, mask, given, count_per_channel, part_mean,
               partial.rest.data() + part * g.channels,
               partial.m2.data() + part * g.channels,
               partial.count.data() +
                   part * (count_per_channel ? g.channels : 1));
         });
    for (int64_t group = 0; group < g.groups; ++group) {
      CombineParts<A>(level, cut, g.channels, count_per_channel,
                      partial.mean.data() + group * stride,
                      partial.rest.data() + group * stride,
                      partial.m2.data() + group * stride,
                      partial.count.data() + group * count_stride, given,
                      mean + group * g.channels, var + group * g.channels,
                      count + group * g.channels);
    }
  }
}

template <typename T, typename U>
void NormalizeAll(const ParallelLoop& loop, SimdLevel level,
                  const Geometry& geometry, const typename T::Storage* x,
                  const typename T::Compute* mean,
                  const typename T::Compute* mul,
                  const typename T::Compute* bias, bool relu,
                  typename U::Storage* y) {
  const Geometry g = Simplify(geometry);
  const int64_t bytes =
      sizeof(typename T::Storage) + sizeof(typename U::Storage);
  const Cut cut = CutWork(g, bytes);
  loop(cut.items(g), Bytes(g, bytes), [&](int64_t index) {
    const Item item = GetItem(g, cut, index);
    const int64_t stat = item.group * g.channels;
    const int64_t first = item.group * g.outer + item.outer_begin;
    const int64_t rows = item.outer_end - item.outer_begin;
    if (g.inner == 1) {
      const int64_t at = first * g.channels;
      KERNELS_SIMD_CALL(
          level, Normalize<T, U, false>(x + at, y + at, rows, g.channels,
                                        mean + stat, mul + stat, bias + stat,
                                        relu));
      return;
    }
    for (int64_t o = 0; o < rows; ++o) {
      for (int64_t c = item.channel_begin; c < item.channel_end; ++c) {
        const int64_t at = ((first + o) * g.channels + c) * g.inner;
        const int64_t s = stat + c;
        KERNELS_SIMD_CALL(
            level, Normalize<T, U, true>(x + at, y + at, 1, g.inner, mean + s,
                                         mul + s, bias + s, relu));
      }
    }
  });
}

template <typename T, typename U>
void GradSums(const ParallelLoop& loop, SimdLevel level,
              const Geometry& geometry, const typename T::Storage* x,
              const typename U::Storage* dy, const typename T::Compute* mean,
              const typename T::Compute* mul, const typename T::Compute* bias,
              bool relu, typename T::Compute* sum_dy,
              typename T::Compute* sum_dyx) {
  using A = typename T::Compute;
  const Geometry g = Simplify(geometry);
  const int64_t bytes =
      sizeof(typename T::Storage) + sizeof(typename U::Storage);
  const Cut cut = CutWork(g, bytes);
  const int64_t stride = cut.outer_parts * g.channels;
  std::vector<A> parts(static_cast<size_t>(2 * g.groups * stride));
  A* part_dy = parts.data();
  A* part_dyx = parts.data() + g.groups * stride;
  loop(cut.items(g), Bytes(g, bytes), [&](int64_t index) {
    const Item item = GetItem(g, cut, index);
    const int64_t stat = item.group * g.channels;
    const int64_t first = item.group * g.outer + item.outer_begin;
    const int64_t rows = item.outer_end - item.outer_begin;
    const int64_t part =
        (item.group * cut.outer_parts + item.part) * g.channels;
    if (g.inner == 1) {
      const int64_t at = first * g.channels;
      KERNELS_SIMD_CALL(
          level,
          GradSumsRows<T, U>(x + at, dy + at, rows, g.channels, mean + stat,
                             mul + stat, bias + stat, relu, part_dy + part,
                             part_dyx + part));
      return;
    }
    for (int64_t o = 0; o < rows; ++o) {
      for (int64_t c = item.channel_begin; c < item.channel_end; ++c) {
        const int64_t at = ((first + o) * g.channels + c) * g.inner;
        const int64_t s = stat + c;
        KERNELS_SIMD_CALL(
            level, GradSumsRun<T, U>(x + at, dy + at, g.inner, mean[s], mul[s],
                                     bias[s], relu, part_dy + part + c,
                                     part_dyx + part + c));
      }
    }
  });
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t c = 0; c < g.channels; ++c) {
      double total_dy = 0;
      double total_dyx = 0;
      for (int64_t part = 0; part < cut.outer_parts; ++part) {
        const int64_t at = group * stride + part * g.channels + c;
        total_dy += static_cast<double>(part_dy[at]);
        total_dyx += static_cast<double>(part_dyx[at]);
      }
      sum_dy[group * g.channels + c] = static_cast<A>(total_dy);
      sum_dyx[group * g.channels + c] = static_cast<A>(total_dyx);
    }
  }
}

template <typename T, typename U>
void GradInputAll(const ParallelLoop& loop, SimdLevel level,
                  const Geometry& geometry, const typename T::Storage* x,
                  const typename U::Storage* dy,
                  const typename T::Compute* mean,
                  const typename T::Compute* mul,
                  const typename T::Compute* bias,
                  const typename T::Compute* c0, const typename T::Compute* c1,
                  const Mask& mask, bool relu, typename T::Storage* dx) {
  using A = typename T::Compute;
  const Geometry g = Simplify(geometry);
  const int64_t bytes =
      2 * sizeof(typename T::Storage) + sizeof(typename U::Storage);
  const Cut cut = CutWork(g, bytes);
  const std::vector<A> zeros(static_cast<size_t>(g.channels));
  loop(cut.items(g), Bytes(g, bytes), [&](int64_t index) {
    const Item item = GetItem(g, cut, index);
    const int64_t stat = item.group * g.channels;
    const int64_t first = item.group * g.outer + item.outer_begin;
    const int64_t rows = item.outer_end - item.outer_begin;
    if (g.inner == 1 && !mask.per_channel) {
      // Neighbouring rows that are all kept, or all not.
      for (int64_t r = 0; r < rows;) {
        int64_t end = rows;
        bool kept = true;
        if (mask.data != nullptr) {
          kept = mask.data[first + r] != 0;
          for (end = r + 1; end < rows; ++end) {
            if ((mask.data[first + end] != 0) != kept) break;
          }
        }
        const int64_t at = (first + r) * g.channels;
        KERNELS_SIMD_CALL(
            level, GradInput<T, U, false>(
                       x + at, dy + at, dx + at, end - r, g.channels,
                       mean + stat, mul + stat, bias + stat,
                       kept ? c0 + stat : zeros.data(),
                       kept ? c1 + stat : zeros.data(), relu));
        r = end;
      }
      return;
    }
    for (int64_t o = 0; o < rows; ++o) {
      for (int64_t c = item.channel_begin; c < item.channel_end; ++c) {
        const int64_t run = (first + o) * g.channels + c;
        const int64_t s = stat + c;
        const uint8_t* keep =
            mask.data == nullptr
                ? nullptr
                : mask.data + (mask.per_channel ? run : first + o) * g.inner;
        for (int64_t i = 0; i < g.inner;) {
          int64_t end = g.inner;
          bool kept = true;
          if (keep != nullptr) {
            kept = keep[i] != 0;
            for (end = i + 1; end < g.inner; ++end) {
              if ((keep[end] != 0) != kept) break;
            }
          }
          const int64_t at = run * g.inner + i;
          KERNELS_SIMD_CALL(
              level, GradInput<T, U, true>(
                         x + at, dy + at, dx + at, 1, end - i, mean + s,
                         mul + s, bias + s, kept ? c0 + s : zeros.data(),
                         kept ? c1 + s : zeros.data(), relu));
          i = end;
        }
      }
    }
  });
}

#define KERNELS_INSTANTIATE_ONE(T)                                           \
  template void Moments<T>(const ParallelLoop&, SimdLevel, const Geometry&,  \
                           const T::Storage*, const Mask&, bool, T::Compute*, \
                           T::Compute*, T::Compute*);
#define KERNELS_INSTANTIATE_TWO(T, U)                                         \
  template void NormalizeAll<T, U>(                                           \
      const ParallelLoop&, SimdLevel, const Geometry&, const T::Storage*,     \
      const T::Compute*, const T::Compute*, const T::Compute*, bool,          \
      U::Storage*);                                                           \
  template void GradSums<T, U>(                                               \
      const ParallelLoop&, SimdLevel, const Geometry&, const T::Storage*,     \
      const U::Storage*, const T::Compute*, const T::Compute*,                \
      const T::Compute*, bool, T::Compute*, T::Compute*);                     \
  template void GradInputAll<T, U>(                                           \
      const ParallelLoop&, SimdLevel, const Geometry&, const T::Storage*,     \
      const U::Storage*, const T::Compute*, const T::Compute*,                \
      const T::Compute*, const T::Compute*, const T::Compute*, const Mask&,   \
      bool, T::Storage*);

KERNELS_INSTANTIATE_ONE(F64)
KERNELS_INSTANTIATE_ONE(F32)
KERNELS_INSTANTIATE_ONE(BF16)
KERNELS_INSTANTIATE_ONE(F16)
KERNELS_INSTANTIATE_TWO(F64, F64)
KERNELS_INSTANTIATE_TWO(F32, F32)
KERNELS_INSTANTIATE_TWO(BF16, BF16)
KERNELS_INSTANTIATE_TWO(BF16, F32)
KERNELS_INSTANTIATE_TWO(F16, F16)
KERNELS_INSTANTIATE_TWO(F16, F32)

}  // namespace kernels::batch_stat
