// What the handlers of batch_stat take, the same on every platform, and checks
// of it, because a handler can be called without the Python layer.
//
// XLA compares operands with a handler's binding only when it runs. The
// handlers of all platforms are bound here, so that a run on one tests it for
// all.

#ifndef KERNELS_BATCH_STAT_BATCH_STAT_SPEC_H_
#define KERNELS_BATCH_STAT_BATCH_STAT_SPEC_H_

#include <cstdint>
#include <string_view>
#include <utility>

#include "kernels/batch_stat/geometry.h"
#include "kernels/common/element_types.h"
#include "kernels/common/ffi_util.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::batch_stat {

// Each adds its operands, attributes and results to what a platform's handler
// takes first. Further results may follow.

template <typename Binding>
auto UpdateSpec(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("feature_axis")
      .template Attr<int64_t>("batch_axes")
      .template Attr<int64_t>("accurate")
      .template Arg<ffi::AnyBuffer>()   // running mean
      .template Arg<ffi::AnyBuffer>()   // running var
      .template Arg<ffi::AnyBuffer>()   // momentum
      .template Arg<ffi::AnyBuffer>()   // x
      .RemainingArgs()                  // mask
      .template Ret<ffi::AnyBuffer>()   // running mean, aliased
      .template Ret<ffi::AnyBuffer>()   // running var, aliased
      .template Ret<ffi::AnyBuffer>()   // batch mean
      .template Ret<ffi::AnyBuffer>();  // batch var
}

template <typename Binding>
auto TrainSpec(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("feature_axis")
      .template Attr<int64_t>("batch_axes")
      .template Attr<int64_t>("accurate")
      .template Attr<double>("epsilon")
      .template Arg<ffi::AnyBuffer>()   // running mean
      .template Arg<ffi::AnyBuffer>()   // running var
      .template Arg<ffi::AnyBuffer>()   // momentum
      .template Arg<ffi::AnyBuffer>()   // scale
      .template Arg<ffi::AnyBuffer>()   // x
      .RemainingArgs()                  // mask
      .template Ret<ffi::AnyBuffer>()   // running mean, aliased
      .template Ret<ffi::AnyBuffer>()   // running var, aliased
      .template Ret<ffi::AnyBuffer>()   // batch mean
      .template Ret<ffi::AnyBuffer>()   // batch var
      .template Ret<ffi::AnyBuffer>()   // count
      .template Ret<ffi::AnyBuffer>()   // rstd
      .template Ret<ffi::AnyBuffer>();  // mul
}

template <typename Binding>
auto MomentsSpec(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("feature_axis")
      .template Attr<int64_t>("batch_axes")
      .template Attr<int64_t>("accurate")
      .template Arg<ffi::AnyBuffer>()   // x
      .RemainingArgs()                  // mask
      .template Ret<ffi::AnyBuffer>()   // mean
      .template Ret<ffi::AnyBuffer>()   // var
      .template Ret<ffi::AnyBuffer>();  // count
}

template <typename Binding>
auto NormalizeSpec(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("feature_axis")
      .template Attr<int64_t>("batch_axes")
      .template Attr<int64_t>("relu")
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // mean
      .template Arg<ffi::AnyBuffer>()   // mul
      .template Arg<ffi::AnyBuffer>()   // bias
      .template Ret<ffi::AnyBuffer>();  // y
}

template <typename Binding>
auto GradSumsSpec(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("feature_axis")
      .template Attr<int64_t>("batch_axes")
      .template Attr<int64_t>("relu")
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // dy
      .template Arg<ffi::AnyBuffer>()   // mean
      .template Arg<ffi::AnyBuffer>()   // mul
      .template Arg<ffi::AnyBuffer>()   // bias
      .template Arg<ffi::AnyBuffer>()   // rstd
      .template Arg<ffi::AnyBuffer>()   // count
      .template Ret<ffi::AnyBuffer>()   // sum of dy
      .template Ret<ffi::AnyBuffer>()   // dscale
      .template Ret<ffi::AnyBuffer>()   // c0
      .template Ret<ffi::AnyBuffer>();  // c1
}

template <typename Binding>
auto GradInputSpec(Binding binding) {
  return std::move(binding)
      .template Attr<int64_t>("feature_axis")
      .template Attr<int64_t>("batch_axes")
      .template Attr<int64_t>("relu")
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // dy
      .template Arg<ffi::AnyBuffer>()   // mean
      .template Arg<ffi::AnyBuffer>()   // mul
      .template Arg<ffi::AnyBuffer>()   // bias
      .template Arg<ffi::AnyBuffer>()   // c0
      .template Arg<ffi::AnyBuffer>()   // c1
      .RemainingArgs()                  // mask
      .template Ret<ffi::AnyBuffer>();  // dx
}

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

inline ffi::Error GetGeometry(const ffi::AnyBuffer& x, int64_t feature_axis,
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

inline ffi::Error CheckStat(const ffi::AnyBuffer& stat, std::string_view name,
                            const Geometry& g, ffi::DataType dtype) {
  KERNELS_REQUIRE(
      stat.element_type() == dtype &&
          static_cast<int64_t>(stat.element_count()) == g.groups * g.channels,
      "`", name, "` must be ", DtypeName(dtype), " with ",
      g.groups * g.channels, " elements, one for each feature of `x`, but got ",
      DtypeName(stat.element_type()), ShapeText(stat.dimensions()), ".");
  return ffi::Error::Success();
}

inline ffi::Error CheckMomentum(const ffi::AnyBuffer& momentum,
                                const Geometry& g, ffi::DataType dtype) {
  KERNELS_REQUIRE(
      momentum.element_type() == dtype &&
          static_cast<int64_t>(momentum.element_count()) == g.groups,
      "`momentum` must be ", DtypeName(dtype), " with ", g.groups,
      " elements, one for each batch, but got ",
      DtypeName(momentum.element_type()), ShapeText(momentum.dimensions()),
      ".");
  return ffi::Error::Success();
}

inline ffi::Error CheckSameShape(const ffi::AnyBuffer& other,
                                 std::string_view name,
                                 const ffi::AnyBuffer& x) {
  KERNELS_REQUIRE(other.element_count() == x.element_count(), "`", name,
                  "` must have the shape of `x`, ", ShapeText(x.dimensions()),
                  ", but got ", ShapeText(other.dimensions()), ".");
  return ffi::Error::Success();
}

inline ffi::Error GetMask(ffi::RemainingArgs rest, const Geometry& g,
                          Mask* mask) {
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

// Each checks what the spec of its name binds, and calls body(T{}, geometry,
// mask), or without a mask where there is none, T being the tag of x's dtype;
// or body(T{}, U{}, ...), U being that of y's or dy's.

template <typename Body>
ffi::Error CheckUpdate(int64_t feature_axis, int64_t batch_axes,
                       const ffi::AnyBuffer& old_mean,
                       const ffi::AnyBuffer& old_var,
                       const ffi::AnyBuffer& momentum, const ffi::AnyBuffer& x,
                       ffi::RemainingArgs rest, const ffi::AnyBuffer& new_mean,
                       const ffi::AnyBuffer& new_var,
                       const ffi::AnyBuffer& mean, const ffi::AnyBuffer& var,
                       Body&& body) {
  Geometry g;
  Mask mask;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(GetMask(rest, g, &mask));
  return DispatchFloat(x.element_type(), "x", [&](auto t) -> ffi::Error {
    constexpr ffi::DataType dtype = ComputeDtype<decltype(t)>();
    KERNELS_RETURN_IF_ERROR(CheckStat(old_mean, "mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(old_var, "var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(new_mean, "the new mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(new_var, "the new var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(mean, "the batch mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(var, "the batch var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckMomentum(momentum, g, dtype));
    return body(t, g, mask);
  });
}

template <typename Body>
ffi::Error CheckTrain(int64_t feature_axis, int64_t batch_axes,
                      const ffi::AnyBuffer& old_mean,
                      const ffi::AnyBuffer& old_var,
                      const ffi::AnyBuffer& momentum,
                      const ffi::AnyBuffer& scale, const ffi::AnyBuffer& x,
                      ffi::RemainingArgs rest, const ffi::AnyBuffer& new_mean,
                      const ffi::AnyBuffer& new_var, const ffi::AnyBuffer& mean,
                      const ffi::AnyBuffer& var, const ffi::AnyBuffer& count,
                      const ffi::AnyBuffer& rstd, const ffi::AnyBuffer& mul,
                      Body&& body) {
  return CheckUpdate(
      feature_axis, batch_axes, old_mean, old_var, momentum, x, rest, new_mean,
      new_var, mean, var,
      [&](auto t, const Geometry& g, const Mask& mask) -> ffi::Error {
        constexpr ffi::DataType dtype = ComputeDtype<decltype(t)>();
        KERNELS_RETURN_IF_ERROR(CheckStat(scale, "scale", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(count, "count", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(rstd, "rstd", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(mul, "mul", g, dtype));
        return body(t, g, mask);
      });
}

template <typename Body>
ffi::Error CheckMoments(int64_t feature_axis, int64_t batch_axes,
                        const ffi::AnyBuffer& x, ffi::RemainingArgs rest,
                        const ffi::AnyBuffer& mean, const ffi::AnyBuffer& var,
                        const ffi::AnyBuffer& count, Body&& body) {
  Geometry g;
  Mask mask;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(GetMask(rest, g, &mask));
  return DispatchFloat(x.element_type(), "x", [&](auto t) -> ffi::Error {
    constexpr ffi::DataType dtype = ComputeDtype<decltype(t)>();
    KERNELS_RETURN_IF_ERROR(CheckStat(mean, "mean", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(var, "var", g, dtype));
    KERNELS_RETURN_IF_ERROR(CheckStat(count, "count", g, dtype));
    return body(t, g, mask);
  });
}

template <typename Body>
ffi::Error CheckNormalize(int64_t feature_axis, int64_t batch_axes,
                          const ffi::AnyBuffer& x, const ffi::AnyBuffer& mean,
                          const ffi::AnyBuffer& mul, const ffi::AnyBuffer& bias,
                          std::string_view other_name,
                          const ffi::AnyBuffer& other, Body&& body) {
  Geometry g;
  KERNELS_RETURN_IF_ERROR(GetGeometry(x, feature_axis, batch_axes, &g));
  KERNELS_RETURN_IF_ERROR(CheckSameShape(other, other_name, x));
  return DispatchPair(
      x.element_type(), other.element_type(),
      [&](auto t, auto u) -> ffi::Error {
        constexpr ffi::DataType dtype = ComputeDtype<decltype(t)>();
        KERNELS_RETURN_IF_ERROR(CheckStat(mean, "mean", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(mul, "mul", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(bias, "bias", g, dtype));
        return body(t, u, g);
      });
}

template <typename Body>
ffi::Error CheckGradSums(int64_t feature_axis, int64_t batch_axes,
                         const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy,
                         const ffi::AnyBuffer& mean, const ffi::AnyBuffer& mul,
                         const ffi::AnyBuffer& bias, const ffi::AnyBuffer& rstd,
                         const ffi::AnyBuffer& count,
                         const ffi::AnyBuffer& sum_dy,
                         const ffi::AnyBuffer& dscale, const ffi::AnyBuffer& c0,
                         const ffi::AnyBuffer& c1, Body&& body) {
  return CheckNormalize(
      feature_axis, batch_axes, x, mean, mul, bias, "dy", dy,
      [&](auto t, auto u, const Geometry& g) -> ffi::Error {
        constexpr ffi::DataType dtype = ComputeDtype<decltype(t)>();
        KERNELS_RETURN_IF_ERROR(CheckStat(rstd, "rstd", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(count, "count", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(sum_dy, "sum_dy", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(dscale, "dscale", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(c0, "c0", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(c1, "c1", g, dtype));
        return body(t, u, g);
      });
}

template <typename Body>
ffi::Error CheckGradInput(int64_t feature_axis, int64_t batch_axes,
                          const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy,
                          const ffi::AnyBuffer& mean, const ffi::AnyBuffer& mul,
                          const ffi::AnyBuffer& bias, const ffi::AnyBuffer& c0,
                          const ffi::AnyBuffer& c1, ffi::RemainingArgs rest,
                          const ffi::AnyBuffer& dx, Body&& body) {
  KERNELS_RETURN_IF_ERROR(CheckSameShape(dx, "dx", x));
  KERNELS_REQUIRE(dx.element_type() == x.element_type(), "`dx` must be ",
                  DtypeName(x.element_type()), " like `x`, but got ",
                  DtypeName(dx.element_type()), ".");
  return CheckNormalize(
      feature_axis, batch_axes, x, mean, mul, bias, "dy", dy,
      [&](auto t, auto u, const Geometry& g) -> ffi::Error {
        constexpr ffi::DataType dtype = ComputeDtype<decltype(t)>();
        Mask mask;
        KERNELS_RETURN_IF_ERROR(GetMask(rest, g, &mask));
        KERNELS_RETURN_IF_ERROR(CheckStat(c0, "c0", g, dtype));
        KERNELS_RETURN_IF_ERROR(CheckStat(c1, "c1", g, dtype));
        return body(t, u, g, mask);
      });
}

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_BATCH_STAT_SPEC_H_
