#ifndef NNX_GRAPH_CC_PYTREE_H_
#define NNX_GRAPH_CC_PYTREE_H_

#include <Python.h>

namespace nnx::graph {

// Adds the functions by which jax flattens and unflattens Variables, objects
// and States.
bool InitPytree(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_PYTREE_H_
