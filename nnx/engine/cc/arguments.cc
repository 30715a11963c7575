#include "nnx/engine/cc/arguments.h"

namespace nnx::engine {

bool CheckArity(Py_ssize_t nargs, Py_ssize_t want, const char* name) {
  if (nargs == want) return true;
  PyErr_Format(PyExc_TypeError, "`%s` takes %zd arguments, but got %zd.", name,
               want, nargs);
  return false;
}

bool ReadBool(PyObject* value, bool* result) {
  const int is_true = PyObject_IsTrue(value);
  *result = is_true == 1;
  return is_true >= 0;
}

bool ObjectList(PyObject* value, const char* name, std::vector<Ref>* objects) {
  if (value == Py_None) return true;
  if (!PyList_Check(value)) {
    PyErr_Format(PyExc_TypeError, "`%s` must be a list or None, but got %s.",
                 name, Py_TYPE(value)->tp_name);
    return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i) {
    objects->push_back(Ref::Borrow(PyList_GET_ITEM(value, i)));
  }
  return true;
}

bool Extend(PyObject* list, const std::vector<Ref>& objects, size_t from) {
  for (size_t i = from; i < objects.size(); ++i) {
    PyObject* object = objects[i] ? objects[i].get() : Py_None;
    if (PyList_Append(list, object) < 0) return false;
  }
  return true;
}

}  // namespace nnx::engine
