#ifndef NNX_ENGINE_CC_JIT_CALL_H_
#define NNX_ENGINE_CC_JIT_CALL_H_

#include <Python.h>

#include <cstdint>
#include <vector>

#include "nnx/engine/cc/entry_cache.h"
#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// Owned references to the leaves and objects of one call.
struct Call {
  std::vector<PyObject*> leaves;
  std::vector<PyObject*> objects;
  bool owns = false;   // one of the Variables owns its array
  bool traced = true;  // one of them belongs to a trace, as far as is known
  ~Call() {
    for (PyObject* leaf : leaves) Py_XDECREF(leaf);
    for (PyObject* object : objects) Py_XDECREF(object);
  }
};

// The leaves with the given numbers, as a tuple.
Ref Pick(const Call& call, const std::vector<int32_t>& numbers);

// Calls the program of an entry, in place where it can, does to the objects of
// the call what it says, and builds the result. `function` is called, and
// `copy_array` copies what is donated twice.
PyObject* RunEntry(PyObject* function, PyObject* copy_array, const Entry& entry,
                   const Call& call);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_JIT_CALL_H_
