#ifndef NNX_ENGINE_CC_MERGE_H_
#define NNX_ENGINE_CC_MERGE_H_

#include <Python.h>

namespace nnx::engine {

// Adds the functions that build object graphs: merge and clone.
bool InitMerge(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_MERGE_H_
