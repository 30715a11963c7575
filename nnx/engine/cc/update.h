#ifndef NNX_ENGINE_CC_UPDATE_H_
#define NNX_ENGINE_CC_UPDATE_H_

#include <Python.h>

namespace nnx::engine {

// Adds the function that writes a state into an object graph: update.
bool InitUpdate(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_UPDATE_H_
