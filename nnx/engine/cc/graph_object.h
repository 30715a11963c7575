#ifndef NNX_ENGINE_CC_GRAPH_OBJECT_H_
#define NNX_ENGINE_CC_GRAPH_OBJECT_H_

#include <Python.h>

#include <cstdint>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

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

inline GraphObject* AsGraphObject(PyObject* value) {
  return reinterpret_cast<GraphObject*>(value);
}

// The number of a new walk.
uint64_t NextEpoch();

// Whether `trace` is the one that an object was made under, of which it has a
// weak reference.
bool IsTraceOf(const GraphObject* object, PyObject* trace);
// Whether the object may be changed while `trace` (null: none) is current.
inline bool BelongsToTrace(const GraphObject* object, PyObject* trace) {
  if (!object->trace_ref) return trace == nullptr;
  return trace && IsTraceOf(object, trace);
}
// Raises unless it may, or Python, asked as the last, lets it.
bool CheckTrace(PyObject* object, PyObject* trace);
// The same for the current trace.
bool CheckCanUpdate(PyObject* object);

// What the constructors of both base types do: remember the line of the user's
// code that makes the object, or that of `origin` if that is not null, and the
// trace under which it is made.
void RecordOrigin(GraphObject* object);
void CopyOrigin(GraphObject* object, const GraphObject* origin);
bool RecordTrace(GraphObject* object);

// What the tables of both base types have in common.
PyObject* GetOrigin(PyObject* self, void*);
PyObject* CanUpdateGetter(PyObject* self, void*);
PyObject* CheckCanUpdateMethod(PyObject* self, PyObject*);
PyObject* GetTraceRef(PyObject* self, void*);
int TraverseShared(GraphObject* self, visitproc visit, void* arg);
void ClearShared(GraphObject* self);

// `__setattr__` and `__delattr__` are methods, not slots: `object.__setattr__`
// refuses a type whose C base has a slot of its own, and a frozen
// dataclass is made with it, as is what goes past the checks on purpose.
template <setattrofunc kSet>
PyObject* SetAttrMethod(PyObject* self, PyObject* const* args,
                        Py_ssize_t nargs) {
  if (nargs != 2) {
    PyErr_Format(PyExc_TypeError,
                 "`__setattr__` takes a name and a value, but got %zd "
                 "arguments.",
                 nargs);
    return nullptr;
  }
  if (kSet(self, args[0], args[1]) < 0) return nullptr;
  Py_RETURN_NONE;
}

template <setattrofunc kSet>
PyObject* DelAttrMethod(PyObject* self, PyObject* name) {
  if (kSet(self, name, nullptr) < 0) return nullptr;
  Py_RETURN_NONE;
}

// Set on the finished type, as Python does it for a class with these methods:
// CPython then gives the type, and all below it, the slot that calls them.
template <setattrofunc kSet>
bool AddSetAttrMethods(PyObject* type) {
  static PyMethodDef methods[] = {
      {"__setattr__", reinterpret_cast<PyCFunction>(SetAttrMethod<kSet>),
       METH_FASTCALL, "Sets an attribute, with the checks of the class."},
      {"__delattr__", DelAttrMethod<kSet>, METH_O,
       "Deletes an attribute, with the checks of the class."},
  };
  for (PyMethodDef& method : methods) {
    Ref descriptor = Ref::Steal(
        PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type), &method));
    if (!descriptor ||
        PyObject_SetAttrString(type, method.ml_name, descriptor.get()) < 0) {
      return false;
    }
  }
  return true;
}

// An int among the attributes of a class: flags that Python keeps for the
// engine.
long ClassFlags(PyTypeObject* type, PyObject* name);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_GRAPH_OBJECT_H_
