#ifndef NNX_ENGINE_CC_TUPLES_H_
#define NNX_ENGINE_CC_TUPLES_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// A tuple of the `Ref`s that `convert` makes of items. Null with an error set
// on failure, also where one of them is null.
template <typename T, typename Convert>
Ref ToTuple(const std::vector<T>& items, Convert convert) {
  Ref tuple = Ref::Steal(PyTuple_New(static_cast<Py_ssize_t>(items.size())));
  if (!tuple) return Ref();
  for (size_t i = 0; i < items.size(); ++i) {
    PyObject* item = convert(items[i]).release();
    if (!item) return Ref();
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i), item);
  }
  return tuple;
}

inline Ref ToTuple(const std::vector<Ref>& items) {
  return ToTuple(items, [](const Ref& item) { return item; });
}

inline Ref ToTuple(const std::vector<PyObject*>& items) {
  return ToTuple(items, Ref::Borrow);
}

inline Ref Number(int32_t number) {
  return Ref::Steal(PyLong_FromLong(number));
}

inline Ref ToTuple(const std::vector<int32_t>& numbers) {
  return ToTuple(numbers, Number);
}

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_TUPLES_H_
