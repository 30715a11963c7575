// XLA FFI bindings of decode attention for CUDA.

#include "kernels/decode_attention/cc/ffi.h"

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "kernels/cache/cuda/ffi.h"
#include "kernels/cache/cuda/update_plan.h"
#include "kernels/common/cuda_ffi_util.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/decode_attention/cuda/decode.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace decode_attention {
namespace {

ffi::Error ReadWorkspace(const Call& call, DeviceDecode* decode) {
  KERNELS_REQUIRE(
      call.workspace.size() == 1,
      "There must be one result after `lse`, the workspace, but got ",
      call.workspace.size(), ".");
  auto workspace = call.workspace.get<ffi::AnyBuffer>(0);
  if (!workspace.has_value()) return workspace.error();
  const auto dims = (*workspace)->dimensions();
  const int64_t floats = decode->states() * (decode->args.shape.v_dim + 3);
  KERNELS_REQUIRE(
      (*workspace)->element_type() == ffi::DataType::F32 && dims.size() == 2 &&
          dims[0] % 2 == 0 &&
          (dims[0] == 0 || (dims[1] >= floats && dims[1] % 4 == 0)),
      "The workspace must have shape [parts, floats of a part] of float32, "
      "`workspace`, with an even "
      "number of parts of a multiple of 4 and at least ",
      floats, " floats, or none, but got ", TypeText(**workspace), ".");
  KERNELS_REQUIRE(dims[0] * dims[1] <= UINT32_MAX,
                  "`workspace` must have at most 2^32 floats, but got ",
                  ShapeText(dims), ".");
  decode->workspace = static_cast<float*>((*workspace)->untyped_data());
  decode->parts = dims[0];
  decode->part_floats = dims[1];
  return ffi::Error::Success();
}

ffi::Error Run(cudaStream_t stream, const Call& call) {
  DeviceDecode decode = {};
  DecodeArgs& args = decode.args;
  KERNELS_RETURN_IF_ERROR(ReadDecode(call, &args));
  KERNELS_RETURN_IF_ERROR(ReadWorkspace(call, &decode));
  decode.first_slot = Data<int32_t>(call.x.first_slot);
  KERNELS_REQUIRE(CudaFits(args),
                  "Rows of a head must be a multiple of 16 bytes and at most ",
                  kMaxRowBytes, ", or have at most ", kMaxOddDim,
                  " elements, but have ", args.shape.k_dim, " and ",
                  args.shape.v_dim, " elements.");
  if (call.new_k == nullptr) {
    args.cache_k = static_cast<uint8_t*>(call.cache_k.untyped_data());
    args.cache_v = static_cast<uint8_t*>(call.cache_v.untyped_data());
    return LaunchStatus(LaunchDecode(stream, decode, /*update=*/nullptr),
                        "decode_attention_attend");
  }
  KERNELS_RETURN_IF_ERROR(
      cache::InPlaceOnDevice(stream, call.cache_k, *call.out_k, &args.cache_k));
  KERNELS_RETURN_IF_ERROR(
      cache::InPlaceOnDevice(stream, call.cache_v, *call.out_v, &args.cache_v));
  cache::UpdateArgs rows = {};
  rows.element = args.element;
  rows.new_element = args.query_element;
  rows.shape = args.shape;
  rows.addressing = args.addressing;
  rows.cache_k = args.cache_k;
  rows.cache_v = args.cache_v;
  rows.new_k = args.new_k;
  rows.new_v = args.new_v;
  rows.tokens = args.tokens;
  rows.index = args.index;
  rows.count = args.count;
  rows.k_scale = args.k_scale;
  rows.v_scale = args.v_scale;
  cache::DeviceUpdate update;
  KERNELS_REQUIRE(
      cache::PlanUpdate(rows, decode.first_slot,
                        args.rotary.cos != nullptr && !args.rotary.cached_keys,
                        &update),
      "`new_k` and `new_v` must be written in at most ", cache::kMaxItems,
      " accesses, but got ", ShapeText(call.new_k->dimensions()),
      ". Write them in several calls.");
  return LaunchStatus(LaunchDecode(stream, decode, &update),
                      "decode_attention_append_and_attend");
}

constexpr auto kAppendAndAttend = AppendAndAttendImpl<cudaStream_t, Run>;
constexpr auto kAttend = AttendImpl<cudaStream_t, Run>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AppendAndAttendCuda, kAppendAndAttend,
    BindAppendAndAttend(ffi::Ffi::Bind().Ctx<Stream>()), {kGraphCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(AttendCuda, kAttend,
                              BindAttend(ffi::Ffi::Bind().Ctx<Stream>()),
                              {kGraphCompatible});

}  // namespace decode_attention
}  // namespace kernels

PYBIND11_MODULE(_decode_attention_cuda, module) {
  namespace ops = kernels::decode_attention;
  module.doc() = "XLA FFI handlers of decode attention for CUDA.";
  module.def(
      "append_and_attend",
      [] { return kernels::HandlerCapsule(ops::AppendAndAttendCuda); },
      "Returns the handler that appends and attends.");
  module.def(
      "attend", [] { return kernels::HandlerCapsule(ops::AttendCuda); },
      "Returns the handler that attends only.");
}
