#ifndef NNX_GRAPH_CC_JIT_H_
#define NNX_GRAPH_CC_JIT_H_

#include <Python.h>

namespace nnx::graph {

// Adds JitFunction, the callable under `nnx.jit`, to `module`.
bool InitJit(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_JIT_H_
