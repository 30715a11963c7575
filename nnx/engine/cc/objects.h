#ifndef NNX_ENGINE_CC_OBJECTS_H_
#define NNX_ENGINE_CC_OBJECTS_H_

#include <Python.h>

#include <cstdint>

#include "nnx/engine/cc/graph_object.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/vocabulary.h"

namespace nnx::engine {

// Who may have the array of a Variable.
enum class Hold : uint8_t {
  kShared,  // anyone
  kOwn,   // the Variable alone: a compiled function made the array for it, and
          // nobody has read it since
  kLent,  // a call that is under way, which will overwrite it
};

// Base of Variable: a value and its metadata, no instance dictionary. Whoever
// lets `raw` out of the engine, or copies it, asks `Share` first.
struct VariableObject : GraphObject {
  PyObject* raw;       // never null
  PyObject* metadata;  // dict, never null
  uint8_t hook_flags;  // kGetHooks, kSetHooks, kBoxed
  Hold hold;
};

// Base of Pytree, Object and Module: an instance dictionary.
struct ObjectObject : GraphObject {
  PyObject* dict;  // null until the first attribute
  // dict name -> True (marked as data), False (as static), Ellipsis (in the
  // place of data), or null
  PyObject* status;
};

extern PyTypeObject* g_variable_base;
extern PyTypeObject* g_object_base;

inline bool IsVariable(PyObject* value) {
  return PyType_IsSubtype(Py_TYPE(value), g_variable_base);
}
inline bool IsObject(PyObject* value) {
  return PyType_IsSubtype(Py_TYPE(value), g_object_base);
}
inline VariableObject* AsVariable(PyObject* value) {
  return reinterpret_cast<VariableObject*>(value);
}
inline ObjectObject* AsObject(PyObject* value) {
  return reinterpret_cast<ObjectObject*>(value);
}

// Creates the types and adds them to `module`.
bool InitVariableBase(PyObject* module);
bool InitObjectBase(PyObject* module);

// A Variable made without `__init__`. `metadata` may be null (empty), else it
// is copied; `origin` may be null, else its creation line is taken over.
// Returns null with an error set on failure.
Ref NewVariable(PyTypeObject* type, PyObject* raw, PyObject* metadata,
                uint8_t hook_flags, const GraphObject* origin);
// An object made without `__init__`, with no attributes.
Ref NewObject(PyTypeObject* type, PyObject* status, const GraphObject* origin);

// The hooks that a class itself has.
uint8_t ClassHookFlags(PyTypeObject* type);

inline void SetRaw(VariableObject* variable, PyObject* raw) {
  Py_INCREF(raw);
  PyObject* old = variable->raw;
  variable->raw = raw;
  variable->hold = Hold::kShared;
  Py_XDECREF(old);
}
// Makes `raw` one that others may have. Where it is lent, a copy takes its
// place or, if the call has used it up, what the call writes; this may run
// Python code and wait. False with an error set on failure.
bool ShareSlow(VariableObject* variable);
inline bool Share(VariableObject* variable) {
  return variable->hold == Hold::kShared || ShareSlow(variable);
}
// The value, out of its box if it is in one; null with an error set on failure.
Ref RawValue(VariableObject* variable);
// Replaces the value, inside of its box or mutable array if it is in one.
bool WriteRawValue(VariableObject* variable, PyObject* raw);
// Gives a copy of a Variable a box of its own, if its value is in one.
bool CopyBox(VariableObject* variable);
// Takes over metadata that a trace has left in the box, if there is one.
bool RefreshMetadata(VariableObject* variable);
// Gives `target` the value, the metadata and the hooks of `source`.
bool AssignVariable(VariableObject* target, VariableObject* source);

// The instance dictionary, made if need be (borrowed).
PyObject* ObjectDict(ObjectObject* object);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_OBJECTS_H_
