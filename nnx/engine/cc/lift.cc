#include "nnx/engine/cc/lift.h"

#include <unordered_map>

#include "nnx/engine/cc/flatten.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/unflatten.h"

namespace nnx::engine {

std::vector<int32_t> TopNodes(const Structure* structure) {
  std::vector<int32_t> tops;
  const std::vector<Node>& nodes = *structure->nodes;
  for (int32_t i = 0; i < static_cast<int32_t>(nodes.size());) {
    if (nodes[i].index >= 0 && nodes[i].kind != NodeKind::kRef) {
      tops.push_back(i);
      i = nodes[i].end;
    } else {
      ++i;
    }
  }
  return tops;
}

namespace {

// Whether an object can be written to as the node says.
bool IsOfKind(const Node& node, PyObject* object) {
  switch (node.kind) {
    case NodeKind::kVariable:
      return IsVariable(object);
    case NodeKind::kObject:
      return IsObject(object);
    case NodeKind::kList:
      return PyList_CheckExact(object);
    case NodeKind::kDict:
      return PyDict_CheckExact(object);
    default:
      return true;
  }
}

// Whether nothing but leaves differs between the copies now and then, and if
// so, the Variables whose leaf was replaced. 1, 0, -1.
int FindWrites(const Structure* before, const std::vector<int32_t>& tops,
               PyObject* const* objects, PyObject* const* leaves,
               const Flattener& after, Plan::Data* data) {
  for (int32_t i = 0; i < before->num_indices; ++i) {
    if (i >= static_cast<int32_t>(after.objects().size()) ||
        after.objects()[i].get() != objects[i]) {
      return 0;
    }
  }
  for (size_t i = 0; i < tops.size(); ++i) {
    const int equal =
        SubtreesEqual(*before->nodes, tops[i], after.nodes(), after.roots()[i]);
    if (equal != 1) return equal;
  }
  for (size_t i = 0; i < tops.size(); ++i) {
    const int32_t size = (*before->nodes)[tops[i]].end - tops[i];
    for (int32_t k = 0; k < size; ++k) {
      const Node& old_node = (*before->nodes)[tops[i] + k];
      const Node& new_node = after.nodes()[after.roots()[i] + k];
      if (old_node.leaf < 0) continue;
      data->matches[new_node.leaf] = old_node.leaf;
      if (after.leaves()[new_node.leaf].get() == leaves[old_node.leaf]) {
        data->output_of[new_node.leaf] = -1;
      } else if (old_node.kind == NodeKind::kVariable) {
        data->writes.emplace_back(old_node.index, data->num_outputs);
        data->output_of[new_node.leaf] = data->num_outputs++;
      } else {
        return 0;  // an array inside a container: rebuilt by the general way
      }
    }
  }
  return 1;
}

// Finds out which input leaf each leaf stands in the place of, where more than
// values changed. A node with an identity is found by it; any other by its key
// in its parent.
class LeafMatcher {
 public:
  LeafMatcher(const Structure* before, const Flattener& after, Plan::Data* data)
      : before_(*before->nodes),
        after_(after.nodes()),
        data_(data),
        position_of_(before->num_indices, -1) {
    for (size_t i = 0; i < before_.size(); ++i) {
      if (before_[i].index >= 0 && before_[i].kind != NodeKind::kRef) {
        position_of_[before_[i].index] = static_cast<int32_t>(i);
      }
    }
  }

  // `old_position`: -1 if there was nothing in this place.
  bool Match(int32_t position, int32_t old_position) {
    RecursionGuard guard;
    if (!guard.entered()) return false;
    const Node& node = after_[position];
    if (node.kind == NodeKind::kRef) return true;
    if (node.index >= 0) {
      const int32_t origin = data_->origin[node.index];
      old_position = origin < 0 ? -1 : position_of_[origin];
    } else if (old_position >= 0 && before_[old_position].kind != node.kind) {
      old_position = -1;
    }
    if (node.leaf >= 0 && old_position >= 0) {
      data_->matches[node.leaf] = before_[old_position].leaf;
    }
    int32_t child = position + 1;
    for (int32_t i = 0; i < node.children; ++i) {
      int32_t old_child = -1;
      if (old_position >= 0 && !Child(node, i, old_position, &old_child)) {
        return false;
      }
      if (!Match(child, old_child)) return false;
      child = after_[child].end;
    }
    return true;
  }

 private:
  // The old node in the place of the i-th child. False with an error set.
  bool Child(const Node& node, int32_t i, int32_t old_position,
             int32_t* found) const {
    const Node& old_node = before_[old_position];
    int32_t wanted = i;
    if (node.keys && old_node.keys) {
      PyObject* key = PyTuple_GET_ITEM(node.keys.get(), i);
      if (i >= old_node.children ||
          PyTuple_GET_ITEM(old_node.keys.get(), i) != key) {
        wanted = -1;
        for (int32_t k = 0; k < old_node.children && wanted < 0; ++k) {
          const int equal = PyObject_RichCompareBool(
              PyTuple_GET_ITEM(old_node.keys.get(), k), key, Py_EQ);
          if (equal < 0) return false;
          if (equal) wanted = k;
        }
      }
    }
    *found = -1;
    if (wanted < 0 || wanted >= old_node.children) return true;
    *found = old_position + 1;
    for (int32_t k = 0; k < wanted; ++k) *found = before_[*found].end;
    return true;
  }

  const std::vector<Node>& before_;
  const std::vector<Node>& after_;
  Plan::Data* data_;
  std::vector<int32_t> position_of_;
};

// Whether a leaf is in a box that the function has made. No transformation of
// jax lets one out: its value is, and gets a new box outside.
bool IsNewBox(const Node& node, const Plan::Data& data) {
  if (node.index < 0 || data.origin[node.index] >= 0) return false;
  return node.kind == NodeKind::kLeaf || (node.hook_flags & kBoxed);
}

}  // namespace

bool CheckObjects(const Structure* structure, PyObject* const* objects,
                  size_t count, const std::vector<int32_t>* origin) {
  for (const Node& node : *structure->nodes) {
    if (node.index < 0 || node.kind == NodeKind::kRef) continue;
    const int32_t number = origin ? (*origin)[node.index] : node.index;
    if (number < 0) continue;
    if (static_cast<size_t>(number) >= count ||
        !IsOfKind(node, objects[number])) {
      PyErr_SetString(PyExc_ValueError,
                      "`objects` must be those of the structure, but one is "
                      "missing or of another kind.");
      return false;
    }
  }
  return true;
}

bool CheckApplies(PyObject* plan, PyObject* const* objects, size_t num_objects,
                  size_t num_leaves) {
  const Plan::Data& data = PlanData(plan);
  for (size_t i = 0; i < data.output_of.size(); ++i) {
    if (data.output_of[i] < 0 &&
        static_cast<size_t>(data.matches[i]) >= num_leaves) {
      PyErr_SetString(PyExc_ValueError,
                      "`leaves` must be those that were packed, but some are "
                      "missing.");
      return false;
    }
  }
  return CheckObjects(AsStructure(data.structure.get()), objects, num_objects,
                      &data.origin);
}

Ref Pack(const Structure* before, const std::vector<int32_t>& tops,
         PyObject* const* objects, PyObject* const* leaves, PyObject* result,
         PyObject* const* given) {
  Flattener after(/*hash_statics=*/true);
  Former former = {*before->nodes, objects, given,
                   std::vector<int32_t>(before->num_indices, -1)};
  for (int32_t top : tops) {
    PyObject* object = objects[(*before->nodes)[top].index];
    if (!(given ? after.AddFormer(&former, top)
                : after.Add(object, Mode::kAttributes))) {
      return Ref();
    }
  }
  const auto argument_leaves = static_cast<int32_t>(after.leaves().size());
  if (!after.Add(result, Mode::kPytree)) return Ref();

  Ref plan_object = Ref::Steal(g_plan_type->tp_alloc(g_plan_type, 0));
  if (!plan_object) return Ref();
  auto* data = new Plan::Data();
  reinterpret_cast<Plan*>(plan_object.get())->data = data;
  data->structure = after.Finish();
  if (!data->structure) return Ref();
  const auto num_leaves = static_cast<int32_t>(after.leaves().size());
  data->output_of.assign(num_leaves, 0);
  data->matches.assign(argument_leaves, -1);

  data->origin.assign(after.objects().size(), -1);
  if (given) {
    for (int32_t i = 0; i < before->num_indices; ++i) {
      const int32_t index = former.index_of[i];
      if (index >= 0) data->origin[index] = i;
    }
  } else {
    std::unordered_map<PyObject*, int32_t> originals;
    for (int32_t i = 0; i < before->num_indices; ++i) {
      originals.emplace(objects[i], i);
    }
    for (size_t i = 0; i < data->origin.size(); ++i) {
      const auto original = originals.find(after.objects()[i].get());
      if (original != originals.end()) data->origin[i] = original->second;
    }
  }

  const int values_only =
      FindWrites(before, tops, objects, leaves, after, data);
  if (values_only < 0) return Ref();
  data->values_only = values_only == 1;
  if (!data->values_only) {
    data->writes.clear();
    data->num_outputs = 0;
    data->matches.assign(argument_leaves, -1);
    LeafMatcher matcher(before, after, data);
    for (size_t i = 0; i < tops.size(); ++i) {
      if (!matcher.Match(after.roots()[i], tops[i])) return Ref();
    }
    // An input that now stands in another place goes through the
    // transformation: there it may be mapped or carried in another way.
    for (int32_t i = 0; i < argument_leaves; ++i) {
      const int32_t input = data->matches[i];
      const bool unchanged =
          input >= 0 && leaves[input] == after.leaves()[i].get();
      data->output_of[i] = unchanged ? -1 : data->num_outputs++;
    }
  }
  // The result always goes through the transformation, which may treat results
  // in another way than state.
  for (int32_t i = argument_leaves; i < num_leaves; ++i) {
    data->output_of[i] = data->num_outputs++;
  }

  data->result_position = after.roots().back();
  for (size_t i = data->result_position; i < after.nodes().size(); ++i) {
    const Node& node = after.nodes()[i];
    if (node.index < 0) continue;
    data->result_has_nodes = true;
    if (data->origin[node.index] >= 0) data->result_refs.push_back(node.index);
  }

  Ref outputs = Ref::Steal(PyTuple_New(data->num_outputs));
  Ref packed = Ref::Steal(g_packed_type->tp_alloc(g_packed_type, 0));
  if (!outputs || !packed) return Ref();
  for (int32_t i = 0; i < num_leaves; ++i) {
    if (data->output_of[i] < 0) continue;
    Ref leaf = after.leaves()[i];
    if (IsNewBox(after.nodes()[after.leaf_nodes()[i]], *data)) {
      leaf = Ref::Steal(PyObject_CallOneArg(GetRuntime().unboxed, leaf.get()));
      if (!leaf) return Ref();
    }
    PyTuple_SET_ITEM(outputs.get(), data->output_of[i], leaf.release());
  }
  auto* self = reinterpret_cast<Packed*>(packed.get());
  self->plan = plan_object.release();
  self->outputs = outputs.release();
  return packed;
}

void WriteValues(const Plan::Data& data, PyObject* const* objects,
                 PyObject* const* outputs, const std::vector<bool>* owners) {
  if (!owners) {
    for (const auto& [index, output] : data.writes) {
      SetRaw(AsVariable(objects[index]), outputs[output]);
    }
    return;
  }
  // What is replaced goes last: Python code that this runs must not meet a
  // Variable whose array is used up.
  std::vector<Ref> replaced;
  replaced.reserve(data.writes.size());
  for (const auto& [index, output] : data.writes) {
    VariableObject* variable = AsVariable(objects[index]);
    PyObject* value = outputs[output];
    const bool fresh = (*owners)[index] && Py_REFCNT(value) == 1 &&
                       Py_TYPE(value) == GetRuntime().array_type;
    replaced.push_back(Ref::Borrow(variable->raw));
    SetRaw(variable, value);
    if (fresh) variable->hold = Hold::kOwn;
  }
}

Ref BuildResult(const Plan::Data& data, PyObject* const* objects,
                PyObject* const* leaves, PyObject* const* outputs) {
  const Structure* structure = AsStructure(data.structure.get());
  auto source = [&](int32_t leaf) {
    const int32_t output = data.output_of[leaf];
    return output < 0 ? leaves[data.matches[leaf]] : outputs[output];
  };
  const std::vector<Node>& nodes = *structure->nodes;
  const Node& result = nodes[data.result_position];
  if (result.kind == NodeKind::kLeaf && result.index < 0) {
    return Ref::Borrow(source(result.leaf));
  }
  if (result.kind == NodeKind::kStatic) return result.aux;
  std::vector<PyObject*> filled(structure->num_leaves);
  for (int32_t i = 0; i < structure->num_leaves; ++i) filled[i] = source(i);
  Unflattener build(nodes, filled.data(), nullptr,
                    data.result_has_nodes ? structure->num_indices : 0);
  build.set_new_boxes();
  for (int32_t index : data.result_refs) {
    build.Declare(index, objects[data.origin[index]]);
  }
  build.set_position(data.result_position);
  return build.Build();
}

Ref Apply(PyObject* plan, PyObject* const* objects, PyObject* const* leaves,
          PyObject* const* outputs) {
  const Plan::Data& data = PlanData(plan);
  if (data.values_only) {
    if (!data.writes.empty()) {
      PyObject* trace = nullptr;
      if (!CurrentTrace(&trace)) return Ref();
      Ref keep = Ref::Steal(trace);
      // All or nothing: a refused write leaves every Variable as it was.
      for (const auto& [index, output] : data.writes) {
        if (!CheckTrace(objects[index], trace)) return Ref();
      }
      WriteValues(data, objects, outputs, /*owners=*/nullptr);
    }
    return BuildResult(data, objects, leaves, outputs);
  }

  const Structure* structure = AsStructure(data.structure.get());
  const std::vector<Node>& nodes = *structure->nodes;
  std::vector<PyObject*> filled(structure->num_leaves);
  for (int32_t i = 0; i < structure->num_leaves; ++i) {
    const int32_t output = data.output_of[i];
    filled[i] = output < 0 ? leaves[data.matches[i]] : outputs[output];
  }
  std::vector<PyObject*> reuse(structure->num_indices);
  for (int32_t i = 0; i < structure->num_indices; ++i) {
    reuse[i] = data.origin[i] < 0 ? nullptr : objects[data.origin[i]];
  }
  Unflattener build(nodes, filled.data(), reuse.data(), structure->num_indices);
  build.set_new_boxes();
  Ref result;
  for (int32_t i = 0; i < structure->num_roots; ++i) {
    result = build.Build();
    if (!result) return Ref();
  }
  return build.Commit() ? result : Ref();
}

}  // namespace nnx::engine
