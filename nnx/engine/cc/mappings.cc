#include "nnx/engine/cc/mappings.h"

#include <utility>
#include <vector>

#include "nnx/engine/cc/arguments.h"
#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/owned_items.h"
#include "nnx/engine/cc/path.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/selection.h"

namespace nnx::engine {
namespace {

class MappingSplitter {
 public:
  MappingSplitter(const Selector& selector, bool exhaustive)
      : selector_(selector), exhaustive_(exhaustive) {}

  bool Split(PyObject* mapping, Mappings* mappings) {
    RecursionGuard guard;
    if (!guard.entered()) return false;
    // Most mappings are those of a layer: a few Variables of one kind.
    const int number = OnlyNumber(mapping);
    if (number >= 0 && number < selector_.size()) {
      (*mappings)[number] = Ref::Steal(PyDict_Copy(mapping));
      return static_cast<bool>((*mappings)[number]);
    }
    const size_t held = held_.size();
    AppendPairs(mapping, &held_);
    const size_t end = held_.size();
    for (size_t i = held; i < end; i += 2) {
      PyObject *key = held_[i].get(), *value = held_[i + 1].get();
      path_.push_back(std::move(held_[i]));
      Ref inner = AsMapping(value);
      if (PyErr_Occurred()) return false;
      if (inner) {
        Mappings children(mappings->size());
        if (!Split(inner.get(), &children) ||
            !InsertChildren(mappings, key, children)) {
          return false;
        }
      } else {
        const int number = selector_.Select(path_, value);
        if (number < 0) return false;
        if (number < selector_.size()) {
          if (!Insert(mappings, number, key, value)) return false;
        } else if (exhaustive_) {
          RaiseUnselected(path_, value);
          return false;
        }
      }
      path_.pop_back();
    }
    held_.resize(held);
    return true;
  }

 private:
  // The filter that selects all of a mapping's values, if they are Variables
  // and types decide it; else -1.
  int OnlyNumber(PyObject* mapping) const {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    int number = -1;
    while (PyDict_Next(mapping, &position, &key, &value)) {
      if (!IsVariable(value)) return -1;
      const int selected = selector_.SelectByType(value);
      if (selected < 0 || (number >= 0 && selected != number)) return -1;
      number = selected;
    }
    return number;
  }

  const Selector& selector_;
  const bool exhaustive_;
  std::vector<Ref> path_;
  std::vector<Ref> held_;  // the items of the mappings that are open
};

// split_mapping(mapping, filters, exhaustive) -> [mapping, ...]
PyObject* SplitMappingFunction(PyObject*, PyObject* const* args,
                               Py_ssize_t nargs) {
  if (!CheckArity(nargs, 3, "split_mapping") || !CheckFilters(args[1])) {
    return nullptr;
  }
  if (!PyDict_Check(args[0])) {
    PyErr_Format(PyExc_TypeError, "`mapping` must be a dict, but got %s.",
                 Py_TYPE(args[0])->tp_name);
    return nullptr;
  }
  const Selector selector(args[1]);
  Mappings mappings(selector.size());
  MappingSplitter splitter(selector, args[2] == Py_True);
  if (!splitter.Split(args[0], &mappings)) return nullptr;
  return ToList(&mappings).release();
}

void RaiseThroughLeaf(const std::vector<Ref>& path) {
  Ref tuple = PathTuple(path);
  if (!tuple) return;
  PyErr_Format(PyExc_ValueError,
               "A path must lead to a leaf or through mappings, but `%R` does "
               "both.",
               tuple.get());
}

// Whether there is no mapping in a mapping, and something else.
bool HoldsOnlyVariables(PyObject* mapping) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(mapping, &position, &key, &value)) {
    if (!IsVariable(value)) return false;
  }
  return PyDict_GET_SIZE(mapping) > 0;
}

// `path` is that of `target`; `held` has the items of the mappings above.
bool MergeInto(PyObject* target, PyObject* source, std::vector<Ref>* path,
               std::vector<Ref>* held) {
  RecursionGuard guard;
  if (!guard.entered()) return false;
  const size_t start = held->size();
  AppendPairs(source, held);
  const size_t end = held->size();
  for (size_t i = start; i < end; i += 2) {
    PyObject *key = (*held)[i].get(), *value = (*held)[i + 1].get();
    path->push_back(std::move((*held)[i]));
    Ref inner = AsMapping(value);
    if (!inner && PyErr_Occurred()) return false;
    Ref existing = Ref::Borrow(PyDict_GetItemWithError(target, key));
    if (!existing && PyErr_Occurred()) return false;
    if (existing &&
        PyDict_CheckExact(existing.get()) != static_cast<bool>(inner)) {
      RaiseThroughLeaf(*path);
      return false;
    }
    if (!inner) {
      if (PyDict_SetItem(target, key, value) < 0) return false;
    } else if (!existing && HoldsOnlyVariables(inner.get())) {
      Ref copy = Ref::Steal(PyDict_Copy(inner.get()));
      if (!copy || PyDict_SetItem(target, key, copy.get()) < 0) return false;
    } else if (existing || PyDict_GET_SIZE(inner.get()) > 0) {
      if (!existing) {
        existing = Ref::Steal(PyDict_New());
        if (!existing || PyDict_SetItem(target, key, existing.get()) < 0) {
          return false;
        }
      }
      if (!MergeInto(existing.get(), inner.get(), path, held)) return false;
    }
    path->pop_back();
  }
  held->resize(start);
  return true;
}

// merge_mappings(*mappings) -> mapping; a later one wins.
PyObject* MergeMappingsFunction(PyObject*, PyObject* const* args,
                                Py_ssize_t nargs) {
  Ref target = Ref::Steal(PyDict_New());
  if (!target) return nullptr;
  for (Py_ssize_t i = 0; i < nargs; ++i) {
    Ref mapping = AsMapping(args[i]);
    if (!mapping) {
      if (!PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError,
                     "States must be State objects or dicts, but got %s.",
                     Py_TYPE(args[i])->tp_name);
      }
      return nullptr;
    }
    std::vector<Ref> path, held;
    if (!MergeInto(target.get(), mapping.get(), &path, &held)) return nullptr;
  }
  return target.release();
}

bool FlattenInto(PyObject* mapping, std::vector<Ref>* path, PyObject* paths,
                 PyObject* leaves) {
  RecursionGuard guard;
  if (!guard.entered()) return false;
  Ref keys;
  std::vector<Ref> values;
  if (!OpenMapping(mapping, &keys, &values)) return false;
  for (size_t i = 0; i < values.size(); ++i) {
    path->push_back(
        Ref::Borrow(PyTuple_GET_ITEM(keys.get(), static_cast<Py_ssize_t>(i))));
    Ref inner = AsMapping(values[i].get());
    if (inner) {
      if (!FlattenInto(inner.get(), path, paths, leaves)) return false;
    } else {
      if (PyErr_Occurred()) return false;
      Ref tuple = PathTuple(*path);
      if (!tuple || PyList_Append(paths, tuple.get()) < 0 ||
          PyList_Append(leaves, values[i].get()) < 0) {
        return false;
      }
    }
    path->pop_back();
  }
  return true;
}

// flatten_mapping(mapping) -> (paths, leaves) in canonical order: tuple, list
PyObject* FlattenMappingFunction(PyObject*, PyObject* mapping) {
  Ref inner = AsMapping(mapping);
  if (!inner) {
    if (!PyErr_Occurred()) {
      PyErr_Format(PyExc_TypeError, "`mapping` must be a dict, but got %s.",
                   Py_TYPE(mapping)->tp_name);
    }
    return nullptr;
  }
  Ref paths = Ref::Steal(PyList_New(0));
  Ref leaves = Ref::Steal(PyList_New(0));
  std::vector<Ref> path;
  if (!paths || !leaves ||
      !FlattenInto(inner.get(), &path, paths.get(), leaves.get())) {
    return nullptr;
  }
  Ref path_tuple = Ref::Steal(PyList_AsTuple(paths.get()));
  return path_tuple ? PyTuple_Pack(2, path_tuple.get(), leaves.get()) : nullptr;
}

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"split_mapping", Fast(SplitMappingFunction), METH_FASTCALL,
       "split_mapping(mapping, filters, exhaustive): mappings."},
      {"merge_mappings", Fast(MergeMappingsFunction), METH_FASTCALL,
       "merge_mappings(*mappings): one mapping; a later one wins."},
      {"flatten_mapping", FlattenMappingFunction, METH_O,
       "flatten_mapping(mapping): (paths, leaves) in canonical order."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitMappings(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::engine
