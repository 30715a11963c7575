#ifndef NNX_ENGINE_CC_MAPPINGS_H_
#define NNX_ENGINE_CC_MAPPINGS_H_

#include <Python.h>

namespace nnx::engine {

// Adds the functions of nested mappings alone (the inside of State):
// split_mapping, merge_mappings and flatten_mapping.
bool InitMappings(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_MAPPINGS_H_
