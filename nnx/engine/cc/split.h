#ifndef NNX_ENGINE_CC_SPLIT_H_
#define NNX_ENGINE_CC_SPLIT_H_

#include <Python.h>

namespace nnx::engine {

// Adds the functions that take object graphs apart: split, state, graphdef and
// pop.
bool InitSplit(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_SPLIT_H_
