#include "nnx/graph/cc/statics.h"

#include "nnx/graph/cc/py_ref.h"

namespace nnx::graph {
namespace {

// Compared by identity alone: the type inherits both hash and equality from
// `object`, or is a class.
bool IsIdentityCompared(PyObject* value) {
  PyTypeObject* type = Py_TYPE(value);
  return PyType_Check(value) || type == &PyFunction_Type ||
         (type->tp_hash == PyBaseObject_Type.tp_hash &&
          type->tp_richcompare == PyBaseObject_Type.tp_richcompare);
}

// Python says that 1 == True == 1.0, and so for tuples of them; a function
// traced with one must not serve for the other.
bool SameTypes(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (!PyTuple_Check(a)) return true;
  const Py_ssize_t size = PyTuple_GET_SIZE(a);
  if (size != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!SameTypes(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool IsAtomic(PyObject* value) {
  return IsNativeScalar(value) || IsIdentityCompared(value);
}

Py_hash_t StaticHash(PyObject* value) {
  const Py_hash_t hash = PyObject_Hash(value);
  if (hash != -1 || !PyErr_ExceptionMatches(PyExc_TypeError)) return hash;
  PyErr_Clear();
  Ref text = Ref::Steal(PyObject_Repr(value));
  return text ? PyObject_Hash(text.get()) : -1;
}

int StaticEqual(PyObject* a, PyObject* b) {
  if (a == b) return 1;
  if (!SameTypes(a, b)) return 0;
  if (IsNativeScalar(a)) return NativeEqual(a, b);
  if (IsIdentityCompared(a)) return 0;
  return PyObject_RichCompareBool(a, b, Py_EQ);
}

}  // namespace nnx::graph
