#include "kernels/batch_stat/cpu/batch_stat.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "kernels/batch_stat/cpu/cuts.h"
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

#define KERNELS_SIMD_BODY "kernels/batch_stat/cpu/batch_stat_simd.inc"
#include "kernels/common/foreach_simd.h"

namespace {

// A statistic repeated for rows that are folded, or as it is.
template <typename A>
class Folded {
 public:
  Folded(const A* stat, const Geometry& g, int64_t fold)
      : stat_(stat), channels_(g.channels), fold_(fold) {
    if (fold == 1) return;
    repeated_.reserve(static_cast<size_t>(g.groups * g.channels * fold));
    for (int64_t group = 0; group < g.groups; ++group) {
      const A* one = stat + group * g.channels;
      for (int64_t i = 0; i < fold; ++i) {
        repeated_.insert(repeated_.end(), one, one + g.channels);
      }
    }
  }

  const A* Get(int64_t group, const Rows& rows) const {
    return rows.fold == 1 ? stat_ + group * channels_ + rows.channel
                          : repeated_.data() + group * channels_ * fold_;
  }

 private:
  const A* stat_;
  int64_t channels_;
  int64_t fold_;
  std::vector<A> repeated_;
};

int64_t Bytes(const Geometry& g, int64_t element_bytes) {
  return g.elements() * element_bytes;
}

// Double-precision moments of all channels, merged part by part. With `each`,
// channels have counts of their own; otherwise count[0] is that of all.
struct Total {
  Total(int64_t channels, bool each_count)
      : each(each_count),
        mean(static_cast<size_t>(channels)),
        m2(mean.size()),
        kept(each ? mean.size() : 1) {}

  template <typename A>
  void Add(SimdLevel level, const A* part_mean, const A* part_rest,
           const A* part_m2, const double* count) {
    if (!each && *count == 0) return;
    KERNELS_SIMD_CALL(
        level, CombineMoments<A>(part_mean, part_rest, part_m2, count, each,
                                 static_cast<int64_t>(mean.size()), kept.data(),
                                 mean.data(), m2.data()));
  }

  bool each;
  std::vector<double> mean, m2, kept;
};

// Not initialised: whoever reads an element has written it before.
template <typename A>
std::unique_ptr<A[]> NewArray(int64_t size) {
  return std::unique_ptr<A[]>(new A[static_cast<size_t>(size)]);
}

// What the items found: [groups, outer_parts, channels]. Where all channels
// have the same count, that of channel 0 only.
template <typename A>
struct Partial {
  explicit Partial(int64_t size)
      : mean(NewArray<A>(size)),
        rest(NewArray<A>(size)),
        m2(NewArray<A>(size)),
        count(NewArray<double>(size)) {}

  std::unique_ptr<A[]> mean, rest, m2;
  std::unique_ptr<double[]> count;
};

// Moments of an item's rows, into its channels of arrays that have all of them.
// With `given`, m2 is taken about `mean`.
template <typename T>
void RowItemMoments(SimdLevel level, const Geometry& g, const Cut& cut,
                    const Item& item, const typename T::Storage* x,
                    const Mask& mask, bool given, typename T::Compute* mean,
                    typename T::Compute* rest, typename T::Compute* m2,
                    double* count) {
  using A = typename T::Compute;
  const int64_t scratch_size = mask.per_channel ? 4 : 2;  // for each column
  const auto moments = [&](const Rows& rows, A* to_mean, A* to_rest, A* to_m2,
                           A* scratch, double* kept) {
    if (mask.per_channel) {
      KERNELS_SIMD_CALL(level, MaskedRowMoments<T>(
                                   x + rows.at, mask.data + rows.at, rows.rows,
                                   rows.columns, rows.stride, given, to_mean,
                                   to_rest, to_m2, scratch, kept));
      return;
    }
    const uint8_t* kept_rows =
        mask.data == nullptr ? nullptr : mask.data + rows.row;
    KERNELS_SIMD_CALL(
        level, RowMoments<T>(x + rows.at, kept_rows, rows.rows, rows.columns,
                             rows.stride, given, to_mean, to_rest, to_m2,
                             scratch, kept));
  };
  if (cut.fold == 1) {
    const int64_t c = item.channel_begin;
    const auto scratch = NewArray<A>(scratch_size * (item.channel_end - c));
    ForRows(g, cut, item, [&](const Rows& rows) {
      double kept = 0;  // which all items of the same rows find
      moments(rows, mean + c, rest + c, m2 + c, scratch.get(),
              mask.per_channel ? count + c : &kept);
      if (!mask.per_channel && c == 0) *count = kept;
    });
    return;
  }
  const int64_t columns = g.channels * cut.fold;
  const auto wide = NewArray<A>((3 + scratch_size) * columns);
  const auto wide_count = NewArray<double>(columns);
  A* wide_mean = wide.get();
  A* wide_rest = wide_mean + columns;
  A* wide_m2 = wide_rest + columns;
  Total total(g.channels, mask.per_channel);
  ForRows(g, cut, item, [&](const Rows& rows) {
    for (int64_t i = 0; given && i < rows.fold; ++i) {
      std::copy_n(mean, g.channels, wide_mean + i * g.channels);
    }
    moments(rows, wide_mean, wide_rest, wide_m2, wide_m2 + columns,
            wide_count.get());
    for (int64_t i = 0; i < rows.fold; ++i) {
      const int64_t at = i * g.channels;
      total.Add(level, wide_mean + at, wide_rest + at, wide_m2 + at,
                wide_count.get() + (total.each ? at : 0));
    }
  });
  for (int64_t c = 0; c < g.channels; ++c) {
    const auto i = static_cast<size_t>(c);
    mean[c] = static_cast<A>(total.mean[i]);
    rest[c] = static_cast<A>(total.mean[i] - static_cast<double>(mean[c]));
    m2[c] = static_cast<A>(total.m2[i]);
  }
  std::copy(total.kept.begin(), total.kept.end(), count);
}

// The same for runs, each channel for itself.
template <typename T>
void RunItemMoments(SimdLevel level, const Geometry& g, const Item& item,
                    const typename T::Storage* x, const Mask& mask, bool given,
                    typename T::Compute* mean, typename T::Compute* rest,
                    typename T::Compute* m2, double* count) {
  using A = typename T::Compute;
  const int64_t first = item.group * g.outer + item.outer_begin;
  ForRuns(g, item, [&](int64_t c, int64_t at) {
    RunState state{0, given ? static_cast<double>(mean[c]) : 0.0, 0.0};
    const uint8_t* kept = mask.data;
    int64_t mask_stride = g.inner;
    if (kept != nullptr) {
      kept += mask.per_channel ? at : first * g.inner;
      if (mask.per_channel) mask_stride *= g.channels;
    }
    KERNELS_SIMD_CALL(
        level, RunMoments<T>(x + at, kept, item.outer_end - item.outer_begin,
                             g.channels * g.inner, mask_stride, g.inner, given,
                             &state));
    mean[c] = static_cast<A>(state.mean);
    rest[c] = static_cast<A>(state.mean - static_cast<double>(mean[c]));
    m2[c] = static_cast<A>(state.m2);
    count[c] = static_cast<double>(state.kept);
  });
}

// Combines the parts of one group, in order.
template <typename A>
void CombineParts(SimdLevel level, const Geometry& g, const Cut& cut,
                  int64_t group, bool each_count, bool keep_mean,
                  const Partial<A>& partial, A* mean, A* var, A* count) {
  Total total(g.channels, each_count);
  for (int64_t part = 0; part < cut.outer_parts; ++part) {
    const int64_t at = (group * cut.outer_parts + part) * g.channels;
    total.Add(level, partial.mean.get() + at, partial.rest.get() + at,
              partial.m2.get() + at, partial.count.get() + at);
  }
  total.kept.resize(total.mean.size(), total.kept[0]);
  KERNELS_SIMD_CALL(level, FinishChannels<A>(total.mean.data(), total.m2.data(),
                                             total.kept.data(), g.channels,
                                             keep_mean ? nullptr : mean, var));
  for (int64_t c = 0; c < g.channels; ++c) {
    count[c] = static_cast<A>(total.kept[static_cast<size_t>(c)]);
  }
}

}  // namespace

template <typename T>
void Moments(const ParallelLoop& loop, SimdLevel level,
             const Geometry& geometry, const typename T::Storage* x,
             const Mask& mask, bool accurate, typename T::Compute* mean,
             typename T::Compute* var, typename T::Compute* count) {
  using A = typename T::Compute;
  const Geometry g = Simplify(geometry);
  if (g.elements() == 0) {
    const int64_t size = g.groups * g.channels;
    std::fill_n(mean, size, std::numeric_limits<A>::quiet_NaN());
    std::fill_n(var, size, std::numeric_limits<A>::quiet_NaN());
    std::fill_n(count, size, A{0});
    return;
  }
  const int64_t element_bytes = sizeof(typename T::Storage);
  const Cut cut = CutWork(g, element_bytes, MayFold(mask), /*sums=*/true);
  const bool by_rows = g.inner == 1;
  const bool each_count = mask.per_channel || !by_rows;
  Partial<A> partial(g.groups * cut.outer_parts * g.channels);
  for (const bool given : {false, true}) {
    if (given && !accurate) break;
    loop(cut.items(g), Bytes(g, element_bytes), [&](int64_t index) {
      const Item item = GetItem(g, cut, index, /*backwards=*/given);
      const int64_t at =
          (item.group * cut.outer_parts + item.part) * g.channels;
      A* part_mean = partial.mean.get() + at;
      A* part_rest = partial.rest.get() + at;
      A* part_m2 = partial.m2.get() + at;
      double* part_count = partial.count.get() + at;
      if (given) {
        const A* whole = mean + item.group * g.channels;
        std::copy(whole + item.channel_begin, whole + item.channel_end,
                  part_mean + item.channel_begin);
      }
      if (by_rows) {
        RowItemMoments<T>(level, g, cut, item, x, mask, given, part_mean,
                          part_rest, part_m2, part_count);
      } else {
        RunItemMoments<T>(level, g, item, x, mask, given, part_mean, part_rest,
                          part_m2, part_count);
      }
    });
    for (int64_t group = 0; group < g.groups; ++group) {
      const int64_t at = group * g.channels;
      CombineParts<A>(level, g, cut, group, each_count, given, partial,
                      mean + at, var + at, count + at);
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
  using A = typename T::Compute;
  const Geometry g = Simplify(geometry);
  if (g.elements() == 0) return;
  const int64_t element_bytes =
      sizeof(typename T::Storage) + sizeof(typename U::Storage);
  const Cut cut = CutWork(g, element_bytes, /*may_fold=*/true, /*sums=*/false);
  const Folded<A> means(mean, g, cut.fold);
  const Folded<A> muls(mul, g, cut.fold);
  const Folded<A> biases(bias, g, cut.fold);
  loop(cut.items(g), Bytes(g, element_bytes), [&](int64_t index) {
    const Item item = GetItem(g, cut, index, /*backwards=*/true);
    if (g.inner == 1) {
      ForRows(g, cut, item, [&](const Rows& rows) {
        KERNELS_SIMD_CALL(
            level, NormalizeRows<T, U>(x + rows.at, y + rows.at, rows.rows,
                                       rows.columns, rows.stride,
                                       means.Get(item.group, rows),
                                       muls.Get(item.group, rows),
                                       biases.Get(item.group, rows), relu));
      });
      return;
    }
    ForRuns(g, item, [&](int64_t c, int64_t at) {
      const int64_t s = item.group * g.channels + c;
      KERNELS_SIMD_CALL(
          level,
          NormalizeRuns<T, U>(x + at, y + at, item.outer_end - item.outer_begin,
                              g.channels * g.inner, g.inner, mean + s, mul + s,
                              bias + s, relu));
    });
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
  if (g.elements() == 0) {
    std::fill_n(sum_dy, g.groups * g.channels, A{0});
    std::fill_n(sum_dyx, g.groups * g.channels, A{0});
    return;
  }
  const int64_t element_bytes =
      sizeof(typename T::Storage) + sizeof(typename U::Storage);
  const Cut cut = CutWork(g, element_bytes, /*may_fold=*/true, /*sums=*/true);
  const Folded<A> means(mean, g, cut.fold);
  const Folded<A> muls(mul, g, cut.fold);
  const Folded<A> biases(bias, g, cut.fold);
  // [groups, outer_parts, channels]
  std::vector<double> part_dy(
      static_cast<size_t>(g.groups * cut.outer_parts * g.channels));
  std::vector<double> part_dyx(part_dy.size());
  loop(cut.items(g), Bytes(g, element_bytes), [&](int64_t index) {
    const Item item = GetItem(g, cut, index, /*backwards=*/false);
    const int64_t part =
        (item.group * cut.outer_parts + item.part) * g.channels;
    double* own_dy = part_dy.data() + part;
    double* own_dyx = part_dyx.data() + part;
    if (g.inner == 1) {
      const int64_t width = item.channel_end - item.channel_begin;
      const auto wide = NewArray<A>(2 * width * cut.fold);
      ForRows(g, cut, item, [&](const Rows& rows) {
        std::fill_n(wide.get(), 2 * rows.columns, A{0});
        const A* sum = wide.get();
        KERNELS_SIMD_CALL(
            level, GradSumsRows<T, U>(
                       x + rows.at, dy + rows.at, rows.rows, rows.columns,
                       rows.stride, means.Get(item.group, rows),
                       muls.Get(item.group, rows), biases.Get(item.group, rows),
                       relu, wide.get(), wide.get() + rows.columns));
        for (int64_t i = 0; i < rows.fold; ++i, sum += width) {
          for (int64_t c = 0; c < width; ++c) {
            own_dy[item.channel_begin + c] += sum[c];
            own_dyx[item.channel_begin + c] += sum[rows.columns + c];
          }
        }
      });
      return;
    }
    ForRuns(g, item, [&](int64_t c, int64_t at) {
      const int64_t s = item.group * g.channels + c;
      KERNELS_SIMD_CALL(
          level,
          GradSumsRuns<T, U>(x + at, dy + at, item.outer_end - item.outer_begin,
                             g.channels * g.inner, g.inner, mean[s], mul[s],
                             bias[s], relu, own_dy + c, own_dyx + c));
    });
  });
  std::vector<double> total(static_cast<size_t>(2 * g.channels));
  for (int64_t group = 0; group < g.groups; ++group) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t part = 0; part < cut.outer_parts; ++part) {
      const auto at =
          static_cast<size_t>((group * cut.outer_parts + part) * g.channels);
      for (size_t c = 0; c < static_cast<size_t>(g.channels); ++c) {
        total[2 * c] += part_dy[at + c];
        total[2 * c + 1] += part_dyx[at + c];
      }
    }
    for (int64_t c = 0; c < g.channels; ++c) {
      const auto i = static_cast<size_t>(2 * c);
      sum_dy[group * g.channels + c] = static_cast<A>(total[i]);
      sum_dyx[group * g.channels + c] = static_cast<A>(total[i + 1]);
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
  if (g.elements() == 0) return;
  const int64_t element_bytes =
      2 * sizeof(typename T::Storage) + sizeof(typename U::Storage);
  const Cut cut = CutWork(g, element_bytes, MayFold(mask), /*sums=*/false);
  const Folded<A> means(mean, g, cut.fold);
  const Folded<A> muls(mul, g, cut.fold);
  const Folded<A> biases(bias, g, cut.fold);
  const Folded<A> c0s(c0, g, cut.fold);
  const Folded<A> c1s(c1, g, cut.fold);
  const auto rows_kernel = [&](int64_t group, const Rows& rows,
                               const uint8_t* kept, bool with_stats) {
    KERNELS_SIMD_CALL(
        level, GradInputRows<T, U>(
                   x + rows.at, dy + rows.at, kept, dx + rows.at, rows.rows,
                   rows.columns, rows.stride, means.Get(group, rows),
                   muls.Get(group, rows), biases.Get(group, rows),
                   with_stats ? c0s.Get(group, rows) : nullptr,
                   with_stats ? c1s.Get(group, rows) : nullptr, relu));
  };
  loop(cut.items(g), Bytes(g, element_bytes), [&](int64_t index) {
    const Item item = GetItem(g, cut, index, /*backwards=*/true);
    if (g.inner == 1) {
      ForRows(g, cut, item, [&](const Rows& rows) {
        if (mask.data == nullptr) {
          rows_kernel(item.group, rows, nullptr, true);
          return;
        }
        if (mask.per_channel) {
          rows_kernel(item.group, rows, mask.data + rows.at, true);
          return;
        }
        // Neighbouring rows that are all kept, or all not.
        const uint8_t* kept = mask.data + rows.row;
        for (int64_t r = 0; r < rows.rows;) {
          int64_t end = r + 1;
          while (end < rows.rows && (kept[end] != 0) == (kept[r] != 0)) ++end;
          Rows same = rows;
          same.at += r * rows.stride;
          same.row += r;
          same.rows = end - r;
          rows_kernel(item.group, same, nullptr, kept[r] != 0);
          r = end;
        }
      });
      return;
    }
    const int64_t first = item.group * g.outer + item.outer_begin;
    ForRuns(g, item, [&](int64_t c, int64_t at) {
      const int64_t s = item.group * g.channels + c;
      const uint8_t* kept = mask.data;
      int64_t mask_stride = g.inner;
      if (kept != nullptr) {
        kept += mask.per_channel ? at : first * g.inner;
        if (mask.per_channel) mask_stride *= g.channels;
      }
      KERNELS_SIMD_CALL(
          level, GradInputRuns<T, U>(x + at, dy + at, kept, dx + at,
                                     item.outer_end - item.outer_begin,
                                     g.channels * g.inner, mask_stride, g.inner,
                                     mean + s, mul + s, bias + s, c0 + s,
                                     c1 + s, relu));
    });
  });
}

template <typename A>
void Blend(SimdLevel level, A momentum, const A* old, const A* batch,
           int64_t channels, A* blended) {
  KERNELS_SIMD_CALL(level,
                    BlendChannels<A>(momentum, old, batch, channels, blended));
}

template <typename A>
void Factors(SimdLevel level, const A* var, const A* scale, A epsilon,
             int64_t channels, A* rstd, A* mul) {
  KERNELS_SIMD_CALL(
      level, FactorsOfChannels<A>(var, scale, epsilon, channels, rstd, mul));
}

template <typename A>
void GradFactors(SimdLevel level, const A* mul, const A* rstd, const A* count,
                 const A* sum_dy, int64_t channels, A* dscale, A* c0, A* c1) {
  KERNELS_SIMD_CALL(level, GradFactorsOfChannels<A>(mul, rstd, count, sum_dy,
                                                    channels, dscale, c0, c1));
}

#define KERNELS_INSTANTIATE_CHANNELS(A)                                        \
  template void Blend<A>(SimdLevel, A, const A*, const A*, int64_t, A*);       \
  template void Factors<A>(SimdLevel, const A*, const A*, A, int64_t, A*, A*); \
  template void GradFactors<A>(SimdLevel, const A*, const A*, const A*,        \
                               const A*, int64_t, A*, A*, A*);
#define KERNELS_INSTANTIATE_ONE(T)                                            \
  template void Moments<T>(const ParallelLoop&, SimdLevel, const Geometry&,   \
                           const T::Storage*, const Mask&, bool, T::Compute*, \
                           T::Compute*, T::Compute*);
#define KERNELS_INSTANTIATE_TWO(T, U)                                       \
  template void NormalizeAll<T, U>(const ParallelLoop&, SimdLevel,          \
                                   const Geometry&, const T::Storage*,      \
                                   const T::Compute*, const T::Compute*,    \
                                   const T::Compute*, bool, U::Storage*);   \
  template void GradSums<T, U>(                                             \
      const ParallelLoop&, SimdLevel, const Geometry&, const T::Storage*,   \
      const U::Storage*, const T::Compute*, const T::Compute*,              \
      const T::Compute*, bool, T::Compute*, T::Compute*);                   \
  template void GradInputAll<T, U>(                                         \
      const ParallelLoop&, SimdLevel, const Geometry&, const T::Storage*,   \
      const U::Storage*, const T::Compute*, const T::Compute*,              \
      const T::Compute*, const T::Compute*, const T::Compute*, const Mask&, \
      bool, T::Storage*);

KERNELS_INSTANTIATE_CHANNELS(double)
KERNELS_INSTANTIATE_CHANNELS(float)
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
