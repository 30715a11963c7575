#ifndef NNX_GRAPH_CC_UPDATE_H_
#define NNX_GRAPH_CC_UPDATE_H_

#include <Python.h>

namespace nnx::graph {

// Adds the function that writes a state into an object graph: update.
bool InitUpdate(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_UPDATE_H_
