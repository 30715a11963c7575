#include "nnx/engine/cc/match.h"

#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/statics.h"

namespace nnx::engine {

namespace {

bool IsOfType(const Node& node, PyObject* value) {
  return reinterpret_cast<PyObject*>(Py_TYPE(value)) == node.type.get();
}

// Whether a value is still an array, or with `scalars` a scalar or the like.
bool IsLeaf(PyObject* value, bool scalars) {
  if (Py_TYPE(value) == GetRuntime().array_type) return true;
  const TypeInfo* info = FindTypeInfo(Py_TYPE(value));
  if (!info) return false;
  return info->kind == TypeKind::kArray ||
         (info->kind == TypeKind::kPlain && scalars && value != Py_None);
}

}  // namespace
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
  deferred_.push_back({Ref::Borrow(recorded), node.key, Ref::Borrow(value),
                       const_cast<Node*>(&node)});
  return true;
}

bool Matcher::VisitMetadata(PyObject* recorded, PyObject* frozen,
                            PyObject* given) {
  const Py_ssize_t size = PyDict_GET_SIZE(given);
  if (!recorded) return size == 0;
  if (PyDict_GET_SIZE(recorded) != size || !HasPlainKeys(recorded)) {
    return false;
  }
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(given, &position, &key, &value)) {
    if (!IsPlainKey(key)) return false;
    PyObject* expected = PyDict_GetItemWithError(recorded, key);
    if (!expected) {
      PyErr_Clear();
      return false;
    }
    PyObject* frozen_key =
        frozen ? PyDict_GetItemWithError(frozen, key) : nullptr;
    if (expected == value && !frozen_key) continue;
    if (Py_TYPE(expected) != Py_TYPE(value)) return false;
    if (IsNativeScalar(value)) {
      if (!NativeEqual(expected, value)) return false;
    } else {
      deferred_.push_back({Ref::Borrow(expected), Ref::Borrow(frozen_key),
                           Ref::Borrow(value), nullptr});
    }
  }
  return true;
}

bool Matcher::Visit(PyObject* value) {
  const Node& node = nodes_[position_++];
  if (node.children == 0) return VisitNode(node, value);
  RecursionGuard guard;
  if (guard.entered()) return VisitNode(node, value);
  PyErr_Clear();  // the slow walk will raise it
  return false;
}

bool Matcher::VisitNode(const Node& node, PyObject* value) {
  switch (node.kind) {
    case NodeKind::kStatic:
      return VisitStatic(node, value);
    case NodeKind::kLeaf:
      return VisitLeaf(node, value);
    case NodeKind::kRef:
      return objects_[node.index] == value;
    case NodeKind::kVariable:
      return IsOfType(node, value) && VisitVariable(node, AsVariable(value));
    case NodeKind::kObject:
      return IsOfType(node, value) && VisitObject(node, AsObject(value));
    case NodeKind::kList:
    case NodeKind::kTuple:
    case NodeKind::kNamedTuple:
      return IsOfType(node, value) && VisitSequence(node, value);
    case NodeKind::kDict:
    case NodeKind::kState:
      return IsOfType(node, value) && VisitMapping(node, value);
    case NodeKind::kPytree:
    case NodeKind::kCustom:
      return false;  // opening them runs Python code
  }
  return false;
}

bool Matcher::VisitLeaf(const Node& node, PyObject* value) {
  // Anything else may be a container by now: the slow walk decides.
  if (!IsLeaf(value, node.scalars)) return false;
  const bool is_mutable = node.index >= 0;
  const Runtime& rt = GetRuntime();
  if (Py_TYPE(value) != rt.array_type) {
    const TypeInfo* info = FindTypeInfo(Py_TYPE(value));
    if (info && info->traced) {
      traced_.emplace_back(value, is_mutable);
    } else if ((Py_TYPE(value) == rt.ref_type) != is_mutable) {
      return false;
    }
  } else if (is_mutable) {
    return false;
  }
  if (is_mutable && !Index(node, value)) return false;
  leaves_[node.leaf] = value;
  return true;
}

bool Matcher::VisitVariable(const Node& node, VariableObject* variable) {
  if (!Index(node, reinterpret_cast<PyObject*>(variable)) ||
      variable->hook_flags != node.hook_flags ||
      !VisitMetadata(node.aux.get(), node.key.get(), variable->metadata)) {
    return false;
  }
  if (variable->hold != Hold::kShared) {
    if (variable->hold == Hold::kLent) return false;  // the slow walk may wait
    owns_ = true;
  }
  in_trace_ |= variable->trace_ref != nullptr;
  if (node.leaf < 0) return Visit(variable->raw);
  if (!IsLeaf(variable->raw, /*scalars=*/true)) return false;
  leaves_[node.leaf] = variable->raw;
  return true;
}

bool Matcher::VisitObject(const Node& node, ObjectObject* object) {
  if (!Index(node, reinterpret_cast<PyObject*>(object))) return false;
  const Py_ssize_t marks = object->status ? PyDict_GET_SIZE(object->status) : 0;
  if (node.aux.get() || marks > 0) {
    if (!node.aux.get() || marks != PyDict_GET_SIZE(node.aux.get()) ||
        !VisitMetadata(node.aux.get(), nullptr, object->status)) {
      return false;
    }
  }
  // One without attributes yet gets its dictionary in the slow walk.
  if (!object->dict) return false;
  const size_t base = arena_.size();
  Layout* layout = MatchLayout(node.info, object->dict, &arena_);
  if (!layout) return false;
  if (layout->keys.get() != node.keys.get()) {
    const int equal =
        PyObject_RichCompareBool(layout->keys.get(), node.keys.get(), Py_EQ);
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

bool Matcher::VisitSequence(const Node& node, PyObject* value) {
  if (node.reference && !Index(node, value)) return false;
  if (PySequence_Fast_GET_SIZE(value) != node.children) return false;
  for (int32_t i = 0; i < node.children; ++i) {
    if (!Visit(PySequence_Fast_GET_ITEM(value, i))) return false;
  }
  return true;
}

bool Matcher::VisitMapping(const Node& node, PyObject* value) {
  if (node.reference && !Index(node, value)) return false;
  Ref mapping =
      node.kind == NodeKind::kState ? StoredMapping(value) : Ref::Borrow(value);
  if (!mapping || PyDict_GET_SIZE(mapping.get()) != node.children ||
      !HasPlainKeys(mapping.get())) {
    return false;
  }
  for (int32_t i = 0; i < node.children; ++i) {
    PyObject* key = PyTuple_GET_ITEM(node.keys.get(), i);
    if (!IsPlainKey(key)) return false;
    PyObject* child = PyDict_GetItemWithError(mapping.get(), key);
    if (!child) {
      PyErr_Clear();
      return false;
    }
    if (!Visit(child)) return false;
  }
  return true;
}

int Matcher::FinishDeferred() {
  for (const auto& [value, wanted] : traced_) {
    const int is_mutable = IsMutableArray(value);
    if (is_mutable < 0) return -1;
    if (is_mutable != wanted) return 0;
  }
  for (const Deferred& item : deferred_) {
    if (item.node && !item.key) {
      // Also for one and the same object: it may have changed in place.
      const Py_hash_t hash = PyObject_Hash(item.given.get());
      if (hash == -1) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
        PyErr_Clear();
        return 0;
      }
      if (hash != item.node->hash) return 0;
    }
    const int equal = StaticEqual(item.recorded.get(), item.key.get(),
                                  item.given.get(), nullptr);
    if (equal != 1) return equal;
    // A trace to come must see this one: the other may have changed since.
    if (item.node && item.key) item.node->aux = item.given;
  }
  return 1;
}

}  // namespace nnx::engine
