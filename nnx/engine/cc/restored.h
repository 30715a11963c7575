#ifndef NNX_ENGINE_CC_RESTORED_H_
#define NNX_ENGINE_CC_RESTORED_H_

#include <Python.h>

#include <string>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// A checkpoint that is read without a target has strings for keys that were
// ints, and a Variable's value in a dict: see `nnx.restored`.

// The int that `key` is the text of, null without an error if it is of none.
Ref IntOfText(PyObject* key);
// The text of the int `key`, null without an error if it is no int.
Ref TextOfInt(PyObject* key);

// Whether `value` is a concrete array of JAX, the commonest leaf.
bool IsConcreteArray(PyObject* value);

// The value of a Variable that has the value `old`, of what a state holds in
// its place. Null with an error set if it does not fit.
Ref RestoredValue(PyObject* old, PyObject* value, const std::string& path,
                  bool check_shapes);

// Whether two values have one shape, as far as both have any. 1, 0, -1.
int SameShape(PyObject* a, PyObject* b);
// Raises the error for an array of another shape than `wanted` has.
void RaiseShapeError(const std::string& path, PyObject* given,
                     PyObject* wanted);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_RESTORED_H_
