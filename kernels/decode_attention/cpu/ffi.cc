// XLA FFI bindings of decode attention for the CPU.

#include "kernels/decode_attention/cc/ffi.h"

#include <cstdint>

#include "kernels/cache/cc/ffi.h"
#include "kernels/common/ffi_util.h"
#include "kernels/common/pybind_util.h"
#include "kernels/common/subnormals.h"
#include "kernels/decode_attention/cpu/decode.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {
namespace decode_attention {
namespace {

ffi::Error Run(ffi::ThreadPool pool, const Call& call) {
  const WithSubnormals subnormals;
  DecodeArgs args = {};
  KERNELS_RETURN_IF_ERROR(ReadDecode(call, &args));
  KERNELS_REQUIRE(call.workspace.size() == 0,
                  "There must be no result after `lse`, but got ",
                  call.workspace.size(), " more.");
  args.addressing.first_slot = *Data<int32_t>(call.x.first_slot);
  args.cache_k = call.out_k != nullptr
                     ? cache::InPlace(call.cache_k, *call.out_k)
                     : static_cast<uint8_t*>(call.cache_k.untyped_data());
  args.cache_v = call.out_v != nullptr
                     ? cache::InPlace(call.cache_v, *call.out_v)
                     : static_cast<uint8_t*>(call.cache_v.untyped_data());
  RunDecode(args, pool);
  return ffi::Error::Success();
}

constexpr auto kAppendAndAttend = AppendAndAttendImpl<ffi::ThreadPool, Run>;
constexpr auto kAttend = AttendImpl<ffi::ThreadPool, Run>;

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    AppendAndAttend, kAppendAndAttend,
    BindAppendAndAttend(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Attend, kAttend, BindAttend(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));

}  // namespace decode_attention
}  // namespace kernels

PYBIND11_MODULE(_decode_attention_cpu, module) {
  namespace ops = kernels::decode_attention;
  module.doc() = "XLA FFI handlers of decode attention for the CPU.";
  module.def(
      "append_and_attend",
      [] { return kernels::HandlerCapsule(ops::AppendAndAttend); },
      "Returns the handler that appends and attends.");
  module.def(
      "attend", [] { return kernels::HandlerCapsule(ops::Attend); },
      "Returns the handler that attends only.");
  kernels::AddSimdLevelFunctions(module);
}
