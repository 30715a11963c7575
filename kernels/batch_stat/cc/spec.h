// What the handlers of batch_stat take, the same on every platform, and checks
// of it, because a handler can be called without the Python layer.
//
// XLA compares operands with a handler's binding only when it runs. The
// handlers of all platforms are bound here, so that a run on one tests it for
// all.

#ifndef KERNELS_BATCH_STAT_CC_SPEC_H_
#define KERNELS_BATCH_STAT_CC_SPEC_H_

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/batch_stat/cc/geometry.h"
#include "kernels/common/element_types.h"
#include "kernels/common/ffi_util.h"
#include "xla/ffi/api/ffi.h"

namespace kernels::batch_stat {

// Each adds its operands, attributes and results to what a platform's handler
// takes first. Further results may follow.

template <typename Binding>
auto UpdateSpec(Binding binding) {
  return std::move(binding)
      .Attrs()                          // feature_axis, batch_axes, accurate
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
      .Attrs()  // feature_axis, batch_axes, accurate, epsilon
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
      .Attrs()                          // feature_axis, batch_axes, accurate
      .template Arg<ffi::AnyBuffer>()   // x
      .RemainingArgs()                  // mask
      .template Ret<ffi::AnyBuffer>()   // mean
      .template Ret<ffi::AnyBuffer>()   // var
      .template Ret<ffi::AnyBuffer>();  // count
}

template <typename Binding>
auto NormalizeSpec(Binding binding) {
  return std::move(binding)
      .Attrs()                          // feature_axis, batch_axes, relu
      .template Arg<ffi::AnyBuffer>()   // x
      .template Arg<ffi::AnyBuffer>()   // mean
      .template Arg<ffi::AnyBuffer>()   // mul
      .template Arg<ffi::AnyBuffer>()   // bias
      .template Ret<ffi::AnyBuffer>();  // y
}

template <typename Binding>
auto GradSumsSpec(Binding binding) {
  return std::move(binding)
      .Attrs()                          // feature_axis, batch_axes, relu
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
      .Attrs()                          // feature_axis, batch_axes, relu
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

// The options of a call. A handler reads those that it has: of `accurate`,
// `relu` and `epsilon`, the ones that it does not have stay as they are here.
struct Options {
  int64_t feature_axis = 0;
  int64_t batch_axes = 0;
  int64_t accurate = 0;
  int64_t relu = 0;
  double epsilon = 0.0;
};

// Reads the attributes that every handler has, and `more`.
template <typename... T>
ffi::Error ReadOptions(const ffi::Dictionary& attributes, Options* options,
                       const Attribute<T>&... more) {
  KERNELS_RETURN_IF_ERROR(ReadAttributes(
      attributes, Attribute("feature_axis", &options->feature_axis),
      Attribute("batch_axes", &options->batch_axes), more...));
  KERNELS_REQUIRE(options->accurate == 0 || options->accurate == 1,
                  "`accurate` must be 0 or 1, but got ", options->accurate,
                  ".");
  KERNELS_REQUIRE(options->relu == 0 || options->relu == 1,
                  "`relu` must be 0 or 1, but got ", options->relu, ".");
  KERNELS_REQUIRE(options->epsilon >= 0.0 && std::isfinite(options->epsilon),
                  "`epsilon` must be finite and not negative, but got ",
                  options->epsilon, ".");
  return ffi::Error::Success();
}

// What the other arrays of a call must be like.
class Batch {
 public:
  Batch(const ffi::AnyBuffer& x, const Options& options)
      : x_(x), options_(options) {}

  // What decides that, for an error.
  std::string operator()() const {
    return StrCat(" to go with `x` ", TypeText(x_), ", `feature_axis` ",
                  options_.feature_axis, " and `batch_axes` ",
                  options_.batch_axes);
  }

  ffi::Error GetGeometry(Geometry* geometry) {
    const auto dims = x_.dimensions();
    const auto rank = static_cast<int64_t>(dims.size());
    const int64_t axis = options_.feature_axis;
    const int64_t batch_axes = options_.batch_axes;
    KERNELS_REQUIRE(0 <= batch_axes && batch_axes <= axis && axis < rank,
                    "`feature_axis` must lie in [`batch_axes`, ", rank,
                    "), and `batch_axes` not be negative, for `x` ",
                    TypeText(x_), ", but got ", axis, " and ", batch_axes, ".");
    *geometry = {DimsProduct(dims, 0, batch_axes),
                 DimsProduct(dims, batch_axes, axis), dims[axis],
                 DimsProduct(dims, axis + 1, rank)};
    groups_.assign(dims.begin(), dims.begin() + batch_axes);
    return ffi::Error::Success();
  }

  // One number for each feature.
  ffi::Error RequireStat(std::string_view name, const ffi::AnyBuffer& stat,
                         ffi::DataType dtype) const {
    return RequirePerGroup(name, stat, dtype,
                           x_.dimensions()[options_.feature_axis]);
  }

  // One number for each batch.
  ffi::Error RequireMomentum(const ffi::AnyBuffer& momentum,
                             ffi::DataType dtype) const {
    return RequirePerGroup("momentum", momentum, dtype, 1);
  }

  ffi::Error RequireLike(std::string_view name, const ffi::AnyBuffer& array,
                         ffi::DataType dtype) const {
    return RequireArray(name, array, dtype, x_.dimensions(), *this);
  }

  ffi::Error GetMask(ffi::RemainingArgs rest, Mask* mask) const {
    if (rest.size() == 0) return ffi::Error::Success();
    KERNELS_REQUIRE(rest.size() == 1,
                    "At most one `mask` must be given, but got ", rest.size(),
                    " more operands.");
    const auto buffer = rest.get<ffi::AnyBuffer>(0);
    if (buffer.has_error()) return buffer.error();
    const auto dims = x_.dimensions();
    std::vector<int64_t> sizes(dims.begin(), dims.end());
    mask->per_channel = SameShape(buffer->dimensions(), sizes);
    if (!mask->per_channel) sizes[options_.feature_axis] = 1;
    mask->data = static_cast<const uint8_t*>(buffer->untyped_data());
    const int64_t size = x_.element_count();
    KERNELS_REQUIRE(
        IsArray(*buffer, ffi::DataType::PRED, sizes),
        "`mask` must be bool with ",
        dims[options_.feature_axis] == 0 ? 0
                                         : size / dims[options_.feature_axis],
        " or ", size, " elements, of x's shape with or without ", "features",
        (*this)(), ", but got ", TypeText(*buffer), ".");
    return ffi::Error::Success();
  }

 private:
  ffi::Error RequirePerGroup(std::string_view name, const ffi::AnyBuffer& array,
                             ffi::DataType dtype, int64_t size) const {
    std::vector<int64_t> sizes = groups_;
    sizes.push_back(size);
    KERNELS_REQUIRE(IsArray(array, dtype, sizes), "`", name, "` must be ",
                    DtypeName(dtype), " with ",
                    DimsProduct(sizes, 0, static_cast<int64_t>(sizes.size())),
                    " elements, of shape ", ShapeText(sizes), ",", (*this)(),
                    ", but got ", TypeText(array), ".");
    return ffi::Error::Success();
  }

  const ffi::AnyBuffer& x_;
  const Options& options_;
  std::vector<int64_t> groups_;
};

// Each checks what the spec of its name binds, and calls body(T{}, options,
// geometry, mask), or without a mask where there is none, T being the tag of
// x's dtype; or body(T{}, U{}, ...), U being that of y's or dy's.

// Of the handlers that compute moments: `require(batch, dtype)` checks the
// statistics.
template <typename Require, typename Body, typename... T>
ffi::Error CheckSums(const ffi::Dictionary& attributes, const ffi::AnyBuffer& x,
                     ffi::RemainingArgs rest, Require&& require, Body&& body,
                     Options* options, const Attribute<T>&... more) {
  Geometry g;
  Mask mask;
  KERNELS_RETURN_IF_ERROR(ReadOptions(
      attributes, options, Attribute("accurate", &options->accurate), more...));
  Batch batch(x, *options);
  KERNELS_RETURN_IF_ERROR(batch.GetGeometry(&g));
  KERNELS_RETURN_IF_ERROR(batch.GetMask(rest, &mask));
  return DispatchFloat(x.element_type(), "x", [&](auto t) -> ffi::Error {
    KERNELS_RETURN_IF_ERROR(require(batch, ComputeDtype<decltype(t)>()));
    return body(t, *options, g, mask);
  });
}

// The arrays of UpdateSpec.
struct UpdateArrays {
  const ffi::AnyBuffer &old_mean, &old_var, &momentum, &x;
  ffi::RemainingArgs rest;
  const ffi::AnyBuffer &new_mean, &new_var, &mean, &var;

  ffi::Error Require(const Batch& batch, ffi::DataType dtype) const {
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("mean", old_mean, dtype));
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("var", old_var, dtype));
    KERNELS_RETURN_IF_ERROR(batch.RequireMomentum(momentum, dtype));
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("new_mean", new_mean, dtype));
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("new_var", new_var, dtype));
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("batch_mean", mean, dtype));
    return batch.RequireStat("batch_var", var, dtype);
  }
};

template <typename Body>
ffi::Error CheckUpdate(const ffi::Dictionary& attributes,
                       const UpdateArrays& arrays, Body&& body) {
  Options options;
  return CheckSums(
      attributes, arrays.x, arrays.rest,
      [&](const Batch& batch, ffi::DataType dtype) {
        return arrays.Require(batch, dtype);
      },
      body, &options);
}

template <typename Body>
ffi::Error CheckTrain(const ffi::Dictionary& attributes,
                      const UpdateArrays& arrays, const ffi::AnyBuffer& scale,
                      const ffi::AnyBuffer& count, const ffi::AnyBuffer& rstd,
                      const ffi::AnyBuffer& mul, Body&& body) {
  Options options;
  return CheckSums(
      attributes, arrays.x, arrays.rest,
      [&](const Batch& batch, ffi::DataType dtype) -> ffi::Error {
        KERNELS_RETURN_IF_ERROR(arrays.Require(batch, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("scale", scale, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("count", count, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("rstd", rstd, dtype));
        return batch.RequireStat("mul", mul, dtype);
      },
      body, &options, Attribute("epsilon", &options.epsilon));
}

template <typename Body>
ffi::Error CheckMoments(const ffi::Dictionary& attributes,
                        const ffi::AnyBuffer& x, ffi::RemainingArgs rest,
                        const ffi::AnyBuffer& mean, const ffi::AnyBuffer& var,
                        const ffi::AnyBuffer& count, Body&& body) {
  Options options;
  return CheckSums(
      attributes, x, rest,
      [&](const Batch& batch, ffi::DataType dtype) -> ffi::Error {
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("mean", mean, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("var", var, dtype));
        return batch.RequireStat("count", count, dtype);
      },
      body, &options);
}

// Of the handlers that go over x and `other`, which is of x's dtype or of that
// of the statistics: `require(batch, dtype)` checks what else there is, and
// body(T{}, U{}, options, geometry, batch) is called.
template <typename Require, typename Body>
ffi::Error CheckPair(const ffi::Dictionary& attributes, const ffi::AnyBuffer& x,
                     const ffi::AnyBuffer& mean, const ffi::AnyBuffer& mul,
                     const ffi::AnyBuffer& bias, std::string_view other_name,
                     const ffi::AnyBuffer& other, Require&& require,
                     Body&& body) {
  Options options;
  Geometry g;
  KERNELS_RETURN_IF_ERROR(
      ReadOptions(attributes, &options, Attribute("relu", &options.relu)));
  Batch batch(x, options);
  KERNELS_RETURN_IF_ERROR(batch.GetGeometry(&g));
  return DispatchFloat(x.element_type(), "x", [&](auto t) -> ffi::Error {
    using T = decltype(t);
    constexpr ffi::DataType dtype = ComputeDtype<T>();
    const bool wide = sizeof(typename T::Storage) == 2 &&
                      other.element_type() == ffi::DataType::F32;
    KERNELS_RETURN_IF_ERROR(batch.RequireLike(
        other_name, other, wide ? ffi::DataType::F32 : x.element_type()));
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("mean", mean, dtype));
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("mul", mul, dtype));
    KERNELS_RETURN_IF_ERROR(batch.RequireStat("bias", bias, dtype));
    KERNELS_RETURN_IF_ERROR(require(batch, dtype));
    if constexpr (sizeof(typename T::Storage) == 2) {
      if (wide) return body(t, F32{}, options, g);
    }
    return body(t, t, options, g);
  });
}

template <typename Body>
ffi::Error CheckNormalize(const ffi::Dictionary& attributes,
                          const ffi::AnyBuffer& x, const ffi::AnyBuffer& mean,
                          const ffi::AnyBuffer& mul, const ffi::AnyBuffer& bias,
                          const ffi::AnyBuffer& y, Body&& body) {
  return CheckPair(
      attributes, x, mean, mul, bias, "y", y,
      [](const Batch&, ffi::DataType) { return ffi::Error::Success(); }, body);
}

template <typename Body>
ffi::Error CheckGradSums(const ffi::Dictionary& attributes,
                         const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy,
                         const ffi::AnyBuffer& mean, const ffi::AnyBuffer& mul,
                         const ffi::AnyBuffer& bias, const ffi::AnyBuffer& rstd,
                         const ffi::AnyBuffer& count,
                         const ffi::AnyBuffer& sum_dy,
                         const ffi::AnyBuffer& dscale, const ffi::AnyBuffer& c0,
                         const ffi::AnyBuffer& c1, Body&& body) {
  return CheckPair(
      attributes, x, mean, mul, bias, "dy", dy,
      [&](const Batch& batch, ffi::DataType dtype) -> ffi::Error {
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("rstd", rstd, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("count", count, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("sum_dy", sum_dy, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("dscale", dscale, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("c0", c0, dtype));
        return batch.RequireStat("c1", c1, dtype);
      },
      body);
}

template <typename Body>
ffi::Error CheckGradInput(const ffi::Dictionary& attributes,
                          const ffi::AnyBuffer& x, const ffi::AnyBuffer& dy,
                          const ffi::AnyBuffer& mean, const ffi::AnyBuffer& mul,
                          const ffi::AnyBuffer& bias, const ffi::AnyBuffer& c0,
                          const ffi::AnyBuffer& c1, ffi::RemainingArgs rest,
                          const ffi::AnyBuffer& dx, Body&& body) {
  Mask mask;
  return CheckPair(
      attributes, x, mean, mul, bias, "dy", dy,
      [&](const Batch& batch, ffi::DataType dtype) -> ffi::Error {
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("c0", c0, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireStat("c1", c1, dtype));
        KERNELS_RETURN_IF_ERROR(batch.RequireLike("dx", dx, x.element_type()));
        return batch.GetMask(rest, &mask);
      },
      [&](auto t, auto u, const Options& options, const Geometry& g) {
        return body(t, u, options, g, mask);
      });
}

}  // namespace kernels::batch_stat

#endif  // KERNELS_BATCH_STAT_CC_SPEC_H_
