#ifndef NNX_GRAPH_CC_STATE_H_
#define NNX_GRAPH_CC_STATE_H_

#include <Python.h>

namespace nnx::graph {

// Adds the functions between object graphs and nested mappings (the inside of
// State): split, state, merge, update, pop, filtering, and the pytree
// functions.
bool InitState(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_STATE_H_
