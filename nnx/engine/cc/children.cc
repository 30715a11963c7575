#include "nnx/engine/cc/children.h"

#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/vocabulary.h"

namespace nnx::engine {

Ref StateMapping(PyObject* state) {
  Ref mapping = Ref::Steal(PyObject_GetAttr(state, GetRuntime().s_mapping));
  if (mapping && !PyDict_CheckExact(mapping.get())) {
    PyErr_Format(PyExc_TypeError,
                 "`_mapping` of a State must be a dict, but got %s.",
                 Py_TYPE(mapping.get())->tp_name);
    return Ref();
  }
  return mapping;
}

bool IsPlainKey(PyObject* key) {
  return PyUnicode_CheckExact(key) || PyLong_CheckExact(key);
}

bool HasPlainKeys(PyObject* dict) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (!IsPlainKey(key)) return false;
  }
  return true;
}

Ref StoredMapping(PyObject* state) {
  PyObject* name = GetRuntime().s_mapping;
  if (_PyType_Lookup(Py_TYPE(state), name)) return Ref();
  Ref mapping = Ref::Steal(PyObject_GenericGetAttr(state, name));
  if (!mapping) PyErr_Clear();
  if (mapping && !PyDict_CheckExact(mapping.get())) return Ref();
  return mapping;
}

Ref AsMapping(PyObject* value) {
  if (PyDict_Check(value)) return Ref::Borrow(value);
  if (IsVariable(value)) return Ref();
  const Runtime& rt = GetRuntime();
  if (rt.state && PyType_IsSubtype(Py_TYPE(value), rt.state)) {
    return StateMapping(value);
  }
  if (IsForeign(value)) RaiseForeign(value, "");
  return Ref();
}

bool OpenPytree(PyObject* value, Ref* children, Ref* treedef, Ref* keys) {
  const Runtime& rt = GetRuntime();
  if (!rt.flatten_pytree) return false;
  Ref opened = Ref::Steal(PyObject_CallOneArg(rt.flatten_pytree, value));
  if (!opened || opened.get() == Py_None) return false;
  OpenedPytree node;
  if (!OpenedPytree::Read(opened.get(), &node)) return false;
  if (TypeInfo* info = FindTypeInfo(Py_TYPE(value))) info->opened = true;
  *children = Ref::Borrow(node.children);
  *treedef = Ref::Borrow(node.treedef);
  if (keys) *keys = Ref::Borrow(node.keys);
  return true;
}

namespace {

// For a key that was in a dict a moment ago.
bool MissingItem() {
  if (!PyErr_Occurred()) {
    PyErr_SetString(PyExc_RuntimeError, "A dict changed while it was walked.");
  }
  return false;
}

}  // namespace

bool OpenCustom(PyObject* value, TypeInfo* info, Ref* keys,
                std::vector<Ref>* children, Ref* metadata) {
  const Ref flatten = info->custom->flatten;
  Ref flattened = Ref::Steal(PyObject_CallOneArg(flatten.get(), value));
  if (!flattened) return false;
  if (!PyTuple_Check(flattened.get()) ||
      PyTuple_GET_SIZE(flattened.get()) != 2) {
    PyErr_Format(PyExc_TypeError,
                 "`flatten` of the node type %s must return "
                 "(items, metadata), but got %R.",
                 Py_TYPE(value)->tp_name, flattened.get());
    return false;
  }
  Ref items =
      Ref::Steal(PySequence_Tuple(PyTuple_GET_ITEM(flattened.get(), 0)));
  Ref dict = Ref::Steal(PyDict_New());
  if (!items || !dict) return false;
  const Py_ssize_t size = PyTuple_GET_SIZE(items.get());
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* item = PyTuple_GET_ITEM(items.get(), i);
    if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 2) {
      PyErr_Format(PyExc_TypeError,
                   "`flatten` of the node type %s must return pairs "
                   "(key, value), but got %R.",
                   Py_TYPE(value)->tp_name, item);
      return false;
    }
    if (PyDict_SetItem(dict.get(), PyTuple_GET_ITEM(item, 0),
                       PyTuple_GET_ITEM(item, 1)) < 0) {
      return false;
    }
  }
  *keys = CanonicalKeys(dict.get());
  if (!*keys) return false;
  if (PyTuple_GET_SIZE(keys->get()) != size) {
    PyErr_Format(
        PyExc_ValueError,
        "`flatten` of the node type %s must return every key once, but "
        "got %R.",
        Py_TYPE(value)->tp_name, items.get());
    return false;
  }
  for (Py_ssize_t i = 0; i < size; ++i) {
    children->push_back(Ref::Borrow(
        PyDict_GetItemWithError(dict.get(), PyTuple_GET_ITEM(keys->get(), i))));
    if (!children->back()) return MissingItem();
  }
  *metadata = Ref::Borrow(PyTuple_GET_ITEM(flattened.get(), 1));
  return true;
}

bool FieldNames(PyObject* value, Ref* names) {
  Ref fields = Ref::Steal(PyObject_GetAttr(value, GetRuntime().s_fields));
  if (!fields) return false;
  if (PyTuple_CheckExact(fields.get()) &&
      PyTuple_GET_SIZE(fields.get()) == PyTuple_GET_SIZE(value)) {
    *names = fields;
  }
  return true;
}

bool OpenMapping(PyObject* mapping, Ref* keys, std::vector<Ref>* children) {
  *keys = CanonicalKeys(mapping);
  if (!*keys) return false;
  const Py_ssize_t size = PyTuple_GET_SIZE(keys->get());
  for (Py_ssize_t i = 0; i < size; ++i) {
    children->push_back(Ref::Borrow(
        PyDict_GetItemWithError(mapping, PyTuple_GET_ITEM(keys->get(), i))));
    if (!children->back()) return MissingItem();
  }
  return true;
}

int OpenNode(PyObject* value, Ref* keys, std::vector<Ref>* children) {
  TypeInfo* info = GetTypeInfo(Py_TYPE(value));
  if (!info) return -1;
  switch (info->kind) {
    case TypeKind::kVariable:
    case TypeKind::kArray:
    case TypeKind::kStatic:
    case TypeKind::kPlain:
      return 0;
    case TypeKind::kForeign:
      RaiseForeign(value, "");
      return -1;
    case TypeKind::kNamedTuple:
      if (!FieldNames(value, keys)) return -1;
      [[fallthrough]];
    case TypeKind::kList:
    case TypeKind::kTuple:
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
        children->push_back(Ref::Borrow(PySequence_Fast_GET_ITEM(value, i)));
      }
      return 1;
    case TypeKind::kObject: {
      // Owned: `__dict__` can be assigned.
      Ref dict = Ref::Borrow(ObjectDict(AsObject(value)));
      return dict && OpenMapping(dict.get(), keys, children) ? 1 : -1;
    }
    case TypeKind::kDict:
      return OpenMapping(value, keys, children) ? 1 : -1;
    case TypeKind::kState: {
      Ref mapping = StateMapping(value);
      return mapping && OpenMapping(mapping.get(), keys, children) ? 1 : -1;
    }
    case TypeKind::kCustom: {
      Ref metadata;
      return OpenCustom(value, info, keys, children, &metadata) ? 1 : -1;
    }
    case TypeKind::kUnknown: {
      Ref opened, treedef;
      if (!OpenPytree(value, &opened, &treedef, keys)) {
        return PyErr_Occurred() ? -1 : 0;
      }
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(opened.get()); ++i) {
        children->push_back(Ref::Borrow(PyTuple_GET_ITEM(opened.get(), i)));
      }
      return 1;
    }
  }
  return 0;
}

int IsMutableArray(PyObject* value) {
  const Runtime& rt = GetRuntime();
  if (Py_TYPE(value) == rt.array_type || !rt.ref_type) return 0;
  if (Py_TYPE(value) == rt.ref_type) return 1;
  const TypeInfo* info = FindTypeInfo(Py_TYPE(value));
  if (!info || !info->traced) return 0;
  return PyObject_IsInstance(value, reinterpret_cast<PyObject*>(rt.ref_type));
}

int HoldsData(PyObject* value) {
  RecursionGuard guard;
  if (!guard.entered()) return -1;
  TypeInfo* info = GetTypeInfo(Py_TYPE(value));
  if (!info) return -1;
  // Each item is owned while it is looked at, which may run Python code that
  // takes it out. Those that such code puts in are not looked at.
  auto any_of = [](PyObject* sequence) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence);
    for (Py_ssize_t i = 0; i < size && i < PySequence_Fast_GET_SIZE(sequence);
         ++i) {
      const Ref item = Ref::Borrow(PySequence_Fast_GET_ITEM(sequence, i));
      const int holds = HoldsData(item.get());
      if (holds != 0) return holds;
    }
    return 0;
  };
  switch (info->kind) {
    case TypeKind::kVariable:
    case TypeKind::kObject:
    case TypeKind::kArray:
    case TypeKind::kCustom:
    case TypeKind::kForeign:
      return 1;
    case TypeKind::kState: {
      const Ref mapping = StateMapping(value);
      return mapping ? HoldsData(mapping.get()) : -1;
    }
    case TypeKind::kList:
    case TypeKind::kTuple:
    case TypeKind::kNamedTuple:
      return any_of(value);
    case TypeKind::kDict: {
      const Py_ssize_t size = PyDict_GET_SIZE(value);
      PyObject *key, *borrowed;
      Py_ssize_t position = 0;
      for (Py_ssize_t i = 0;
           i < size && PyDict_Next(value, &position, &key, &borrowed); ++i) {
        const Ref item = Ref::Borrow(borrowed);
        const int holds = HoldsData(item.get());
        if (holds != 0) return holds;
      }
      return 0;
    }
    case TypeKind::kStatic:
    case TypeKind::kPlain:
      return 0;
    case TypeKind::kUnknown: {
      Ref children, treedef;
      if (!OpenPytree(value, &children, &treedef, nullptr)) {
        return PyErr_Occurred() ? -1 : 0;
      }
      return any_of(children.get());
    }
  }
  return 0;
}

}  // namespace nnx::engine
