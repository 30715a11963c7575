// The extension module kernels.batch_stat.cpu._batch_stat_cpu.

#include <pybind11/pybind11.h>

#include "kernels/batch_stat/cpu/ffi.h"
#include "kernels/common/pybind_util.h"

namespace kernels::batch_stat {

PYBIND11_MODULE(_batch_stat_cpu, module) {
  module.doc() = "XLA FFI handlers of kernels.batch_stat for the CPU.";
  module.def(
      "update", [] { return HandlerCapsule(BatchStatUpdate); },
      "Handler of the running-average update.");
  module.def(
      "train", [] { return HandlerCapsule(BatchStatTrain); },
      "Handler of the running-average update before x is normalised.");
  module.def(
      "moments", [] { return HandlerCapsule(BatchStatMoments); },
      "Handler of mean, variance and count.");
  module.def(
      "normalize", [] { return HandlerCapsule(BatchStatNormalize); },
      "Handler of the normalisation.");
  module.def(
      "grad_sums", [] { return HandlerCapsule(BatchStatGradSums); },
      "Handler of the sums that the gradient needs.");
  module.def(
      "grad_input", [] { return HandlerCapsule(BatchStatGradInput); },
      "Handler of the gradient for x.");
  AddSimdLevelFunctions(module);
}

}  // namespace kernels::batch_stat
