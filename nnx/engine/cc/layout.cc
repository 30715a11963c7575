#include "nnx/engine/cc/layout.h"

#include <algorithm>
#include <string>
#include <unordered_map>

#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/runtime.h"

namespace nnx::engine {
namespace {

// A class whose instances keep changing their attribute names (a container
// that grows) would collect layouts without end.
constexpr size_t kMaxLayouts = 16;

using TypeMap = std::unordered_map<PyTypeObject*, TypeInfo>;

TypeMap& Types() {
  static TypeMap* types = new TypeMap();
  return *types;
}

PyObject* DropType(PyObject* key, PyObject*);

PyMethodDef drop_type_def = {"_drop_type", DropType, METH_O, nullptr};

// The entry goes when the class goes; a class defined in a function must be
// collectable.
Ref WatchType(PyTypeObject* type) {
  Ref key = Ref::Steal(PyLong_FromVoidPtr(type));
  if (!key) return Ref();
  Ref callback = Ref::Steal(PyCFunction_New(&drop_type_def, key.get()));
  if (!callback) return Ref();
  return Ref::Steal(
      PyWeakref_NewRef(reinterpret_cast<PyObject*>(type), callback.get()));
}

PyObject* DropType(PyObject* key, PyObject*) {
  auto* type = static_cast<PyTypeObject*>(PyLong_AsVoidPtr(key));
  auto entry = Types().find(type);
  if (entry == Types().end()) Py_RETURN_NONE;
  // The collector tells of a class that it is about to take apart before it
  // calls the finalisers, whose structures still point at the entry.
  if (Py_REFCNT(type) > 0) {
    entry->second.weakref = WatchType(type);
    if (!entry->second.weakref) return nullptr;
    Py_RETURN_NONE;
  }
  // What goes with the entry may run Python code, which must not find it.
  const auto dropped = Types().extract(entry);
  Py_RETURN_NONE;
}

bool IsNamedTupleType(PyTypeObject* type) {
  return PyType_IsSubtype(type, &PyTuple_Type) &&
         _PyType_Lookup(type, GetRuntime().s_fields) != nullptr;
}

bool IsPlainType(PyTypeObject* type) {
  return type == Py_TYPE(Py_None) || type == &PyBool_Type ||
         type == &PyLong_Type || type == &PyFloat_Type ||
         type == &PyComplex_Type || type == &PyUnicode_Type ||
         type == &PyBytes_Type || type == &PyFunction_Type ||
         type == &PyCFunction_Type || type == &PyMethod_Type ||
         type == Py_TYPE(Py_Ellipsis) || PyType_IsSubtype(type, &PyType_Type);
}

// Whether a class of objects says that they are pytrees.
bool SaysPytree(PyTypeObject* type) {
  Ref says = Ref::Steal(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "_is_pytree"));
  if (!says) PyErr_Clear();
  return says.get() == Py_True;
}

bool Classify(PyTypeObject* type, TypeInfo* info) {
  const Runtime& rt = GetRuntime();
  if (PyType_IsSubtype(type, g_variable_base)) {
    info->kind = TypeKind::kVariable;
  } else if (PyType_IsSubtype(type, g_object_base)) {
    info->kind = TypeKind::kObject;
    info->pytree = SaysPytree(type);
  } else if (type == &PyList_Type) {
    info->kind = TypeKind::kList;
  } else if (type == &PyDict_Type) {
    info->kind = TypeKind::kDict;
  } else if (type == &PyTuple_Type) {
    info->kind = TypeKind::kTuple;
  } else if (rt.state && PyType_IsSubtype(type, rt.state)) {
    info->kind = TypeKind::kState;
  } else if (IsNamedTupleType(type)) {
    info->kind = TypeKind::kNamedTuple;
  } else if (rt.structure && PyType_IsSubtype(type, rt.structure)) {
    info->kind = TypeKind::kStatic;
  } else if (type == rt.array_type) {
    info->kind = TypeKind::kArray;
  } else if (IsPlainType(type)) {
    info->kind = TypeKind::kPlain;
  } else if (rt.is_array_type) {
    Ref is_array = Ref::Steal(PyObject_CallOneArg(
        rt.is_array_type, reinterpret_cast<PyObject*>(type)));
    if (!is_array) return false;
    if (is_array.get() == Py_True) info->kind = TypeKind::kArray;
    info->traced = rt.tracer_type && PyType_IsSubtype(type, rt.tracer_type);
    if (is_array.get() == Py_False) info->kind = TypeKind::kPlain;
    if (is_array.get() == Py_Ellipsis) info->kind = TypeKind::kForeign;
  }
  return true;
}

// Names are interned, so different pointers are nearly always different names.
bool SameKey(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b) ||
      !(PyUnicode_CheckExact(a) || PyLong_CheckExact(a))) {
    return false;
  }
  return PyObject_RichCompareBool(a, b, Py_EQ) == 1;
}

bool MatchInserted(const Layout& layout, PyObject* dict,
                   std::vector<PyObject*>* scratch) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t count = 0;
  const size_t size = layout.inserted.size();
  if (static_cast<size_t>(PyDict_GET_SIZE(dict)) != size) return false;
  while (PyDict_Next(dict, &position, &key, &value)) {
    if (!SameKey(layout.inserted[count].get(), key)) return false;
    (*scratch)[count++] = value;
  }
  return true;
}

void Canonicalise(const Layout& layout, const std::vector<PyObject*>& scratch,
                  std::vector<PyObject*>* arena) {
  const size_t size = layout.order.size();
  const size_t base = arena->size();
  arena->resize(base + size);
  for (size_t i = 0; i < size; ++i) {
    (*arena)[base + i] = scratch[layout.order[i]];
  }
}

// The canonical positions of keys: ints, then strings, each ascending; where
// there are any others, as they come. Runs no Python code.
std::vector<int32_t> CanonicalOrder(const std::vector<Ref>& keys) {
  const auto size = static_cast<int32_t>(keys.size());
  std::vector<std::pair<long long, int32_t>> ints;
  std::vector<int32_t> order;
  order.reserve(keys.size());
  bool plain = true;
  for (int32_t i = 0; plain && i < size; ++i) {
    PyObject* key = keys[i].get();
    if (PyUnicode_CheckExact(key)) {
      order.push_back(i);
    } else if (PyLong_CheckExact(key)) {
      int overflow = 0;
      ints.emplace_back(PyLong_AsLongLongAndOverflow(key, &overflow), i);
      plain = overflow == 0;
    } else {
      plain = false;
    }
  }
  if (!plain) {
    order.resize(keys.size());
    for (int32_t i = 0; i < size; ++i) order[i] = i;
    return order;
  }
  auto less = [&](int32_t a, int32_t b) {
    return PyUnicode_Compare(keys[a].get(), keys[b].get()) < 0;
  };
  if (!std::is_sorted(order.begin(), order.end(), less)) {
    std::sort(order.begin(), order.end(), less);
  }
  if (ints.empty()) return order;
  std::sort(ints.begin(), ints.end());
  std::vector<int32_t> all;
  all.reserve(keys.size());
  for (const auto& [number, i] : ints) all.push_back(i);
  all.insert(all.end(), order.begin(), order.end());
  return all;
}

Ref PickTuple(const std::vector<Ref>& items,
              const std::vector<int32_t>& order) {
  Ref tuple = Ref::Steal(PyTuple_New(static_cast<Py_ssize_t>(order.size())));
  if (!tuple) return Ref();
  for (size_t i = 0; i < order.size(); ++i) {
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i),
                     Ref(items[order[i]]).release());
  }
  return tuple;
}

}  // namespace

bool IsForeign(PyObject* value) {
  const TypeInfo* info = GetTypeInfo(Py_TYPE(value));
  if (!info) PyErr_Clear();
  return info && info->kind == TypeKind::kForeign;
}

void RaiseForeign(PyObject* value, const std::string& path) {
  const std::string place = path.empty() ? "" : " at `" + path + "`";
  PyErr_Format(PyExc_TypeError,
               "Objects of `flax.nnx` are no part of a graph of `nnx`, but got "
               "its `%s`%s. Make it with `nnx`, which has the same names, or "
               "convert it: `nnx.bridge.from_flax_nnx(...)`. `import "
               "nnx.as_flax`, first in a program, puts `nnx` in the place of "
               "`flax.nnx`.",
               Py_TYPE(value)->tp_name, place.c_str());
}

TypeInfo* FindTypeInfo(PyTypeObject* type) {
  auto found = Types().find(type);
  return found == Types().end() ? nullptr : &found->second;
}

TypeInfo* GetTypeInfo(PyTypeObject* type) {
  if (TypeInfo* info = FindTypeInfo(type)) return info;
  const Ref held = Ref::Borrow(reinterpret_cast<PyObject*>(type));
  TypeInfo info;
  if (!Classify(type, &info)) return nullptr;
  info.weakref = WatchType(type);
  if (!info.weakref) return nullptr;
  return &Types().emplace(type, std::move(info)).first->second;
}

void ForgetType(PyTypeObject* type) {
  TypeInfo* info = FindTypeInfo(type);
  if (!info) return;
  // Structures point at the entry of a graph node's type, so it stays in place.
  if (info->kind == TypeKind::kUnknown || info->kind == TypeKind::kForeign) {
    Classify(type, info);
  }
  PyErr_Clear();
}

bool RegisterCustomNode(PyTypeObject* type, CustomNode node) {
  TypeInfo* info = GetTypeInfo(type);
  if (!info) return false;
  if (info->kind == TypeKind::kCustom) {
    PyErr_Format(PyExc_ValueError,
                 "`type` must be registered once, but %s is already.",
                 type->tp_name);
    return false;
  }
  if (info->kind != TypeKind::kUnknown && info->kind != TypeKind::kForeign &&
      info->kind != TypeKind::kNamedTuple) {
    PyErr_Format(PyExc_ValueError,
                 "`type` must not be a Variable, Module, array or builtin "
                 "container, which the graph functions know already, but got "
                 "%s.",
                 type->tp_name);
    return false;
  }
  info->kind = TypeKind::kCustom;
  info->pytree = false;
  info->custom = std::make_unique<CustomNode>(std::move(node));
  return true;
}

Layout* MatchLayout(TypeInfo* info, PyObject* dict,
                    std::vector<PyObject*>* arena) {
  static std::vector<PyObject*>* scratch = new std::vector<PyObject*>();
  const size_t size = static_cast<size_t>(PyDict_GET_SIZE(dict));
  if (scratch->size() < size) scratch->resize(size);
  for (size_t i = 0; i < info->layouts.size(); ++i) {
    Layout* layout = info->layouts[i].get();
    if (!MatchInserted(*layout, dict, scratch)) continue;
    Canonicalise(*layout, *scratch, arena);
    return layout;
  }
  return nullptr;
}

Layout* FindLayout(TypeInfo* info, PyObject* dict,
                   std::vector<PyObject*>* arena) {
  if (Layout* layout = MatchLayout(info, dict, arena)) return layout;
  // Owned, since making the tuple below may run the garbage collector.
  std::vector<Ref> names;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    names.push_back(Ref::Borrow(key));
  }
  for (const Ref& name : names) {
    if (PyUnicode_CheckExact(name.get()) || PyLong_CheckExact(name.get())) {
      continue;
    }
    PyErr_Format(PyExc_TypeError,
                 "Attribute names must be strings or ints, but `__dict__` "
                 "has the key %R.",
                 name.get());
    return nullptr;
  }
  auto layout = std::make_unique<Layout>();
  layout->order = CanonicalOrder(names);
  layout->keys = PickTuple(names, layout->order);
  if (!layout->keys) return nullptr;
  layout->inserted = std::move(names);
  if (info->layouts.size() >= kMaxLayouts) info->layouts.clear();
  info->layouts.insert(info->layouts.begin(), std::move(layout));
  if (Layout* made = MatchLayout(info, dict, arena)) return made;
  PyErr_SetString(PyExc_RuntimeError, "An object changed while it was walked.");
  return nullptr;
}

Ref CanonicalKeys(PyObject* dict) {
  std::vector<Ref> keys;
  keys.reserve(static_cast<size_t>(PyDict_GET_SIZE(dict)));
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) {
    keys.push_back(Ref::Borrow(key));
  }
  return PickTuple(keys, CanonicalOrder(keys));
}

}  // namespace nnx::engine
