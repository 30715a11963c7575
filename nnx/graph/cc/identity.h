#ifndef NNX_GRAPH_CC_IDENTITY_H_
#define NNX_GRAPH_CC_IDENTITY_H_

#include <Python.h>

namespace nnx::graph {

// Adds what tells whether many objects are still the same ones: same_values,
// same_codes.
bool InitIdentity(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_IDENTITY_H_
