// Exposing FFI handlers to Python.

#ifndef KERNELS_COMMON_PYBIND_UTIL_H_
#define KERNELS_COMMON_PYBIND_UTIL_H_

#include <pybind11/pybind11.h>

#include <string>

#include "kernels/common/cpu_features.h"
#include "xla/ffi/api/ffi.h"

namespace kernels {

// A capsule as `jax.ffi.register_ffi_target` wants it.
inline pybind11::capsule HandlerCapsule(XLA_FFI_Handler* handler) {
  return pybind11::capsule(reinterpret_cast<void*>(handler));
}

// Adds `simd_level()` and `set_simd_level(name)` to an extension module. Each
// extension has its own level.
inline void AddSimdLevelFunctions(pybind11::module_& module) {
  module.def(
      "simd_level", [] { return SimdLevelName(CurrentSimdLevel()); },
      "Returns the instruction set in use: baseline, avx2, avx512 or "
      "avx512_bf16.");
  module.def(
      "set_simd_level",
      [](const std::string& name) {
        if (!SetSimdLevel(name)) {
          throw pybind11::value_error(
              "`name` must be auto, baseline, avx2, avx512 or avx512_bf16 and "
              "supported by this machine, but got `" +
              name + "`.");
        }
      },
      pybind11::arg("name"),
      "Caps the instruction set, to test every code path on one machine.");
}

}  // namespace kernels

#endif  // KERNELS_COMMON_PYBIND_UTIL_H_
