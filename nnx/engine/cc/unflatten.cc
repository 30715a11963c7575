#include "nnx/engine/cc/unflatten.h"

#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/runtime.h"

namespace nnx::engine {
namespace {

bool SetItems(PyObject* list, PyObject* items) {
  return PyList_SetSlice(list, 0, PyList_GET_SIZE(list), items) == 0;
}

bool InitCustom(const CustomNode& custom, PyObject* object, PyObject* items) {
  const Ref init = custom.init;
  return static_cast<bool>(Ref::Steal(
      PyObject_CallFunctionObjArgs(init.get(), object, items, nullptr)));
}

bool WriteVariable(const Node& node, VariableObject* variable, PyObject* raw) {
  PyDict_Clear(variable->metadata);
  if (node.aux && PyDict_Update(variable->metadata, node.aux.get()) < 0) {
    return false;
  }
  variable->hook_flags = node.hook_flags;
  SetRaw(variable, raw);
  return true;
}

// `given`: a value, or a Variable to take over.
bool AdoptIntoVariable(VariableObject* variable, PyObject* given) {
  if (IsVariable(given)) return AssignVariable(variable, AsVariable(given));
  return WriteRawValue(variable, given);
}

bool WriteObject(const Node& node, ObjectObject* object, PyObject* contents) {
  const Ref dict = Ref::Borrow(ObjectDict(object));
  Ref names = dict ? Ref::Steal(PyDict_Keys(dict.get())) : Ref();
  if (!names) return false;
  for (int32_t i = 0; i < node.children; ++i) {
    PyObject* key = PyTuple_GET_ITEM(node.keys.get(), i);
    PyObject* child = PyDict_GetItemWithError(contents, key);
    if (!child || PyDict_SetItem(dict.get(), key, child) < 0) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names.get()); ++i) {
    PyObject* name = PyList_GET_ITEM(names.get(), i);
    const int kept = PyDict_Contains(contents, name);
    if (kept < 0 || (!kept && PyDict_DelItem(dict.get(), name) < 0)) {
      return false;
    }
  }
  PyObject* status = node.aux ? PyDict_Copy(node.aux.get()) : nullptr;
  if (node.aux && !status) return false;
  PyObject* old = object->status;
  object->status = status;
  Py_XDECREF(old);
  return true;
}

}  // namespace

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
      return BuildLeaf(node);
    case NodeKind::kRef:
      if (!made_[node.index]) {
        PyErr_SetString(PyExc_ValueError,
                        "The graph must hold the node that it refers to, but "
                        "the Variable whose value it was in holds another.");
      }
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
  int32_t inside = position_;
  position_ = node.end;
  if (node.index < 0) return Ref::Borrow(value);
  Ref self = Ref::Borrow(value);
  PyObject* existing = reuse_ ? reuse_[node.index] : nullptr;
  if (existing && node.kind == NodeKind::kLeaf) {
    self = Ref::Borrow(existing);
  } else if (existing && existing != value) {
    self = Ref::Borrow(existing);
    pending_.push_back({&node, self, Ref::Borrow(value), /*adopted=*/true});
  }
  made_[node.index] = self;
  if (node.children == 0 || !IsVariable(value)) return self;
  const Ref raw = Ref::Borrow(AsVariable(value)->raw);
  return DeclareInside(&inside, raw.get()) ? self : Ref();
}

// Of a Variable that was given ready-made, finds the objects in its value: the
// graph may refer to them from elsewhere. Where the value is another than the
// structure says, there is none.
bool Unflattener::DeclareInside(int32_t* position, PyObject* value) {
  RecursionGuard guard;
  if (!guard.entered()) return false;
  const Node& node = nodes_[*position];
  *position = node.end;
  if (node.kind == NodeKind::kRef) return true;
  if (node.type &&
      reinterpret_cast<PyObject*>(Py_TYPE(value)) != node.type.get()) {
    return true;
  }
  if (node.index >= 0) made_[node.index] = Ref::Borrow(value);
  if (node.children == 0) return true;
  Ref keys;
  std::vector<Ref> children;
  if (IsVariable(value)) {
    children.push_back(Ref::Borrow(AsVariable(value)->raw));
  } else if (OpenNode(value, &keys, &children) < 0) {
    return false;
  }
  if (children.size() != static_cast<size_t>(node.children)) return true;
  int32_t child = static_cast<int32_t>(&node - nodes_.data()) + 1;
  for (const Ref& item : children) {
    if (!DeclareInside(&child, item.get())) return false;
  }
  return true;
}

Ref Unflattener::BuildLeaf(const Node& node) {
  Ref leaf = Ref::Borrow(leaves_[node.leaf]);
  if (node.index < 0) return leaf;
  if (PyObject* existing = reuse_ ? reuse_[node.index] : nullptr) {
    leaf = Ref::Borrow(existing);
  } else if (new_refs_) {
    leaf = Ref::Steal(PyObject_CallOneArg(GetRuntime().new_ref, leaf.get()));
  }
  made_[node.index] = leaf;
  return leaf;
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
  if (existing) {
    pending_.push_back({&node, self, raw, /*adopted=*/false});
  } else {
    SetRaw(AsVariable(self.get()), raw.get());
    if (copy_boxes_ && !CopyBox(AsVariable(self.get()))) return Ref();
  }
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
  Ref dict = existing ? Ref::Steal(PyDict_New())
                      : Ref::Borrow(ObjectDict(AsObject(self.get())));
  if (!dict || !BuildItems(node, dict.get())) return Ref();
  if (existing) pending_.push_back({&node, self, dict, /*adopted=*/false});
  return self;
}

bool Unflattener::BuildItems(const Node& node, PyObject* dict) {
  for (int32_t i = 0; i < node.children; ++i) {
    Ref child = Build();
    if (!child || PyDict_SetItem(dict, PyTuple_GET_ITEM(node.keys.get(), i),
                                 child.get()) < 0) {
      return false;
    }
  }
  return true;
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
    if (existing) {
      pending_.push_back({&node, self, children, /*adopted=*/false});
    } else if (!SetItems(self.get(), children.get())) {
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
  if (!fresh || !BuildItems(node, fresh.get())) return Ref();
  if (existing) pending_.push_back({&node, self, fresh, /*adopted=*/false});
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
  Ref items = children ? Ref::Steal(PyTuple_New(node.children)) : Ref();
  if (!items) return Ref();
  for (int32_t i = 0; i < node.children; ++i) {
    PyObject* item = PyTuple_Pack(2, PyTuple_GET_ITEM(node.keys.get(), i),
                                  PyTuple_GET_ITEM(children.get(), i));
    if (!item) return Ref();
    PyTuple_SET_ITEM(items.get(), i, item);
  }
  if (existing) {
    pending_.push_back({&node, self, items, /*adopted=*/false});
  } else if (!InitCustom(custom, self.get(), items.get())) {
    return Ref();
  }
  return self;
}

bool Unflattener::Commit() {
  for (const Pending& pending : pending_) {
    if (!CanWrite(pending)) return false;
  }
  for (const Pending& pending : pending_) {
    if (!Write(pending)) return false;
  }
  return true;
}

bool Unflattener::CanWrite(const Pending& pending) const {
  PyObject* object = pending.object.get();
  PyObject* contents = pending.contents.get();
  if (pending.node->kind == NodeKind::kVariable) {
    const bool same = !pending.adopted && AsVariable(object)->raw == contents;
    return same || CheckCanUpdate(object);
  }
  if (pending.node->kind != NodeKind::kObject) return true;
  const Ref dict = Ref::Borrow(ObjectDict(AsObject(object)));
  if (!dict) return false;
  bool same = PyDict_GET_SIZE(dict.get()) == PyDict_GET_SIZE(contents);
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (same && PyDict_Next(contents, &position, &key, &value)) {
    same = PyDict_GetItemWithError(dict.get(), key) == value;
    if (PyErr_Occurred()) return false;
  }
  return same || CheckCanUpdate(object);
}

bool Unflattener::Write(const Pending& pending) const {
  const Node& node = *pending.node;
  PyObject* object = pending.object.get();
  PyObject* contents = pending.contents.get();
  if (pending.adopted) return AdoptIntoVariable(AsVariable(object), contents);
  switch (node.kind) {
    case NodeKind::kVariable:
      return WriteVariable(node, AsVariable(object), contents);
    case NodeKind::kObject:
      return WriteObject(node, AsObject(object), contents);
    case NodeKind::kList:
      return SetItems(object, contents);
    case NodeKind::kDict:
      PyDict_Clear(object);
      return PyDict_Update(object, contents) == 0;
    default: {
      const CustomNode& custom = *node.info->custom;
      const Ref clear = custom.clear;
      return Ref::Steal(PyObject_CallOneArg(clear.get(), object)) &&
             InitCustom(custom, object, contents);
    }
  }
}

}  // namespace nnx::engine
