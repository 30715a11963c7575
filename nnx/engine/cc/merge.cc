#include "nnx/engine/cc/merge.h"

#include <string>
#include <utility>
#include <vector>

#include "nnx/engine/cc/arguments.h"
#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/flatten.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/path.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/restored.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/split.h"
#include "nnx/engine/cc/structure.h"
#include "nnx/engine/cc/unflatten.h"

namespace nnx::engine {
namespace {

bool HasLeaves(const std::vector<Node>& nodes, int32_t position) {
  for (int32_t i = position; i < nodes[position].end; ++i) {
    if (nodes[i].leaf >= 0 || nodes[i].kind == NodeKind::kVariable) return true;
  }
  return false;
}

// Finds the leaf of each node of a structure in a nested mapping.
class Provider {
 public:
  // `copy`: Variables are copied; those of another trace than `trace` are in
  // any case. `keep_arrays`: an array in place of a Variable stays one.
  Provider(const Structure* structure, PyObject* trace, bool copy,
           bool keep_arrays)
      : nodes_(*structure->nodes),
        trace_(trace),
        copy_(copy),
        keep_arrays_(keep_arrays),
        provided_(nodes_.size()) {}

  bool ProvideRoot(int32_t position, PyObject* value) {
    const Node& node = nodes_[position];
    if (node.kind == NodeKind::kVariable || node.kind == NodeKind::kLeaf) {
      return ProvideLeaf(position, Ref::Borrow(value));
    }
    if (PyList_CheckExact(value)) return ProvideList(value);
    Ref mapping = AsMapping(value);
    if (!mapping) return RaiseMapping(value);
    Py_ssize_t used = 0;
    return Provide(position, mapping.get(), &used) &&
           CheckAllUsed(position, mapping.get(), used);
  }

  // The leaves in canonical order.
  bool ProvideList(PyObject* list) {
    Py_ssize_t count = 0;
    const auto size = static_cast<int32_t>(nodes_.size());
    for (int32_t i = 0; i < size;) {
      const bool leaf = nodes_[i].kind == NodeKind::kVariable ||
                        nodes_[i].kind == NodeKind::kLeaf;
      if (leaf) {
        if (count < PyList_GET_SIZE(list)) {
          Ref value = Ref::Borrow(PyList_GET_ITEM(list, count));
          if (!ProvideLeaf(i, std::move(value))) return false;
        }
        ++count;
      }
      i = leaf ? nodes_[i].end : i + 1;
    }
    if (count == PyList_GET_SIZE(list)) return true;
    PyErr_Format(PyExc_ValueError,
                 "The list must hold the %zd leaves of the graph, but got %zd.",
                 count, PyList_GET_SIZE(list));
    return false;
  }

  std::vector<PyObject*> Borrowed() const {
    std::vector<PyObject*> borrowed(provided_.size());
    for (size_t i = 0; i < provided_.size(); ++i) {
      borrowed[i] = provided_[i].get();
    }
    return borrowed;
  }

 private:
  bool RaiseMapping(PyObject* value) {
    if (!PyErr_Occurred()) {
      PyErr_Format(PyExc_ValueError,
                   "The state must hold a nested mapping at `%s`, but got %s.",
                   PathText(path_).c_str(), Py_TYPE(value)->tp_name);
    }
    return false;
  }

  bool ProvideLeaf(int32_t position, Ref held) {
    PyObject* value = held.get();
    if (IsForeign(value)) {
      RaiseForeign(value, PathText(path_));
      return false;
    }
    const Node& node = nodes_[position];
    if (node.kind == NodeKind::kLeaf) {
      if (IsVariable(value)) {
        PyErr_Format(PyExc_ValueError,
                     "The state must hold an array at `%s`, as the graph does, "
                     "but got a Variable of type %s.",
                     PathText(path_).c_str(), Py_TYPE(value)->tp_name);
        return false;
      }
      provided_[position] = std::move(held);
      return true;
    }
    auto* type = reinterpret_cast<PyTypeObject*>(node.type.get());
    Ref given = Ref::Borrow(value);
    if (!IsVariable(value) && !IsConcreteArray(value)) {
      Ref old = ValueOf(position);
      given = old ? RestoredValue(old.get(), value, PathText(path_),
                                  /*check_shapes=*/false)
                  : Ref();
      if (!given) return false;
    }
    if (!IsVariable(value) && keep_arrays_) {
      provided_[position] = std::move(given);
    } else if (!IsVariable(value)) {
      provided_[position] = NewVariable(type, given.get(), node.aux.get(),
                                        node.hook_flags, nullptr);
    } else if (copy_ || !BelongsToTrace(AsGraphObject(value), trace_)) {
      VariableObject* source = AsVariable(value);
      if (!Share(source)) return false;
      provided_[position] =
          NewVariable(Py_TYPE(value), source->raw, source->metadata,
                      source->hook_flags, source);
      if (copy_ && provided_[position] &&
          !CopyBox(AsVariable(provided_[position].get()))) {
        return false;
      }
    } else {
      provided_[position] = std::move(held);
    }
    return static_cast<bool>(provided_[position]);
  }

  // What a Variable of the structure holds, as far as containers go.
  Ref ValueOf(int32_t position) {
    const Node& node = nodes_[position];
    if (node.children == 0) return Ref::Borrow(GetRuntime().restored_leaf);
    return Skeleton(position + 1);
  }

  Ref Skeleton(int32_t position) {
    const Node& node = nodes_[position];
    const bool mapping =
        node.kind == NodeKind::kDict || node.kind == NodeKind::kState;
    const bool sequence = node.kind == NodeKind::kList ||
                          node.kind == NodeKind::kTuple ||
                          node.kind == NodeKind::kNamedTuple;
    if (node.kind == NodeKind::kLeaf) {
      return Ref::Borrow(GetRuntime().restored_leaf);
    }
    if (!mapping && !sequence) return Ref::Borrow(Py_None);
    Ref items = Ref::Steal(mapping ? PyDict_New() : PyList_New(0));
    int32_t child = position + 1;
    for (int32_t i = 0; items && i < node.children;
         ++i, child = nodes_[child].end) {
      Ref key = ChildKey(node, i);
      Ref item = key ? Skeleton(child) : Ref();
      if (!item || (mapping ? PyDict_SetItem(items.get(), key.get(), item.get())
                            : PyList_Append(items.get(), item.get())) < 0) {
        return Ref();
      }
    }
    if (!items || mapping || node.kind == NodeKind::kList) return items;
    Ref tuple = Ref::Steal(PyList_AsTuple(items.get()));
    if (!tuple || node.kind == NodeKind::kTuple) return tuple;
    return Ref::Steal(PyObject_CallObject(node.type.get(), tuple.get()));
  }

  // `used` counts the keys of `mapping` that a node asked for.
  bool Provide(int32_t position, PyObject* mapping, Py_ssize_t* used) {
    RecursionGuard guard;
    if (!guard.entered()) return false;
    const Node& node = nodes_[position];
    int32_t child = position + 1;
    for (int32_t i = 0; i < node.children; ++i, child = nodes_[child].end) {
      const Node& child_node = nodes_[child];
      if (child_node.kind == NodeKind::kStatic ||
          child_node.kind == NodeKind::kRef) {
        continue;
      }
      path_.push_back(ChildKey(node, i));
      if (!path_.back() || !ProvideChild(child, mapping, used)) return false;
      path_.pop_back();
    }
    return true;
  }

  bool ProvideChild(int32_t child, PyObject* mapping, Py_ssize_t* used) {
    Ref value =
        Ref::Borrow(PyDict_GetItemWithError(mapping, path_.back().get()));
    if (!value && !PyErr_Occurred()) {
      Ref text = TextOfInt(path_.back().get());
      if (text) {
        value = Ref::Borrow(PyDict_GetItemWithError(mapping, text.get()));
      }
    }
    if (!value) {
      if (PyErr_Occurred()) return false;
      if (!HasLeaves(nodes_, child)) return true;
      PyErr_Format(PyExc_ValueError,
                   "The state must hold every leaf of the graph, but `%s` is "
                   "missing: pass all the states that `nnx.split` returned.",
                   PathText(path_).c_str());
      return false;
    }
    ++*used;
    const Node& node = nodes_[child];
    if (node.kind == NodeKind::kVariable || node.kind == NodeKind::kLeaf) {
      return ProvideLeaf(child, std::move(value));
    }
    Ref inner = AsMapping(value.get());
    if (!inner) return RaiseMapping(value.get());
    Py_ssize_t inner_used = 0;
    return Provide(child, inner.get(), &inner_used) &&
           CheckAllUsed(child, inner.get(), inner_used);
  }

  bool CheckAllUsed(int32_t position, PyObject* mapping, Py_ssize_t used) {
    if (PyDict_GET_SIZE(mapping) == used) return true;
    Ref keys = Ref::Steal(PyDict_Keys(mapping));
    if (!keys) return false;
    std::string known;
    CollectKeys(position, &known);
    PyErr_Format(PyExc_ValueError,
                 "The state must hold only what the graph has, but at `%s` it "
                 "has the keys %R where the graph has leaves below: %s.",
                 PathText(path_).c_str(), keys.get(),
                 known.empty() ? "none" : known.c_str());
    return false;
  }

  void CollectKeys(int32_t position, std::string* known) {
    const Node& node = nodes_[position];
    int32_t child = position + 1;
    for (int32_t i = 0; i < node.children; ++i, child = nodes_[child].end) {
      if (HasLeaves(nodes_, child)) {
        if (!known->empty()) *known += ", ";
        *known += PathText({ChildKey(node, i)});
      }
    }
  }

  const std::vector<Node>& nodes_;
  PyObject* const trace_;
  const bool copy_;
  const bool keep_arrays_;
  std::vector<Ref> provided_;
  std::vector<Ref> path_;
};

// Whether the objects to update are what the structure has in their place.
bool CheckReuse(const Structure& structure,
                const std::vector<PyObject*>& reuse) {
  for (const Node& node : *structure.nodes) {
    if (node.kind == NodeKind::kRef || node.kind == NodeKind::kLeaf ||
        node.index < 0) {
      continue;
    }
    PyObject* object = reuse[node.index];
    if (!object ||
        reinterpret_cast<PyObject*>(Py_TYPE(object)) == node.type.get()) {
      continue;
    }
    PyErr_Format(
        PyExc_ValueError,
        "`graphdef` updates a %s where the context has a %s: it is not "
        "of this `nnx.update_context`.",
        reinterpret_cast<PyTypeObject*>(node.type.get())->tp_name,
        Py_TYPE(object)->tp_name);
    return false;
  }
  return true;
}

// merge(structure, state, copy, keep_arrays, seen=None, updated=None) -> value
// `copy`: copies the Variables. `keep_arrays`: arrays in the place of Variables
// stay arrays.
// `seen`: list of the objects that earlier merges made, to be continued.
// `updated`: list of the objects that the structure says it updates.
PyObject* MergeFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  bool copy = false, keep_arrays = false;
  if (nargs != 6 && !CheckArity(nargs, 4, "merge")) return nullptr;
  if (!ReadBool(args[2], &copy) || !ReadBool(args[3], &keep_arrays)) {
    return nullptr;
  }
  if (!CheckStructure(args[0])) return nullptr;
  const Structure* structure = AsStructure(args[0]);
  if (structure->num_roots != 1) {
    PyErr_SetString(PyExc_ValueError,
                    "`graphdef` must describe one value; this one describes "
                    "the arguments of a function.");
    return nullptr;
  }
  std::vector<Ref> seen, updated;
  if (nargs == 6 && (!ObjectList(args[4], "seen", &seen) ||
                     !ObjectList(args[5], "updated", &updated))) {
    return nullptr;
  }
  if (static_cast<size_t>(structure->num_outer) > seen.size()) {
    PyErr_Format(
        PyExc_ValueError,
        "`graphdef` refers to %d objects of earlier splits of its "
        "context, but %zu were merged: merge all of them, in order, in "
        "one `nnx.merge_context`.",
        structure->num_outer, seen.size());
    return nullptr;
  }
  PyObject* current = nullptr;
  if (!CurrentTrace(&current)) return nullptr;
  const Ref trace = Ref::Steal(current);
  Provider provider(structure, trace.get(), copy, keep_arrays);
  if (!provider.ProvideRoot(0, args[1])) return nullptr;
  const std::vector<PyObject*> provided = provider.Borrowed();
  std::vector<PyObject*> reuse;
  if (structure->updates && !updated.empty()) {
    reuse.resize(structure->num_indices);
    for (int32_t i = structure->num_outer; i < structure->num_indices; ++i) {
      const long number =
          PyLong_AsLong(PyTuple_GET_ITEM(structure->updates, i));
      if (number >= 0 && static_cast<size_t>(number) < updated.size()) {
        reuse[i] = updated[number].get();
      }
    }
    if (!CheckReuse(*structure, reuse)) return nullptr;
  }
  Unflattener build(*structure->nodes, nullptr,
                    reuse.empty() ? nullptr : reuse.data(),
                    structure->num_indices);
  build.set_provided(&provided);
  for (int32_t i = 0; i < structure->num_outer; ++i) {
    build.Declare(i, seen[i].get());
  }
  Ref result = build.Build();
  if (!result || !build.Commit()) return nullptr;
  if (nargs == 6 && args[4] != Py_None &&
      !Extend(args[4], build.objects(), structure->num_outer)) {
    return nullptr;
  }
  return result.release();
}

// clone(value, variables, as_tree=False) -> value
PyObject* CloneFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 3 && !CheckArity(nargs, 2, "clone")) return nullptr;
  Flattener walk(/*hash_statics=*/false);
  if (!walk.Add(args[0], Mode::kAttributes)) return nullptr;
  const bool as_tree = nargs == 3 && args[2] == Py_True;
  if (as_tree && !walk.is_tree()) Py_RETURN_NOTIMPLEMENTED;
  std::vector<PyObject*> leaves, origins, provided;
  for (const Ref& leaf : walk.leaves()) leaves.push_back(leaf.get());
  for (const Ref& object : walk.objects()) origins.push_back(object.get());
  if (args[1] != Py_True) {
    provided.resize(walk.nodes().size());
    for (size_t i = 0; i < walk.nodes().size(); ++i) {
      const Node& node = walk.nodes()[i];
      if (node.kind == NodeKind::kVariable) provided[i] = origins[node.index];
    }
  }
  Unflattener build(walk.nodes(), leaves.data(), nullptr,
                    static_cast<int32_t>(origins.size()));
  build.set_origins(origins.data());
  build.set_copy_boxes();
  if (!provided.empty()) build.set_provided(&provided);
  return build.Build().release();
}

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"merge", Fast(MergeFunction), METH_FASTCALL,
       "merge(structure, state, copy, keep_arrays[, seen, updated]): the "
       "value."},
      {"clone", Fast(CloneFunction), METH_FASTCALL,
       "clone(value, variables[, as_tree]): a copy, of the Variables too if "
       "True; with `as_tree` of a tree of pytrees alone, or NotImplemented."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitMerge(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::engine
