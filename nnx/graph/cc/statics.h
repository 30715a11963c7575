#ifndef NNX_GRAPH_CC_STATICS_H_
#define NNX_GRAPH_CC_STATICS_H_

#include <Python.h>

#include <cstring>

namespace nnx::graph {

// How static values are compared: structures are equal only if what a function
// computes from their static values is.

// Compared by value without running user code.
inline bool IsNativeScalar(PyObject* value) {
  PyTypeObject* type = Py_TYPE(value);
  return value == Py_None || type == &PyUnicode_Type || type == &PyLong_Type ||
         type == &PyBool_Type || type == &PyFloat_Type ||
         type == &PyBytes_Type || type == &PyComplex_Type ||
         value == Py_Ellipsis;
}

// For two native scalars of one type.
inline bool NativeEqual(PyObject* a, PyObject* b) {
  if (Py_TYPE(a) == &PyFloat_Type) {
    // By bits: NaN is NaN, and 0.0 is not -0.0.
    const double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
    return std::memcmp(&x, &y, sizeof(x)) == 0;
  }
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

// Whether comparing with the value runs no Python code.
bool IsAtomic(PyObject* value);

// The hash; of what it prints, if the value has none (a config that is not
// frozen, a slice, a set), so that a change in place is seen. Equal values that
// print differently are taken for different ones. -1 with an error set. Runs
// Python code.
Py_hash_t StaticHash(PyObject* value);

// 1, 0, -1. Runs Python code.
int StaticEqual(PyObject* a, PyObject* b);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_STATICS_H_
