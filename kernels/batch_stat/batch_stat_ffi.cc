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
  Geometry g;
  Mask mask;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(GetMask(rest, g, &mask));
  return DispatchFloat(x.element_type(), "x", [&](auto t) -> ffi::Error {
    using T = decltype(t);
    using A = typename T::Compute;
    constexpr ffi::DataType dtype = ComputeDtype<T>();
    KERNELS_RETURN_IF_ERROR(CheckStat(old_mean, "mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(old_var, "var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(*new_mean, "the new mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(*new_var, "the new var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(*mean, "the batch mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(*var, "the batch var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(momentum, "momentum", g, dtype));
    std::vector<A> count(static_cast<size_t>(g.groups * g.channels));
    Moments<T>(MakeParallelLoop(pool), CurrentSimdLevel(), g,
               Data<typename T::Storage>(x), mask, accurate != 0, Data<A>(mean),
               Data<A>(var), count.data());
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
  Geometry g;
  Mask mask;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(GetMask(rest, g, &mask));
  return DispatchFloat(x.element_type(), "x", [&](auto t) -> ffi::Error {
    using T = decltype(t);
    using A = typename T::Compute;
    constexpr ffi::DataType dtype = ComputeDtype<T>();
    KERNELS_RETURN_IF_ERROR(CheckStat(*mean, "mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(*var, "var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(*count, "count", g, dtype));
    Moments<T>(MakeParallelLoop(pool), CurrentSimdLevel(), g,
               Data<typename T::Storage>(x), mask, accurate != 0, Data<A>(mean),
               Data<A>(var), Data<A>(count));
    return ffi::Error::Success();
  });
}

ffi::Error BatchStatNormalizeImpl(ffi::ThreadPool pool, int64_t feature_axis,
                                  int64_t batch_axes, int64_t relu,
                                  ffi::AnyBuffer x, ffi::AnyBuffer mean,
                                  ffi::AnyBuffer mul, ffi::AnyBuffer bias,
                                  ffi::Result<ffi::AnyBuffer> y) {
  Geometry g;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(CheckSameShape(*y, "y", x));
  return DispatchPair(
      x.element_type(), y->element_type(), [&](auto t, auto u) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        constexpr ffi::DataType dtype = ComputeDtype<T>();
        KERNELS_RETURN_IF_ERROR(CheckStat(mean, "mean", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(mul, "mul", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(bias, "bias", g, dtype));
        NormalizeAll<T, U>(MakeParallelLoop(pool), CurrentSimdLevel(), g,
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
  Geometry g;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(CheckSameShape(dy, "dy", x));
  return DispatchPair(
      x.element_type(), dy.element_type(), [&](auto t, auto u) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        constexpr ffi::DataType dtype = ComputeDtype<T>();
        KERNELS_RETURN_IF_ERROR(CheckStat(mean, "mean", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(mul, "mul", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(bias, "bias", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(*sum_dy, "sum_dy", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(*sum_dyx, "sum_dyx", g, dtype));
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
  Geometry g;
  Mask mask;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(GetMask(rest, g, &mask));
  KERNELS_RETURN_IF_ERROR(CheckSameShape(dy, "dy", x));
  KERNELS_RETURN_IF_ERROR(CheckSameShape(*dx, "dx", x));
  KERNELS_REQUIRE(dx->element_type() == x.element_type(), "`dx` must be ",
                  DtypeName(x.element_type()), " like `x`, but got ",
                  DtypeName(dx->element_type()), ".");
  return DispatchPair(
      x.element_type(), dy.element_type(), [&](auto t, auto u) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        constexpr ffi::DataType dtype = ComputeDtype<T>();
        KERNELS_RETURN_IF_ERROR(CheckStat(mean, "mean", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(mul, "mul", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(bias, "bias", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(c0, "c0", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(c1, "c1", g, dtype));
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
