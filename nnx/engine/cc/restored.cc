#include "nnx/engine/cc/restored.h"

#include "nnx/engine/cc/runtime.h"

namespace nnx::engine {
namespace {

// The attribute, null without an error where there is none.
Ref Shape(PyObject* value) {
  Ref shape = Ref::Steal(PyObject_GetAttr(value, GetRuntime().s_shape));
  if (!shape && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
  return shape;
}

}  // namespace

Ref IntOfText(PyObject* key) {
  if (!PyUnicode_Check(key) || PyUnicode_GET_LENGTH(key) == 0) return Ref();
  const Py_UCS4 first = PyUnicode_READ_CHAR(key, 0);
  if (first != '-' && (first < '0' || first > '9')) return Ref();
  Ref number = Ref::Steal(PyLong_FromUnicodeObject(key, 10));
  Ref text = number ? TextOfInt(number.get()) : Ref();
  if (!text) {
    PyErr_Clear();
    return Ref();
  }
  return PyUnicode_Compare(text.get(), key) == 0 ? number : Ref();
}

Ref TextOfInt(PyObject* key) {
  if (!PyLong_CheckExact(key)) return Ref();
  Ref text = Ref::Steal(PyObject_Str(key));
  if (!text) PyErr_Clear();
  return text;
}

bool IsConcreteArray(PyObject* value) {
  return Py_TYPE(value) == GetRuntime().array_type;
}

Ref RestoredValue(PyObject* old, PyObject* value, const std::string& path,
                  bool check_shapes) {
  const Runtime& rt = GetRuntime();
  if (!rt.restored_value) return Ref::Borrow(value);
  return Ref::Steal(PyObject_CallFunction(rt.restored_value, "OOsO", old, value,
                                          path.c_str(),
                                          check_shapes ? Py_True : Py_False));
}

int SameShape(PyObject* a, PyObject* b) {
  if (a == b) return 1;
  if (IsConcreteArray(a) && IsConcreteArray(b)) {
    // Arrays that one program made share these, and they are cheap to get.
    PyObject* name = GetRuntime().s_aval;
    Ref aval_a = Ref::Steal(PyObject_GetAttr(a, name));
    Ref aval_b = Ref::Steal(PyObject_GetAttr(b, name));
    if (!aval_a || !aval_b) return -1;
    if (aval_a.get() == aval_b.get()) return 1;
  }
  Ref shape_a = Shape(a);
  if (!shape_a) return PyErr_Occurred() ? -1 : 1;
  Ref shape_b = Shape(b);
  if (!shape_b) return PyErr_Occurred() ? -1 : 1;
  return PyObject_RichCompareBool(shape_a.get(), shape_b.get(), Py_EQ);
}

void RaiseShapeError(const std::string& path, PyObject* given,
                     PyObject* wanted) {
  const Runtime& rt = GetRuntime();
  Ref given_shape = Shape(given);
  Ref wanted_shape = given_shape ? Shape(wanted) : Ref();
  if (!wanted_shape || !rt.shape_message) return;
  Ref text =
      Ref::Steal(PyObject_CallFunction(rt.shape_message, "sOO", path.c_str(),
                                       given_shape.get(), wanted_shape.get()));
  if (text) PyErr_SetObject(PyExc_ValueError, text.get());
}

}  // namespace nnx::engine
