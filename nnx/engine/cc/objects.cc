#include "nnx/engine/cc/objects.h"

#include <structmember.h>

#include <cstddef>
#include <cstring>

#include "nnx/engine/cc/runtime.h"

// The types derive from GraphObject, which the standard makes offsetof
// conditional on; GCC and Clang both support it there.
#pragma GCC diagnostic ignored "-Winvalid-offsetof"

namespace nnx::engine {

PyTypeObject* g_variable_base = nullptr;
PyTypeObject* g_object_base = nullptr;

uint64_t NextEpoch() {
  static uint64_t epoch = 0;
  return ++epoch;
}

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

bool RecordTrace(GraphObject* object) {
  PyObject* trace = nullptr;
  if (!CurrentTrace(&trace)) return false;
  if (!trace) return true;
  // CPython hands out one weakref a referent, so this allocates once a trace.
  object->trace_ref = PyWeakref_NewRef(trace, nullptr);
  Py_DECREF(trace);
  return object->trace_ref != nullptr;
}

void CopyOrigin(GraphObject* object, const GraphObject* origin) {
  if (!origin || !origin->origin_code) return;
  Py_INCREF(origin->origin_code);
  object->origin_code = origin->origin_code;
  object->origin_lasti = origin->origin_lasti;
}

// --- behaviour shared by both types

PyObject* GetOrigin(PyObject* self, void*) {
  const GraphObject* object = AsGraphObject(self);
  if (!object->origin_code) Py_RETURN_NONE;
  auto* code = reinterpret_cast<PyCodeObject*>(object->origin_code);
  const int line = PyCode_Addr2Line(code, object->origin_lasti);
  return Py_BuildValue("(Oi)", code->co_filename, line);
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

long ClassFlags(PyTypeObject* type, PyObject* name) {
  PyObject* flags = _PyType_Lookup(type, name);
  if (!flags || !PyLong_Check(flags)) return 0;
  int overflow = 0;  // without an error: then every flag is set
  return PyLong_AsLongAndOverflow(flags, &overflow);
}

// --- VariableBase

PyObject* VariableNew(PyTypeObject* type, PyObject*, PyObject*) {
  Ref self = NewVariable(type, Py_None, nullptr, 0, nullptr);
  if (self) RecordOrigin(AsGraphObject(self.get()));
  return self.release();
}

int VariableInit(PyObject* self, PyObject* args, PyObject* kwargs) {
  const Runtime& rt = GetRuntime();
  if (PyTuple_GET_SIZE(args) == 1 &&
      (!kwargs || PyDict_GET_SIZE(kwargs) == 0)) {
    PyObject* value = PyTuple_GET_ITEM(args, 0);
    const bool special =
        IsVariable(value) ||
        (rt.variable_metadata &&
         PyType_IsSubtype(Py_TYPE(value), rt.variable_metadata));
    if (!special && ClassFlags(Py_TYPE(self), rt.s_class_hook_flags) == 0) {
      SetRaw(AsVariable(self), value);
      return 0;
    }
  }
  Ref method = Ref::Steal(PyObject_GetAttr(self, rt.s_init_slow));
  if (!method) return -1;
  return Ref::Steal(PyObject_Call(method.get(), args, kwargs)) ? 0 : -1;
}

int VariableTraverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(AsVariable(self)->raw);
  Py_VISIT(AsVariable(self)->metadata);
  return TraverseShared(AsGraphObject(self), visit, arg);
}

int VariableClear(PyObject* self) {
  VariableObject* variable = AsVariable(self);
  // Fields are never null, even in an object that the collector took apart.
  PyObject* raw = variable->raw;
  variable->raw = Py_None;
  Py_INCREF(Py_None);
  Py_XDECREF(raw);
  if (variable->metadata) PyDict_Clear(variable->metadata);
  ClearShared(variable);
  return 0;
}

void VariableDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  // A Variable may hold a Variable, and so on.
  Py_TRASHCAN_BEGIN(self, VariableDealloc);
  VariableObject* variable = AsVariable(self);
  if (variable->weaklist) PyObject_ClearWeakRefs(self);
  Py_CLEAR(variable->raw);
  Py_CLEAR(variable->metadata);
  ClearShared(variable);
  type->tp_free(self);
  Py_DECREF(type);
  Py_TRASHCAN_END;
}

PyObject* VariableGetValue(PyObject* self, void*) {
  VariableObject* variable = AsVariable(self);
  if (variable->hook_flags & kGetHooks) {
    return PyObject_CallMethodNoArgs(self, GetRuntime().s_get_value_slow);
  }
  Py_INCREF(variable->raw);
  return variable->raw;
}

bool RefuseDelete(PyObject* value, const char* name) {
  if (value) return false;
  PyErr_Format(PyExc_AttributeError,
               "`%s` of a Variable cannot be deleted; set it to None instead.",
               name);
  return true;
}

int VariableSetValue(PyObject* self, PyObject* value, void*) {
  if (RefuseDelete(value, "value")) return -1;
  VariableObject* variable = AsVariable(self);
  Ref unwrapped = IsVariable(value)
                      ? Ref::Steal(VariableGetValue(value, nullptr))
                      : Ref::Borrow(value);
  if (!unwrapped) return -1;
  value = unwrapped.get();
  if (variable->hook_flags & kSetHooks) {
    return Ref::Steal(PyObject_CallMethodOneArg(
               self, GetRuntime().s_set_value_slow, value))
               ? 0
               : -1;
  }
  if (!CheckCanUpdate(self)) return -1;
  SetRaw(variable, value);
  return 0;
}

PyObject* VariableGetRaw(PyObject* self, void*) {
  Py_INCREF(AsVariable(self)->raw);
  return AsVariable(self)->raw;
}

int VariableSetRaw(PyObject* self, PyObject* value, void*) {
  if (RefuseDelete(value, "raw_value")) return -1;
  if (!CheckCanUpdate(self)) return -1;
  SetRaw(AsVariable(self), value);
  return 0;
}

PyObject* VariableGetMetadata(PyObject* self, void*) {
  Py_INCREF(AsVariable(self)->metadata);
  return AsVariable(self)->metadata;
}

PyObject* VariableGetHookFlags(PyObject* self, void*) {
  return PyLong_FromLong(AsVariable(self)->hook_flags);
}

PyObject* VariableSetHookFlags(PyObject* self, PyObject* flags) {
  const long bits = PyLong_AsLong(flags);
  if (bits == -1 && PyErr_Occurred()) return nullptr;
  if (bits & ~static_cast<long>(kGetHooks | kSetHooks)) {
    PyErr_Format(PyExc_ValueError, "`bits` must be 0, 1, 2 or 3, but got %ld.",
                 bits);
    return nullptr;
  }
  AsVariable(self)->hook_flags = static_cast<uint8_t>(bits);
  Py_RETURN_NONE;
}

PyObject* VariableNewRaw(PyObject* cls, PyObject* const* args,
                         Py_ssize_t nargs) {
  if (nargs != 2 || !PyDict_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError,
                    "`_new` takes a raw value and a dict of metadata.");
    return nullptr;
  }
  auto* type = reinterpret_cast<PyTypeObject*>(cls);
  Ref self = NewVariable(type, args[0], args[1],
                         static_cast<uint8_t>(ClassHookFlags(type)), nullptr);
  if (self) RecordOrigin(AsGraphObject(self.get()));
  return self.release();
}

PyObject* VariableSubscript(PyObject* self, PyObject* key) {
  if (AsVariable(self)->hook_flags & kGetHooks) {
    return PyObject_CallMethodOneArg(self, GetRuntime().s_getitem_slow, key);
  }
  Ref value = Ref::Steal(VariableGetValue(self, nullptr));
  if (!value || key == Py_Ellipsis) return value.release();
  return PyObject_GetItem(value.get(), key);
}

// Whether `v[...] = value` can replace the array instead of writing into it:
// both are arrays alike in shape, dtype and weak type.
int SameAbstractValue(PyObject* a, PyObject* b) {
  if (Py_TYPE(a) != Py_TYPE(b) || Py_TYPE(a) != GetRuntime().array_type) {
    return 0;
  }
  static PyObject* aval = PyUnicode_InternFromString("aval");
  Ref aval_a = Ref::Steal(PyObject_GetAttr(a, aval));
  Ref aval_b = Ref::Steal(PyObject_GetAttr(b, aval));
  if (!aval_a || !aval_b) return -1;
  return PyObject_RichCompareBool(aval_a.get(), aval_b.get(), Py_EQ);
}

int VariableAssignSubscript(PyObject* self, PyObject* key, PyObject* value) {
  if (!value) {
    return Ref::Steal(PyObject_CallMethodOneArg(
               self, GetRuntime().s_delitem_slow, key))
               ? 0
               : -1;
  }
  VariableObject* variable = AsVariable(self);
  if (key == Py_Ellipsis && variable->hook_flags == 0) {
    const Ref raw = Ref::Borrow(variable->raw);
    const int same = SameAbstractValue(raw.get(), value);
    if (same < 0) return -1;
    if (same) {
      if (!CheckCanUpdate(self)) return -1;
      SetRaw(variable, value);
      return 0;
    }
  }
  return Ref::Steal(PyObject_CallMethodObjArgs(
             self, GetRuntime().s_setitem_slow, key, value, nullptr))
             ? 0
             : -1;
}

PyObject* VariableGetAttr(PyObject* self, PyObject* name) {
  PyObject* found = PyObject_GenericGetAttr(self, name);
  if (found || !PyErr_ExceptionMatches(PyExc_AttributeError)) return found;
  // A property that failed with AttributeError reports that, not a missing
  // name.
  if (_PyType_Lookup(Py_TYPE(self), name)) return nullptr;
  PyErr_Clear();
  PyObject* metadata = AsVariable(self)->metadata;
  found = PyDict_GetItemWithError(metadata, name);
  if (found) {
    Py_INCREF(found);
    return found;
  }
  if (PyErr_Occurred()) return nullptr;
  PyObject* slow = GetRuntime().s_getattr_slow;
  // A bare VariableBase has none, and looking for it would lead here again.
  if (!_PyType_Lookup(Py_TYPE(self), slow)) {
    return PyObject_GenericGetAttr(self, name);
  }
  return PyObject_CallMethodOneArg(self, slow, name);
}

int VariableSetAttr(PyObject* self, PyObject* name, PyObject* value) {
  PyObject* descriptor = _PyType_Lookup(Py_TYPE(self), name);
  if (descriptor && Py_TYPE(descriptor)->tp_descr_set) {
    return PyObject_GenericSetAttr(self, name, value);
  }
  const Runtime& rt = GetRuntime();
  Ref result = Ref::Steal(
      value ? PyObject_CallMethodObjArgs(self, rt.s_setattr_slow, name, value,
                                         nullptr)
            : PyObject_CallMethodOneArg(self, rt.s_delattr_slow, name));
  return result ? 0 : -1;
}

PyMemberDef variable_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(VariableObject, weaklist),
     READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef variable_getset[] = {
    {"value", VariableGetValue, VariableSetValue,
     "The value, through the hooks.", nullptr},
    {"raw_value", VariableGetRaw, VariableSetRaw,
     "The value as stored, past the hooks.", nullptr},
    {"_metadata", VariableGetMetadata, nullptr, "The live metadata.", nullptr},
    {"_hook_flags", VariableGetHookFlags, nullptr,
     "1: get hooks exist; 2: set hooks exist.", nullptr},
    {"_origin", GetOrigin, nullptr,
     "(filename, line) of the user's code that made it, or None.", nullptr},
    {"_can_update", CanUpdateGetter, nullptr,
     "Whether it may be changed under the current trace.", nullptr},
    {"_trace_ref", GetTraceRef, nullptr,
     "A weak reference to the trace it belongs to, or None outside of all.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef variable_methods[] = {
    {"_set_hook_flags", VariableSetHookFlags, METH_O,
     "Says which hooks exist: bit 0 get, bit 1 set."},
    {"_check_can_update", CheckCanUpdateMethod, METH_NOARGS,
     "Raises unless it may be changed under the current trace."},
    {"_new", reinterpret_cast<PyCFunction>(VariableNewRaw),
     METH_FASTCALL | METH_CLASS,
     "_new(raw_value, metadata): an instance made without __init__."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot variable_slots[] = {
    {Py_tp_doc, const_cast<char*>("Base of Variable, with its storage.")},
    {Py_tp_new, reinterpret_cast<void*>(VariableNew)},
    {Py_tp_init, reinterpret_cast<void*>(VariableInit)},
    {Py_tp_dealloc, reinterpret_cast<void*>(VariableDealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(VariableTraverse)},
    {Py_tp_clear, reinterpret_cast<void*>(VariableClear)},
    {Py_tp_getattro, reinterpret_cast<void*>(VariableGetAttr)},
    {Py_mp_subscript, reinterpret_cast<void*>(VariableSubscript)},
    {Py_mp_ass_subscript, reinterpret_cast<void*>(VariableAssignSubscript)},
    {Py_tp_members, variable_members},
    {Py_tp_getset, variable_getset},
    {Py_tp_methods, variable_methods},
    {0, nullptr},
};

PyType_Spec variable_spec = {
    "nnx.engine._engine.VariableBase", sizeof(VariableObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    variable_slots};

// --- ObjectBase

PyObject* ObjectNew(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
  if (type->tp_flags & Py_TPFLAGS_IS_ABSTRACT) {
    // Refuses, naming the methods that are missing.
    return PyBaseObject_Type.tp_new(type, args, kwargs);
  }
  // What the class declares holds also for what is stored past the checks.
  PyObject* statuses =
      ClassFlags(type, GetRuntime().s_setattr_flags) == 0
          ? nullptr
          : _PyType_Lookup(type, GetRuntime().s_class_statuses);
  Ref declared = Ref::Borrow(statuses && PyDict_CheckExact(statuses) &&
                                     PyDict_GET_SIZE(statuses) > 0
                                 ? statuses
                                 : nullptr);
  Ref self = NewObject(type, declared.get(), nullptr);
  if (self) RecordOrigin(AsGraphObject(self.get()));
  return self.release();
}

int ObjectTraverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(AsObject(self)->dict);
  Py_VISIT(AsObject(self)->status);
  return TraverseShared(AsGraphObject(self), visit, arg);
}

int ObjectClear(PyObject* self) {
  Py_CLEAR(AsObject(self)->dict);
  Py_CLEAR(AsObject(self)->status);
  ClearShared(AsGraphObject(self));
  return 0;
}

void ObjectDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (AsObject(self)->weaklist) PyObject_ClearWeakRefs(self);
  ObjectClear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

int ObjectSetAttr(PyObject* self, PyObject* name, PyObject* value) {
  const Runtime& rt = GetRuntime();
  if (!CheckCanUpdate(self)) return -1;
  const bool marked = value && rt.attribute_marker &&
                      PyType_IsSubtype(Py_TYPE(value), rt.attribute_marker);
  if (!marked && ClassFlags(Py_TYPE(self), rt.s_setattr_flags) == 0) {
    if (PyObject_GenericSetAttr(self, name, value) < 0) return -1;
    // Owned: a name that is compared in Python can put another in its place.
    const Ref status = Ref::Borrow(AsObject(self)->status);
    if (!status) return 0;
    // An assignment leaves an earlier mark by the user as it is, not that of
    // what stood in the place of data.
    PyObject* mark = PyDict_GetItemWithError(status.get(), name);
    if (!mark) return PyErr_Occurred() ? -1 : 0;
    if (value && mark != Py_Ellipsis) return 0;
    return PyDict_DelItem(status.get(), name);
  }
  Ref result = Ref::Steal(
      value ? PyObject_CallMethodObjArgs(self, rt.s_setattr_slow, name, value,
                                         nullptr)
            : PyObject_CallMethodOneArg(self, rt.s_delattr_slow, name));
  return result ? 0 : -1;
}

PyObject* ObjectSetAttrRaw(PyObject* self, PyObject* const* args,
                           Py_ssize_t nargs) {
  if (nargs != 2) {
    PyErr_SetString(PyExc_TypeError,
                    "`_setattr_raw` takes a name and a value.");
    return nullptr;
  }
  if (PyObject_GenericSetAttr(self, args[0], args[1]) < 0) return nullptr;
  Py_RETURN_NONE;
}

PyObject* ObjectDelAttrRaw(PyObject* self, PyObject* name) {
  if (PyObject_GenericSetAttr(self, name, nullptr) < 0) return nullptr;
  Py_RETURN_NONE;
}

PyObject* ObjectGetStatus(PyObject* self, void*) {
  PyObject* status = AsObject(self)->status;
  if (!status) Py_RETURN_NONE;
  Py_INCREF(status);
  return status;
}

int ObjectSetStatus(PyObject* self, PyObject* value, void*) {
  if (value && value != Py_None && !PyDict_CheckExact(value)) {
    PyErr_Format(PyExc_TypeError,
                 "`_pytree_status` must be a dict or None, but got %s.",
                 Py_TYPE(value)->tp_name);
    return -1;
  }
  PyObject* fresh = value == Py_None ? nullptr : value;
  Py_XINCREF(fresh);
  PyObject* old = AsObject(self)->status;
  AsObject(self)->status = fresh;
  Py_XDECREF(old);
  return 0;
}

PyMemberDef object_members[] = {
    {"__dictoffset__", T_PYSSIZET, offsetof(ObjectObject, dict), READONLY,
     nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(ObjectObject, weaklist),
     READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef object_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr,
     nullptr},
    {"_pytree_status", ObjectGetStatus, ObjectSetStatus,
     "Attributes marked explicitly: name -> True (data) or False (static).",
     nullptr},
    {"_origin", GetOrigin, nullptr,
     "(filename, line) of the user's code that made it, or None.", nullptr},
    {"_can_update", CanUpdateGetter, nullptr,
     "Whether it may be changed under the current trace.", nullptr},
    {"_trace_ref", GetTraceRef, nullptr,
     "A weak reference to the trace it belongs to, or None outside of all.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef object_methods[] = {
    {"_check_can_update", CheckCanUpdateMethod, METH_NOARGS,
     "Raises unless it may be changed under the current trace."},
    {"_setattr_raw", reinterpret_cast<PyCFunction>(ObjectSetAttrRaw),
     METH_FASTCALL, "_setattr_raw(name, value): sets without any check."},
    {"_delattr_raw", ObjectDelAttrRaw, METH_O,
     "_delattr_raw(name): deletes without any check."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot object_slots[] = {
    {Py_tp_doc, const_cast<char*>("Base of Pytree, Object and Module.")},
    {Py_tp_new, reinterpret_cast<void*>(ObjectNew)},
    {Py_tp_dealloc, reinterpret_cast<void*>(ObjectDealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(ObjectTraverse)},
    {Py_tp_clear, reinterpret_cast<void*>(ObjectClear)},
    {Py_tp_members, object_members},
    {Py_tp_getset, object_getset},
    {Py_tp_methods, object_methods},
    {0, nullptr},
};

PyType_Spec object_spec = {
    "nnx.engine._engine.ObjectBase", sizeof(ObjectObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    object_slots};

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

uint8_t ClassHookFlags(PyTypeObject* type) {
  const long flags = ClassFlags(type, GetRuntime().s_class_hook_flags);
  return static_cast<uint8_t>(flags & (kGetHooks | kSetHooks));
}

bool BelongsToTrace(const GraphObject* object, PyObject* trace) {
  if (!object->trace_ref) return trace == nullptr;
  return trace && WeakrefTarget(object->trace_ref) == trace;
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

void SetRaw(VariableObject* variable, PyObject* raw) {
  Py_INCREF(raw);
  PyObject* old = variable->raw;
  variable->raw = raw;
  Py_XDECREF(old);
}

bool AssignVariable(VariableObject* target, VariableObject* source) {
  if (target == source) return true;
  SetRaw(target, source->raw);
  target->hook_flags = source->hook_flags;
  if (PyDict_GET_SIZE(target->metadata) == 0 &&
      PyDict_GET_SIZE(source->metadata) == 0) {
    return true;
  }
  Ref metadata = Ref::Steal(PyDict_Copy(source->metadata));
  if (!metadata) return false;
  PyDict_Clear(target->metadata);
  return PyDict_Update(target->metadata, metadata.get()) == 0;
}

PyObject* ObjectDict(ObjectObject* object) {
  if (!object->dict) object->dict = PyDict_New();
  return object->dict;
}

Ref NewVariable(PyTypeObject* type, PyObject* raw, PyObject* metadata,
                uint8_t hook_flags, const GraphObject* origin) {
  // All at hand before the collector, and so Python code, can see the object.
  const Ref held = Ref::Borrow(reinterpret_cast<PyObject*>(type));
  Ref value = Ref::Borrow(raw);
  Ref copy = Ref::Steal(metadata ? PyDict_Copy(metadata) : PyDict_New());
  if (!copy) return Ref();
  Ref self = Ref::Steal(type->tp_alloc(type, 0));
  if (!self) return Ref();
  VariableObject* variable = AsVariable(self.get());
  variable->raw = value.release();
  variable->metadata = copy.release();
  variable->hook_flags = hook_flags;
  if (!RecordTrace(variable)) return Ref();
  CopyOrigin(variable, origin);
  return self;
}

Ref NewObject(PyTypeObject* type, PyObject* status, const GraphObject* origin) {
  const Ref held = Ref::Borrow(reinterpret_cast<PyObject*>(type));
  Ref copy = status ? Ref::Steal(PyDict_Copy(status)) : Ref();
  if (status && !copy) return Ref();
  Ref self = Ref::Steal(type->tp_alloc(type, 0));
  if (!self) return Ref();
  ObjectObject* object = AsObject(self.get());
  object->status = copy.release();
  if (!RecordTrace(object)) return Ref();
  CopyOrigin(object, origin);
  return self;
}

bool InitObjects(PyObject* module) {
  Ref variable = Ref::Steal(PyType_FromSpec(&variable_spec));
  Ref object = Ref::Steal(PyType_FromSpec(&object_spec));
  if (!variable || !AddSetAttrMethods<VariableSetAttr>(variable.get()) ||
      !object || !AddSetAttrMethods<ObjectSetAttr>(object.get())) {
    return false;
  }
  g_variable_base = reinterpret_cast<PyTypeObject*>(variable.get());
  g_object_base = reinterpret_cast<PyTypeObject*>(object.get());
  return PyModule_AddObject(module, "VariableBase", variable.release()) == 0 &&
         PyModule_AddObject(module, "ObjectBase", object.release()) == 0;
}

}  // namespace nnx::engine
