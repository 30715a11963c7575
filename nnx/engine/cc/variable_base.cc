#include <Python.h>
#include <structmember.h>

#include <cstddef>

#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/runtime.h"

// The types derive from GraphObject, which the standard makes offsetof
// conditional on; GCC and Clang both support it there.
#pragma GCC diagnostic ignored "-Winvalid-offsetof"

namespace nnx::engine {

PyTypeObject* g_variable_base = nullptr;

namespace {

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
  variable->hold = Hold::kShared;
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
  if (!Share(variable)) return nullptr;
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
  return RawValue(AsVariable(self)).release();
}

int VariableSetRaw(PyObject* self, PyObject* value, void*) {
  if (RefuseDelete(value, "raw_value")) return -1;
  if (AsVariable(self)->hook_flags & kBoxed) {
    return Ref::Steal(PyObject_CallMethodOneArg(
               self, GetRuntime().s_set_raw_slow, value))
               ? 0
               : -1;
  }
  if (!CheckCanUpdate(self)) return -1;
  SetRaw(AsVariable(self), value);
  return 0;
}

PyObject* VariableCanUpdate(PyObject* self, void* closure) {
  if (AsVariable(self)->hook_flags & kBoxed) {
    static PyObject* name = PyUnicode_InternFromString("hijax");
    PyObject* hijax = PyDict_GetItemWithError(AsVariable(self)->metadata, name);
    if (!hijax && PyErr_Occurred()) return nullptr;
    // It can be changed under any trace.
    if (hijax == Py_True) Py_RETURN_TRUE;
  }
  return CanUpdateGetter(self, closure);
}

PyObject* VariableGetStored(PyObject* self, void*) {
  if (!Share(AsVariable(self))) return nullptr;
  Py_INCREF(AsVariable(self)->raw);
  return AsVariable(self)->raw;
}

int VariableSetStored(PyObject* self, PyObject* value, void*) {
  if (RefuseDelete(value, "_stored")) return -1;
  if (!CheckCanUpdate(self)) return -1;
  SetRaw(AsVariable(self), value);
  return 0;
}

PyObject* VariableGetMetadata(PyObject* self, void*) {
  if (!RefreshMetadata(AsVariable(self))) return nullptr;
  Py_INCREF(AsVariable(self)->metadata);
  return AsVariable(self)->metadata;
}

PyObject* VariableGetHookFlags(PyObject* self, void*) {
  PyObject* flags = HookFlagsMember(AsVariable(self)->hook_flags);
  Py_INCREF(flags);
  return flags;
}

PyObject* VariableSetHookFlags(PyObject* self, PyObject* flags) {
  const long bits = PyLong_AsLong(flags);
  if (bits == -1 && PyErr_Occurred()) return nullptr;
  if (bits & ~static_cast<long>(kHookFlags)) {
    PyErr_Format(PyExc_ValueError,
                 "`bits` must be those of HookFlags, but got %ld.", bits);
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
  if (!RefreshMetadata(AsVariable(self))) return nullptr;
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
    {"_stored", VariableGetStored, VariableSetStored,
     "What it holds: the value, or the box that has it.", nullptr},
    {"_metadata", VariableGetMetadata, nullptr, "The live metadata.", nullptr},
    {"_hook_flags", VariableGetHookFlags, nullptr,
     "The hooks that it has, as HookFlags.", nullptr},
    {"_origin", GetOrigin, nullptr,
     "The SourceLine of the user's code that made it, or None.", nullptr},
    {"_can_update", VariableCanUpdate, nullptr,
     "Whether it may be changed under the current trace.", nullptr},
    {"_trace_ref", GetTraceRef, nullptr,
     "A weak reference to the trace it belongs to, or None outside of all.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef variable_methods[] = {
    {"_set_hook_flags", VariableSetHookFlags, METH_O,
     "Says which hooks it has, by HookFlags."},
    {"_check_can_update", CheckCanUpdateMethod, METH_NOARGS,
     "Raises unless it may be changed under the current trace."},
    {"_new", reinterpret_cast<PyCFunction>(VariableNewRaw),
     METH_FASTCALL | METH_CLASS,
     "_new(raw_value, metadata): an instance made without __init__."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot variable_slots[] = {
    // The first line is what `inspect.signature` reads.
    {Py_tp_doc, const_cast<char*>("VariableBase(value, /, **metadata)\n--\n\n"
                                  "Base of Variable, with its storage.")},
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

}  // namespace

uint8_t ClassHookFlags(PyTypeObject* type) {
  const long flags = ClassFlags(type, GetRuntime().s_class_hook_flags);
  return static_cast<uint8_t>(flags & (kGetHooks | kSetHooks));
}

Ref RawValue(VariableObject* variable) {
  if (!(variable->hook_flags & kBoxed)) {
    return Share(variable) ? Ref::Borrow(variable->raw) : Ref();
  }
  return Ref::Steal(PyObject_CallMethodNoArgs(
      reinterpret_cast<PyObject*>(variable), GetRuntime().s_get_raw_slow));
}

bool WriteRawValue(VariableObject* variable, PyObject* raw) {
  if (variable->hook_flags & kBoxed) {
    return static_cast<bool>(Ref::Steal(
        PyObject_CallMethodOneArg(reinterpret_cast<PyObject*>(variable),
                                  GetRuntime().s_write_raw_slow, raw)));
  }
  SetRaw(variable, raw);
  return true;
}

bool CopyBox(VariableObject* variable) {
  if (!(variable->hook_flags & kBoxed)) return true;
  return static_cast<bool>(Ref::Steal(PyObject_CallMethodNoArgs(
      reinterpret_cast<PyObject*>(variable), GetRuntime().s_copy_box)));
}

bool RefreshMetadata(VariableObject* variable) {
  if (!(variable->hook_flags & kBoxed)) return true;
  PyObject* method = GetRuntime().s_refresh_metadata;
  // A bare VariableBase has none, and looking for it would lead here again.
  if (!_PyType_Lookup(Py_TYPE(variable), method)) return true;
  const Ref metadata = Ref::Borrow(variable->metadata);
  return static_cast<bool>(Ref::Steal(PyObject_CallMethodOneArg(
      reinterpret_cast<PyObject*>(variable), method, metadata.get())));
}

bool AssignVariable(VariableObject* target, VariableObject* source) {
  if (target == source) return true;
  if ((target->hook_flags | source->hook_flags) & kBoxed) {
    return static_cast<bool>(Ref::Steal(PyObject_CallMethodOneArg(
        reinterpret_cast<PyObject*>(target), GetRuntime().s_assign_slow,
        reinterpret_cast<PyObject*>(source))));
  }
  if (!Share(source)) return false;
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

bool InitVariableBase(PyObject* module) {
  Ref type = Ref::Steal(PyType_FromSpec(&variable_spec));
  if (!type || !AddSetAttrMethods<VariableSetAttr>(type.get())) return false;
  g_variable_base = reinterpret_cast<PyTypeObject*>(type.get());
  return PyModule_AddObject(module, "VariableBase", type.release()) == 0;
}

}  // namespace nnx::engine
