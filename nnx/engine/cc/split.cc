#include "nnx/engine/cc/split.h"

#include <unordered_map>
#include <utility>
#include <vector>

#include "nnx/engine/cc/arguments.h"
#include "nnx/engine/cc/flatten.h"
#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/path.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/selection.h"
#include "nnx/engine/cc/structure.h"

namespace nnx::engine {
namespace {

// What mappings hold of a node: the Variable, or the array that is in none.
PyObject* LeafOf(const Flattener& walk, const Node& node) {
  return node.kind == NodeKind::kVariable ? walk.objects()[node.index].get()
                                          : walk.leaves()[node.leaf].get();
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
      PyObject* leaf = LeafOf(walk_, root);
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
  bool Build(int32_t position, Mappings* mappings) {
    RecursionGuard guard;
    if (!guard.entered()) return false;
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
      PyObject* leaf = LeafOf(walk_, child_node);
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

// split(value, filters, exhaustive, as_pytree=False)
// split(value, filters, exhaustive, seen, updated)
//   -> (structure, [mapping, ...])
// `as_pytree`: outside of objects, whatever is no node is a leaf.
// `seen`: list of the objects that earlier splits met, to be continued.
// `updated`: list of objects; the structure says which of its nodes they are.
PyObject* SplitFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 5 && nargs != 4 && !CheckArity(nargs, 3, "split")) {
    return nullptr;
  }
  if (!CheckFilters(args[1])) return nullptr;
  Flattener walk(/*hash_statics=*/true);
  std::vector<Ref> seen, updated;
  if (nargs == 5) {
    if (!ObjectList(args[3], "seen", &seen) ||
        !ObjectList(args[4], "updated", &updated)) {
      return nullptr;
    }
    walk.Seed(seen);
  }
  const bool as_pytree = nargs == 4 && args[3] == Py_True;
  if (!walk.Add(args[0], as_pytree ? Mode::kPytree : Mode::kAttributes)) {
    return nullptr;
  }
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

// state(value, filters, as_tree=False) -> [mapping, ...]
PyObject* StateFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if ((nargs != 3 && !CheckArity(nargs, 2, "state")) ||
      !CheckFilters(args[1])) {
    return nullptr;
  }
  const bool as_tree = nargs == 3 && args[2] == Py_True;
  Flattener walk(/*hash_statics=*/false);
  if (!walk.Add(args[0], as_tree ? Mode::kPytree : Mode::kAttributes)) {
    return nullptr;
  }
  if (as_tree && !walk.is_tree()) Py_RETURN_NOTIMPLEMENTED;
  const Selector selector(args[1]);
  return MappingBuilder(walk, selector, /*exhaustive=*/false).Run().release();
}

// is_tree(value) -> bool
PyObject* IsTreeFunction(PyObject*, PyObject* value) {
  Flattener walk(/*hash_statics=*/false);
  if (!walk.Add(value, Mode::kAttributes)) return nullptr;
  return PyBool_FromLong(walk.is_tree());
}

// graphdef(value, as_pytree=False) -> structure
PyObject* GraphdefFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 && !CheckArity(nargs, 1, "graphdef")) return nullptr;
  const bool as_pytree = nargs == 2 && args[1] == Py_True;
  Flattener walk(/*hash_statics=*/true);
  if (!walk.Add(args[0], as_pytree ? Mode::kPytree : Mode::kAttributes)) {
    return nullptr;
  }
  return walk.Finish().release();
}

class Popper {
 public:
  Popper(const Flattener& walk, const Selector& selector)
      : walk_(walk),
        selector_(selector),
        popped_(walk.objects().size(), false) {}

  bool Select(int32_t position, Mappings* mappings) {
    RecursionGuard guard;
    if (!guard.entered()) return false;
    const Node& node = walk_.nodes()[position];
    int32_t child = position + 1;
    for (int32_t i = 0; i < node.children;
         ++i, child = walk_.nodes()[child].end) {
      const Node& child_node = walk_.nodes()[child];
      if (child_node.kind == NodeKind::kStatic) continue;
      Ref key = ChildKey(node, i);
      if (!key) return false;
      path_.push_back(key);
      if (child_node.kind == NodeKind::kVariable ||
          child_node.kind == NodeKind::kLeaf) {
        PyObject* leaf = LeafOf(walk_, child_node);
        const int number = selector_.Select(path_, leaf);
        if (number < 0) return false;
        if (number < selector_.size()) {
          if (child_node.index >= 0) popped_[child_node.index] = true;
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
      // Owned: a key that is compared in Python can assign to `__dict__`.
      const Ref dict = IsObject(owner.get())
                           ? Ref::Borrow(ObjectDict(AsObject(owner.get())))
                           : owner;
      if (!dict || PyDict_DelItem(dict.get(), key.get()) < 0) return false;
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
  if (!CheckArity(nargs, 2, "pop") || !CheckFilters(args[1])) return nullptr;
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

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"split", Fast(SplitFunction), METH_FASTCALL,
       "split(value, filters, exhaustive[, as_pytree]), or "
       "split(value, filters, exhaustive, seen, updated): (structure, "
       "mappings)."},
      {"state", Fast(StateFunction), METH_FASTCALL,
       "state(value, filters[, as_tree]): the mappings of the leaves "
       "selected; with `as_tree` as `split(..., as_pytree)` finds them in a "
       "tree of pytrees alone, or NotImplemented."},
      {"is_tree", IsTreeFunction, METH_O,
       "is_tree(value): whether it is a tree of pytrees for sure."},
      {"graphdef", Fast(GraphdefFunction), METH_FASTCALL,
       "graphdef(value[, as_pytree]): the structure that `split` returns."},
      {"pop", Fast(PopFunction), METH_FASTCALL,
       "pop(value, filters): removes Variables and arrays; their mappings."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitSplit(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::engine
