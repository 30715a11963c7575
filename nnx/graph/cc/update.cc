#include "nnx/graph/cc/update.h"

#include <utility>
#include <vector>

#include "nnx/graph/cc/arguments.h"
#include "nnx/graph/cc/children.h"
#include "nnx/graph/cc/layout.h"
#include "nnx/graph/cc/objects.h"
#include "nnx/graph/cc/owned_items.h"
#include "nnx/graph/cc/path.h"
#include "nnx/graph/cc/recursion_guard.h"
#include "nnx/graph/cc/runtime.h"

namespace nnx::graph {
namespace {

// Puts an error aside, and sets it again at the end.
class KeptError {
 public:
#if PY_VERSION_HEX >= 0x030C0000
  KeptError() : error_(PyErr_GetRaisedException()) {}
  ~KeptError() { PyErr_SetRaisedException(error_); }
#else
  KeptError() { PyErr_Fetch(&type_, &error_, &traceback_); }
  ~KeptError() { PyErr_Restore(type_, error_, traceback_); }
#endif
  KeptError(const KeptError&) = delete;
  KeptError& operator=(const KeptError&) = delete;

 private:
#if PY_VERSION_HEX < 0x030C0000
  PyObject* type_ = nullptr;
  PyObject* traceback_ = nullptr;
#endif
  PyObject* error_ = nullptr;
};

// Checks a whole update before any of it is done.
class Updater {
 public:
  bool Plan(PyObject* node, PyObject* state) {
    RecursionGuard guard;
    if (!guard.entered()) return false;
    if (IsVariable(node)) return PlanVariable(node, state);
    Ref mapping = AsMapping(state);
    if (!mapping) {
      if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError,
                     "The state must hold a nested mapping at `%s`, where the "
                     "graph has a %s, but got %s.",
                     PathText(path_).c_str(), Py_TYPE(node)->tp_name,
                     Py_TYPE(state)->tp_name);
      }
      return false;
    }
    const size_t held = held_.size();
    AppendPairs(mapping.get(), &held_);
    const size_t end = held_.size();
    for (size_t i = held; i < end; i += 2) {
      PyObject *key = held_[i].get(), *value = held_[i + 1].get();
      path_.push_back(std::move(held_[i]));
      if (!PlanItem(node, key, value)) return false;
      path_.pop_back();
    }
    held_.resize(held);
    return true;
  }

  bool Run() {
    PyObject* trace = nullptr;
    if (!CurrentTrace(&trace)) return false;
    Ref keep = Ref::Steal(trace);
    for (const Write& write : writes_) {
      if (!CheckTrace(write.variable.get(), trace)) return false;
    }
    for (const ItemWrite& write : items_) {
      PyObject* owner = write.owner.get();
      if (IsObject(owner) && !CheckTrace(owner, trace)) return false;
    }
    // Items first, as only writing them may run Python code that raises: then
    // those that were written get back what they had.
    for (size_t i = 0; i < items_.size(); ++i) {
      const ItemWrite& write = items_[i];
      if (SetItem(write.owner.get(), write.key.get(), write.value.get())) {
        continue;
      }
      Undo(i);
      return false;
    }
    for (const Write& write : writes_) {
      if (!RunVariable(write)) return false;
    }
    return true;
  }

 private:
  struct Write {
    Ref variable;
    Ref value;
  };
  struct ItemWrite {
    Ref owner;
    Ref key;
    Ref value;
    Ref old;  // null: there was none
  };

  static bool CheckTrace(PyObject* object, PyObject* trace) {
    if (BelongsToTrace(AsGraphObject(object), trace)) return true;
    RaiseTraceError(object);
    return false;
  }

  bool PlanVariable(PyObject* variable, PyObject* value) {
    if (IsForeign(value)) {
      RaiseForeign(value, PathText(path_));
      return false;
    }
    if (IsVariable(value) &&
        !PyType_IsSubtype(Py_TYPE(value), Py_TYPE(variable)) &&
        !PyType_IsSubtype(Py_TYPE(variable), Py_TYPE(value))) {
      PyErr_Format(PyExc_ValueError,
                   "The state must hold a %s at `%s`, as the graph does, but "
                   "got a %s.",
                   Py_TYPE(variable)->tp_name, PathText(path_).c_str(),
                   Py_TYPE(value)->tp_name);
      return false;
    }
    writes_.push_back({Ref::Borrow(variable), Ref::Borrow(value)});
    return true;
  }

  // The child of `node` under `key`: null without an error if there is none.
  // `owner` is what holds it: the node, or the dict inside a State.
  Ref Child(PyObject* node, PyObject* key, Ref* owner) {
    *owner = Ref::Borrow(node);
    if (PyDict_Check(node)) {
      return Ref::Borrow(PyDict_GetItemWithError(node, key));
    }
    if (PyList_Check(node) || PyTuple_Check(node)) {
      if (PyUnicode_Check(key) && PyTuple_Check(node)) {
        Ref child = Ref::Steal(PyObject_GetAttr(node, key));
        if (!child) PyErr_Clear();
        return child;
      }
      if (!PyLong_Check(key)) return Ref();
      const Py_ssize_t index = PyLong_AsSsize_t(key);
      if (index < 0 || index >= PySequence_Fast_GET_SIZE(node)) {
        PyErr_Clear();
        return Ref();
      }
      return Ref::Borrow(PySequence_Fast_GET_ITEM(node, index));
    }
    if (IsObject(node)) {
      // Owned: a key that is compared in Python can assign to `__dict__`.
      const Ref dict = Ref::Borrow(ObjectDict(AsObject(node)));
      if (!dict) return Ref();
      return Ref::Borrow(PyDict_GetItemWithError(dict.get(), key));
    }
    Ref mapping = AsMapping(node);
    if (mapping) return Child(mapping.get(), key, owner);
    if (PyErr_Occurred()) return Ref();
    return OpenedChild(node, key);
  }

  // The child of a custom or registered pytree node.
  Ref OpenedChild(PyObject* node, PyObject* key) {
    Ref keys;
    std::vector<Ref> children;
    if (OpenNode(node, &keys, &children) < 0) return Ref();
    for (size_t i = 0; i < children.size(); ++i) {
      const auto position = static_cast<Py_ssize_t>(i);
      Ref child_key = keys ? Ref::Borrow(PyTuple_GET_ITEM(keys.get(), position))
                           : Ref::Steal(PyLong_FromSsize_t(position));
      const int equal =
          child_key ? PyObject_RichCompareBool(child_key.get(), key, Py_EQ)
                    : -1;
      if (equal < 0) return Ref();
      if (equal) return children[i];
    }
    return Ref();
  }

  bool PlanItem(PyObject* node, PyObject* key, PyObject* value) {
    Ref owner;
    Ref current = Child(node, key, &owner);
    if (!current) {
      if (PyErr_Occurred()) return false;
      return PlanNew(owner.get(), key, value);
    }
    if (IsVariable(current.get())) return PlanVariable(current.get(), value);
    TypeInfo* info = GetTypeInfo(Py_TYPE(current.get()));
    if (!info) return false;
    const bool value_is_mapping =
        PyDict_Check(value) ||
        (GetRuntime().state &&
         PyType_IsSubtype(Py_TYPE(value), GetRuntime().state));
    bool is_leaf =
        info->kind == TypeKind::kArray || info->kind == TypeKind::kPlain;
    if (info->kind == TypeKind::kUnknown) {
      Ref keys;
      std::vector<Ref> children;
      const int opened = OpenNode(current.get(), &keys, &children);
      if (opened < 0) return false;
      is_leaf = !opened;
    }
    if (!is_leaf && value_is_mapping) return Plan(current.get(), value);
    if (!is_leaf || IsVariable(value) || value_is_mapping) {
      PyErr_Format(PyExc_ValueError,
                   "The state must hold %s at `%s`, where the graph has a %s, "
                   "but got %s.",
                   is_leaf ? "an array" : "a nested mapping",
                   PathText(path_).c_str(), Py_TYPE(current.get())->tp_name,
                   Py_TYPE(value)->tp_name);
      return false;
    }
    if (!CanAssign(owner.get())) return false;
    items_.push_back({owner, Ref::Borrow(key), Ref::Borrow(value), current});
    return true;
  }

  // Whether an item of `owner` can be replaced, as far as its type tells.
  bool CanAssign(PyObject* owner) {
    TypeInfo* info = GetTypeInfo(Py_TYPE(owner));
    if (!info) return false;
    switch (info->kind) {
      case TypeKind::kObject:
      case TypeKind::kList:
      case TypeKind::kDict:
      case TypeKind::kState:
      case TypeKind::kCustom:
        return true;
      default:
        PyErr_Format(
            PyExc_ValueError,
            "Arrays that `update` replaces must be attributes or items "
            "of lists and dicts, but `%s` is in a %s, which cannot "
            "change: make it a Variable.",
            PathText(path_).c_str(), Py_TYPE(owner)->tp_name);
        return false;
    }
  }

  // A leaf that the graph does not have yet becomes an attribute or item.
  bool PlanNew(PyObject* owner, PyObject* key, PyObject* value) {
    const bool can_hold =
        (IsObject(owner) && PyUnicode_Check(key)) || PyDict_CheckExact(owner);
    if (!can_hold || PyDict_Check(value)) {
      PyErr_Format(PyExc_ValueError,
                   "The graph must have every node of the state, but `%s` is "
                   "not there (in a %s).",
                   PathText(path_).c_str(), Py_TYPE(owner)->tp_name);
      return false;
    }
    Ref copy = Ref::Borrow(value);
    if (IsVariable(value)) {
      VariableObject* source = AsVariable(value);
      copy = NewVariable(Py_TYPE(value), source->raw, source->metadata,
                         source->hook_flags, source);
      if (!copy) return false;
    }
    items_.push_back({Ref::Borrow(owner), Ref::Borrow(key), copy, Ref()});
    return true;
  }

  bool RunVariable(const Write& write) {
    VariableObject* variable = AsVariable(write.variable.get());
    PyObject* value = write.value.get();
    if (IsVariable(value)) return AssignVariable(variable, AsVariable(value));
    SetRaw(variable, value);
    return true;
  }

  // Takes back the first writes of items, and keeps the error that is set.
  void Undo(size_t count) {
    const KeptError error;
    while (count > 0) {
      const ItemWrite& write = items_[--count];
      if (!SetItem(write.owner.get(), write.key.get(), write.old.get())) {
        PyErr_Clear();
      }
    }
  }

  // `value`: null deletes.
  bool SetItem(PyObject* owner, PyObject* key, PyObject* value) {
    if (IsObject(owner)) {
      const Ref dict = Ref::Borrow(ObjectDict(AsObject(owner)));
      if (!dict) return false;
      return (value ? PyDict_SetItem(dict.get(), key, value)
                    : PyDict_DelItem(dict.get(), key)) == 0;
    }
    const TypeInfo* info = GetTypeInfo(Py_TYPE(owner));
    if (!info) return false;
    if (info->kind == TypeKind::kCustom) {
      const Ref set_key = info->custom->set_key;
      return static_cast<bool>(Ref::Steal(PyObject_CallFunctionObjArgs(
          set_key.get(), owner, key, value, nullptr)));
    }
    return (value ? PyObject_SetItem(owner, key, value)
                  : PyObject_DelItem(owner, key)) == 0;
  }

  std::vector<Write> writes_;
  std::vector<ItemWrite> items_;
  std::vector<Ref> path_;
  std::vector<Ref> held_;  // the items of the mappings that are open
};

// update(value, state)
PyObject* UpdateFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "update")) return nullptr;
  Updater updater;
  if (!updater.Plan(args[0], args[1]) || !updater.Run()) return nullptr;
  Py_RETURN_NONE;
}

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"update", Fast(UpdateFunction), METH_FASTCALL,
       "update(value, state): writes a state into a graph, or nothing of it."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitUpdate(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::graph
