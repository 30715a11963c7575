#ifndef NNX_ENGINE_CC_NODE_TYPES_H_
#define NNX_ENGINE_CC_NODE_TYPES_H_

#include <Python.h>

namespace nnx::engine {

// Adds the functions that register types of nodes and look at single nodes:
// items, set_item, is_custom_node, holds_data, forget_type, register_node_type.
bool InitNodeTypes(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_NODE_TYPES_H_
