#ifndef NNX_GRAPH_CC_MERGE_H_
#define NNX_GRAPH_CC_MERGE_H_

#include <Python.h>

namespace nnx::graph {

// Adds the functions that build object graphs: merge and clone.
bool InitMerge(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_MERGE_H_
