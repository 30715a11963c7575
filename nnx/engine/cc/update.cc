#include "nnx/engine/cc/update.h"

#include <utility>
#include <vector>

#include "nnx/engine/cc/arguments.h"
#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/owned_items.h"
#include "nnx/engine/cc/path.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/restored.h"
#include "nnx/engine/cc/runtime.h"

namespace nnx::engine {
namespace {

struct UpdateOptions {
  bool check_variables = false;  // the state's must keep the shapes there are
  bool check_arrays = false;     // and so must arrays that are in none
  bool new_arrays = false;       // arrays in no Variable may be new
};

// Checks a whole update before any of it is done.
class Updater {
 public:
  explicit Updater(UpdateOptions options) : options_(options) {}

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
      PyObject* value = held_[i + 1].get();
      path_.push_back(std::move(held_[i]));
      if (!PlanItem(node, mapping.get(), value)) return false;
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
    const Ref raw = RawValue(AsVariable(variable));
    if (!raw) return false;
    PyObject* old = raw.get();
    Ref kept = Ref::Borrow(value);
    if (IsVariable(value)) {
      const Ref given = RawValue(AsVariable(value));
      if (!given) return false;
      if (options_.check_variables && !CheckShape(variable, old, given.get())) {
        return false;
      }
    } else if (IsConcreteArray(old) && IsConcreteArray(value)) {
      if (options_.check_arrays && !CheckShape(variable, old, value)) {
        return false;
      }
    } else {
      const int fixed = options_.check_arrays ? IsOfFixedShape(variable) : 0;
      if (fixed < 0) return false;
      kept = RestoredValue(old, value, PathText(path_), fixed);
      if (!kept) return false;
    }
    writes_.push_back({Ref::Borrow(variable), std::move(kept)});
    return true;
  }

  // Whether the shape of a Variable's value is part of what it is: not so for
  // caches and the like. 1, 0, -1.
  static int IsOfFixedShape(PyObject* variable) {
    Ref fixed = Ref::Steal(
        PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(variable)),
                         GetRuntime().s_fixed_shape));
    if (fixed) return PyObject_IsTrue(fixed.get());
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
    PyErr_Clear();
    return 1;
  }

  bool CheckShape(PyObject* variable, PyObject* old, PyObject* value) {
    const int same = SameShape(old, value);
    if (same) return same > 0;
    const int fixed = IsOfFixedShape(variable);
    if (fixed <= 0) return !fixed;
    RaiseShapeError(PathText(path_), value, old);
    return false;
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

  // The child under the last key of the path, or under the int that this is
  // the text of: the path then ends with the int. Null as `Child` is.
  Ref ChildAtPath(PyObject* node, PyObject* mapping, Ref* owner) {
    const Ref key = path_.back();
    Ref current = Child(node, key.get(), owner);
    if (current || PyErr_Occurred()) return current;
    Ref number = IntOfText(key.get());
    if (!number) return Ref();
    current = Child(node, number.get(), owner);
    if (!current) return Ref();
    const int both = PyDict_Contains(mapping, number.get());
    if (both > 0) {
      PyErr_Format(PyExc_ValueError,
                   "The state must have one value for `%s`, but it has the "
                   "keys %R and %R.",
                   PathText(path_).c_str(), number.get(), key.get());
    }
    if (both) return Ref();
    path_.back() = std::move(number);
    return current;
  }

  bool PlanItem(PyObject* node, PyObject* mapping, PyObject* value) {
    Ref owner;
    Ref current = ChildAtPath(node, mapping, &owner);
    const Ref key = path_.back();
    if (!current) {
      if (PyErr_Occurred()) return false;
      return PlanNew(owner.get(), key.get(), value);
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
    if (options_.check_arrays && info->kind == TypeKind::kArray) {
      const int same = SameShape(current.get(), value);
      if (!same) RaiseShapeError(PathText(path_), value, current.get());
      if (same <= 0) return false;
    }
    if (!CanAssign(owner.get())) return false;
    items_.push_back({owner, key, Ref::Borrow(value), current});
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

  // What of `owner` may get a new item: an object's attributes, or a dict.
  static PyObject* ItemsOf(PyObject* owner) {
    if (IsObject(owner)) return ObjectDict(AsObject(owner));
    return PyDict_CheckExact(owner) ? owner : nullptr;
  }

  static bool HasIntKeys(PyObject* items) {
    PyObject* key;
    Py_ssize_t position = 0;
    while (PyDict_Next(items, &position, &key, nullptr)) {
      if (PyLong_Check(key)) return true;
    }
    return false;
  }

  // Whether `owner` may get a leaf under `key`. The text of an int is the name
  // of nothing but an item of a mapping, and a sequence has its items.
  bool CanHold(PyObject* owner, PyObject* items, PyObject* key, bool variable) {
    if (!items || (IsObject(owner) && !PyUnicode_Check(key))) return false;
    if (!variable && !options_.new_arrays) return false;
    const bool ints = HasIntKeys(items);
    if (IntOfText(key)) {
      return !ints &&
             (!IsObject(owner) || PyObject_HasAttrString(owner, "keys"));
    }
    return !ints || !IsObject(owner);
  }

  // What a State or dict may bring anew: a copy of a Variable, or of a mapping
  // of nothing else. Null without an error if it is neither.
  static Ref CopyOfVariables(PyObject* value) {
    if (IsVariable(value)) {
      VariableObject* source = AsVariable(value);
      if (!Share(source)) return Ref();
      return NewVariable(Py_TYPE(value), source->raw, source->metadata,
                         source->hook_flags, source);
    }
    RecursionGuard guard;
    Ref mapping = guard.entered() ? AsMapping(value) : Ref();
    if (!mapping) return Ref();
    std::vector<Ref> pairs;
    AppendPairs(mapping.get(), &pairs);
    Ref copy = pairs.empty() ? Ref() : Ref::Steal(PyDict_New());
    for (size_t i = 0; copy && i < pairs.size(); i += 2) {
      Ref item = CopyOfVariables(pairs[i + 1].get());
      if (!item || PyDict_SetItem(copy.get(), pairs[i].get(), item.get()) < 0) {
        return Ref();
      }
    }
    return copy;
  }

  // What the graph does not have yet becomes an attribute or item.
  bool PlanNew(PyObject* owner, PyObject* key, PyObject* value) {
    PyObject* items = ItemsOf(owner);
    if (!items && PyErr_Occurred()) return false;
    Ref copy = CopyOfVariables(value);
    if (!copy && PyErr_Occurred()) return false;
    if ((!copy && PyDict_Check(value)) ||
        !CanHold(owner, items, key, static_cast<bool>(copy))) {
      Ref keys = items ? Ref::Steal(PyDict_Keys(items)) : Ref();
      if (items && !keys) return false;
      Ref known = keys ? Ref::Steal(PyUnicode_FromFormat(" with the keys %R",
                                                         keys.get()))
                       : Ref::Steal(PyUnicode_FromString(""));
      if (!known) return false;
      PyErr_Format(PyExc_ValueError,
                   "The graph must have every node of the state, but `%s` is "
                   "not there: no key %R in a %s%U.",
                   PathText(path_).c_str(), key, Py_TYPE(owner)->tp_name,
                   known.get());
      return false;
    }
    if (!copy) copy = Ref::Borrow(value);
    items_.push_back({Ref::Borrow(owner), Ref::Borrow(key), copy, Ref()});
    return true;
  }

  bool RunVariable(const Write& write) {
    VariableObject* variable = AsVariable(write.variable.get());
    PyObject* value = write.value.get();
    if (IsVariable(value)) return AssignVariable(variable, AsVariable(value));
    return WriteRawValue(variable, value);
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

  const UpdateOptions options_;
  std::vector<Write> writes_;
  std::vector<ItemWrite> items_;
  std::vector<Ref> path_;
  std::vector<Ref> held_;  // the items of the mappings that are open
};

// update(value, state, check_variables, check_arrays, new_arrays)
PyObject* UpdateFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  UpdateOptions options;
  if (!CheckArity(nargs, 5, "update") ||
      !ReadBool(args[2], &options.check_variables) ||
      !ReadBool(args[3], &options.check_arrays) ||
      !ReadBool(args[4], &options.new_arrays)) {
    return nullptr;
  }
  Updater updater(options);
  if (!updater.Plan(args[0], args[1]) || !updater.Run()) return nullptr;
  Py_RETURN_NONE;
}

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"update", Fast(UpdateFunction), METH_FASTCALL,
       "update(value, state, check_variables, check_arrays, new_arrays): "
       "writes a state into a graph, or nothing of it."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitUpdate(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::engine
