#include "kernels/batch_stat/cpu/ffi.h"

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/batch_stat/cc/geometry.h"
#include "kernels/batch_stat/cc/spec.h"
#include "kernels/batch_stat/cpu/batch_stat.h"
#include "kernels/common/cpu_features.h"
#include "kernels/common/element_types.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/subnormals.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::batch_stat {
namespace {

// Blends a batch's statistics into the running averages, which may lie where
// the new ones go.
template <typename A>
void BlendGroups(SimdLevel level, const Geometry& g, const A* momentum,
                 const A* old_mean, const A* old_var, const A* mean,
                 const A* var, A* new_mean, A* new_var) {
  for (int64_t group = 0; group < g.groups; ++group) {
    const int64_t at = group * g.channels;
    Blend(level, momentum[group], old_mean + at, mean + at, g.channels,
          new_mean + at);
    Blend(level, momentum[group], old_var + at, var + at, g.channels,
          new_var + at);
  }
}

ffi::Error BatchStatUpdateImpl(
    ffi::ThreadPool pool, const ffi::Dictionary& attributes,
    ffi::AnyBuffer old_mean, ffi::AnyBuffer old_var, ffi::AnyBuffer momentum,
    ffi::AnyBuffer x, ffi::RemainingArgs rest,
    ffi::Result<ffi::AnyBuffer> new_mean, ffi::Result<ffi::AnyBuffer> new_var,
    ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> var) {
  const WithSubnormals subnormals;
  return CheckUpdate(
      attributes,
      {old_mean, old_var, momentum, x, rest, *new_mean, *new_var, *mean, *var},
      [&](auto t, const Options& options, const Geometry& g,
          const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using A = typename T::Compute;
        const SimdLevel level = CurrentSimdLevel();
        std::vector<A> count(static_cast<size_t>(g.groups * g.channels));
        Moments<T>(MakeParallelLoop(pool), level, g,
                   Data<typename T::Storage>(x), mask, options.accurate != 0,
                   Data<A>(mean), Data<A>(var), count.data());
        BlendGroups(level, g, Data<A>(momentum), Data<A>(old_mean),
                    Data<A>(old_var), Data<A>(mean), Data<A>(var),
                    Data<A>(new_mean), Data<A>(new_var));
        return ffi::Error::Success();
      });
}

ffi::Error BatchStatTrainImpl(
    ffi::ThreadPool pool, const ffi::Dictionary& attributes,
    ffi::AnyBuffer old_mean, ffi::AnyBuffer old_var, ffi::AnyBuffer momentum,
    ffi::AnyBuffer scale, ffi::AnyBuffer x, ffi::RemainingArgs rest,
    ffi::Result<ffi::AnyBuffer> new_mean, ffi::Result<ffi::AnyBuffer> new_var,
    ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> var,
    ffi::Result<ffi::AnyBuffer> count, ffi::Result<ffi::AnyBuffer> rstd,
    ffi::Result<ffi::AnyBuffer> mul) {
  const WithSubnormals subnormals;
  return CheckTrain(
      attributes,
      {old_mean, old_var, momentum, x, rest, *new_mean, *new_var, *mean, *var},
      scale, *count, *rstd, *mul,
      [&](auto t, const Options& options, const Geometry& g,
          const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using A = typename T::Compute;
        const SimdLevel level = CurrentSimdLevel();
        Moments<T>(MakeParallelLoop(pool), level, g,
                   Data<typename T::Storage>(x), mask, options.accurate != 0,
                   Data<A>(mean), Data<A>(var), Data<A>(count));
        BlendGroups(level, g, Data<A>(momentum), Data<A>(old_mean),
                    Data<A>(old_var), Data<A>(mean), Data<A>(var),
                    Data<A>(new_mean), Data<A>(new_var));
        Factors(level, Data<A>(var), Data<A>(scale),
                static_cast<A>(options.epsilon), g.groups * g.channels,
                Data<A>(rstd), Data<A>(mul));
        return ffi::Error::Success();
      });
}

ffi::Error BatchStatMomentsImpl(ffi::ThreadPool pool,
                                const ffi::Dictionary& attributes,
                                ffi::AnyBuffer x, ffi::RemainingArgs rest,
                                ffi::Result<ffi::AnyBuffer> mean,
                                ffi::Result<ffi::AnyBuffer> var,
                                ffi::Result<ffi::AnyBuffer> count) {
  const WithSubnormals subnormals;
  return CheckMoments(attributes, x, rest, *mean, *var, *count,
                      [&](auto t, const Options& options, const Geometry& g,
                          const Mask& mask) -> ffi::Error {
                        using T = decltype(t);
                        using A = typename T::Compute;
                        Moments<T>(MakeParallelLoop(pool), CurrentSimdLevel(),
                                   g, Data<typename T::Storage>(x), mask,
                                   options.accurate != 0, Data<A>(mean),
                                   Data<A>(var), Data<A>(count));
                        return ffi::Error::Success();
                      });
}

ffi::Error BatchStatNormalizeImpl(ffi::ThreadPool pool,
                                  const ffi::Dictionary& attributes,
                                  ffi::AnyBuffer x, ffi::AnyBuffer mean,
                                  ffi::AnyBuffer mul, ffi::AnyBuffer bias,
                                  ffi::Result<ffi::AnyBuffer> y) {
  const WithSubnormals subnormals;
  return CheckNormalize(attributes, x, mean, mul, bias, *y,
                        [&](auto t, auto u, const Options& options,
                            const Geometry& g) -> ffi::Error {
                          using T = decltype(t);
                          using U = decltype(u);
                          using A = typename T::Compute;
                          NormalizeAll<T, U>(
                              MakeParallelLoop(pool), CurrentSimdLevel(), g,
                              Data<typename T::Storage>(x), Data<A>(mean),
                              Data<A>(mul), Data<A>(bias), options.relu != 0,
                              Data<typename U::Storage>(y));
                          return ffi::Error::Success();
                        });
}

ffi::Error BatchStatGradSumsImpl(
    ffi::ThreadPool pool, const ffi::Dictionary& attributes, ffi::AnyBuffer x,
    ffi::AnyBuffer dy, ffi::AnyBuffer mean, ffi::AnyBuffer mul,
    ffi::AnyBuffer bias, ffi::AnyBuffer rstd, ffi::AnyBuffer count,
    ffi::Result<ffi::AnyBuffer> sum_dy, ffi::Result<ffi::AnyBuffer> dscale,
    ffi::Result<ffi::AnyBuffer> c0, ffi::Result<ffi::AnyBuffer> c1) {
  const WithSubnormals subnormals;
  return CheckGradSums(
      attributes, x, dy, mean, mul, bias, rstd, count, *sum_dy, *dscale, *c0,
      *c1,
      [&](auto t, auto u, const Options& options,
          const Geometry& g) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        const SimdLevel level = CurrentSimdLevel();
        GradSums<T, U>(
            MakeParallelLoop(pool), level, g, Data<typename T::Storage>(x),
            Data<typename U::Storage>(dy), Data<A>(mean), Data<A>(mul),
            Data<A>(bias), options.relu != 0, Data<A>(sum_dy), Data<A>(dscale));
        GradFactors(level, Data<A>(mul), Data<A>(rstd), Data<A>(count),
                    Data<A>(sum_dy), g.groups * g.channels, Data<A>(dscale),
                    Data<A>(c0), Data<A>(c1));
        return ffi::Error::Success();
      });
}

ffi::Error BatchStatGradInputImpl(ffi::ThreadPool pool,
                                  const ffi::Dictionary& attributes,
                                  ffi::AnyBuffer x, ffi::AnyBuffer dy,
                                  ffi::AnyBuffer mean, ffi::AnyBuffer mul,
                                  ffi::AnyBuffer bias, ffi::AnyBuffer c0,
                                  ffi::AnyBuffer c1, ffi::RemainingArgs rest,
                                  ffi::Result<ffi::AnyBuffer> dx) {
  const WithSubnormals subnormals;
  return CheckGradInput(attributes, x, dy, mean, mul, bias, c0, c1, rest, *dx,
                        [&](auto t, auto u, const Options& options,
                            const Geometry& g, const Mask& mask) -> ffi::Error {
                          using T = decltype(t);
                          using U = decltype(u);
                          using A = typename T::Compute;
                          GradInputAll<T, U>(
                              MakeParallelLoop(pool), CurrentSimdLevel(), g,
                              Data<typename T::Storage>(x),
                              Data<typename U::Storage>(dy), Data<A>(mean),
                              Data<A>(mul), Data<A>(bias), Data<A>(c0),
                              Data<A>(c1), mask, options.relu != 0,
                              Data<typename T::Storage>(dx));
                          return ffi::Error::Success();
                        });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatUpdate, BatchStatUpdateImpl,
    UpdateSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatTrain, BatchStatTrainImpl,
    TrainSpec(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
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
