#include "kernels/batch_stat/batch_stat_ffi.h"

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/batch_stat/batch_stat_cpu.h"
#include "kernels/batch_stat/batch_stat_spec.h"
#include "kernels/batch_stat/geometry.h"
#include "kernels/common/cpu_features.h"
#include "kernels/common/element_types.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/parallel_for.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::batch_stat {
namespace {

ffi::Error BatchStatUpdateImpl(
    ffi::ThreadPool pool, int64_t feature_axis, int64_t batch_axes,
    int64_t accurate, ffi::AnyBuffer old_mean, ffi::AnyBuffer old_var,
    ffi::AnyBuffer momentum, ffi::AnyBuffer x, ffi::RemainingArgs rest,
    ffi::Result<ffi::AnyBuffer> new_mean, ffi::Result<ffi::AnyBuffer> new_var,
    ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> var) {
  return CheckUpdate(
      feature_axis, batch_axes, old_mean, old_var, momentum, x, rest, *new_mean,
      *new_var, *mean, *var,
      [&](auto t, const Geometry& g, const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using A = typename T::Compute;
        std::vector<A> count(static_cast<size_t>(g.groups * g.channels));
        Moments<T>(MakeParallelLoop(pool), CurrentSimdLevel(), g,
                   Data<typename T::Storage>(x), mask, accurate != 0,
                   Data<A>(mean), Data<A>(var), count.data());
        for (int64_t i = 0; i < g.groups * g.channels; ++i) {
          // The old averages may lie where the new ones go.
          const A keep = Data<A>(momentum)[i];
          Data<A>(new_mean)[i] =
              keep * Data<A>(old_mean)[i] + (1 - keep) * Data<A>(mean)[i];
          Data<A>(new_var)[i] =
              keep * Data<A>(old_var)[i] + (1 - keep) * Data<A>(var)[i];
        }
        return ffi::Error::Success();
      });
}

ffi::Error BatchStatMomentsImpl(ffi::ThreadPool pool, int64_t feature_axis,
                                int64_t batch_axes, int64_t accurate,
                                ffi::AnyBuffer x, ffi::RemainingArgs rest,
                                ffi::Result<ffi::AnyBuffer> mean,
                                ffi::Result<ffi::AnyBuffer> var,
                                ffi::Result<ffi::AnyBuffer> count) {
  return CheckMoments(
      feature_axis, batch_axes, x, rest, *mean, *var, *count,
      [&](auto t, const Geometry& g, const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using A = typename T::Compute;
        Moments<T>(MakeParallelLoop(pool), CurrentSimdLevel(), g,
                   Data<typename T::Storage>(x), mask, accurate != 0,
                   Data<A>(mean), Data<A>(var), Data<A>(count));
        return ffi::Error::Success();
      });
}

ffi::Error BatchStatNormalizeImpl(ffi::ThreadPool pool, int64_t feature_axis,
                                  int64_t batch_axes, int64_t relu,
                                  ffi::AnyBuffer x, ffi::AnyBuffer mean,
                                  ffi::AnyBuffer mul, ffi::AnyBuffer bias,
                                  ffi::Result<ffi::AnyBuffer> y) {
  return CheckNormalize(feature_axis, batch_axes, x, mean, mul, bias, "y", *y,
                        [&](auto t, auto u, const Geometry& g) -> ffi::Error {
                          using T = decltype(t);
                          using U = decltype(u);
                          using A = typename T::Compute;
                          NormalizeAll<T, U>(
                              MakeParallelLoop(pool), CurrentSimdLevel(), g,
                              Data<typename T::Storage>(x), Data<A>(mean),
                              Data<A>(mul), Data<A>(bias), relu != 0,
                              Data<typename U::Storage>(y));
                          return ffi::Error::Success();
                        });
}

ffi::Error BatchStatGradSumsImpl(ffi::ThreadPool pool, int64_t feature_axis,
                                 int64_t batch_axes, int64_t relu,
                                 ffi::AnyBuffer x, ffi::AnyBuffer dy,
                                 ffi::AnyBuffer mean, ffi::AnyBuffer mul,
                                 ffi::AnyBuffer bias,
                                 ffi::Result<ffi::AnyBuffer> sum_dy,
                                 ffi::Result<ffi::AnyBuffer> sum_dyx) {
  return CheckGradSums(
      feature_axis, batch_axes, x, dy, mean, mul, bias, *sum_dy, *sum_dyx,
      [&](auto t, auto u, const Geometry& g) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        GradSums<T, U>(MakeParallelLoop(pool), CurrentSimdLevel(), g,
                       Data<typename T::Storage>(x),
                       Data<typename U::Storage>(dy), Data<A>(mean),
                       Data<A>(mul), Data<A>(bias), relu != 0, Data<A>(sum_dy),
                       Data<A>(sum_dyx));
        return ffi::Error::Success();
      });
}

ffi::Error BatchStatGradInputImpl(ffi::ThreadPool pool, int64_t feature_axis,
                                  int64_t batch_axes, int64_t relu,
                                  ffi::AnyBuffer x, ffi::AnyBuffer dy,
                                  ffi::AnyBuffer mean, ffi::AnyBuffer mul,
                                  ffi::AnyBuffer bias, ffi::AnyBuffer c0,
                                  ffi::AnyBuffer c1, ffi::RemainingArgs rest,
                                  ffi::Result<ffi::AnyBuffer> dx) {
  return CheckGradInput(
      feature_axis, batch_axes, x, dy, mean, mul, bias, c0, c1, rest, *dx,
      [&](auto t, auto u, const Geometry& g, const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        GradInputAll<T, U>(
            MakeParallelLoop(pool), CurrentSimdLevel(), g,
            Data<typename T::Storage>(x), Data<typename U::Storage>(dy),
            Data<A>(mean), Data<A>(mul), Data<A>(bias), Data<A>(c0),
            Data<A>(c1), mask, relu != 0, Data<typename T::Storage>(dx));
        return ffi::Error::Success();
      });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatUpdate, BatchStatUpdateImpl,
    UpdateSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatMoments, BatchStatMomentsImpl,
    MomentsSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatNormalize, BatchStatNormalizeImpl,
    NormalizeSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatGradSums, BatchStatGradSumsImpl,
    GradSumsSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatGradInput, BatchStatGradInputImpl,
    GradInputSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace kernels::batch_stat
