#ifndef NNX_GRAPH_CC_SPLIT_H_
#define NNX_GRAPH_CC_SPLIT_H_

#include <Python.h>

namespace nnx::graph {

// Adds the functions that take object graphs apart: split, state, graphdef and
// pop.
bool InitSplit(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_SPLIT_H_
