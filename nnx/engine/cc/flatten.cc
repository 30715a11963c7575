#include "nnx/engine/cc/flatten.h"

#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/owned_items.h"
#include "nnx/engine/cc/path.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/statics.h"

namespace nnx::engine {

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

void Flattener::PushRef(int32_t index) {
  const int32_t position = Push(NodeKind::kRef, nullptr);
  nodes_[position].index = index;
  Close(position, 0);
  is_tree_ = false;
}

// Pushes a node with an identity. `position` is -1 when it was met before and a
// reference has been pushed instead.
bool Flattener::PushIndexed(PyObject* value, NodeKind kind, int32_t* position) {
  const auto index = static_cast<int32_t>(objects_.size());
  auto [entry, fresh] = seen_.try_emplace(value, index);
  if (!fresh) {
    PushRef(entry->second);
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
  // Unlike an attribute, an argument must have a hash, as for `jax.jit`.
  if (PyObject_Hash(value) == -1) {
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Clear();
      PyErr_Format(PyExc_TypeError,
                   "Static arguments must be hashable, but got %R of type %s. "
                   "Pass a tuple or a frozen dataclass.",
                   value, Py_TYPE(value)->tp_name);
    }
    return false;
  }
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
      return VisitArray(value, mode == Mode::kPytree);
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
      return mapping &&
             VisitMapping(value, mapping.get(), NodeKind::kState,
                          mode == Mode::kPytree ? mode : Mode::kState);
    }
    case TypeKind::kCustom:
      return VisitCustom(value, info);
    case TypeKind::kForeign:
      RaiseForeign(value, PathText(path_));
      return false;
    case TypeKind::kStatic:
      return VisitStatic(value);
    case TypeKind::kPlain:
      return (mode != Mode::kPytree && !AtRoot()) || value == Py_None
                 ? VisitStatic(value)
                 : VisitLeaf(value, /*scalars=*/true);
    case TypeKind::kUnknown:
      return VisitUnknown(value, mode);
  }
  return false;
}

// A mark does its work when an attribute is assigned; one that was stored past
// the assignment, by `object.__setattr__`, has done none.
bool Flattener::CheckNoMark(PyObject* value) const {
  const Runtime& rt = GetRuntime();
  if (!rt.attribute_marker || Py_TYPE(value) != rt.attribute_marker) {
    return true;
  }
  PyErr_Format(PyExc_ValueError,
               "`nnx.data(...)` and `nnx.static(...)` must be assigned to "
               "attributes, but `%s` was stored as %R. Use `setattr`, or "
               "declare the attribute in the class: `name: type = nnx.data()`.",
               PathText(path_).c_str(), value);
  return false;
}

bool Flattener::VisitStatic(PyObject* value) {
  const int32_t position = Push(NodeKind::kStatic, nullptr);
  Node& node = nodes_[position];
  node.aux = Ref::Borrow(value);
  node.atomic = IsAtomic(value);
  if (!node.atomic && hash_statics_) {
    Ref key;
    const Py_hash_t hash = HashStatic(value, PathText(path_), &key);
    if (hash == -1) return false;
    nodes_[position].hash = hash;
    nodes_[position].key = key;
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

// A mutable array has an identity: two attributes may hold the same.
bool Flattener::VisitArray(PyObject* value, bool scalars) {
  const int is_mutable = IsMutableArray(value);
  if (is_mutable < 0) return false;
  if (!is_mutable) return VisitLeaf(value, scalars);
  int32_t position = -1;
  if (!PushIndexed(value, NodeKind::kLeaf, &position)) return false;
  if (position < 0) return true;
  Node& node = nodes_[position];
  node.type = Ref();  // a traced one has another, and is the same
  node.leaf = static_cast<int32_t>(leaves_.size());
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
  if (!RefreshMetadata(variable)) return false;
  {
    Node& node = nodes_[position];
    node.info = info;
    node.hook_flags = variable->hook_flags;
    if (PyDict_GET_SIZE(variable->metadata) > 0) {
      // A copy: the structure must not follow later changes.
      node.aux = Ref::Steal(PyDict_Copy(variable->metadata));
      if (!node.aux) return false;
      Ref keys;
      if (hash_statics_ && !FreezeMapping(node.aux.get(), &keys)) return false;
      node.key = keys;
    }
  }
  if (!Share(variable)) return false;
  Ref raw = Ref::Borrow(variable->raw);
  const TypeInfo* raw_info = GetTypeInfo(Py_TYPE(raw.get()));
  if (!raw_info) return false;
  bool leaf = raw_info->kind == TypeKind::kArray ||
              (raw_info->kind == TypeKind::kPlain && raw.get() != Py_None);
  if (raw_info->kind == TypeKind::kUnknown) {
    Ref children, treedef;
    leaf = !OpenPytree(raw.get(), &children, &treedef, nullptr);
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
  is_tree_ = is_tree_ && info->pytree;
  // Owned: `__dict__` can be assigned.
  const Ref dict = Ref::Borrow(ObjectDict(object));
  if (!dict) return false;
  const size_t base = arena_.size();
  Layout* layout = FindLayout(info, dict.get(), &arena_);
  if (!layout) return false;
  Ref keys = layout->keys;
  const Py_ssize_t size = PyTuple_GET_SIZE(keys.get());
  // From here on Python code may run, which could change the dictionary.
  const size_t held = held_.size();
  for (Py_ssize_t i = 0; i < size; ++i) {
    held_.push_back(Ref::Borrow(arena_[base + i]));
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
    PyObject* child = held_[held + i].get();
    PyObject* marked =
        status ? PyDict_GetItemWithError(status.get(), key) : nullptr;
    if (status && !marked && PyErr_Occurred()) return false;
    path_.push_back(key);
    if (!CheckNoMark(child)) {
      ok = false;
    } else if (marked == Py_False && !IsForeign(child)) {
      ok = VisitStatic(child);
    } else if (marked == Py_True && Py_TYPE(child) != Py_TYPE(Py_None)) {
      const TypeInfo* child_info = GetTypeInfo(Py_TYPE(child));
      if (!child_info) {
        ok = false;
      } else if (child_info->kind == TypeKind::kArray) {
        ok = VisitArray(child, /*scalars=*/true);
      } else {
        ok = child_info->kind == TypeKind::kPlain
                 ? VisitLeaf(child, /*scalars=*/true)
                 : Visit(child, Mode::kAttributes);
      }
    } else {
      ok = Visit(child, Mode::kAttributes);
    }
    path_.pop_back();
  }
  --depth_indexed_;
  if (!ok) return false;
  held_.resize(held);
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
  const size_t held = held_.size();
  AppendItems(value, &held_);
  const auto size = static_cast<int32_t>(held_.size() - held);
  for (int32_t i = 0; i < size; ++i) {
    Ref key = Ref::Steal(PyLong_FromLong(i));
    if (!key || !VisitChild(key.get(), held_[held + i].get(), mode)) {
      return false;
    }
  }
  held_.resize(held);
  Close(position, size);
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
  is_tree_ = is_tree_ && info->pytree;
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
    return mode != Mode::kPytree && !AtRoot()
               ? VisitStatic(value)
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

bool Flattener::AddFormer(Former* former, int32_t position) {
  roots_.push_back(static_cast<int32_t>(nodes_.size()));
  return VisitFormer(former, position);
}

bool Flattener::VisitFormer(Former* former, int32_t position) {
  RecursionGuard guard;
  if (!guard.entered()) return false;
  const Node& old = former->nodes[position];
  PyObject* object = old.index < 0 ? nullptr : former->objects[old.index];
  if (old.kind == NodeKind::kRef && former->index_of[old.index] >= 0) {
    PushRef(former->index_of[old.index]);
    return true;
  }
  const auto here = static_cast<int32_t>(nodes_.size());
  // A reference to what was in a Variable alone, and is there no more, stands
  // for it now.
  if (old.kind == NodeKind::kRef || old.kind == NodeKind::kVariable ||
      (old.kind == NodeKind::kLeaf && object)) {
    if (!Visit(object, Mode::kAttributes)) return false;
    former->index_of[old.index] = nodes_[here].index;
    return true;
  }
  // No object is looked up by its identity: what else holds it has a new one.
  nodes_.push_back(old);
  Node& node = nodes_.back();
  if (object) {
    node.index = static_cast<int32_t>(objects_.size());
    former->index_of[old.index] = node.index;
    objects_.push_back(Ref::Borrow(object));
  }
  if (old.leaf >= 0) {
    node.leaf = static_cast<int32_t>(leaves_.size());
    leaves_.push_back(Ref::Borrow(former->leaves[old.leaf]));
    leaf_nodes_.push_back(here);
  }
  is_tree_ = is_tree_ && !(old.info && !old.info->pytree);
  int32_t child = position + 1;
  for (int32_t i = 0; i < old.children; ++i) {
    if (!VisitFormer(former, child)) return false;
    child = former->nodes[child].end;
  }
  Close(here, old.children);
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
  structure->is_tree = is_tree_;
  structure->updates = nullptr;
  structure->hash = -1;
  return self;
}

}  // namespace nnx::engine
