#include "nnx/engine/cc/pytree.h"

#include <vector>

#include "nnx/engine/cc/arguments.h"
#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/owned_items.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/runtime.h"

namespace nnx::engine {
namespace {

// Metadata in a form that compares and hashes: pairs by name.
Ref MetadataKey(PyObject* metadata) {
  if (PyDict_GET_SIZE(metadata) == 0) return Ref::Steal(PyTuple_New(0));
  Ref items = Ref::Steal(PyDict_Items(metadata));
  if (!items || PyList_Sort(items.get()) < 0) {
    // Pairs with one name never compare their values; names are strings.
    return Ref();
  }
  return Ref::Steal(PyList_AsTuple(items.get()));
}

// variable_flatten(variable) -> ((raw_value,), metadata)
PyObject* VariableFlatten(PyObject*, PyObject* self) {
  if (!IsVariable(self)) {
    PyErr_SetString(PyExc_TypeError, "`variable` must be a Variable.");
    return nullptr;
  }
  if (!RefreshMetadata(AsVariable(self)) || !Share(AsVariable(self))) {
    return nullptr;
  }
  const Ref raw = Ref::Borrow(AsVariable(self)->raw);
  Ref children = Ref::Steal(PyTuple_Pack(1, raw.get()));
  Ref metadata = MetadataKey(AsVariable(self)->metadata);
  if (!children || !metadata) return nullptr;
  return PyTuple_Pack(2, children.get(), metadata.get());
}

// Bound to a class by `make_variable_unflatten`: (metadata, children) -> it.
PyObject* VariableUnflatten(PyObject* cls, PyObject* const* args,
                            Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "unflatten")) return nullptr;
  Ref children = Ref::Steal(PySequence_Tuple(args[1]));
  if (!children) return nullptr;
  if (!PyTuple_Check(args[0]) || PyTuple_GET_SIZE(children.get()) != 1) {
    PyErr_SetString(PyExc_ValueError,
                    "A Variable has one child, its value, and a tuple of "
                    "metadata.");
    return nullptr;
  }
  Ref metadata;
  if (PyTuple_GET_SIZE(args[0]) > 0) {
    metadata = Ref::Steal(PyDict_New());
    if (!metadata || PyDict_MergeFromSeq2(metadata.get(), args[0], 1) < 0) {
      return nullptr;
    }
  }
  auto* type = reinterpret_cast<PyTypeObject*>(cls);
  Ref self = NewVariable(type, PyTuple_GET_ITEM(children.get(), 0),
                         metadata.get(), ClassHookFlags(type), nullptr);
  // Metadata may carry hooks: Python knows their names.
  if (self && metadata &&
      !Ref::Steal(PyObject_CallMethodNoArgs(
          self.get(), GetRuntime().s_update_hook_flags))) {
    return nullptr;
  }
  return self.release();
}

PyMethodDef variable_unflatten_def = {
    "variable_unflatten", reinterpret_cast<PyCFunction>(VariableUnflatten),
    METH_FASTCALL, nullptr};

PyObject* MakeVariableUnflatten(PyObject*, PyObject* cls) {
  if (!PyType_Check(cls) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(cls),
                        g_variable_base)) {
    PyErr_SetString(PyExc_TypeError, "`cls` must be a Variable type.");
    return nullptr;
  }
  return PyCFunction_New(&variable_unflatten_def, cls);
}

// What jax puts in the place of data, such as the entries of `in_axes`, stays a
// child: `ObjectUnflatten` marks it so, and no treedef shows the mark.
bool IsStandIn(PyObject* mark) { return mark == Py_Ellipsis; }

// The marks that users made, in a form that compares and hashes.
Ref MarksKey(PyObject* status) {
  if (!status) return Ref::Steal(PyTuple_New(0));
  Ref marks = Ref::Steal(PyDict_New());
  if (!marks) return Ref();
  std::vector<Ref> items;
  AppendPairs(status, &items);
  for (size_t i = 0; i < items.size(); i += 2) {
    PyObject *name = items[i].get(), *mark = items[i + 1].get();
    if (!IsStandIn(mark) && PyDict_SetItem(marks.get(), name, mark) < 0) {
      return Ref();
    }
  }
  return MetadataKey(marks.get());
}

// object_flatten(object) -> (children, (names, statics, values, status)):
// attributes that hold data are children, the rest is static.
PyObject* ObjectFlatten(PyObject*, PyObject* self) {
  if (!IsObject(self)) {
    PyErr_SetString(PyExc_TypeError, "`object` must be a Pytree.");
    return nullptr;
  }
  ObjectObject* object = AsObject(self);
  TypeInfo* info = GetTypeInfo(Py_TYPE(self));
  // Owned, as all that follows may run Python code that assigns to them.
  const Ref dict = Ref::Borrow(ObjectDict(object));
  if (!info || !dict) return nullptr;
  std::vector<PyObject*> arena;
  Layout* layout = FindLayout(info, dict.get(), &arena);
  if (!layout) return nullptr;
  Ref keys = layout->keys;
  std::vector<Ref> values;
  for (PyObject* value : arena) values.push_back(Ref::Borrow(value));
  Ref children = Ref::Steal(PyList_New(0));
  Ref names = Ref::Steal(PyList_New(0));
  Ref statics = Ref::Steal(PyList_New(0));
  Ref static_values = Ref::Steal(PyList_New(0));
  const Ref status = Ref::Borrow(object->status);
  Ref marks = MarksKey(status.get());
  if (!children || !names || !statics || !static_values || !marks) {
    return nullptr;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* key = PyTuple_GET_ITEM(keys.get(), static_cast<Py_ssize_t>(i));
    const int data = IsData(status.get(), key, values[i].get());
    if (data < 0) return nullptr;
    if (PyList_Append(data ? names.get() : statics.get(), key) < 0 ||
        PyList_Append(data ? children.get() : static_values.get(),
                      values[i].get()) < 0) {
      return nullptr;
    }
  }
  Ref parts[4] = {Ref::Steal(PyList_AsTuple(children.get())),
                  Ref::Steal(PyList_AsTuple(names.get())),
                  Ref::Steal(PyList_AsTuple(statics.get())),
                  Ref::Steal(PyList_AsTuple(static_values.get()))};
  for (const Ref& part : parts) {
    if (!part) return nullptr;
  }
  return Py_BuildValue("(O(OOOO))", parts[0].get(), parts[1].get(),
                       parts[2].get(), parts[3].get(), marks.get());
}

PyObject* ObjectUnflatten(PyObject* cls, PyObject* const* args,
                          Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "unflatten")) return nullptr;
  if (!PyTuple_Check(args[0])) {
    PyErr_Format(PyExc_TypeError,
                 "`aux` of a Pytree must be a tuple, but got %s.",
                 Py_TYPE(args[0])->tp_name);
    return nullptr;
  }
  PyObject *names, *statics, *static_values, *status_items;
  if (!PyArg_ParseTuple(args[0], "O!O!O!O!", &PyTuple_Type, &names,
                        &PyTuple_Type, &statics, &PyTuple_Type, &static_values,
                        &PyTuple_Type, &status_items)) {
    return nullptr;
  }
  Ref children = Ref::Steal(PySequence_Tuple(args[1]));
  if (!children) return nullptr;
  if (PyTuple_GET_SIZE(statics) != PyTuple_GET_SIZE(static_values)) {
    PyErr_Format(PyExc_ValueError,
                 "There must be a value for each static attribute, but got "
                 "%zd for %zd.",
                 PyTuple_GET_SIZE(static_values), PyTuple_GET_SIZE(statics));
    return nullptr;
  }
  if (PyTuple_GET_SIZE(children.get()) != PyTuple_GET_SIZE(names)) {
    PyErr_Format(PyExc_ValueError,
                 "`children` must have %zd items, but got "
                 "%zd.",
                 PyTuple_GET_SIZE(names), PyTuple_GET_SIZE(children.get()));
    return nullptr;
  }
  Ref status;
  if (PyTuple_GET_SIZE(status_items) > 0) {
    status = Ref::Steal(PyDict_New());
    if (!status || PyDict_MergeFromSeq2(status.get(), status_items, 1) < 0) {
      return nullptr;
    }
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    const int data = HoldsData(PyTuple_GET_ITEM(children.get(), i));
    if (data < 0) return nullptr;
    if (data) continue;
    if (!status && !(status = Ref::Steal(PyDict_New()))) return nullptr;
    // Those that the user marked keep their mark.
    if (!PyDict_SetDefault(status.get(), name, Py_Ellipsis)) return nullptr;
  }
  Ref self =
      NewObject(reinterpret_cast<PyTypeObject*>(cls), status.get(), nullptr);
  if (!self) return nullptr;
  const Ref dict = Ref::Borrow(ObjectDict(AsObject(self.get())));
  if (!dict) return nullptr;
  auto fill = [&dict](PyObject* keys, PyObject* values) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keys); ++i) {
      if (PyDict_SetItem(dict.get(), PyTuple_GET_ITEM(keys, i),
                         PyTuple_GET_ITEM(values, i)) < 0) {
        return false;
      }
    }
    return true;
  };
  if (!fill(names, children.get()) || !fill(statics, static_values)) {
    return nullptr;
  }
  return self.release();
}

PyMethodDef object_unflatten_def = {
    "object_unflatten", reinterpret_cast<PyCFunction>(ObjectUnflatten),
    METH_FASTCALL, nullptr};

PyObject* MakeObjectUnflatten(PyObject*, PyObject* cls) {
  if (!PyType_Check(cls) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(cls), g_object_base)) {
    PyErr_SetString(PyExc_TypeError, "`cls` must be a Pytree type.");
    return nullptr;
  }
  return PyCFunction_New(&object_unflatten_def, cls);
}

// A State around a dict, without running its `__init__`.
Ref NewState(PyTypeObject* type, PyObject* mapping) {
  Ref state = Ref::Steal(type->tp_alloc(type, 0));
  if (state && PyObject_GenericSetAttr(state.get(), GetRuntime().s_mapping,
                                       mapping) < 0) {
    return Ref();
  }
  return state;
}

// Whether some key of nested dicts is no string. 1, 0, -1.
int HasOtherKeys(PyObject* dict) {
  RecursionGuard guard;
  if (!guard.entered()) return -1;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (!PyUnicode_CheckExact(key)) return 1;
    if (!PyDict_CheckExact(value)) continue;
    if (const int has = HasOtherKeys(value)) return has;
  }
  return 0;
}

// state_flatten(state) -> (values, keys), in canonical order. A nested dict is
// a child as it is, unless there are numbers among its keys: such dicts of jax
// cannot be written by `jax.export`, and are States here.
PyObject* StateFlatten(PyObject*, PyObject* state) {
  Ref mapping = AsMapping(state);
  if (!mapping) {
    if (!PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError,
                   "`state` must be a State or a dict, but got %s.",
                   Py_TYPE(state)->tp_name);
    }
    return nullptr;
  }
  Ref keys;
  std::vector<Ref> items;
  if (!OpenMapping(mapping.get(), &keys, &items)) return nullptr;
  Ref values = Ref::Steal(PyTuple_New(static_cast<Py_ssize_t>(items.size())));
  if (!values) return nullptr;
  for (size_t i = 0; i < items.size(); ++i) {
    if (PyDict_CheckExact(items[i].get()) && GetRuntime().state) {
      const int other_keys = HasOtherKeys(items[i].get());
      if (other_keys > 0) {
        items[i] = NewState(GetRuntime().state, items[i].get());
      }
      if (other_keys < 0 || !items[i]) return nullptr;
    }
    PyTuple_SET_ITEM(values.get(), static_cast<Py_ssize_t>(i),
                     items[i].release());
  }
  return PyTuple_Pack(2, values.get(), keys.get());
}

// Bound to a class by `make_state_unflatten`: (keys, children) -> it.
PyObject* StateUnflatten(PyObject* cls, PyObject* const* args,
                         Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "unflatten")) return nullptr;
  Ref children = Ref::Steal(PySequence_Tuple(args[1]));
  Ref mapping = Ref::Steal(PyDict_New());
  if (!children || !mapping) return nullptr;
  if (!PyTuple_Check(args[0]) ||
      PyTuple_GET_SIZE(args[0]) != PyTuple_GET_SIZE(children.get())) {
    PyErr_SetString(PyExc_ValueError,
                    "A State has a tuple of keys, and a child for each.");
    return nullptr;
  }
  PyTypeObject* state = GetRuntime().state;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[0]); ++i) {
    PyObject* child = PyTuple_GET_ITEM(children.get(), i);
    Ref value = Ref::Borrow(child);
    if (state && PyType_IsSubtype(Py_TYPE(child), state)) {
      value = StateMapping(child);
    }
    if (!value || PyDict_SetItem(mapping.get(), PyTuple_GET_ITEM(args[0], i),
                                 value.get()) < 0) {
      return nullptr;
    }
  }
  return NewState(reinterpret_cast<PyTypeObject*>(cls), mapping.get())
      .release();
}

PyMethodDef state_unflatten_def = {
    "state_unflatten", reinterpret_cast<PyCFunction>(StateUnflatten),
    METH_FASTCALL, nullptr};

PyObject* MakeStateUnflatten(PyObject*, PyObject* cls) {
  if (!PyType_Check(cls)) {
    PyErr_SetString(PyExc_TypeError, "`cls` must be a State type.");
    return nullptr;
  }
  return PyCFunction_New(&state_unflatten_def, cls);
}

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"variable_flatten", VariableFlatten, METH_O,
       "Pytree flattening of a Variable."},
      {"make_variable_unflatten", MakeVariableUnflatten, METH_O,
       "Pytree unflattening for a Variable type."},
      {"object_flatten", ObjectFlatten, METH_O,
       "Pytree flattening of a Pytree object."},
      {"make_object_unflatten", MakeObjectUnflatten, METH_O,
       "Pytree unflattening for a Pytree type."},
      {"state_flatten", StateFlatten, METH_O, "Pytree flattening of a State."},
      {"make_state_unflatten", MakeStateUnflatten, METH_O,
       "Pytree unflattening for a State type."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

int IsData(PyObject* status, PyObject* key, PyObject* value) {
  PyObject* marked = status ? PyDict_GetItemWithError(status, key) : nullptr;
  if (marked) return marked != Py_False;
  return status && PyErr_Occurred() ? -1 : HoldsData(value);
}

bool InitPytree(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::engine
