#ifndef NNX_ENGINE_CC_OWNED_ITEMS_H_
#define NNX_ENGINE_CC_OWNED_ITEMS_H_

#include <Python.h>

#include <vector>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// What a container holds now, owned: the Python code that a walk runs on the
// way cannot take away what the walk has still before it. The items go to the
// end of a vector that serves a whole walk, so that levels cost no allocation.

// Of a list or tuple.
inline void AppendItems(PyObject* sequence, std::vector<Ref>* held) {
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence);
  for (Py_ssize_t i = 0; i < size; ++i) {
    held->push_back(Ref::Borrow(PySequence_Fast_GET_ITEM(sequence, i)));
  }
}

// Of a dict: each key and its value, as inserted.
inline void AppendPairs(PyObject* dict, std::vector<Ref>* held) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    held->push_back(Ref::Borrow(key));
    held->push_back(Ref::Borrow(value));
  }
}

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_OWNED_ITEMS_H_
