#include "nnx/engine/cc/graph_object.h"

#include <cstddef>
#include <cstring>

#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/vocabulary.h"

namespace nnx::engine {

namespace {

bool IsLibraryCode(PyCodeObject* code) {
  Py_ssize_t size = 0;
  const char* name = PyUnicode_AsUTF8AndSize(code->co_filename, &size);
  if (!name) {
    PyErr_Clear();
    return false;
  }
  const auto is_below = [&](const std::string& prefix) {
    return !prefix.empty() && static_cast<size_t>(size) >= prefix.size() &&
           std::memcmp(name, prefix.data(), prefix.size()) == 0;
  };
  const Runtime& rt = GetRuntime();
  return is_below(rt.library_prefix) || is_below(rt.jax_prefix);
}

PyObject* WeakrefTarget(PyObject* ref) {  // borrowed, or null when dead
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* target = nullptr;
  if (PyWeakref_GetRef(ref, &target) != 1) return nullptr;
  // The caller compares pointers with a trace that somebody else keeps alive.
  Py_DECREF(target);
  return target;
#else
  PyObject* target = PyWeakref_GetObject(ref);
  return target == Py_None ? nullptr : target;
#endif
}

}  // namespace

uint64_t NextEpoch() {
  static uint64_t epoch = 0;
  return ++epoch;
}

bool IsTraceOf(const GraphObject* object, PyObject* trace) {
  return WeakrefTarget(object->trace_ref) == trace;
}

// Raises, unless Python knows that the object may be changed: returns that.
static bool RaiseTraceError(PyObject* object) {
  const Runtime& rt = GetRuntime();
  if (!rt.trace_error) {
    PyErr_SetString(PyExc_RuntimeError,
                    "Cannot change an object made under another trace.");
    return false;
  }
  Ref error = Ref::Steal(PyObject_CallOneArg(rt.trace_error, object));
  if (!error) return false;
  if (error.get() == Py_None) return true;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.get())),
                  error.get());
  return false;
}

bool CheckTrace(PyObject* object, PyObject* trace) {
  return BelongsToTrace(AsGraphObject(object), trace) ||
         RaiseTraceError(object);
}

bool CheckCanUpdate(PyObject* object) {
  PyObject* trace = nullptr;
  if (!CurrentTrace(&trace)) return false;
  const Ref keep = Ref::Steal(trace);
  return CheckTrace(object, trace);
}

// Remembers the innermost frame outside of the library and of JAX: the code
// object and the instruction, from which the line is computed only when
// somebody asks.
void RecordOrigin(GraphObject* object) {
  PyFrameObject* frame = PyEval_GetFrame();
  Py_XINCREF(frame);
  while (frame) {
    PyCodeObject* code = PyFrame_GetCode(frame);
    if (!IsLibraryCode(code)) {
      object->origin_code = reinterpret_cast<PyObject*>(code);
      object->origin_lasti = PyFrame_GetLasti(frame);
      Py_DECREF(frame);
      return;
    }
    Py_DECREF(code);
    PyFrameObject* back = PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = back;
  }
}

void CopyOrigin(GraphObject* object, const GraphObject* origin) {
  if (!origin || !origin->origin_code) return;
  Py_INCREF(origin->origin_code);
  object->origin_code = origin->origin_code;
  object->origin_lasti = origin->origin_lasti;
}

bool RecordTrace(GraphObject* object) {
  PyObject* trace = nullptr;
  if (!CurrentTrace(&trace)) return false;
  if (!trace) return true;
  // CPython hands out one weakref a referent, so this allocates once a trace.
  object->trace_ref = PyWeakref_NewRef(trace, nullptr);
  Py_DECREF(trace);
  return object->trace_ref != nullptr;
}

PyObject* GetOrigin(PyObject* self, void*) {
  const GraphObject* object = AsGraphObject(self);
  if (!object->origin_code) Py_RETURN_NONE;
  auto* code = reinterpret_cast<PyCodeObject*>(object->origin_code);
  const int line = PyCode_Addr2Line(code, object->origin_lasti);
  return NewRecord(g_source_line_type, {Ref::Borrow(code->co_filename),
                                        Ref::Steal(PyLong_FromLong(line))})
      .release();
}

PyObject* CheckCanUpdateMethod(PyObject* self, PyObject*) {
  if (!CheckCanUpdate(self)) return nullptr;
  Py_RETURN_NONE;
}

PyObject* CanUpdateGetter(PyObject* self, void*) {
  PyObject* trace = nullptr;
  if (!CurrentTrace(&trace)) return nullptr;
  const bool belongs = BelongsToTrace(AsGraphObject(self), trace);
  Py_XDECREF(trace);
  return PyBool_FromLong(belongs);
}

PyObject* GetTraceRef(PyObject* self, void*) {
  PyObject* ref = AsGraphObject(self)->trace_ref;
  if (!ref) Py_RETURN_NONE;
  Py_INCREF(ref);
  return ref;
}

int TraverseShared(GraphObject* self, visitproc visit, void* arg) {
  Py_VISIT(self->trace_ref);
  Py_VISIT(self->origin_code);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

void ClearShared(GraphObject* self) {
  Py_CLEAR(self->trace_ref);
  Py_CLEAR(self->origin_code);
}

long ClassFlags(PyTypeObject* type, PyObject* name) {
  PyObject* flags = _PyType_Lookup(type, name);
  if (!flags || !PyLong_Check(flags)) return 0;
  int overflow = 0;  // without an error: then every flag is set
  return PyLong_AsLongAndOverflow(flags, &overflow);
}

}  // namespace nnx::engine
