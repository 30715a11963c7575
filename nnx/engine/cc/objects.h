#ifndef NNX_ENGINE_CC_OBJECTS_H_
#define NNX_ENGINE_CC_OBJECTS_H_

#include <Python.h>

#include <cstdint>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// Bits of `hook_flags`.
inline constexpr uint8_t kGetHooks = 1;
inline constexpr uint8_t kSetHooks = 2;

// What both base types carry. `epoch` and `index` are the marks of a walk: an
// object was met by the walk whose number stands in `epoch`, as its
// `index`-th. A walk never runs Python code between its first and last mark,
// and holds the GIL, so one pair of fields serves all walks.
struct GraphObject {
  PyObject_HEAD PyObject*
      trace_ref;  // weakref to the trace it was made in; null: none
  PyObject* weaklist;
  PyObject* origin_code;  // code object of the user's frame that made it
  int origin_lasti;
  int32_t index;
  uint64_t epoch;
};

// Base of Variable: a value and its metadata, no instance dictionary.
struct VariableObject : GraphObject {
  PyObject* raw;       // never null
  PyObject* metadata;  // dict, never null
  uint8_t hook_flags;
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
inline GraphObject* AsGraphObject(PyObject* value) {
  return reinterpret_cast<GraphObject*>(value);
}

// The number of a new walk.
uint64_t NextEpoch();

// Creates both types and adds them to `module`.
bool InitObjects(PyObject* module);

// A Variable made without `__init__`. `metadata` may be null (empty), else it
// is copied; `origin` may be null, else its creation line is taken over.
// Returns null with an error set on failure.
Ref NewVariable(PyTypeObject* type, PyObject* raw, PyObject* metadata,
                uint8_t hook_flags, const GraphObject* origin);
// An object made without `__init__`, with no attributes.
Ref NewObject(PyTypeObject* type, PyObject* status, const GraphObject* origin);

// The hooks that a class itself has.
uint8_t ClassHookFlags(PyTypeObject* type);

// Whether the object may be changed while `trace` (null: none) is current.
bool BelongsToTrace(const GraphObject* object, PyObject* trace);
// Raises unless it may, or Python, asked as the last, lets it.
bool CheckTrace(PyObject* object, PyObject* trace);
// The same for the current trace.
bool CheckCanUpdate(PyObject* object);

void SetRaw(VariableObject* variable, PyObject* raw);
// Gives `target` the value, the metadata and the hooks of `source`.
bool AssignVariable(VariableObject* target, VariableObject* source);

// The instance dictionary, made if need be (borrowed).
PyObject* ObjectDict(ObjectObject* object);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_OBJECTS_H_
