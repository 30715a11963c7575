#ifndef NNX_ENGINE_CC_JIT_H_
#define NNX_ENGINE_CC_JIT_H_

#include <Python.h>

namespace nnx::engine {

// Adds JitFunction, the callable under `nnx.jit`, to `module`.
bool InitJit(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_JIT_H_
