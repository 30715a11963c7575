#include "nnx/engine/cc/identity.h"

#include "nnx/engine/cc/arguments.h"

namespace nnx::engine {
namespace {

bool CheckIsTuple(PyObject* value, const char* name) {
  if (PyTuple_Check(value)) return true;
  PyErr_Format(PyExc_TypeError, "`%s` must be a tuple, but got %s.", name,
               Py_TYPE(value)->tp_name);
  return false;
}

// same_values(dict, values) -> bool
PyObject* SameValues(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "same_values")) return nullptr;
  if (!PyDict_Check(args[0])) {
    PyErr_Format(PyExc_TypeError, "`dict` must be a dict, but got %s.",
                 Py_TYPE(args[0])->tp_name);
    return nullptr;
  }
  if (!CheckIsTuple(args[1], "values")) return nullptr;
  // Nothing here runs Python code or makes an object.
  const Py_ssize_t size = PyTuple_GET_SIZE(args[1]);
  if (PyDict_GET_SIZE(args[0]) != size) Py_RETURN_FALSE;
  PyObject* value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!PyDict_Next(args[0], &position, nullptr, &value) ||
        value != PyTuple_GET_ITEM(args[1], i)) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

// same_codes(functions, codes) -> bool
PyObject* SameCodes(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "same_codes")) return nullptr;
  if (!CheckIsTuple(args[0], "functions") || !CheckIsTuple(args[1], "codes")) {
    return nullptr;
  }
  const Py_ssize_t size = PyTuple_GET_SIZE(args[0]);
  if (PyTuple_GET_SIZE(args[1]) != size) Py_RETURN_FALSE;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* function = PyTuple_GET_ITEM(args[0], i);
    if (!PyFunction_Check(function)) {
      PyErr_Format(PyExc_TypeError,
                   "`functions` must hold Python functions, but got %s.",
                   Py_TYPE(function)->tp_name);
      return nullptr;
    }
    if (PyFunction_GET_CODE(function) != PyTuple_GET_ITEM(args[1], i)) {
      Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"same_values", Fast(SameValues), METH_FASTCALL,
       "same_values(dict, values): whether the values of a dict are these very "
       "objects, in this order."},
      {"same_codes", Fast(SameCodes), METH_FASTCALL,
       "same_codes(functions, codes): whether the code of each function is "
       "this "
       "very object."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitIdentity(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::engine
