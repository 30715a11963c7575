#include "nnx/graph/cc/structure.h"

#include <cstring>
#include <string>

#include "nnx/graph/cc/runtime.h"

namespace nnx::graph {

PyTypeObject* g_structure_type = nullptr;

namespace {

// Compared by identity alone: the type inherits both hash and equality from
// `object`, or is a class.
bool IsIdentityCompared(PyObject* value) {
  PyTypeObject* type = Py_TYPE(value);
  return PyType_Check(value) || type == &PyFunction_Type ||
         (type->tp_hash == PyBaseObject_Type.tp_hash &&
          type->tp_richcompare == PyBaseObject_Type.tp_richcompare);
}

// Compared by value without running user code.
bool IsNativeScalar(PyObject* value) {
  PyTypeObject* type = Py_TYPE(value);
  return value == Py_None || type == &PyUnicode_Type || type == &PyLong_Type ||
         type == &PyBool_Type || type == &PyFloat_Type ||
         type == &PyBytes_Type || type == &PyComplex_Type ||
         value == Py_Ellipsis;
}

bool IsAtomic(PyObject* value) {
  return IsNativeScalar(value) || IsIdentityCompared(value);
}

// For two native scalars of one type.
bool NativeEqual(PyObject* a, PyObject* b) {
  if (Py_TYPE(a) == &PyFloat_Type) {
    // By bits: NaN is NaN, and 0.0 is not -0.0.
    const double x = PyFloat_AS_DOUBLE(a), y = PyFloat_AS_DOUBLE(b);
    return std::memcmp(&x, &y, sizeof(x)) == 0;
  }
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

// Python says that 1 == True == 1.0, and so for tuples of them; a function
// traced with one must not serve for the other.
bool SameTypes(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (Py_TYPE(a) != Py_TYPE(b)) return false;
  if (!PyTuple_Check(a)) return true;
  const Py_ssize_t size = PyTuple_GET_SIZE(a);
  if (size != PyTuple_GET_SIZE(b)) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!SameTypes(PyTuple_GET_ITEM(a, i), PyTuple_GET_ITEM(b, i))) {
      return false;
    }
  }
  return true;
}

// 1, 0, -1. Runs Python code.
int StaticEqual(PyObject* a, PyObject* b) {
  if (a == b) return 1;
  if (!SameTypes(a, b)) return 0;
  if (IsNativeScalar(a)) return NativeEqual(a, b);
  if (IsIdentityCompared(a)) return 0;
  return PyObject_RichCompareBool(a, b, Py_EQ);
}

std::string PathText(const std::vector<PyObject*>& path) {
  std::string text;
  for (PyObject* key : path) {
    Ref part = Ref::Steal(PyUnicode_Check(key) ? PyObject_Str(key)
                                               : PyObject_Repr(key));
    const char* utf8 = part ? PyUnicode_AsUTF8(part.get()) : nullptr;
    if (!utf8) {
      PyErr_Clear();
      utf8 = "?";
    }
    if (PyUnicode_Check(key)) {
      if (!text.empty()) text += '.';
      text += utf8;
    } else {
      text += '[';
      text += utf8;
      text += ']';
    }
  }
  return text.empty() ? "the value itself" : text;
}

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

// The same without running Python code, so not for a class that computes it;
// null without an error.
Ref StoredMapping(PyObject* state) {
  PyObject* name = GetRuntime().s_mapping;
  if (_PyType_Lookup(Py_TYPE(state), name)) return Ref();
  Ref mapping = Ref::Steal(PyObject_GenericGetAttr(state, name));
  if (!mapping) PyErr_Clear();
  if (mapping && !PyDict_CheckExact(mapping.get())) return Ref();
  return mapping;
}

// A registered pytree node opened one level, or false with no error for a leaf.
bool OpenPytree(PyObject* value, Ref* children, Ref* treedef,
                Ref* keys = nullptr) {
  const Runtime& rt = GetRuntime();
  if (!rt.flatten_pytree) return false;
  Ref opened = Ref::Steal(PyObject_CallOneArg(rt.flatten_pytree, value));
  if (!opened || opened.get() == Py_None) return false;
  PyObject *child_items, *def, *key_items;
  if (!PyArg_ParseTuple(opened.get(), "O!OO!:flatten_pytree", &PyTuple_Type,
                        &child_items, &def, &PyTuple_Type, &key_items)) {
    return false;
  }
  if (PyTuple_GET_SIZE(child_items) != PyTuple_GET_SIZE(key_items)) {
    PyErr_SetString(PyExc_ValueError,
                    "`flatten_pytree` must return a key for each child.");
    return false;
  }
  *children = Ref::Borrow(child_items);
  *treedef = Ref::Borrow(def);
  if (keys) *keys = Ref::Borrow(key_items);
  return true;
}

// The children of a custom node, in canonical order.
bool OpenCustom(PyObject* value, TypeInfo* info, Ref* keys,
                std::vector<Ref>* children, Ref* metadata) {
  Ref flattened =
      Ref::Steal(PyObject_CallOneArg(info->custom->flatten.get(), value));
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
    if (!children->back()) return false;
  }
  *metadata = Ref::Borrow(PyTuple_GET_ITEM(flattened.get(), 1));
  return true;
}

// The field names of a named tuple; null, without an error, where they do not
// fit its items.
bool FieldNames(PyObject* value, Ref* names) {
  Ref fields = Ref::Steal(PyObject_GetAttr(value, GetRuntime().s_fields));
  if (!fields) return false;
  if (PyTuple_CheckExact(fields.get()) &&
      PyTuple_GET_SIZE(fields.get()) == PyTuple_GET_SIZE(value)) {
    *names = fields;
  }
  return true;
}

}  // namespace

bool OpenMapping(PyObject* mapping, Ref* keys, std::vector<Ref>* children) {
  *keys = CanonicalKeys(mapping);
  if (!*keys) return false;
  const Py_ssize_t size = PyTuple_GET_SIZE(keys->get());
  for (Py_ssize_t i = 0; i < size; ++i) {
    children->push_back(Ref::Borrow(
        PyDict_GetItemWithError(mapping, PyTuple_GET_ITEM(keys->get(), i))));
    if (children->back()) continue;
    if (!PyErr_Occurred()) {
      PyErr_SetString(PyExc_RuntimeError,
                      "A dict changed while it was walked.");
    }
    return false;
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
      PyObject* dict = ObjectDict(AsObject(value));
      return dict && OpenMapping(dict, keys, children) ? 1 : -1;
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

// --- Flattener

int32_t Flattener::Push(NodeKind kind, PyTypeObject* type) {
  nodes_.emplace_back();
  Node& node = nodes_.back();
  node.kind = kind;
  if (type) node.type = Ref::Borrow(reinterpret_cast<PyObject*>(type));
  return static_cast<int32_t>(nodes_.size()) - 1;
}

void Flattener::Close(int32_t position, int32_t children) {
  nodes_[position].children = children;
  nodes_[position].end = static_cast<int32_t>(nodes_.size());
}

// Pushes a node with an identity. `position` is -1 when it was met before and a
// reference has been pushed instead.
bool Flattener::PushIndexed(PyObject* value, NodeKind kind, int32_t* position) {
  const auto index = static_cast<int32_t>(objects_.size());
  auto [entry, fresh] = seen_.try_emplace(value, index);
  if (!fresh) {
    const int32_t ref = Push(NodeKind::kRef, nullptr);
    nodes_[ref].index = entry->second;
    Close(ref, 0);
    *position = -1;
    return true;
  }
  objects_.push_back(Ref::Borrow(value));
  *position = Push(kind, Py_TYPE(value));
  nodes_[*position].index = index;
  if (depth_indexed_ == 0) tops_.push_back(*position);
  return true;
}

void Flattener::Seed(const std::vector<Ref>& objects) {
  for (const Ref& object : objects) {
    seen_.try_emplace(object.get(), static_cast<int32_t>(objects_.size()));
    objects_.push_back(object);
  }
  num_outer_ = static_cast<int32_t>(objects_.size());
}

bool Flattener::Add(PyObject* value, Mode mode) {
  roots_.push_back(static_cast<int32_t>(nodes_.size()));
  return Visit(value, mode);
}

bool Flattener::AddStatic(PyObject* value) {
  roots_.push_back(static_cast<int32_t>(nodes_.size()));
  return VisitStatic(value);
}

bool Flattener::Visit(PyObject* value, Mode mode) {
  RecursionGuard guard;
  if (!guard.entered()) return false;
  TypeInfo* info = GetTypeInfo(Py_TYPE(value));
  if (!info) return false;
  switch (info->kind) {
    case TypeKind::kVariable:
      return VisitVariable(value, info);
    case TypeKind::kObject:
      return VisitObject(value, info);
    case TypeKind::kArray:
      return VisitLeaf(value, mode == Mode::kPytree);
    case TypeKind::kList:
      return VisitSequence(value, NodeKind::kList, mode);
    case TypeKind::kTuple:
      return VisitSequence(value, NodeKind::kTuple, mode);
    case TypeKind::kNamedTuple:
      return VisitSequence(value, NodeKind::kNamedTuple, mode);
    case TypeKind::kDict:
      return VisitMapping(value, value, NodeKind::kDict, mode);
    case TypeKind::kState: {
      Ref mapping = StateMapping(value);
      return mapping && VisitMapping(value, mapping.get(), NodeKind::kState,
                                     Mode::kPytree);
    }
    case TypeKind::kCustom:
      return VisitCustom(value, info);
    case TypeKind::kStatic:
      return VisitStatic(value);
    case TypeKind::kPlain:
      return mode == Mode::kAttributes || value == Py_None
                 ? VisitStatic(value)
                 : VisitLeaf(value, /*scalars=*/true);
    case TypeKind::kUnknown:
      return VisitUnknown(value, mode);
  }
  return false;
}

bool Flattener::VisitStatic(PyObject* value) {
  const int32_t position = Push(NodeKind::kStatic, nullptr);
  Node& node = nodes_[position];
  node.aux = Ref::Borrow(value);
  node.atomic = IsAtomic(value);
  if (!node.atomic && hash_statics_) {
    const Py_hash_t hash = PyObject_Hash(value);
    if (hash == -1) {
      if (PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        PyErr_Format(
            PyExc_TypeError,
            "Static attributes must be hashable, but `%s` is %R of type %s. "
            "Make it hashable (a tuple, a frozen dataclass), or mark it as "
            "data with `nnx.data(...)` if it holds arrays.",
            PathText(path_).c_str(), value, Py_TYPE(value)->tp_name);
      }
      return false;
    }
    nodes_[position].hash = hash;
  }
  Close(position, 0);
  return true;
}

bool Flattener::VisitLeaf(PyObject* value, bool scalars) {
  const int32_t position = Push(NodeKind::kLeaf, nullptr);
  nodes_[position].leaf = static_cast<int32_t>(leaves_.size());
  nodes_[position].scalars = scalars;
  leaves_.push_back(Ref::Borrow(value));
  leaf_nodes_.push_back(position);
  Close(position, 0);
  return true;
}

bool Flattener::VisitVariable(PyObject* value, TypeInfo* info) {
  int32_t position = -1;
  if (!PushIndexed(value, NodeKind::kVariable, &position)) return false;
  if (position < 0) return true;
  VariableObject* variable = AsVariable(value);
  {
    Node& node = nodes_[position];
    node.info = info;
    node.hook_flags = variable->hook_flags;
    if (PyDict_GET_SIZE(variable->metadata) > 0) {
      // A copy: the structure must not follow later changes.
      node.aux = Ref::Steal(PyDict_Copy(variable->metadata));
      if (!node.aux) return false;
    }
  }
  Ref raw = Ref::Borrow(variable->raw);
  const TypeInfo* raw_info = GetTypeInfo(Py_TYPE(raw.get()));
  if (!raw_info) return false;
  bool leaf = raw_info->kind == TypeKind::kArray ||
              (raw_info->kind == TypeKind::kPlain && raw.get() != Py_None);
  if (raw_info->kind == TypeKind::kUnknown) {
    Ref children, treedef;
    leaf = !OpenPytree(raw.get(), &children, &treedef);
    if (PyErr_Occurred()) return false;
  }
  if (leaf) {
    nodes_[position].leaf = static_cast<int32_t>(leaves_.size());
    leaves_.push_back(raw);
    leaf_nodes_.push_back(position);
    Close(position, 0);
    return true;
  }
  ++depth_indexed_;
  const bool ok = Visit(raw.get(), Mode::kPytree);
  --depth_indexed_;
  if (!ok) return false;
  Close(position, 1);
  return true;
}

bool Flattener::VisitChild(PyObject* key, PyObject* value, Mode mode) {
  path_.push_back(key);
  const bool ok = Visit(value, mode);
  path_.pop_back();
  return ok;
}

bool Flattener::VisitObject(PyObject* value, TypeInfo* info) {
  int32_t position = -1;
  if (!PushIndexed(value, NodeKind::kObject, &position)) return false;
  if (position < 0) return true;
  ObjectObject* object = AsObject(value);
  PyObject* dict = ObjectDict(object);
  if (!dict) return false;
  const size_t base = arena_.size();
  Layout* layout = FindLayout(info, dict, &arena_);
  if (!layout) return false;
  Ref keys = layout->keys;
  const Py_ssize_t size = PyTuple_GET_SIZE(keys.get());
  // From here on Python code may run, which could change the dictionary.
  std::vector<Ref> values;
  values.reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    values.push_back(Ref::Borrow(arena_[base + i]));
  }
  arena_.resize(base);
  Ref status = Ref::Borrow(object->status);
  {
    Node& node = nodes_[position];
    node.info = info;
    node.keys = keys;
    if (status && PyDict_GET_SIZE(status.get()) > 0) {
      node.aux = Ref::Steal(PyDict_Copy(status.get()));
      if (!node.aux) return false;
    }
  }
  ++depth_indexed_;
  bool ok = true;
  for (Py_ssize_t i = 0; ok && i < size; ++i) {
    PyObject* key = PyTuple_GET_ITEM(keys.get(), i);
    PyObject* child = values[i].get();
    PyObject* marked =
        status ? PyDict_GetItemWithError(status.get(), key) : nullptr;
    path_.push_back(key);
    if (marked == Py_False) {
      ok = VisitStatic(child);
    } else if (marked == Py_True && Py_TYPE(child) != Py_TYPE(Py_None)) {
      const TypeInfo* child_info = GetTypeInfo(Py_TYPE(child));
      const bool leaf = child_info && (child_info->kind == TypeKind::kPlain ||
                                       child_info->kind == TypeKind::kArray);
      ok = child_info && (leaf ? VisitLeaf(child, /*scalars=*/true)
                               : Visit(child, Mode::kAttributes));
    } else {
      ok = Visit(child, Mode::kAttributes);
    }
    path_.pop_back();
  }
  --depth_indexed_;
  if (!ok) return false;
  Close(position, static_cast<int32_t>(size));
  return true;
}

bool Flattener::VisitSequence(PyObject* value, NodeKind kind, Mode mode) {
  int32_t position = -1;
  const bool reference = kind == NodeKind::kList && mode == Mode::kAttributes;
  if (reference) {
    if (!PushIndexed(value, kind, &position)) return false;
    if (position < 0) return true;
    nodes_[position].reference = true;
  } else {
    position = Push(kind, Py_TYPE(value));
  }
  if (kind == NodeKind::kNamedTuple) {
    Ref names;
    if (!FieldNames(value, &names)) return false;
    nodes_[position].keys = names;
  }
  int32_t count = 0;
  for (; count < PySequence_Fast_GET_SIZE(value); ++count) {
    Ref item = Ref::Borrow(PySequence_Fast_GET_ITEM(value, count));
    Ref key = Ref::Steal(PyLong_FromLong(count));
    if (!key || !VisitChild(key.get(), item.get(), mode)) return false;
  }
  Close(position, count);
  return true;
}

bool Flattener::VisitMapping(PyObject* value, PyObject* mapping, NodeKind kind,
                             Mode mode) {
  int32_t position = -1;
  const bool reference = kind == NodeKind::kDict && mode == Mode::kAttributes;
  if (reference) {
    if (!PushIndexed(value, kind, &position)) return false;
    if (position < 0) return true;
    nodes_[position].reference = true;
  } else {
    position = Push(kind, Py_TYPE(value));
  }
  Ref keys;
  std::vector<Ref> children;
  if (!OpenMapping(mapping, &keys, &children)) return false;
  nodes_[position].keys = keys;
  for (size_t i = 0; i < children.size(); ++i) {
    if (!VisitChild(PyTuple_GET_ITEM(keys.get(), static_cast<Py_ssize_t>(i)),
                    children[i].get(), mode)) {
      return false;
    }
  }
  Close(position, static_cast<int32_t>(children.size()));
  return true;
}

bool Flattener::VisitCustom(PyObject* value, TypeInfo* info) {
  int32_t position = -1;
  if (!PushIndexed(value, NodeKind::kCustom, &position)) return false;
  if (position < 0) return true;
  Ref keys, metadata;
  std::vector<Ref> children;
  if (!OpenCustom(value, info, &keys, &children, &metadata)) return false;
  nodes_[position].keys = keys;
  nodes_[position].info = info;
  nodes_[position].aux = metadata;
  ++depth_indexed_;
  bool ok = true;
  for (size_t i = 0; ok && i < children.size(); ++i) {
    ok = VisitChild(PyTuple_GET_ITEM(keys.get(), static_cast<Py_ssize_t>(i)),
                    children[i].get(), Mode::kAttributes);
  }
  --depth_indexed_;
  if (!ok) return false;
  Close(position, static_cast<int32_t>(children.size()));
  return true;
}

bool Flattener::VisitUnknown(PyObject* value, Mode mode) {
  Ref children, treedef, keys;
  if (!OpenPytree(value, &children, &treedef, &keys)) {
    if (PyErr_Occurred()) return false;
    return mode == Mode::kAttributes ? VisitStatic(value)
                                     : VisitLeaf(value, /*scalars=*/true);
  }
  const int32_t position = Push(NodeKind::kPytree, Py_TYPE(value));
  nodes_[position].aux = treedef;
  nodes_[position].keys = keys;
  const Py_ssize_t size = PyTuple_GET_SIZE(children.get());
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!VisitChild(PyTuple_GET_ITEM(keys.get(), i),
                    PyTuple_GET_ITEM(children.get(), i), mode)) {
      return false;
    }
  }
  Close(position, static_cast<int32_t>(size));
  return true;
}

Ref Flattener::Finish() {
  PyTypeObject* type =
      GetRuntime().structure ? GetRuntime().structure : g_structure_type;
  Ref self = Ref::Steal(type->tp_alloc(type, 0));
  if (!self) return Ref();
  Structure* structure = AsStructure(self.get());
  structure->nodes = new std::vector<Node>(nodes_);
  structure->num_leaves = static_cast<int32_t>(leaves_.size());
  structure->num_indices = static_cast<int32_t>(objects_.size());
  structure->num_roots = static_cast<int32_t>(roots_.size());
  structure->num_outer = num_outer_;
  structure->updates = nullptr;
  structure->hash = -1;
  return self;
}

// --- Matcher

bool Matcher::Match(PyObject* value) { return Visit(value); }

// Gives an object its index, or tells that it was met before, which the
// structure would have had to record as a reference.
bool Matcher::Index(const Node& node, PyObject* value) {
  if (node.kind == NodeKind::kVariable || node.kind == NodeKind::kObject) {
    GraphObject* object = AsGraphObject(value);
    if (object->epoch == epoch_) return false;
    object->epoch = epoch_;
    object->index = node.index;
  } else if (!containers_.try_emplace(value, node.index).second) {
    return false;
  }
  objects_[node.index] = value;
  return true;
}

bool Matcher::VisitStatic(const Node& node, PyObject* value) {
  PyObject* recorded = node.aux.get();
  if (node.atomic) {
    if (recorded == value) return true;
    return Py_TYPE(recorded) == Py_TYPE(value) && IsNativeScalar(recorded) &&
           NativeEqual(recorded, value);
  }
  if (Py_TYPE(recorded) != Py_TYPE(value)) return false;
  deferred_.push_back({recorded, node.hash, Ref::Borrow(value)});
  return true;
}

bool Matcher::VisitMetadata(PyObject* recorded, PyObject* given) {
  const Py_ssize_t size = PyDict_GET_SIZE(given);
  if (!recorded) return size == 0;
  if (PyDict_GET_SIZE(recorded) != size) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(given, &position, &key, &value)) {
    // Other keys could run Python code when they are compared.
    if (!PyUnicode_CheckExact(key) && !PyLong_CheckExact(key)) return false;
    PyObject* expected = PyDict_GetItemWithError(recorded, key);
    if (!expected) {
      PyErr_Clear();
      return false;
    }
    if (expected == value) continue;
    if (Py_TYPE(expected) != Py_TYPE(value)) return false;
    if (IsNativeScalar(value)) {
      if (!NativeEqual(expected, value)) return false;
    } else {
      deferred_.push_back({expected, -1, Ref::Borrow(value)});
    }
  }
  return true;
}

bool Matcher::Visit(PyObject* value) {
  const Node& node = nodes_[position_++];
  PyTypeObject* type = Py_TYPE(value);
  switch (node.kind) {
    case NodeKind::kStatic:
      return VisitStatic(node, value);
    case NodeKind::kLeaf: {
      if (type != GetRuntime().array_type) {
        const TypeInfo* info = FindTypeInfo(type);
        if (!info) return false;
        // Any other kind may be a container by now: the slow walk decides.
        if (info->kind != TypeKind::kArray &&
            (info->kind != TypeKind::kPlain || !node.scalars ||
             value == Py_None)) {
          return false;
        }
      }
      leaves_[node.leaf] = value;
      return true;
    }
    case NodeKind::kRef:
      return objects_[node.index] == value;
    case NodeKind::kVariable: {
      if (reinterpret_cast<PyObject*>(type) != node.type.get()) return false;
      VariableObject* variable = AsVariable(value);
      if (!Index(node, value) || variable->hook_flags != node.hook_flags ||
          !VisitMetadata(node.aux.get(), variable->metadata)) {
        return false;
      }
      PyObject* raw = variable->raw;
      if (node.leaf < 0) return Visit(raw);
      if (Py_TYPE(raw) != GetRuntime().array_type) {
        const TypeInfo* info = FindTypeInfo(Py_TYPE(raw));
        if (!info || (info->kind != TypeKind::kArray &&
                      (info->kind != TypeKind::kPlain || raw == Py_None))) {
          return false;
        }
      }
      leaves_[node.leaf] = raw;
      return true;
    }
    case NodeKind::kObject: {
      if (reinterpret_cast<PyObject*>(type) != node.type.get() ||
          !Index(node, value)) {
        return false;
      }
      ObjectObject* object = AsObject(value);
      const Py_ssize_t marks =
          object->status ? PyDict_GET_SIZE(object->status) : 0;
      if (node.aux.get() || marks > 0) {
        if (!node.aux.get() || marks != PyDict_GET_SIZE(node.aux.get())) {
          return false;
        }
        if (!VisitMetadata(node.aux.get(), object->status)) return false;
      }
      // One without attributes yet gets its dictionary in the slow walk.
      if (!object->dict) return false;
      const size_t base = arena_.size();
      Layout* layout = MatchLayout(node.info, object->dict, &arena_);
      if (!layout) return false;
      if (layout->keys.get() != node.keys.get()) {
        const int equal = PyObject_RichCompareBool(layout->keys.get(),
                                                   node.keys.get(), Py_EQ);
        if (equal != 1) {
          PyErr_Clear();
          return false;
        }
      }
      for (int32_t i = 0; i < node.children; ++i) {
        if (!Visit(arena_[base + i])) return false;
      }
      arena_.resize(base);
      return true;
    }
    case NodeKind::kList:
    case NodeKind::kTuple:
    case NodeKind::kNamedTuple: {
      if (reinterpret_cast<PyObject*>(type) != node.type.get()) return false;
      if (node.reference && !Index(node, value)) return false;
      if (PySequence_Fast_GET_SIZE(value) != node.children) return false;
      for (int32_t i = 0; i < node.children; ++i) {
        if (!Visit(PySequence_Fast_GET_ITEM(value, i))) return false;
      }
      return true;
    }
    case NodeKind::kDict:
    case NodeKind::kState: {
      if (reinterpret_cast<PyObject*>(type) != node.type.get()) return false;
      if (node.reference && !Index(node, value)) return false;
      Ref mapping = node.kind == NodeKind::kState ? StoredMapping(value)
                                                  : Ref::Borrow(value);
      if (!mapping) return false;
      if (PyDict_GET_SIZE(mapping.get()) != node.children) return false;
      for (int32_t i = 0; i < node.children; ++i) {
        PyObject* key = PyTuple_GET_ITEM(node.keys.get(), i);
        // Other keys could run Python code when they are compared.
        if (!PyUnicode_CheckExact(key) && !PyLong_CheckExact(key)) return false;
        PyObject* child = PyDict_GetItemWithError(mapping.get(), key);
        if (!child) {
          PyErr_Clear();
          return false;
        }
        if (!Visit(child)) return false;
      }
      return true;
    }
    case NodeKind::kPytree:
    case NodeKind::kCustom:
      return false;  // opening them runs Python code
  }
  return false;
}

int Matcher::FinishDeferred() {
  for (const Deferred& item : deferred_) {
    if (item.hash != -1) {
      // Also for one and the same object: it may have changed in place.
      const Py_hash_t hash = PyObject_Hash(item.given.get());
      if (hash == -1) return -1;
      if (hash != item.hash) return 0;
    }
    const int equal = StaticEqual(item.recorded, item.given.get());
    if (equal != 1) return equal;
  }
  return 1;
}

// --- Unflattener

Ref Unflattener::Build() {
  RecursionGuard guard;
  if (!guard.entered()) return Ref();
  const int32_t position = position_++;
  const Node& node = nodes_[position];
  if (provided_ && (*provided_)[position]) {
    return Adopt(node, (*provided_)[position]);
  }
  switch (node.kind) {
    case NodeKind::kStatic:
      return node.aux;
    case NodeKind::kLeaf:
      return Ref::Borrow(leaves_[node.leaf]);
    case NodeKind::kRef:
      return made_[node.index];
    case NodeKind::kVariable:
      return BuildVariable(node);
    case NodeKind::kObject:
      return BuildObject(node);
    case NodeKind::kList:
    case NodeKind::kTuple:
    case NodeKind::kNamedTuple:
      return BuildSequence(node);
    case NodeKind::kDict:
    case NodeKind::kState:
      return BuildMapping(node);
    case NodeKind::kPytree:
      return BuildPytree(node);
    case NodeKind::kCustom:
      return BuildCustom(node);
  }
  return Ref();
}

// A value that was given ready-made; an existing Variable takes it over.
Ref Unflattener::Adopt(const Node& node, PyObject* value) {
  position_ = node.end;
  if (node.index < 0) return Ref::Borrow(value);
  PyObject* existing = reuse_ ? reuse_[node.index] : nullptr;
  if (existing && existing != value) {
    if (!IsVariable(value)) {
      if (!CheckCanUpdate(existing)) return Ref();
      SetRaw(AsVariable(existing), value);
      made_[node.index] = Ref::Borrow(existing);
      return Ref::Borrow(existing);
    }
    if (!CheckCanUpdate(existing) ||
        !AssignVariable(AsVariable(existing), AsVariable(value))) {
      return Ref();
    }
    value = existing;
  }
  made_[node.index] = Ref::Borrow(value);
  return Ref::Borrow(value);
}

Ref Unflattener::BuildVariable(const Node& node) {
  auto* type = reinterpret_cast<PyTypeObject*>(node.type.get());
  PyObject* existing = reuse_ ? reuse_[node.index] : nullptr;
  Ref self = Ref::Borrow(existing);
  if (!self) {
    self =
        NewVariable(type, Py_None, node.aux.get(), node.hook_flags,
                    origins_ ? AsGraphObject(origins_[node.index]) : nullptr);
    if (!self) return Ref();
  }
  made_[node.index] = self;
  Ref raw = node.leaf >= 0 ? Ref::Borrow(leaves_[node.leaf]) : Build();
  if (!raw) return Ref();
  VariableObject* variable = AsVariable(self.get());
  if (existing) {
    if (variable->raw != raw.get() && !CheckCanUpdate(existing)) return Ref();
    PyDict_Clear(variable->metadata);
    if (node.aux && PyDict_Update(variable->metadata, node.aux.get()) < 0) {
      return Ref();
    }
    variable->hook_flags = node.hook_flags;
  }
  SetRaw(variable, raw.get());
  return self;
}

Ref Unflattener::BuildObject(const Node& node) {
  auto* type = reinterpret_cast<PyTypeObject*>(node.type.get());
  PyObject* existing = reuse_ ? reuse_[node.index] : nullptr;
  Ref self = Ref::Borrow(existing);
  if (!self) {
    self = NewObject(type, node.aux.get(),
                     origins_ ? AsGraphObject(origins_[node.index]) : nullptr);
    if (!self) return Ref();
  }
  made_[node.index] = self;
  ObjectObject* object = AsObject(self.get());
  Ref dict = Ref::Borrow(ObjectDict(object));
  if (!dict) return Ref();
  bool checked = existing == nullptr;
  auto check = [&] {
    checked = checked || CheckCanUpdate(existing);
    return checked;
  };
  for (int32_t i = 0; i < node.children; ++i) {
    PyObject* key = PyTuple_GET_ITEM(node.keys.get(), i);
    Ref child = Build();
    if (!child) return Ref();
    PyObject* current =
        existing ? PyDict_GetItemWithError(dict.get(), key) : nullptr;
    if (current == child.get()) continue;
    if (!check() || PyDict_SetItem(dict.get(), key, child.get()) < 0) {
      return Ref();
    }
  }
  if (existing) {
    if (PyDict_GET_SIZE(dict.get()) != node.children) {
      Ref names = Ref::Steal(PyDict_Keys(dict.get()));
      if (!names) return Ref();
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names.get()); ++i) {
        PyObject* name = PyList_GET_ITEM(names.get(), i);
        const int kept = PySequence_Contains(node.keys.get(), name);
        if (kept < 0) return Ref();
        if (!kept && (!check() || PyDict_DelItem(dict.get(), name) < 0)) {
          return Ref();
        }
      }
    }
    PyObject* status = node.aux ? PyDict_Copy(node.aux.get()) : nullptr;
    if (node.aux && !status) return Ref();
    PyObject* old = object->status;
    object->status = status;
    Py_XDECREF(old);
  }
  return self;
}

Ref Unflattener::Children(const Node& node) {
  Ref children = Ref::Steal(PyTuple_New(node.children));
  if (!children) return Ref();
  for (int32_t i = 0; i < node.children; ++i) {
    Ref child = Build();
    if (!child) return Ref();
    PyTuple_SET_ITEM(children.get(), i, child.release());
  }
  return children;
}

Ref Unflattener::BuildSequence(const Node& node) {
  if (node.kind == NodeKind::kList) {
    PyObject* existing =
        reuse_ && node.index >= 0 ? reuse_[node.index] : nullptr;
    Ref self = existing ? Ref::Borrow(existing) : Ref::Steal(PyList_New(0));
    if (!self) return Ref();
    // Before the children: one of them may lead back here.
    if (node.index >= 0) made_[node.index] = self;
    Ref children = Children(node);
    if (!children) return Ref();
    if (PyList_SetSlice(self.get(), 0, PyList_GET_SIZE(self.get()),
                        children.get()) < 0) {
      return Ref();
    }
    return self;
  }
  Ref children = Children(node);
  if (!children || node.kind == NodeKind::kTuple) return children;
  return Ref::Steal(PyObject_CallObject(node.type.get(), children.get()));
}

Ref Unflattener::BuildMapping(const Node& node) {
  PyObject* existing = reuse_ && node.index >= 0 ? reuse_[node.index] : nullptr;
  Ref self = existing ? Ref::Borrow(existing) : Ref::Steal(PyDict_New());
  if (!self) return Ref();
  if (node.index >= 0) made_[node.index] = self;
  Ref fresh = existing ? Ref::Steal(PyDict_New()) : self;
  if (!fresh) return Ref();
  for (int32_t i = 0; i < node.children; ++i) {
    Ref child = Build();
    if (!child ||
        PyDict_SetItem(fresh.get(), PyTuple_GET_ITEM(node.keys.get(), i),
                       child.get()) < 0) {
      return Ref();
    }
  }
  if (existing) {
    PyDict_Clear(existing);
    if (PyDict_Update(existing, fresh.get()) < 0) return Ref();
  }
  if (node.kind == NodeKind::kState) {
    static PyObject* from_nested = PyUnicode_InternFromString("_from_nested");
    return Ref::Steal(
        PyObject_CallMethodOneArg(node.type.get(), from_nested, self.get()));
  }
  return self;
}

Ref Unflattener::BuildPytree(const Node& node) {
  Ref children = Children(node);
  if (!children) return Ref();
  static PyObject* unflatten = PyUnicode_InternFromString("unflatten");
  return Ref::Steal(
      PyObject_CallMethodOneArg(node.aux.get(), unflatten, children.get()));
}

Ref Unflattener::BuildCustom(const Node& node) {
  const CustomNode& custom = *node.info->custom;
  PyObject* existing = reuse_ ? reuse_[node.index] : nullptr;
  Ref self = Ref::Borrow(existing);
  if (!self) {
    self = Ref::Steal(
        PyObject_CallOneArg(custom.create_empty.get(), node.aux.get()));
    if (!self) return Ref();
  }
  made_[node.index] = self;
  Ref children = Children(node);
  if (!children) return Ref();
  if (existing &&
      !Ref::Steal(PyObject_CallOneArg(custom.clear.get(), existing))) {
    return Ref();
  }
  Ref items = Ref::Steal(PyTuple_New(node.children));
  if (!items) return Ref();
  for (int32_t i = 0; i < node.children; ++i) {
    PyObject* item = PyTuple_Pack(2, PyTuple_GET_ITEM(node.keys.get(), i),
                                  PyTuple_GET_ITEM(children.get(), i));
    if (!item) return Ref();
    PyTuple_SET_ITEM(items.get(), i, item);
  }
  if (!Ref::Steal(PyObject_CallFunctionObjArgs(custom.init.get(), self.get(),
                                               items.get(), nullptr))) {
    return Ref();
  }
  return self;
}

// --- comparison

namespace {

int ObjectsEqual(PyObject* a, PyObject* b) {
  if (a == b) return 1;
  if (!a || !b) return 0;
  return PyObject_RichCompareBool(a, b, Py_EQ);
}

int NodesEqual(const Node& a, const Node& b) {
  if (a.kind != b.kind || a.reference != b.reference || a.index != b.index ||
      a.children != b.children || a.hook_flags != b.hook_flags ||
      (a.leaf < 0) != (b.leaf < 0) || a.type.get() != b.type.get()) {
    return 0;
  }
  if (a.kind == NodeKind::kStatic) {
    if (a.atomic != b.atomic || a.hash != b.hash) return 0;
    return StaticEqual(a.aux.get(), b.aux.get());
  }
  const int keys = ObjectsEqual(a.keys.get(), b.keys.get());
  if (keys != 1) return keys;
  return ObjectsEqual(a.aux.get(), b.aux.get());
}

}  // namespace

int SubtreesEqual(const std::vector<Node>& a, int32_t position_a,
                  const std::vector<Node>& b, int32_t position_b) {
  const int32_t size = a[position_a].end - position_a;
  if (b[position_b].end - position_b != size) return 0;
  for (int32_t i = 0; i < size; ++i) {
    const int equal = NodesEqual(a[position_a + i], b[position_b + i]);
    if (equal != 1) return equal;
  }
  return 1;
}

int HoldsData(PyObject* value) {
  RecursionGuard guard;
  if (!guard.entered()) return -1;
  TypeInfo* info = GetTypeInfo(Py_TYPE(value));
  if (!info) return -1;
  auto any_of = [](PyObject* sequence) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(sequence);
    for (Py_ssize_t i = 0; i < size; ++i) {
      const int holds = HoldsData(PySequence_Fast_GET_ITEM(sequence, i));
      if (holds != 0) return holds;
    }
    return 0;
  };
  switch (info->kind) {
    case TypeKind::kVariable:
    case TypeKind::kObject:
    case TypeKind::kArray:
    case TypeKind::kState:
    case TypeKind::kCustom:
      return 1;
    case TypeKind::kList:
    case TypeKind::kTuple:
    case TypeKind::kNamedTuple:
      return any_of(value);
    case TypeKind::kDict: {
      PyObject *key, *item;
      Py_ssize_t position = 0;
      while (PyDict_Next(value, &position, &key, &item)) {
        const int holds = HoldsData(item);
        if (holds != 0) return holds;
      }
      return 0;
    }
    case TypeKind::kStatic:
    case TypeKind::kPlain:
      return 0;
    case TypeKind::kUnknown: {
      Ref children, treedef;
      if (!OpenPytree(value, &children, &treedef)) {
        return PyErr_Occurred() ? -1 : 0;
      }
      return any_of(children.get());
    }
  }
  return 0;
}

// --- the Python type

namespace {

int StructureTraverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(AsStructure(self)->updates);
  if (!AsStructure(self)->nodes) return 0;
  for (const Node& node : *AsStructure(self)->nodes) {
    Py_VISIT(node.type.get());
    Py_VISIT(node.keys.get());
    Py_VISIT(node.aux.get());
  }
  return 0;
}

int StructureClear(PyObject* self) {
  std::vector<Node>* nodes = AsStructure(self)->nodes;
  AsStructure(self)->nodes = nullptr;
  delete nodes;
  Py_CLEAR(AsStructure(self)->updates);
  return 0;
}

void StructureDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  StructureClear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

size_t Mix(size_t hash, size_t value) {
  return (hash ^ value) * 0x9E3779B97F4A7C15ull + (hash >> 29);
}

// Metadata is hashed by its names alone: values may be unhashable, and equality
// looks at them anyway.
bool MixMapping(PyObject* mapping, size_t* hash) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t sum = 0;
  while (PyDict_Next(mapping, &position, &key, &value)) {
    const Py_hash_t part = PyObject_Hash(key);
    if (part == -1) return false;
    sum += Mix(17, static_cast<size_t>(part));
  }
  *hash = Mix(*hash, sum);
  return true;
}

Py_hash_t StructureHash(PyObject* self) {
  Structure* structure = AsStructure(self);
  if (structure->hash != -1) return structure->hash;
  size_t hash = structure->nodes->size();
  for (const Node& node : *structure->nodes) {
    hash = Mix(hash, static_cast<size_t>(node.kind) * 4 + node.reference);
    hash = Mix(hash, static_cast<size_t>(node.index + 1));
    hash = Mix(hash, static_cast<size_t>(node.children));
    hash = Mix(hash, reinterpret_cast<size_t>(node.type.get()));
    if (node.keys) {
      const Py_hash_t part = PyObject_Hash(node.keys.get());
      if (part == -1) return -1;
      hash = Mix(hash, static_cast<size_t>(part));
    }
    if (!node.aux) continue;
    if (PyDict_CheckExact(node.aux.get()) && node.kind != NodeKind::kStatic) {
      if (!MixMapping(node.aux.get(), &hash)) return -1;
    } else {
      const Py_hash_t part = PyObject_Hash(node.aux.get());
      if (part == -1) return -1;
      hash = Mix(hash, static_cast<size_t>(part));
    }
  }
  structure->hash = static_cast<Py_hash_t>(hash);
  if (structure->hash == -1) structure->hash = -2;
  return structure->hash;
}

PyObject* StructureCompare(PyObject* self, PyObject* other, int op) {
  if ((op != Py_EQ && op != Py_NE) ||
      !PyObject_TypeCheck(other, g_structure_type)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  int equal = self == other;
  if (!equal) {
    const Structure *a = AsStructure(self), *b = AsStructure(other);
    equal = a->nodes->size() == b->nodes->size() &&
            a->num_roots == b->num_roots && a->num_outer == b->num_outer;
    if (equal == 1) equal = ObjectsEqual(a->updates, b->updates);
    for (size_t i = 0; equal == 1 && i < a->nodes->size(); ++i) {
      equal = NodesEqual((*a->nodes)[i], (*b->nodes)[i]);
    }
    if (equal < 0) return nullptr;
  }
  return PyBool_FromLong(op == Py_EQ ? equal : !equal);
}

const char* KindName(const Node& node) {
  switch (node.kind) {
    case NodeKind::kStatic:
      return "static";
    case NodeKind::kLeaf:
      return "leaf";
    case NodeKind::kVariable:
      return "variable";
    case NodeKind::kObject:
      return "object";
    case NodeKind::kList:
      return "list";
    case NodeKind::kDict:
      return "dict";
    case NodeKind::kTuple:
      return "tuple";
    case NodeKind::kNamedTuple:
      return "namedtuple";
    case NodeKind::kState:
      return "state";
    case NodeKind::kPytree:
      return "pytree";
    case NodeKind::kCustom:
      return "custom";
    case NodeKind::kRef:
      return "ref";
  }
  return "?";
}

PyObject* OrNone(const Ref& ref) { return ref ? ref.get() : Py_None; }

// The records as plain tuples: what Python needs to print, pickle and test a
// structure. `_restore` is the inverse.
PyObject* StructureRecords(PyObject* self, void*) {
  const Structure* structure = AsStructure(self);
  Ref records = Ref::Steal(
      PyTuple_New(static_cast<Py_ssize_t>(structure->nodes->size())));
  if (!records) return nullptr;
  Py_ssize_t count = 0;
  for (const Node& node : *structure->nodes) {
    PyObject* record =
        Py_BuildValue("(siiiOOOOOi)", KindName(node), node.index, node.leaf,
                      node.children, OrNone(node.type), OrNone(node.keys),
                      OrNone(node.aux), node.reference ? Py_True : Py_False,
                      node.atomic ? Py_True : Py_False, node.hook_flags);
    if (!record) return nullptr;
    PyTuple_SET_ITEM(records.get(), count++, record);
  }
  return records.release();
}

bool ParseKind(const char* name, NodeKind* kind) {
  for (int i = 0; i <= static_cast<int>(NodeKind::kRef); ++i) {
    Node node;
    node.kind = static_cast<NodeKind>(i);
    if (std::strcmp(KindName(node), name) == 0) {
      *kind = node.kind;
      return true;
    }
  }
  PyErr_Format(PyExc_ValueError, "`kind` %s is not known.", name);
  return false;
}

// Sets the ends of a subtree; -1 if it does not fit into the vector.
int32_t CloseRestored(std::vector<Node>* nodes, int32_t position) {
  RecursionGuard guard;
  if (!guard.entered()) return -1;
  const auto size = static_cast<int32_t>(nodes->size());
  if (position >= size) return -1;
  int32_t next = position + 1;
  for (int32_t i = 0; i < (*nodes)[position].children; ++i) {
    next = CloseRestored(nodes, next);
    if (next < 0) return -1;
  }
  (*nodes)[position].end = next;
  return next;
}

bool IsTypeBelow(const Ref& type, PyTypeObject* base) {
  return type && PyType_Check(type.get()) &&
         PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.get()), base);
}

// Whether a record has what building its kind of node reads.
bool IsComplete(const Node& node) {
  const bool named =
      node.keys && PyTuple_GET_SIZE(node.keys.get()) == node.children;
  const bool dict_or_null = !node.aux || PyDict_CheckExact(node.aux.get());
  switch (node.kind) {
    case NodeKind::kStatic:
      return node.aux && node.children == 0;
    case NodeKind::kLeaf:
      return node.leaf >= 0 && node.children == 0;
    case NodeKind::kRef:
      return node.index >= 0 && node.children == 0;
    case NodeKind::kVariable:
      return IsTypeBelow(node.type, g_variable_base) && node.index >= 0 &&
             dict_or_null && node.children == (node.leaf >= 0 ? 0 : 1);
    case NodeKind::kObject:
      return IsTypeBelow(node.type, g_object_base) && node.index >= 0 &&
             dict_or_null && named;
    case NodeKind::kList:
      return true;
    case NodeKind::kTuple:
    case NodeKind::kNamedTuple:
      return IsTypeBelow(node.type, &PyTuple_Type) && node.index < 0 &&
             (!node.keys || named);
    case NodeKind::kDict:
      return named;
    case NodeKind::kState:
      return GetRuntime().state && IsTypeBelow(node.type, GetRuntime().state) &&
             node.index < 0 && named;
    case NodeKind::kPytree:
      return node.aux && node.index < 0 && (!node.keys || named);
    case NodeKind::kCustom:
      return node.info && node.info->kind == TypeKind::kCustom && node.aux &&
             node.index >= 0 && named;
  }
  return false;
}

// Whether records make a structure that can be built: damaged ones must not
// lead a walk out of a vector. Counts leaves and indices.
bool IsValid(Structure* structure) {
  std::vector<Node>& nodes = *structure->nodes;
  int32_t position = 0;
  for (int32_t i = 0; i < structure->num_roots && position >= 0; ++i) {
    position = CloseRestored(&nodes, position);
  }
  if (position != static_cast<int32_t>(nodes.size())) return false;
  structure->num_leaves = 0;
  structure->num_indices = structure->num_outer;
  for (const Node& node : nodes) {
    if (!IsComplete(node)) return false;
    if (node.leaf >= 0 && node.leaf != structure->num_leaves++) return false;
    if (node.kind == NodeKind::kRef) {
      if (node.index >= structure->num_indices) return false;
    } else if (node.index >= 0 && node.index != structure->num_indices++) {
      return false;
    }
  }
  return !structure->updates ||
         PyTuple_GET_SIZE(structure->updates) == structure->num_indices;
}

bool RestoreNode(PyObject* record, Node* node) {
  const char* kind_name = nullptr;
  PyObject *node_type, *keys, *aux;
  int index, leaf, children, reference, atomic, hook_flags;
  if (!PyTuple_Check(record) ||
      !PyArg_ParseTuple(record, "siiiOOOppi", &kind_name, &index, &leaf,
                        &children, &node_type, &keys, &aux, &reference, &atomic,
                        &hook_flags) ||
      !ParseKind(kind_name, &node->kind)) {
    return false;
  }
  node->index = index < 0 ? -1 : index;
  node->leaf = leaf < 0 ? -1 : leaf;
  node->children = children < 0 ? 0 : children;
  node->reference = reference;
  node->hook_flags = static_cast<uint8_t>(hook_flags & (kGetHooks | kSetHooks));
  if (node_type != Py_None) node->type = Ref::Borrow(node_type);
  if (PyTuple_CheckExact(keys)) node->keys = Ref::Borrow(keys);
  if (aux != Py_None || node->kind == NodeKind::kStatic ||
      node->kind == NodeKind::kCustom) {
    node->aux = Ref::Borrow(aux);
  }
  if (PyType_Check(node_type)) {
    node->info = GetTypeInfo(reinterpret_cast<PyTypeObject*>(node_type));
    if (!node->info) return false;
  }
  if (node->kind != NodeKind::kStatic) return true;
  node->atomic = IsAtomic(aux);
  // Hashes of strings differ between processes.
  if (!node->atomic) node->hash = PyObject_Hash(aux);
  return node->hash != -1;
}

PyObject* StructureRestore(PyObject* cls, PyObject* args) {
  PyObject *records = nullptr, *updates = Py_None;
  int num_roots = 1, num_outer = 0;
  if (!PyArg_ParseTuple(args, "O!i|iO:_restore", &PyTuple_Type, &records,
                        &num_roots, &num_outer, &updates)) {
    return nullptr;
  }
  auto* type = reinterpret_cast<PyTypeObject*>(cls);
  Ref self = Ref::Steal(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  Structure* structure = AsStructure(self.get());
  structure->nodes = new std::vector<Node>();
  structure->hash = -1;
  structure->num_roots = num_roots;
  structure->num_outer = num_outer < 0 ? 0 : num_outer;
  if (PyTuple_CheckExact(updates)) {
    Py_INCREF(updates);
    structure->updates = updates;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(records); ++i) {
    structure->nodes->emplace_back();
    if (!RestoreNode(PyTuple_GET_ITEM(records, i), &structure->nodes->back())) {
      if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "`records` must hold tuples.");
      }
      return nullptr;
    }
  }
  if (!IsValid(structure)) {
    if (!PyErr_Occurred()) {
      PyErr_SetString(
          PyExc_ValueError,
          "`records` must be those of a graph structure whose node "
          "types are registered in this process, but they are not.");
    }
    return nullptr;
  }
  return self.release();
}

PyObject* StructureNumLeaves(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_leaves);
}
PyObject* StructureNumIndices(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_indices);
}
PyObject* StructureNumRoots(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_roots);
}
PyObject* StructureNumOuter(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_outer);
}
PyObject* StructureUpdates(PyObject* self, void*) {
  PyObject* updates = AsStructure(self)->updates;
  return Ref::Borrow(updates ? updates : Py_None).release();
}

PyGetSetDef structure_getset[] = {
    {"_records", StructureRecords, nullptr, "The nodes as tuples.", nullptr},
    {"num_leaves", StructureNumLeaves, nullptr, "Number of leaves.", nullptr},
    {"num_nodes", StructureNumIndices, nullptr,
     "Number of nodes with an identity.", nullptr},
    {"_num_roots", StructureNumRoots, nullptr, "Number of roots.", nullptr},
    {"_num_outer", StructureNumOuter, nullptr,
     "Number of objects of earlier walks that it may refer to.", nullptr},
    {"_updates", StructureUpdates, nullptr,
     "By object, the number of the one it updates, or -1; None: updates none.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef structure_methods[] = {
    {"_restore", StructureRestore, METH_VARARGS | METH_CLASS,
     "_restore(records, num_roots, num_outer, updates): the inverse of "
     "`_records`."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot structure_slots[] = {
    {Py_tp_doc, const_cast<char*>("The structure of an object graph.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(StructureDealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(StructureTraverse)},
    {Py_tp_hash, reinterpret_cast<void*>(StructureHash)},
    {Py_tp_richcompare, reinterpret_cast<void*>(StructureCompare)},
    {Py_tp_getset, structure_getset},
    {Py_tp_methods, structure_methods},
    {0, nullptr},
};

PyType_Spec structure_spec = {
    "nnx.graph._engine.StructureBase", sizeof(Structure), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC |
        Py_TPFLAGS_DISALLOW_INSTANTIATION,
    structure_slots};

}  // namespace

bool InitStructure(PyObject* module) {
  Ref type = Ref::Steal(PyType_FromSpec(&structure_spec));
  if (!type) return false;
  g_structure_type = reinterpret_cast<PyTypeObject*>(type.get());
  return PyModule_AddObject(module, "StructureBase", type.release()) == 0;
}

}  // namespace nnx::graph
