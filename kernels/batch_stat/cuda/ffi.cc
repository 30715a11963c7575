// XLA FFI handlers of batch_stat for the platform "CUDA": those of
// cpu/ffi.h, of which the ones that sum give their workspace as one more
// result. Its first dimension says into how many parts the sums are cut.

#include "xla/ffi/api/ffi.h"

#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels/batch_stat/cc/geometry.h"
#include "kernels/batch_stat/cc/spec.h"
#include "kernels/batch_stat/cuda/batch_stat.h"
#include "kernels/common/cuda_ffi_util.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"

namespace kernels::batch_stat {
namespace {

// Reads how many parts, of `parts` numbers for each channel, `workspace` has.
ffi::Error GetSplits(const ffi::AnyBuffer& workspace, const Geometry& g,
                     int64_t parts, ffi::DataType dtype, int64_t* splits) {
  const auto dims = workspace.dimensions();
  KERNELS_REQUIRE(workspace.element_type() == dtype && dims.size() == 3 &&
                      dims[0] >= 1 && dims[1] == parts &&
                      dims[2] == g.groups * g.channels,
                  "`workspace` must be ", DtypeName(dtype), " of shape [n, ",
                  parts, ", ", g.groups * g.channels, "], but got ",
                  DtypeName(workspace.element_type()), ShapeText(dims), ".");
  *splits = dims[0];
  return ffi::Error::Success();
}

// As GetSplits for the workspace of the moments, which has one part more.
ffi::Error GetMomentsSplits(const ffi::AnyBuffer& workspace, const Geometry& g,
                            ffi::DataType dtype, int64_t* splits) {
  KERNELS_RETURN_IF_ERROR(
      GetSplits(workspace, g, kMomentsParts, dtype, splits));
  KERNELS_REQUIRE(*splits >= 2,
                  "`workspace` must have 2 parts or more, but got ", *splits,
                  ".");
  --*splits;
  return ffi::Error::Success();
}

// Starts what computes moments, and all that `results` wants of them.
template <typename T>
ffi::Error RunMoments(cudaStream_t stream, const Geometry& g,
                      const ffi::AnyBuffer& x, const Mask& mask, bool accurate,
                      const MomentsResults<typename T::Compute>& results,
                      ffi::Result<ffi::AnyBuffer>& workspace,
                      const char* what) {
  int64_t splits = 0;
  KERNELS_RETURN_IF_ERROR(
      GetMomentsSplits(*workspace, g, ComputeDtype<T>(), &splits));
  return LaunchStatus(
      LaunchMoments<T>(stream, g, Data<typename T::Storage>(x), mask, accurate,
                       results, Data<typename T::Compute>(workspace), splits),
      what);
}

ffi::Error UpdateImpl(cudaStream_t stream, const ffi::Dictionary& attributes,
                      ffi::AnyBuffer old_mean, ffi::AnyBuffer old_var,
                      ffi::AnyBuffer momentum, ffi::AnyBuffer x,
                      ffi::RemainingArgs rest,
                      ffi::Result<ffi::AnyBuffer> new_mean,
                      ffi::Result<ffi::AnyBuffer> new_var,
                      ffi::Result<ffi::AnyBuffer> mean,
                      ffi::Result<ffi::AnyBuffer> var,
                      ffi::Result<ffi::AnyBuffer> workspace) {
  return CheckUpdate(
      attributes,
      {old_mean, old_var, momentum, x, rest, *new_mean, *new_var, *mean, *var},
      [&](auto t, const Options& options, const Geometry& g,
          const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using A = typename T::Compute;
        MomentsResults<A> results = {};
        results.mean = Data<A>(mean);
        results.var = Data<A>(var);
        results.momentum = Data<A>(momentum);
        results.old_mean = Data<A>(old_mean);
        results.old_var = Data<A>(old_var);
        results.new_mean = Data<A>(new_mean);
        results.new_var = Data<A>(new_var);
        return RunMoments<T>(stream, g, x, mask, options.accurate != 0, results,
                             workspace, "batch_stat.update");
      });
}

ffi::Error TrainImpl(
    cudaStream_t stream, const ffi::Dictionary& attributes,
    ffi::AnyBuffer old_mean, ffi::AnyBuffer old_var, ffi::AnyBuffer momentum,
    ffi::AnyBuffer scale, ffi::AnyBuffer x, ffi::RemainingArgs rest,
    ffi::Result<ffi::AnyBuffer> new_mean, ffi::Result<ffi::AnyBuffer> new_var,
    ffi::Result<ffi::AnyBuffer> mean, ffi::Result<ffi::AnyBuffer> var,
    ffi::Result<ffi::AnyBuffer> count, ffi::Result<ffi::AnyBuffer> rstd,
    ffi::Result<ffi::AnyBuffer> mul, ffi::Result<ffi::AnyBuffer> workspace) {
  return CheckTrain(
      attributes,
      {old_mean, old_var, momentum, x, rest, *new_mean, *new_var, *mean, *var},
      scale, *count, *rstd, *mul,
      [&](auto t, const Options& options, const Geometry& g,
          const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using A = typename T::Compute;
        const MomentsResults<A> results = {Data<A>(mean),
                                           Data<A>(var),
                                           Data<A>(count),
                                           Data<A>(momentum),
                                           Data<A>(old_mean),
                                           Data<A>(old_var),
                                           Data<A>(new_mean),
                                           Data<A>(new_var),
                                           static_cast<A>(options.epsilon),
                                           Data<A>(scale),
                                           Data<A>(rstd),
                                           Data<A>(mul)};
        return RunMoments<T>(stream, g, x, mask, options.accurate != 0, results,
                             workspace, "the statistics of batch_stat");
      });
}

ffi::Error MomentsImpl(cudaStream_t stream, const ffi::Dictionary& attributes,
                       ffi::AnyBuffer x, ffi::RemainingArgs rest,
                       ffi::Result<ffi::AnyBuffer> mean,
                       ffi::Result<ffi::AnyBuffer> var,
                       ffi::Result<ffi::AnyBuffer> count,
                       ffi::Result<ffi::AnyBuffer> workspace) {
  return CheckMoments(attributes, x, rest, *mean, *var, *count,
                      [&](auto t, const Options& options, const Geometry& g,
                          const Mask& mask) -> ffi::Error {
                        using T = decltype(t);
                        using A = typename T::Compute;
                        MomentsResults<A> results = {};
                        results.mean = Data<A>(mean);
                        results.var = Data<A>(var);
                        results.count = Data<A>(count);
                        return RunMoments<T>(
                            stream, g, x, mask, options.accurate != 0, results,
                            workspace, "the moments of batch_stat");
                      });
}

ffi::Error NormalizeImpl(cudaStream_t stream, const ffi::Dictionary& attributes,
                         ffi::AnyBuffer x, ffi::AnyBuffer mean,
                         ffi::AnyBuffer mul, ffi::AnyBuffer bias,
                         ffi::Result<ffi::AnyBuffer> y) {
  return CheckNormalize(
      attributes, x, mean, mul, bias, *y,
      [&](auto t, auto u, const Options& options,
          const Geometry& g) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        return LaunchStatus(
            LaunchNormalize<T, U>(stream, g, Data<typename T::Storage>(x),
                                  Data<A>(mean), Data<A>(mul), Data<A>(bias),
                                  options.relu != 0,
                                  Data<typename U::Storage>(y)),
            "batch_stat's normalisation");
      });
}

ffi::Error GradSumsImpl(
    cudaStream_t stream, const ffi::Dictionary& attributes, ffi::AnyBuffer x,
    ffi::AnyBuffer dy, ffi::AnyBuffer mean, ffi::AnyBuffer mul,
    ffi::AnyBuffer bias, ffi::AnyBuffer rstd, ffi::AnyBuffer count,
    ffi::Result<ffi::AnyBuffer> sum_dy, ffi::Result<ffi::AnyBuffer> dscale,
    ffi::Result<ffi::AnyBuffer> c0, ffi::Result<ffi::AnyBuffer> c1,
    ffi::Result<ffi::AnyBuffer> workspace) {
  return CheckGradSums(
      attributes, x, dy, mean, mul, bias, rstd, count, *sum_dy, *dscale, *c0,
      *c1,
      [&](auto t, auto u, const Options& options,
          const Geometry& g) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        constexpr ffi::DataType dtype = ComputeDtype<T>();
        int64_t splits = 0;
        KERNELS_RETURN_IF_ERROR(
            GetSplits(*workspace, g, kGradSumsParts, dtype, &splits));
        const GradSumsResults<A> results = {
            Data<A>(mul),    Data<A>(rstd), Data<A>(count), Data<A>(sum_dy),
            Data<A>(dscale), Data<A>(c0),   Data<A>(c1)};
        return LaunchStatus(
            LaunchGradSums<T, U>(stream, g, Data<typename T::Storage>(x),
                                 Data<typename U::Storage>(dy), Data<A>(mean),
                                 Data<A>(mul), Data<A>(bias), options.relu != 0,
                                 results, Data<A>(workspace), splits),
            "the sums of batch_stat's gradient");
      });
}

ffi::Error GradInputImpl(cudaStream_t stream, const ffi::Dictionary& attributes,
                         ffi::AnyBuffer x, ffi::AnyBuffer dy,
                         ffi::AnyBuffer mean, ffi::AnyBuffer mul,
                         ffi::AnyBuffer bias, ffi::AnyBuffer c0,
                         ffi::AnyBuffer c1, ffi::RemainingArgs rest,
                         ffi::Result<ffi::AnyBuffer> dx) {
  return CheckGradInput(
      attributes, x, dy, mean, mul, bias, c0, c1, rest, *dx,
      [&](auto t, auto u, const Options& options, const Geometry& g,
          const Mask& mask) -> ffi::Error {
        using T = decltype(t);
        using U = decltype(u);
        using A = typename T::Compute;
        return LaunchStatus(
            LaunchGradInput<T, U>(stream, g, Data<typename T::Storage>(x),
                                  Data<typename U::Storage>(dy), Data<A>(mean),
                                  Data<A>(mul), Data<A>(bias), Data<A>(c0),
                                  Data<A>(c1), mask, options.relu != 0,
                                  Data<typename T::Storage>(dx)),
            "batch_stat's gradient");
      });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER(kUpdate, UpdateImpl,
                       UpdateSpec(ffi::Ffi::Bind().Ctx<Stream>())
                           .Ret<ffi::AnyBuffer>(),  // workspace
                       {kGraphCompatible});
XLA_FFI_DEFINE_HANDLER(kTrain, TrainImpl,
                       TrainSpec(ffi::Ffi::Bind().Ctx<Stream>())
                           .Ret<ffi::AnyBuffer>(),  // workspace
                       {kGraphCompatible});
XLA_FFI_DEFINE_HANDLER(kMoments, MomentsImpl,
                       MomentsSpec(ffi::Ffi::Bind().Ctx<Stream>())
                           .Ret<ffi::AnyBuffer>(),  // workspace
                       {kGraphCompatible});
XLA_FFI_DEFINE_HANDLER(kNormalize, NormalizeImpl,
                       NormalizeSpec(ffi::Ffi::Bind().Ctx<Stream>()),
                       {kGraphCompatible});
XLA_FFI_DEFINE_HANDLER(kGradSums, GradSumsImpl,
                       GradSumsSpec(ffi::Ffi::Bind().Ctx<Stream>())
                           .Ret<ffi::AnyBuffer>(),  // workspace
                       {kGraphCompatible});
XLA_FFI_DEFINE_HANDLER(kGradInput, GradInputImpl,
                       GradInputSpec(ffi::Ffi::Bind().Ctx<Stream>()),
                       {kGraphCompatible});

PYBIND11_MODULE(_batch_stat_cuda, module) {
  module.doc() = "XLA FFI handlers of kernels.batch_stat for CUDA.";
  module.def(
      "update", [] { return HandlerCapsule(kUpdate); },
      "Handler of the running-average update.");
  module.def(
      "train", [] { return HandlerCapsule(kTrain); },
      "Handler of the running-average update before x is normalised.");
  module.def(
      "moments", [] { return HandlerCapsule(kMoments); },
      "Handler of mean, variance and count.");
  module.def(
      "normalize", [] { return HandlerCapsule(kNormalize); },
      "Handler of the normalisation.");
  module.def(
      "grad_sums", [] { return HandlerCapsule(kGradSums); },
      "Handler of the sums that the gradient needs.");
  module.def(
      "grad_input", [] { return HandlerCapsule(kGradInput); },
      "Handler of the gradient for x.");
}

}  // namespace kernels::batch_stat
