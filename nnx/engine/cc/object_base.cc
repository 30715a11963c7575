#include <Python.h>
#include <structmember.h>

#include <cstddef>

#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/runtime.h"

// The types derive from GraphObject, which the standard makes offsetof
// conditional on; GCC and Clang both support it there.
#pragma GCC diagnostic ignored "-Winvalid-offsetof"

namespace nnx::engine {

PyTypeObject* g_object_base = nullptr;

namespace {

PyObject* ObjectAlloc(PyTypeObject* type, Py_ssize_t) {
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

// `__new__` is a method, as `__setattr__` is and for the same reason:
// `object.__new__`, the end of a chain of them, refuses a type whose C base has
// a slot of its own. This one goes on with the classes that come after
// ObjectBase in the order of the bases.
PyObject* ObjectNew(PyObject*, PyObject* const* args, Py_ssize_t nargs,
                    PyObject* keywords) {
  if (nargs < 1 || !PyType_Check(args[0]) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(args[0]),
                        g_object_base)) {
    PyErr_SetString(PyExc_TypeError,
                    "`__new__` must get the class first, a subclass of this.");
    return nullptr;
  }
  auto* type = reinterpret_cast<PyTypeObject*>(args[0]);
  // What `object.__new__` allocates by; Python gives each class its own.
  type->tp_alloc = ObjectAlloc;
  const Ref bases = Ref::Borrow(type->tp_mro);
  Py_ssize_t i = 0;
  while (PyTuple_GET_ITEM(bases.get(), i) !=
         reinterpret_cast<PyObject*>(g_object_base)) {
    ++i;
  }
  for (++i; i < PyTuple_GET_SIZE(bases.get()); ++i) {
    auto* base =
        reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(bases.get(), i));
    if (!(base->tp_flags & Py_TPFLAGS_HEAPTYPE)) continue;  // `object`
    const Ref method =
        Ref::Borrow(PyDict_GetItemWithError(base->tp_dict, GetRuntime().s_new));
    if (!method && PyErr_Occurred()) return nullptr;
    // That of a type in C goes on with nothing.
    if (!method || PyCFunction_Check(method.get())) continue;
    const descrgetfunc get = Py_TYPE(method.get())->tp_descr_get;
    const Ref bound =
        get ? Ref::Steal(get(method.get(), nullptr, args[0])) : method;
    if (!bound) return nullptr;
    return PyObject_Vectorcall(bound.get(), args, nargs, keywords);
  }
  if (type->tp_flags & Py_TPFLAGS_IS_ABSTRACT) {
    // Refuses, naming the methods that are missing.
    const Ref nothing = Ref::Steal(PyTuple_New(0));
    if (!nothing) return nullptr;
    return PyBaseObject_Type.tp_new(type, nothing.get(), nullptr);
  }
  return ObjectAlloc(type, 0);
}

bool AddNew(PyObject* type) {
  static PyMethodDef method = {
      "__new__",
      reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(ObjectNew)),
      METH_FASTCALL | METH_KEYWORDS, "Makes an object without attributes."};
  const Ref function = Ref::Steal(PyCFunction_New(&method, nullptr));
  // On the finished type: CPython gives it the slot that calls the method.
  return function &&
         PyObject_SetAttrString(type, "__new__", function.get()) == 0;
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
     "The SourceLine of the user's code that made it, or None.", nullptr},
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

}  // namespace

PyObject* ObjectDict(ObjectObject* object) {
  if (!object->dict) object->dict = PyDict_New();
  return object->dict;
}

Ref NewObject(PyTypeObject* type, PyObject* status, const GraphObject* origin) {
  const Ref held = Ref::Borrow(reinterpret_cast<PyObject*>(type));
  Ref copy = status ? Ref::Steal(PyDict_Copy(status)) : Ref();
  if (status && !copy) return Ref();
  Ref self = Ref::Steal(PyType_GenericAlloc(type, 0));
  if (!self) return Ref();
  ObjectObject* object = AsObject(self.get());
  object->status = copy.release();
  if (!RecordTrace(object)) return Ref();
  CopyOrigin(object, origin);
  return self;
}

bool InitObjectBase(PyObject* module) {
  Ref type = Ref::Steal(PyType_FromSpec(&object_spec));
  if (!type || !AddSetAttrMethods<ObjectSetAttr>(type.get()) ||
      !AddNew(type.get())) {
    return false;
  }
  g_object_base = reinterpret_cast<PyTypeObject*>(type.get());
  return PyModule_AddObject(module, "ObjectBase", type.release()) == 0;
}

}  // namespace nnx::engine
