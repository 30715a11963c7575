#ifndef NNX_ENGINE_CC_IDENTITY_H_
#define NNX_ENGINE_CC_IDENTITY_H_

#include <Python.h>

namespace nnx::engine {

// Adds what tells whether many objects are still the same ones: same_values,
// same_codes.
bool InitIdentity(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_IDENTITY_H_
