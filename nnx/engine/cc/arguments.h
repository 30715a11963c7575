#ifndef NNX_ENGINE_CC_ARGUMENTS_H_
#define NNX_ENGINE_CC_ARGUMENTS_H_

#include <Python.h>

#include <cstddef>
#include <vector>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// What the engine's functions share in reading their arguments.

// A function that takes an array of arguments, for a table of methods.
template <typename F>
PyCFunction Fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// Each of these sets an error where it returns false.
bool CheckArity(Py_ssize_t nargs, Py_ssize_t want, const char* name);
// Reads an argument that is True or False.
bool ReadBool(PyObject* value, bool* result);
// The objects of a list that a context keeps, or of None.
bool ObjectList(PyObject* value, const char* name, std::vector<Ref>* objects);
// Adds the objects that a walk has met first to such a list.
bool Extend(PyObject* list, const std::vector<Ref>& objects, size_t from);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_ARGUMENTS_H_
