#include "kernels/batch_stat/batch_stat_ffi.h"

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "kernels/batch_stat/batch_stat_cpu.h"
#include "kernels/common/cpu_features.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/parallel_for.h"
#include "kernels/common/simd_prelude.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::batch_stat {
namespace {

template <typename T>
constexpr ffi::DataType ComputeDtype() {
  return sizeof(typename T::Compute) == 8 ? ffi::DataType::F64
                                          : ffi::DataType::F32;
}

template <typename T>
const T* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

template <typename T>
T* Data(ffi::Result<ffi::AnyBuffer>& buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

ffi::Error GetGeometry(const ffi::AnyBuffer& x, int64_t feature_axis,
                       int64_t batch_axes, Geometry* geometry) {
  const auto dims = x.dimensions();
  const auto rank = static_cast<int64_t>(dims.size());
  KERNELS_REQUIRE(
      batch_axes >= 0 && batch_axes <= feature_axis && feature_axis < rank,
      "`feature_axis` must lie in [", batch_axes, ", ", rank,
      ") for `x` of shape ", ShapeText(dims), ", but got ", feature_axis, ".");
  *geometry = {DimsProduct(dims, 0, batch_axes),
               DimsProduct(dims, batch_axes, feature_axis), dims[feature_axis],
               DimsProduct(dims, feature_axis + 1, rank)};
  return ffi::Error::Success();
}

ffi::Error CheckStat(const ffi::AnyBuffer& stat, std::string_view name,
                     const Geometry& g, ffi::DataType dtype) {
  KERNELS_REQUIRE(
      stat.element_type() == dtype &&
          static_cast<int64_t>(stat.element_count()) == g.groups * g.channels,
      "`", name, "` must be ", DtypeName(dtype), " with ",
      g.groups * g.channels, " elements, one for each feature of `x`, but got ",
      DtypeName(stat.element_type()), ShapeText(stat.dimensions()), ".");
  return ffi::Error::Success();
}

ffi::Error CheckSameShape(const ffi::AnyBuffer& other, std::string_view name,
                          const ffi::AnyBuffer& x) {
  KERNELS_REQUIRE(other.element_count() == x.element_count(), "`", name,
                  "` must have the shape of `x`, ", ShapeText(x.dimensions()),
                  ", but got ", ShapeText(other.dimensions()), ".");
  return ffi::Error::Success();
}

ffi::Error GetMask(ffi::RemainingArgs rest, const Geometry& g, Mask* mask) {
  if (rest.size() == 0) return ffi::Error::Success();
  KERNELS_REQUIRE(rest.size() == 1,
                  "At most one `mask` must be given, but got ", rest.size(),
                  " more operands.");
  const auto buffer = rest.get<ffi::AnyBuffer>(0);
  if (buffer.has_error()) return buffer.error();
  const auto count = static_cast<int64_t>(buffer->element_count());
  const int64_t positions = g.groups * g.outer * g.inner;
  KERNELS_REQUIRE(buffer->element_type() == ffi::DataType::PRED &&
                      (count == positions || count == positions * g.channels),
                  "`mask` must be bool with ", positions, " or ",
                  positions * g.channels, " elements, but got ",
                  DtypeName(buffer->element_type()),
                  ShapeText(buffer->dimensions()), ".");
  mask->data = static_cast<const uint8_t*>(buffer->untyped_data());
  mask->per_channel = count != positions;
  return ffi::Error::Success();
}

// Returns from the handler if `expression` is an error.
#define KERNELS_RETURN_IF_ERROR(expression) \
  do {                                      \
    const ffi::Error error = (expression);  \
    if (error.failure()) return error;      \
  } while (false)

// Calls body(T{}, U{}) for the dtypes of x and y that are instantiated.
template <typename Body>
ffi::Error DispatchPair(ffi::DataType x, ffi::DataType y, Body&& body) {
  return DispatchFloat(x, "x", [&](auto t) -> ffi::Error {
    using T = decltype(t);
    if constexpr (sizeof(typename T::Storage) == 2) {
      if (y == ffi::DataType::F32) return body(t, F32{});
    }
    KERNELS_REQUIRE(x == y, "`y` must be ", DtypeName(x), " like `x`",
                    sizeof(typename T::Storage) == 2 ? " or float32" : "",
                    ", but got ", DtypeName(y), ".");
    return body(t, t);
  });
}

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
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Attr<int64_t>("feature_axis")
        .Attr<int64_t>("batch_axes")
        .Attr<int64_t>("accurate")
        .Arg<ffi::AnyBuffer>()    // running mean
        .Arg<ffi::AnyBuffer>()    // running var
        .Arg<ffi::AnyBuffer>()    // momentum
        .Arg<ffi::AnyBuffer>()    // x
        .RemainingArgs()          // mask
        .Ret<ffi::AnyBuffer>()    // running mean, aliased
        .Ret<ffi::AnyBuffer>()    // running var, aliased
        .Ret<ffi::AnyBuffer>()    // batch mean
        .Ret<ffi::AnyBuffer>());  // batch var

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatchStatMoments, BatchStatMomentsImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("feature_axis")
                                  .Attr<int64_t>("batch_axes")
                                  .Attr<int64_t>("accurate")
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .RemainingArgs()          // mask
                                  .Ret<ffi::AnyBuffer>()    // mean
                                  .Ret<ffi::AnyBuffer>()    // var
                                  .Ret<ffi::AnyBuffer>());  // count

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatchStatNormalize, BatchStatNormalizeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("feature_axis")
                                  .Attr<int64_t>("batch_axes")
                                  .Attr<int64_t>("relu")
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<ffi::AnyBuffer>()    // mean
                                  .Arg<ffi::AnyBuffer>()    // mul
                                  .Arg<ffi::AnyBuffer>()    // bias
                                  .Ret<ffi::AnyBuffer>());  // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    BatchStatGradSums, BatchStatGradSumsImpl,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Attr<int64_t>("feature_axis")
        .Attr<int64_t>("batch_axes")
        .Attr<int64_t>("relu")
        .Arg<ffi::AnyBuffer>()    // x
        .Arg<ffi::AnyBuffer>()    // dy
        .Arg<ffi::AnyBuffer>()    // mean
        .Arg<ffi::AnyBuffer>()    // mul
        .Arg<ffi::AnyBuffer>()    // bias
        .Ret<ffi::AnyBuffer>()    // sum of dy
        .Ret<ffi::AnyBuffer>());  // sum of dy * (x - mean)

XLA_FFI_DEFINE_HANDLER_SYMBOL(BatchStatGradInput, BatchStatGradInputImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("feature_axis")
                                  .Attr<int64_t>("batch_axes")
                                  .Attr<int64_t>("relu")
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<ffi::AnyBuffer>()    // dy
                                  .Arg<ffi::AnyBuffer>()    // mean
                                  .Arg<ffi::AnyBuffer>()    // mul
                                  .Arg<ffi::AnyBuffer>()    // bias
                                  .Arg<ffi::AnyBuffer>()    // c0
                                  .Arg<ffi::AnyBuffer>()    // c1
                                  .RemainingArgs()          // mask
                                  .Ret<ffi::AnyBuffer>());  // dx

}  // namespace kernels::batch_stat
