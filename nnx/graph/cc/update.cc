#include "nnx/graph/cc/update.h"

#include <vector>

#include "nnx/graph/cc/arguments.h"
#include "nnx/graph/cc/children.h"
#include "nnx/graph/cc/flatten.h"
#include "nnx/graph/cc/layout.h"
#include "nnx/graph/cc/objects.h"
#include "nnx/graph/cc/path.h"
#include "nnx/graph/cc/recursion_guard.h"
#include "nnx/graph/cc/runtime.h"
#include "nnx/graph/cc/structure.h"

namespace nnx::graph {
namespace {

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
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(mapping.get(), &position, &key, &value)) {
      path_.push_back(Ref::Borrow(key));
      Ref held = Ref::Borrow(value);
      if (!PlanItem(node, key, value)) return false;
      path_.pop_back();
    }
    return true;
  }

  bool Run() {
    PyObject* trace = nullptr;
    if (!CurrentTrace(&trace)) return false;
    Ref keep = Ref::Steal(trace);
    for (const Write& write : writes_) {
      PyObject* owner = write.owner.get();
      if ((IsVariable(owner) || IsObject(owner)) &&
          !BelongsToTrace(AsGraphObject(owner), trace)) {
        RaiseTraceError(owner);
        return false;
      }
    }
    for (const Write& write : writes_) {
      if (!RunWrite(write)) return false;
    }
    return true;
  }

 private:
  struct Write {
    Ref owner;  // Variable: its value; else the item `key`
    Ref key;
    Ref value;
  };

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
    writes_.push_back({Ref::Borrow(variable), Ref(), Ref::Borrow(value)});
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
      PyObject* dict = ObjectDict(AsObject(node));
      if (!dict) return Ref();
      return Ref::Borrow(PyDict_GetItemWithError(dict, key));
    }
    Ref mapping = AsMapping(node);
    if (mapping) return Child(mapping.get(), key, owner);
    if (PyErr_Occurred()) return Ref();
    return OpenedChild(node, key);
  }

  // The child of a custom or registered pytree node.
  Ref OpenedChild(PyObject* node, PyObject* key) {
    Flattener walk(/*hash_statics=*/false);
    if (!walk.Add(node, Mode::kAttributes)) return Ref();
    const Node& root = walk.nodes()[0];
    int32_t child = 1;
    for (int32_t i = 0; i < root.children;
         ++i, child = walk.nodes()[child].end) {
      Ref child_key = ChildKey(root, i);
      const int equal =
          child_key ? PyObject_RichCompareBool(child_key.get(), key, Py_EQ)
                    : -1;
      if (equal < 0) return Ref();
      if (!equal) continue;
      const Node& found = walk.nodes()[child];
      if (found.index >= 0) return walk.objects()[found.index];
      if (found.leaf >= 0) return walk.leaves()[found.leaf];
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
    writes_.push_back({owner, Ref::Borrow(key), Ref::Borrow(value)});
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
    writes_.push_back({Ref::Borrow(owner), Ref::Borrow(key), copy});
    return true;
  }

  bool RunWrite(const Write& write) {
    PyObject* owner = write.owner.get();
    PyObject* value = write.value.get();
    if (IsVariable(owner)) {
      if (IsVariable(value)) {
        return AssignVariable(AsVariable(owner), AsVariable(value));
      }
      SetRaw(AsVariable(owner), value);
      return true;
    }
    if (IsObject(owner)) {
      PyObject* dict = ObjectDict(AsObject(owner));
      return dict && PyDict_SetItem(dict, write.key.get(), value) == 0;
    }
    const TypeInfo* info = GetTypeInfo(Py_TYPE(owner));
    if (!info) return false;
    if (info->kind == TypeKind::kCustom) {
      Ref set_key = info->custom->set_key;
      return static_cast<bool>(Ref::Steal(PyObject_CallFunctionObjArgs(
          set_key.get(), owner, write.key.get(), value, nullptr)));
    }
    return PyObject_SetItem(owner, write.key.get(), value) == 0;
  }

  std::vector<Write> writes_;
  std::vector<Ref> path_;
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
