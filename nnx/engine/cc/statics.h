#ifndef NNX_ENGINE_CC_STATICS_H_
#define NNX_ENGINE_CC_STATICS_H_

#include <Python.h>

#include <cmath>
#include <cstring>
#include <string>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

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
  if (Py_TYPE(a) == &PyComplex_Type) {
    const Py_complex x = PyComplex_AsCComplex(a), y = PyComplex_AsCComplex(b);
    return std::memcmp(&x, &y, sizeof(x)) == 0;
  }
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

// Of a native scalar: equal for equal ones, which Python's is not for NaN.
inline Py_hash_t NativeHash(PyObject* value) {
  if (Py_TYPE(value) == &PyFloat_Type || Py_TYPE(value) == &PyComplex_Type) {
    const Py_complex parts = PyComplex_AsCComplex(value);
    if (std::isnan(parts.real) || std::isnan(parts.imag)) return 17;
  }
  return PyObject_Hash(value);
}

// Whether comparing with the value runs no Python code.
bool IsAtomic(PyObject* value);

// The hash of a static value that is not atomic. One without a hash gets a
// `key` that holds what it holds now: it may be changed in place. -1 with an
// error set that names `path`, if there is one. Runs Python code.
Py_hash_t HashStatic(PyObject* value, const std::string& path, Ref* key);

// The keys of the values of a mapping that have no hash, by name; null where
// there are none. False with an error set on failure. Runs Python code.
bool FreezeMapping(PyObject* mapping, Ref* keys);

// Whether two static values are equal, types and all; `key`s may be null. 1, 0,
// -1. Runs Python code.
int StaticEqual(PyObject* a, PyObject* key_a, PyObject* b, PyObject* key_b);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_STATICS_H_
