#include "nnx/graph/cc/state.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nnx/graph/cc/objects.h"
#include "nnx/graph/cc/runtime.h"
#include "nnx/graph/cc/structure.h"

namespace nnx::graph {
namespace {

// The key of a node's child.
Ref ChildKey(const Node& node, int32_t child) {
  if (node.keys) return Ref::Borrow(PyTuple_GET_ITEM(node.keys.get(), child));
  return Ref::Steal(PyLong_FromLong(child));
}

Ref PathTuple(const std::vector<Ref>& path) {
  Ref tuple = Ref::Steal(PyTuple_New(static_cast<Py_ssize_t>(path.size())));
  if (!tuple) return Ref();
  for (size_t i = 0; i < path.size(); ++i) {
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i),
                     Ref(path[i]).release());
  }
  return tuple;
}

// A path as the user would type it: `layers[0].kernel`.
std::string PathText(const std::vector<Ref>& path) {
  std::string text;
  for (const Ref& key : path) {
    const bool name = PyUnicode_Check(key.get());
    Ref part =
        Ref::Steal(name ? PyObject_Str(key.get()) : PyObject_Repr(key.get()));
    const char* utf8 = part ? PyUnicode_AsUTF8(part.get()) : nullptr;
    if (!utf8) PyErr_Clear();
    if (name && !text.empty()) text += '.';
    if (!name) text += '[';
    text += utf8 ? utf8 : "?";
    if (!name) text += ']';
  }
  return text.empty() ? "<root>" : text;
}

// Sorts leaves by the first filter that selects them. A filter is True
// (everything), a type, or a callable (path, leaf) -> bool.
class Selector {
 public:
  explicit Selector(PyObject* filters) : filters_(filters) {}
  int size() const { return static_cast<int>(PyTuple_GET_SIZE(filters_)); }
  // For a Variable, by the filters' types alone and without running Python
  // code: the number as below, or -1 where that does not decide.
  int SelectByType(PyObject* variable) const {
    for (int i = 0; i < size(); ++i) {
      PyObject* filter = PyTuple_GET_ITEM(filters_, i);
      if (filter == Py_True) return i;
      if (!PyType_Check(filter)) return -1;
      if (PyObject_TypeCheck(variable,
                             reinterpret_cast<PyTypeObject*>(filter))) {
        return i;
      }
    }
    return size();
  }
  // Number of the filter; `size()` for none, -1 for an error.
  int Select(const std::vector<Ref>& path, PyObject* leaf) const {
    for (int i = 0; i < size(); ++i) {
      PyObject* filter = PyTuple_GET_ITEM(filters_, i);
      if (filter == Py_True) return i;
      if (PyType_Check(filter)) {
        const int is =
            PyObject_TypeCheck(leaf, reinterpret_cast<PyTypeObject*>(filter))
                ? 1
            : IsVariable(leaf) ? 0
                               : PyObject_IsInstance(leaf, filter);
        if (is < 0) return -1;
        if (is) return i;
        continue;
      }
      Ref tuple = PathTuple(path);
      if (!tuple) return -1;
      Ref selected = Ref::Steal(
          PyObject_CallFunctionObjArgs(filter, tuple.get(), leaf, nullptr));
      if (!selected) return -1;
      const int is = PyObject_IsTrue(selected.get());
      if (is < 0) return -1;
      if (is) return i;
    }
    return size();
  }

 private:
  PyObject* filters_;
};

// One nested mapping a filter, each made when its first leaf comes.
using Mappings = std::vector<Ref>;

bool Insert(Mappings* mappings, int number, PyObject* key, PyObject* value) {
  Ref& mapping = (*mappings)[number];
  if (!mapping) mapping = Ref::Steal(PyDict_New());
  return mapping && PyDict_SetItem(mapping.get(), key, value) == 0;
}

bool InsertChildren(Mappings* mappings, PyObject* key,
                    const Mappings& children) {
  for (size_t i = 0; i < children.size(); ++i) {
    if (children[i] &&
        !Insert(mappings, static_cast<int>(i), key, children[i].get())) {
      return false;
    }
  }
  return true;
}

Ref ToList(Mappings* mappings) {
  Ref list = Ref::Steal(PyList_New(static_cast<Py_ssize_t>(mappings->size())));
  if (!list) return Ref();
  for (size_t i = 0; i < mappings->size(); ++i) {
    Ref& mapping = (*mappings)[i];
    if (!mapping) mapping = Ref::Steal(PyDict_New());
    if (!mapping) return Ref();
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), mapping.release());
  }
  return list;
}

void RaiseUnselected(const std::vector<Ref>& path, PyObject* leaf) {
  PyErr_Format(PyExc_ValueError,
               "Filters must cover every leaf, but none of them selects `%s` "
               "of type %s: add `...` as the last filter, or use the "
               "non-exhaustive `filter`.",
               PathText(path).c_str(), Py_TYPE(leaf)->tp_name);
}

// Nested mappings of the leaves that a walk has met.
class MappingBuilder {
 public:
  MappingBuilder(const Flattener& walk, const Selector& selector,
                 bool exhaustive)
      : walk_(walk), selector_(selector), exhaustive_(exhaustive) {}

  // A list with a nested mapping for each filter; of a value that is a Variable
  // or an array, with it in place of the mapping.
  Ref Run() {
    Mappings mappings(selector_.size());
    const Node& root = walk_.nodes()[0];
    if (root.kind == NodeKind::kVariable || root.kind == NodeKind::kLeaf) {
      PyObject* leaf = LeafOf(root);
      const int number = selector_.Select(path_, leaf);
      if (number < 0) return Ref();
      if (number < selector_.size()) {
        mappings[number] = Ref::Borrow(leaf);
      } else if (exhaustive_) {
        RaiseUnselected(path_, leaf);
        return Ref();
      }
    } else if (!Build(0, &mappings)) {
      return Ref();
    }
    return ToList(&mappings);
  }

 private:
  PyObject* LeafOf(const Node& node) {
    return node.kind == NodeKind::kVariable ? walk_.objects()[node.index].get()
                                            : walk_.leaves()[node.leaf].get();
  }

  bool Build(int32_t position, Mappings* mappings) {
    const Node& node = walk_.nodes()[position];
    int32_t child = position + 1;
    for (int32_t i = 0; i < node.children; ++i) {
      const Node& child_node = walk_.nodes()[child];
      if (!BuildChild(node, i, child, child_node, mappings)) return false;
      child = child_node.end;
    }
    return true;
  }

  bool BuildChild(const Node& node, int32_t i, int32_t child,
                  const Node& child_node, Mappings* mappings) {
    if (child_node.kind == NodeKind::kStatic ||
        child_node.kind == NodeKind::kRef) {
      return true;
    }
    path_.push_back(ChildKey(node, i));
    if (!path_.back()) return false;
    bool ok = true;
    if (child_node.kind == NodeKind::kVariable ||
        child_node.kind == NodeKind::kLeaf) {
      PyObject* leaf = LeafOf(child_node);
      const int number = selector_.Select(path_, leaf);
      if (number == selector_.size()) {
        if (exhaustive_) RaiseUnselected(path_, leaf);
        ok = !exhaustive_;
      } else {
        ok = number >= 0 && Insert(mappings, number, path_.back().get(), leaf);
      }
    } else if (child_node.children > 0) {
      Mappings children(mappings->size());
      ok = Build(child, &children) &&
           InsertChildren(mappings, path_.back().get(), children);
    }
    path_.pop_back();
    return ok;
  }

  const Flattener& walk_;
  const Selector& selector_;
  const bool exhaustive_;
  std::vector<Ref> path_;
};

bool ParseFilters(PyObject* filters) {
  if (PyTuple_Check(filters)) return true;
  PyErr_Format(PyExc_TypeError, "`filters` must be a tuple, but got %s.",
               Py_TYPE(filters)->tp_name);
  return false;
}

bool CheckArity(Py_ssize_t nargs, Py_ssize_t want, const char* name) {
  if (nargs == want) return true;
  PyErr_Format(PyExc_TypeError, "`%s` takes %zd arguments, but got %zd.", name,
               want, nargs);
  return false;
}

bool ObjectList(PyObject* value, const char* name, std::vector<Ref>* objects) {
  if (value == Py_None) return true;
  if (!PyList_Check(value)) {
    PyErr_Format(PyExc_TypeError, "`%s` must be a list or None, but got %s.",
                 name, Py_TYPE(value)->tp_name);
    return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i) {
    objects->push_back(Ref::Borrow(PyList_GET_ITEM(value, i)));
  }
  return true;
}

// Adds the objects that a walk has met first.
bool Extend(PyObject* list, const std::vector<Ref>& objects, size_t from) {
  for (size_t i = from; i < objects.size(); ++i) {
    PyObject* object = objects[i] ? objects[i].get() : Py_None;
    if (PyList_Append(list, object) < 0) return false;
  }
  return true;
}

// By object of a walk, its number among `updated`, or -1.
Ref UpdateNumbers(const std::vector<Ref>& objects,
                  const std::vector<Ref>& updated) {
  std::unordered_map<PyObject*, long> numbers;
  for (size_t i = 0; i < updated.size(); ++i) {
    numbers.emplace(updated[i].get(), static_cast<long>(i));
  }
  Ref tuple = Ref::Steal(PyTuple_New(static_cast<Py_ssize_t>(objects.size())));
  if (!tuple) return Ref();
  for (size_t i = 0; i < objects.size(); ++i) {
    const auto number = numbers.find(objects[i].get());
    PyObject* item =
        PyLong_FromLong(number == numbers.end() ? -1 : number->second);
    if (!item) return Ref();
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i), item);
  }
  return tuple;
}

// split(value, filters, exhaustive, seen=None, updated=None)
//   -> (structure, [mapping, ...])
// `seen`: list of the objects that earlier splits met, to be continued.
// `updated`: list of objects; the structure says which of its nodes they are.
PyObject* SplitFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 5 && !CheckArity(nargs, 3, "split")) return nullptr;
  if (!ParseFilters(args[1])) return nullptr;
  Flattener walk(/*hash_statics=*/true);
  std::vector<Ref> seen, updated;
  if (nargs == 5) {
    if (!ObjectList(args[3], "seen", &seen) ||
        !ObjectList(args[4], "updated", &updated)) {
      return nullptr;
    }
    walk.Seed(seen);
  }
  if (!walk.Add(args[0], Mode::kAttributes)) return nullptr;
  const Selector selector(args[1]);
  Ref list = MappingBuilder(walk, selector, args[2] == Py_True).Run();
  Ref structure = list ? walk.Finish() : Ref();
  if (!structure) return nullptr;
  if (nargs == 5 && args[4] != Py_None) {
    Ref numbers = UpdateNumbers(walk.objects(), updated);
    if (!numbers) return nullptr;
    AsStructure(structure.get())->updates = numbers.release();
  }
  if (nargs == 5 && args[3] != Py_None &&
      !Extend(args[3], walk.objects(), seen.size())) {
    return nullptr;
  }
  return PyTuple_Pack(2, structure.get(), list.get());
}

// state(value, filters) -> [mapping, ...]
PyObject* StateFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "state") || !ParseFilters(args[1])) return nullptr;
  Flattener walk(/*hash_statics=*/false);
  if (!walk.Add(args[0], Mode::kAttributes)) return nullptr;
  const Selector selector(args[1]);
  return MappingBuilder(walk, selector, /*exhaustive=*/false).Run().release();
}

// graphdef(value) -> structure
PyObject* GraphdefFunction(PyObject*, PyObject* value) {
  Flattener walk(/*hash_statics=*/true);
  if (!walk.Add(value, Mode::kAttributes)) return nullptr;
  return walk.Finish().release();
}

// --- merge

// The dict inside a mapping: a dict itself, or the inside of a State.
Ref AsMapping(PyObject* value) {
  if (PyDict_Check(value)) return Ref::Borrow(value);
  if (IsVariable(value)) return Ref();
  const Runtime& rt = GetRuntime();
  if (rt.state && PyType_IsSubtype(Py_TYPE(value), rt.state)) {
    return Ref::Steal(PyObject_GetAttr(value, rt.s_mapping));
  }
  return Ref();
}

bool HasLeaves(const std::vector<Node>& nodes, int32_t position) {
  for (int32_t i = position; i < nodes[position].end; ++i) {
    if (nodes[i].leaf >= 0 || nodes[i].kind == NodeKind::kVariable) return true;
  }
  return false;
}

// Finds the leaf of each node of a structure in a nested mapping.
class Provider {
 public:
  // `copy`: Variables are copied. `keep_arrays`: an array in place of a
  // Variable stays one.
  Provider(const Structure* structure, bool copy, bool keep_arrays)
      : nodes_(*structure->nodes),
        copy_(copy),
        keep_arrays_(keep_arrays),
        provided_(nodes_.size()) {}

  bool ProvideRoot(int32_t position, PyObject* value) {
    const Node& node = nodes_[position];
    if (node.kind == NodeKind::kVariable || node.kind == NodeKind::kLeaf) {
      return ProvideLeaf(position, value);
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
          if (!ProvideLeaf(i, value.get())) return false;
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

  bool ProvideLeaf(int32_t position, PyObject* value) {
    const Node& node = nodes_[position];
    if (node.kind == NodeKind::kLeaf) {
      if (IsVariable(value)) {
        PyErr_Format(PyExc_ValueError,
                     "The state must hold an array at `%s`, as the graph does, "
                     "but got a Variable of type %s.",
                     PathText(path_).c_str(), Py_TYPE(value)->tp_name);
        return false;
      }
      provided_[position] = Ref::Borrow(value);
      return true;
    }
    auto* type = reinterpret_cast<PyTypeObject*>(node.type.get());
    if (!IsVariable(value) && keep_arrays_) {
      provided_[position] = Ref::Borrow(value);
    } else if (!IsVariable(value)) {
      provided_[position] =
          NewVariable(type, value, node.aux.get(), node.hook_flags, nullptr);
    } else if (copy_) {
      VariableObject* source = AsVariable(value);
      provided_[position] =
          NewVariable(Py_TYPE(value), source->raw, source->metadata,
                      source->hook_flags, source);
    } else {
      provided_[position] = Ref::Borrow(value);
    }
    return static_cast<bool>(provided_[position]);
  }

  // `used` counts the keys of `mapping` that a node asked for.
  bool Provide(int32_t position, PyObject* mapping, Py_ssize_t* used) {
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
    PyObject* value = PyDict_GetItemWithError(mapping, path_.back().get());
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
      return ProvideLeaf(child, value);
    }
    Ref inner = AsMapping(value);
    if (!inner) return RaiseMapping(value);
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
  const bool copy_;
  const bool keep_arrays_;
  std::vector<Ref> provided_;
  std::vector<Ref> path_;
};

// Whether the objects to update are what the structure has in their place.
bool CheckReuse(const Structure& structure,
                const std::vector<PyObject*>& reuse) {
  for (const Node& node : *structure.nodes) {
    if (node.kind == NodeKind::kRef || node.index < 0) continue;
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

// merge(structure, state, flags, seen=None, updated=None) -> value
// `flags`: 1 copies the Variables, 2 keeps arrays in place of Variables.
// `seen`: list of the objects that earlier merges made, to be continued.
// `updated`: list of the objects that the structure says it updates.
PyObject* MergeFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 5 && !CheckArity(nargs, 3, "merge")) return nullptr;
  if (!PyObject_TypeCheck(args[0], g_structure_type)) {
    PyErr_Format(PyExc_TypeError,
                 "`graphdef` must be a graph structure (from nnx.split or "
                 "nnx.graphdef), but got %s.",
                 Py_TYPE(args[0])->tp_name);
    return nullptr;
  }
  const Structure* structure = AsStructure(args[0]);
  if (structure->num_roots != 1) {
    PyErr_SetString(PyExc_ValueError,
                    "`graphdef` must describe one value; this one describes "
                    "the arguments of a function.");
    return nullptr;
  }
  std::vector<Ref> seen, updated;
  if (nargs == 5 && (!ObjectList(args[3], "seen", &seen) ||
                     !ObjectList(args[4], "updated", &updated))) {
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
  const long flags = PyLong_AsLong(args[2]);
  if (flags == -1 && PyErr_Occurred()) return nullptr;
  Provider provider(structure, flags & 1, flags & 2);
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
  if (!result) return nullptr;
  if (nargs == 5 && args[3] != Py_None &&
      !Extend(args[3], build.objects(), structure->num_outer)) {
    return nullptr;
  }
  return result.release();
}

// clone(value, variables) -> value
PyObject* CloneFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "clone")) return nullptr;
  Flattener walk(/*hash_statics=*/false);
  if (!walk.Add(args[0], Mode::kAttributes)) return nullptr;
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
  if (!provided.empty()) build.set_provided(&provided);
  return build.Build().release();
}

// --- update

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

// --- pop

class Popper {
 public:
  Popper(const Flattener& walk, const Selector& selector)
      : walk_(walk),
        selector_(selector),
        popped_(walk.objects().size(), false) {}

  bool Select(int32_t position, Mappings* mappings) {
    const Node& node = walk_.nodes()[position];
    int32_t child = position + 1;
    for (int32_t i = 0; i < node.children;
         ++i, child = walk_.nodes()[child].end) {
      const Node& child_node = walk_.nodes()[child];
      if (child_node.kind == NodeKind::kStatic) continue;
      Ref key = ChildKey(node, i);
      if (!key) return false;
      path_.push_back(key);
      if (child_node.kind == NodeKind::kVariable) {
        PyObject* leaf = walk_.objects()[child_node.index].get();
        const int number = selector_.Select(path_, leaf);
        if (number < 0) return false;
        if (number < selector_.size()) {
          popped_[child_node.index] = true;
          if (!Insert(mappings, number, key.get(), leaf) ||
              !Remove(node, key)) {
            return false;
          }
        }
      } else if (child_node.kind == NodeKind::kRef) {
        if (popped_[child_node.index] && !Remove(node, key)) return false;
      } else if (child_node.children > 0) {
        Mappings children(mappings->size());
        if (!Select(child, &children) ||
            !InsertChildren(mappings, key.get(), children)) {
          return false;
        }
      }
      path_.pop_back();
    }
    return true;
  }

  bool Run() {
    for (const auto& [owner, key] : removals_) {
      if (IsObject(owner.get()) && !CheckCanUpdate(owner.get())) return false;
    }
    for (const auto& [owner, key] : removals_) {
      const TypeInfo* info = GetTypeInfo(Py_TYPE(owner.get()));
      if (!info) return false;
      if (info->kind == TypeKind::kCustom) {
        Ref pop_key = info->custom->pop_key;
        if (!Ref::Steal(PyObject_CallFunctionObjArgs(pop_key.get(), owner.get(),
                                                     key.get(), nullptr))) {
          return false;
        }
        continue;
      }
      PyObject* dict = IsObject(owner.get()) ? ObjectDict(AsObject(owner.get()))
                                             : owner.get();
      if (!dict || PyDict_DelItem(dict, key.get()) < 0) return false;
    }
    return true;
  }

 private:
  bool Remove(const Node& owner, const Ref& key) {
    if (owner.index >= 0 &&
        (owner.kind == NodeKind::kObject || owner.kind == NodeKind::kDict ||
         owner.kind == NodeKind::kCustom)) {
      removals_.emplace_back(walk_.objects()[owner.index], key);
      return true;
    }
    PyErr_Format(PyExc_ValueError,
                 "Only attributes and dict items can be popped, but `%s` is in "
                 "a sequence, whose other items would change places.",
                 PathText(path_).c_str());
    return false;
  }

  const Flattener& walk_;
  const Selector& selector_;
  std::vector<bool> popped_;
  std::vector<Ref> path_;
  std::vector<std::pair<Ref, Ref>> removals_;
};

// pop(value, filters) -> [mapping, ...]
PyObject* PopFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "pop") || !ParseFilters(args[1])) return nullptr;
  Flattener walk(/*hash_statics=*/false);
  if (!walk.Add(args[0], Mode::kAttributes)) return nullptr;
  if (IsVariable(args[0])) {
    PyErr_SetString(PyExc_ValueError,
                    "`node` must hold the Variables to pop, but it is one.");
    return nullptr;
  }
  const Selector selector(args[1]);
  Mappings mappings(selector.size());
  Popper popper(walk, selector);
  if (!popper.Select(0, &mappings) || !popper.Run()) return nullptr;
  return ToList(&mappings).release();
}

// --- nested mappings alone

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
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(mapping, &position, &key, &value)) {
      path_.push_back(Ref::Borrow(key));
      Ref held = Ref::Borrow(value);
      Ref inner = AsMapping(value);
      if (PyErr_Occurred()) return false;
      if (inner) {
        Mappings children(mappings->size());
        if (!Split(inner.get(), &children) ||
            !InsertChildren(mappings, path_.back().get(), children)) {
          return false;
        }
      } else {
        const int number = selector_.Select(path_, value);
        if (number < 0) return false;
        if (number < selector_.size()) {
          if (!Insert(mappings, number, path_.back().get(), value)) {
            return false;
          }
        } else if (exhaustive_) {
          RaiseUnselected(path_, value);
          return false;
        }
      }
      path_.pop_back();
    }
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
};

// split_mapping(mapping, filters, exhaustive) -> [mapping, ...]
PyObject* SplitMappingFunction(PyObject*, PyObject* const* args,
                               Py_ssize_t nargs) {
  if (!CheckArity(nargs, 3, "split_mapping") || !ParseFilters(args[1])) {
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

// `path` is that of `target`.
bool MergeInto(PyObject* target, PyObject* source, std::vector<Ref>* path) {
  RecursionGuard guard;
  if (!guard.entered()) return false;
  PyObject *key_item, *value_item;
  Py_ssize_t position = 0;
  while (PyDict_Next(source, &position, &key_item, &value_item)) {
    path->push_back(Ref::Borrow(key_item));
    PyObject* key = path->back().get();
    Ref value = Ref::Borrow(value_item);
    Ref inner = AsMapping(value.get());
    if (!inner && PyErr_Occurred()) return false;
    Ref existing = Ref::Borrow(PyDict_GetItemWithError(target, key));
    if (!existing && PyErr_Occurred()) return false;
    if (existing &&
        PyDict_CheckExact(existing.get()) != static_cast<bool>(inner)) {
      RaiseThroughLeaf(*path);
      return false;
    }
    if (!inner) {
      if (PyDict_SetItem(target, key, value.get()) < 0) return false;
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
      if (!MergeInto(existing.get(), inner.get(), path)) return false;
    }
    path->pop_back();
  }
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
    std::vector<Ref> path;
    if (!MergeInto(target.get(), mapping.get(), &path)) return nullptr;
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

// --- looking at nodes from Python

// items(value) -> [(key, child), ...] in canonical order; None for a leaf
PyObject* ItemsFunction(PyObject*, PyObject* value) {
  Ref keys;
  std::vector<Ref> children;
  const int opened = OpenNode(value, &keys, &children);
  if (opened < 0) return nullptr;
  if (!opened) Py_RETURN_NONE;
  Ref items = Ref::Steal(PyList_New(static_cast<Py_ssize_t>(children.size())));
  if (!items) return nullptr;
  for (size_t i = 0; i < children.size(); ++i) {
    const auto position = static_cast<Py_ssize_t>(i);
    Ref key = keys ? Ref::Borrow(PyTuple_GET_ITEM(keys.get(), position))
                   : Ref::Steal(PyLong_FromSsize_t(position));
    PyObject* item =
        key ? PyTuple_Pack(2, key.get(), children[i].get()) : nullptr;
    if (!item) return nullptr;
    PyList_SET_ITEM(items.get(), position, item);
  }
  return items.release();
}

// set_item(custom node, key, child): as registered
PyObject* SetItemFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 3, "set_item")) return nullptr;
  TypeInfo* info = GetTypeInfo(Py_TYPE(args[0]));
  if (!info) return nullptr;
  if (info->kind != TypeKind::kCustom) {
    PyErr_Format(PyExc_TypeError,
                 "`node` must be of a registered type, but got "
                 "%s.",
                 Py_TYPE(args[0])->tp_name);
    return nullptr;
  }
  Ref set_key = info->custom->set_key;
  return PyObject_CallFunctionObjArgs(set_key.get(), args[0], args[1], args[2],
                                      nullptr);
}

// is_custom_node(value) -> whether its type was registered
PyObject* IsCustomNodeFunction(PyObject*, PyObject* value) {
  TypeInfo* info = GetTypeInfo(Py_TYPE(value));
  return info ? PyBool_FromLong(info->kind == TypeKind::kCustom) : nullptr;
}

// --- pytree functions

// Metadata in a form that compares and hashes: pairs by name.
Ref MetadataKey(PyObject* metadata) {
  if (PyDict_GET_SIZE(metadata) == 0) return Ref::Steal(PyTuple_New(0));
  Ref items = Ref::Steal(PyDict_Items(metadata));
  if (!items || PyList_Sort(items.get()) < 0) {
    // Pairs with one name never compare their values; names are strings.
    return Ref();
  }
  return Ref::Steal(PyList_AsTuple(items.get()));
}

// variable_flatten(variable) -> ((raw_value,), metadata)
PyObject* VariableFlatten(PyObject*, PyObject* self) {
  if (!IsVariable(self)) {
    PyErr_SetString(PyExc_TypeError, "`variable` must be a Variable.");
    return nullptr;
  }
  Ref children = Ref::Steal(PyTuple_Pack(1, AsVariable(self)->raw));
  Ref metadata = MetadataKey(AsVariable(self)->metadata);
  if (!children || !metadata) return nullptr;
  return PyTuple_Pack(2, children.get(), metadata.get());
}

// Bound to a class by `make_variable_unflatten`: (metadata, children) -> it.
PyObject* VariableUnflatten(PyObject* cls, PyObject* const* args,
                            Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "unflatten")) return nullptr;
  Ref children = Ref::Steal(PySequence_Tuple(args[1]));
  if (!children) return nullptr;
  if (!PyTuple_Check(args[0]) || PyTuple_GET_SIZE(children.get()) != 1) {
    PyErr_SetString(PyExc_ValueError,
                    "A Variable has one child, its value, and a tuple of "
                    "metadata.");
    return nullptr;
  }
  Ref metadata;
  if (PyTuple_GET_SIZE(args[0]) > 0) {
    metadata = Ref::Steal(PyDict_New());
    if (!metadata || PyDict_MergeFromSeq2(metadata.get(), args[0], 1) < 0) {
      return nullptr;
    }
  }
  auto* type = reinterpret_cast<PyTypeObject*>(cls);
  Ref self = NewVariable(type, PyTuple_GET_ITEM(children.get(), 0),
                         metadata.get(), ClassHookFlags(type), nullptr);
  // Metadata may carry hooks: Python knows their names.
  if (self && metadata &&
      !Ref::Steal(PyObject_CallMethodNoArgs(
          self.get(), GetRuntime().s_update_hook_flags))) {
    return nullptr;
  }
  return self.release();
}

PyMethodDef variable_unflatten_def = {
    "variable_unflatten", reinterpret_cast<PyCFunction>(VariableUnflatten),
    METH_FASTCALL, nullptr};

PyObject* MakeVariableUnflatten(PyObject*, PyObject* cls) {
  if (!PyType_Check(cls) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(cls),
                        g_variable_base)) {
    PyErr_SetString(PyExc_TypeError, "`cls` must be a Variable type.");
    return nullptr;
  }
  return PyCFunction_New(&variable_unflatten_def, cls);
}

// object_flatten(object) -> (children, (names, statics, values, status)):
// attributes that hold data are children, the rest is static.
PyObject* ObjectFlatten(PyObject*, PyObject* self) {
  if (!IsObject(self)) {
    PyErr_SetString(PyExc_TypeError, "`object` must be a Pytree.");
    return nullptr;
  }
  ObjectObject* object = AsObject(self);
  TypeInfo* info = GetTypeInfo(Py_TYPE(self));
  PyObject* dict = ObjectDict(object);
  if (!info || !dict) return nullptr;
  std::vector<PyObject*> arena;
  Layout* layout = FindLayout(info, dict, &arena);
  if (!layout) return nullptr;
  Ref keys = layout->keys;
  std::vector<Ref> values;
  for (PyObject* value : arena) values.push_back(Ref::Borrow(value));
  Ref children = Ref::Steal(PyList_New(0));
  Ref names = Ref::Steal(PyList_New(0));
  Ref statics = Ref::Steal(PyList_New(0));
  Ref static_values = Ref::Steal(PyList_New(0));
  Ref status;
  if (object->status && PyDict_GET_SIZE(object->status) > 0) {
    status = MetadataKey(object->status);
  } else {
    status = Ref::Steal(PyTuple_New(0));
  }
  if (!children || !names || !statics || !static_values || !status) {
    return nullptr;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* key = PyTuple_GET_ITEM(keys.get(), static_cast<Py_ssize_t>(i));
    PyObject* marked =
        object->status ? PyDict_GetItemWithError(object->status, key) : nullptr;
    const int data = marked ? marked == Py_True : HoldsData(values[i].get());
    if (data < 0) return nullptr;
    if (PyList_Append(data ? names.get() : statics.get(), key) < 0 ||
        PyList_Append(data ? children.get() : static_values.get(),
                      values[i].get()) < 0) {
      return nullptr;
    }
  }
  Ref parts[4] = {Ref::Steal(PyList_AsTuple(children.get())),
                  Ref::Steal(PyList_AsTuple(names.get())),
                  Ref::Steal(PyList_AsTuple(statics.get())),
                  Ref::Steal(PyList_AsTuple(static_values.get()))};
  for (const Ref& part : parts) {
    if (!part) return nullptr;
  }
  return Py_BuildValue("(O(OOOO))", parts[0].get(), parts[1].get(),
                       parts[2].get(), parts[3].get(), status.get());
}

PyObject* ObjectUnflatten(PyObject* cls, PyObject* const* args,
                          Py_ssize_t nargs) {
  if (!CheckArity(nargs, 2, "unflatten")) return nullptr;
  PyObject *names, *statics, *static_values, *status_items;
  if (!PyTuple_Check(args[0]) ||
      !PyArg_ParseTuple(args[0], "O!O!O!O!", &PyTuple_Type, &names,
                        &PyTuple_Type, &statics, &PyTuple_Type, &static_values,
                        &PyTuple_Type, &status_items)) {
    return nullptr;
  }
  Ref children = Ref::Steal(PySequence_Tuple(args[1]));
  if (!children) return nullptr;
  if (PyTuple_GET_SIZE(children.get()) != PyTuple_GET_SIZE(names)) {
    PyErr_Format(PyExc_ValueError,
                 "`children` must have %zd items, but got "
                 "%zd.",
                 PyTuple_GET_SIZE(names), PyTuple_GET_SIZE(children.get()));
    return nullptr;
  }
  Ref status;
  if (PyTuple_GET_SIZE(status_items) > 0) {
    status = Ref::Steal(PyDict_New());
    if (!status || PyDict_MergeFromSeq2(status.get(), status_items, 1) < 0) {
      return nullptr;
    }
  }
  Ref self =
      NewObject(reinterpret_cast<PyTypeObject*>(cls), status.get(), nullptr);
  if (!self) return nullptr;
  PyObject* dict = ObjectDict(AsObject(self.get()));
  if (!dict) return nullptr;
  auto fill = [dict](PyObject* keys, PyObject* values) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keys); ++i) {
      if (PyDict_SetItem(dict, PyTuple_GET_ITEM(keys, i),
                         PyTuple_GET_ITEM(values, i)) < 0) {
        return false;
      }
    }
    return true;
  };
  if (!fill(names, children.get()) || !fill(statics, static_values)) {
    return nullptr;
  }
  return self.release();
}

PyMethodDef object_unflatten_def = {
    "object_unflatten", reinterpret_cast<PyCFunction>(ObjectUnflatten),
    METH_FASTCALL, nullptr};

PyObject* MakeObjectUnflatten(PyObject*, PyObject* cls) {
  if (!PyType_Check(cls) ||
      !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(cls), g_object_base)) {
    PyErr_SetString(PyExc_TypeError, "`cls` must be a Pytree type.");
    return nullptr;
  }
  return PyCFunction_New(&object_unflatten_def, cls);
}

// state_flatten(state) -> (values, keys), in canonical order
PyObject* StateFlatten(PyObject*, PyObject* state) {
  Ref mapping = AsMapping(state);
  if (!mapping) return nullptr;
  Ref keys = CanonicalKeys(mapping.get());
  if (!keys) return nullptr;
  const Py_ssize_t size = PyTuple_GET_SIZE(keys.get());
  Ref values = Ref::Steal(PyTuple_New(size));
  if (!values) return nullptr;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* value =
        PyDict_GetItemWithError(mapping.get(), PyTuple_GET_ITEM(keys.get(), i));
    if (!value) return nullptr;
    Py_INCREF(value);
    PyTuple_SET_ITEM(values.get(), i, value);
  }
  return PyTuple_Pack(2, values.get(), keys.get());
}

// forget_type(type): classifies it anew when it is next met.
PyObject* ForgetTypeFunction(PyObject*, PyObject* type) {
  ForgetType(reinterpret_cast<PyTypeObject*>(type));
  Py_RETURN_NONE;
}

PyObject* HoldsDataFunction(PyObject*, PyObject* value) {
  const int holds = HoldsData(value);
  return holds < 0 ? nullptr : PyBool_FromLong(holds);
}

// register_node_type(type, flatten, set_key, pop_key, create_empty, clear,
//                    init)
PyObject* RegisterNodeTypeFunction(PyObject*, PyObject* const* args,
                                   Py_ssize_t nargs) {
  if (!CheckArity(nargs, 7, "register_node_type")) return nullptr;
  if (!PyType_Check(args[0])) {
    PyErr_Format(PyExc_TypeError, "`type` must be a class, but got %R.",
                 args[0]);
    return nullptr;
  }
  CustomNode node;
  node.flatten = Ref::Borrow(args[1]);
  node.set_key = Ref::Borrow(args[2]);
  node.pop_key = Ref::Borrow(args[3]);
  node.create_empty = Ref::Borrow(args[4]);
  node.clear = Ref::Borrow(args[5]);
  node.init = Ref::Borrow(args[6]);
  if (!RegisterCustomNode(reinterpret_cast<PyTypeObject*>(args[0]),
                          std::move(node))) {
    return nullptr;
  }
  Py_RETURN_NONE;
}

template <typename F>
PyCFunction Fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"split", Fast(SplitFunction), METH_FASTCALL,
       "split(value, filters, exhaustive[, seen, updated]): (structure, "
       "mappings)."},
      {"state", Fast(StateFunction), METH_FASTCALL,
       "state(value, filters): the mappings of the leaves selected."},
      {"graphdef", GraphdefFunction, METH_O, "graphdef(value): structure."},
      {"merge", Fast(MergeFunction), METH_FASTCALL,
       "merge(structure, state, flags[, seen, updated]): the value."},
      {"clone", Fast(CloneFunction), METH_FASTCALL,
       "clone(value, variables): a copy, of the Variables too if True."},
      {"update", Fast(UpdateFunction), METH_FASTCALL,
       "update(value, state): writes a state into a graph, or nothing of it."},
      {"pop", Fast(PopFunction), METH_FASTCALL,
       "pop(value, filters): removes Variables; their mappings."},
      {"split_mapping", Fast(SplitMappingFunction), METH_FASTCALL,
       "split_mapping(mapping, filters, exhaustive): mappings."},
      {"merge_mappings", Fast(MergeMappingsFunction), METH_FASTCALL,
       "merge_mappings(*mappings): one mapping; a later one wins."},
      {"flatten_mapping", FlattenMappingFunction, METH_O,
       "flatten_mapping(mapping): (paths, leaves) in canonical order."},
      {"variable_flatten", VariableFlatten, METH_O,
       "Pytree flattening of a Variable."},
      {"make_variable_unflatten", MakeVariableUnflatten, METH_O,
       "Pytree unflattening for a Variable type."},
      {"object_flatten", ObjectFlatten, METH_O,
       "Pytree flattening of a Pytree object."},
      {"make_object_unflatten", MakeObjectUnflatten, METH_O,
       "Pytree unflattening for a Pytree type."},
      {"state_flatten", StateFlatten, METH_O, "Pytree flattening of a State."},
      {"holds_data", HoldsDataFunction, METH_O,
       "Whether a value holds a Variable, Module or array anywhere."},
      {"forget_type", ForgetTypeFunction, METH_O,
       "forget_type(type): its instances are classified anew."},
      {"register_node_type", Fast(RegisterNodeTypeFunction), METH_FASTCALL,
       "register_node_type(type, flatten, set_key, pop_key, create_empty, "
       "clear, init)."},
      {"items", ItemsFunction, METH_O,
       "items(value): [(key, child), ...] in canonical order, None for a "
       "leaf."},
      {"set_item", Fast(SetItemFunction), METH_FASTCALL,
       "set_item(node, key, child): of a node whose type was registered."},
      {"is_custom_node", IsCustomNodeFunction, METH_O,
       "is_custom_node(value): whether its type was registered."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitState(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::graph
