// The extension module kernels.matmul.cpu._matmul_cpu.

#include <pybind11/pybind11.h>

#include "kernels/common/pybind_util.h"
#include "kernels/matmul/cpu/ffi.h"

namespace kernels::matmul {

PYBIND11_MODULE(_matmul_cpu, module) {
  module.doc() = "XLA FFI handlers of kernels.matmul for the CPU.";
  module.def(
      "multiply", [] { return HandlerCapsule(MatmulMultiply); },
      "Handler of the product with a matrix of floating numbers.");
  module.def(
      "multiply_transposed",
      [] { return HandlerCapsule(MatmulMultiplyTransposed); },
      "Handler of the product with the transpose of such a matrix.");
  module.def(
      "multiply_packed", [] { return HandlerCapsule(MatmulMultiplyPacked); },
      "Handler of the product with a matrix of packed numbers.");
  AddSimdLevelFunctions(module);
}

}  // namespace kernels::matmul
