#ifndef NNX_ENGINE_CC_PYTREE_H_
#define NNX_ENGINE_CC_PYTREE_H_

#include <Python.h>

namespace nnx::engine {

// Adds the functions by which jax flattens and unflattens Variables, objects
// and States.
bool InitPytree(PyObject* module);

// Whether an attribute of an object is data, by its mark in `status`, which may
// be null, or else by what it holds. 1, 0, -1.
int IsData(PyObject* status, PyObject* key, PyObject* value);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_PYTREE_H_
