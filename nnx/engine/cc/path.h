#ifndef NNX_ENGINE_CC_PATH_H_
#define NNX_ENGINE_CC_PATH_H_

#include <Python.h>

#include <string>
#include <vector>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// A path of keys as the user would type it: `layers[0].kernel`.
std::string PathText(const std::vector<PyObject*>& path);
std::string PathText(const std::vector<Ref>& path);

// The same as a tuple.
Ref PathTuple(const std::vector<Ref>& path);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_PATH_H_
