#ifndef NNX_ENGINE_CC_PYTREE_H_
#define NNX_ENGINE_CC_PYTREE_H_

#include <Python.h>

namespace nnx::engine {

// Adds the functions by which jax flattens and unflattens Variables, objects
// and States.
bool InitPytree(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_PYTREE_H_
