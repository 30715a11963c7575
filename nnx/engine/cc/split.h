#ifndef NNX_ENGINE_CC_SPLIT_H_
#define NNX_ENGINE_CC_SPLIT_H_

#include <Python.h>

#include "nnx/engine/cc/flatten.h"

namespace nnx::engine {

// Adds the functions that take object graphs apart: split, state, graphdef and
// pop.
bool InitSplit(PyObject* module);

// Whether a walk has met nothing twice, and no objects but such as are pytrees
// of jax for sure. -1 with an error set on failure.
int IsTree(const Flattener& walk);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_SPLIT_H_
