#ifndef NNX_ENGINE_CC_LIFT_FUNCTIONS_H_
#define NNX_ENGINE_CC_LIFT_FUNCTIONS_H_

#include <Python.h>

namespace nnx::engine {

// Adds the functions under all transforms: flatten, unflatten, pack, apply and
// their like.
bool InitLift(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_LIFT_FUNCTIONS_H_
