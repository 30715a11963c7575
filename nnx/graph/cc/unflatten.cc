#include "nnx/graph/cc/unflatten.h"

#include "nnx/graph/cc/objects.h"
#include "nnx/graph/cc/recursion_guard.h"

namespace nnx::graph {

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

}  // namespace nnx::graph
