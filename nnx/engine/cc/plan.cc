#include "nnx/engine/cc/plan.h"

#include <algorithm>
#include <set>

#include "nnx/engine/cc/structure.h"
#include "nnx/engine/cc/tuples.h"
#include "nnx/engine/cc/vocabulary.h"

namespace nnx::engine {

PyTypeObject* g_plan_type = nullptr;
PyTypeObject* g_packed_type = nullptr;

namespace {

void PlanDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  delete reinterpret_cast<Plan*>(self)->data;
  type->tp_free(self);
  Py_DECREF(type);
}

int PlanTraverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (Plan::Data* data = reinterpret_cast<Plan*>(self)->data) {
    Py_VISIT(data->structure.get());
  }
  return 0;
}

PyObject* PlanWrites(PyObject* self, void*) {
  const Plan::Data& data = PlanData(self);
  if (!data.values_only) Py_RETURN_NONE;
  return ToTuple(data.writes,
                 [](const std::pair<int32_t, int32_t>& write) {
                   return NewRecord(
                       g_variable_write_type,
                       {Number(write.first), Number(write.second)});
                 })
      .release();
}

PyObject* PlanOutputOf(PyObject* self, void*) {
  return ToTuple(PlanData(self).output_of).release();
}

PyObject* PlanMatches(PyObject* self, void*) {
  return ToTuple(PlanData(self).matches).release();
}

PyObject* PlanOrigin(PyObject* self, void*) {
  return ToTuple(PlanData(self).origin).release();
}

PyObject* PlanStructure(PyObject* self, void*) {
  return Ref(PlanData(self).structure).release();
}

// plan.__reduce__(): what follows from the rest is left out.
PyObject* PlanReduce(PyObject* self, PyObject*) {
  Ref restore = Ref::Steal(PyObject_GetAttrString(
      reinterpret_cast<PyObject*>(g_plan_type), "_restore"));
  Ref writes = Ref::Steal(PlanWrites(self, nullptr));
  Ref output_of = Ref::Steal(PlanOutputOf(self, nullptr));
  Ref matches = Ref::Steal(PlanMatches(self, nullptr));
  Ref origin = Ref::Steal(PlanOrigin(self, nullptr));
  if (!restore || !writes || !output_of || !matches || !origin) return nullptr;
  if (writes.get() != Py_None) {
    // Plain tuples: a pickle must not depend on the engine's types.
    writes = ToTuple(
        PlanData(self).writes, [](const std::pair<int32_t, int32_t>& write) {
          return Ref::Steal(Py_BuildValue("(ii)", write.first, write.second));
        });
    if (!writes) return nullptr;
  }
  return Py_BuildValue("(O(OOOOO))", restore.get(),
                       PlanData(self).structure.get(), output_of.get(),
                       matches.get(), writes.get(), origin.get());
}

// Reads a tuple of numbers that are -1 or more. False with an error perhaps.
bool ReadNumbers(PyObject* tuple, std::vector<int32_t>* numbers) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    const long number = PyLong_AsLong(PyTuple_GET_ITEM(tuple, i));
    if (number < -1 || number > INT32_MAX || PyErr_Occurred()) return false;
    numbers->push_back(static_cast<int32_t>(number));
  }
  return true;
}

bool ReadWrites(PyObject* writes, Plan::Data* data) {
  data->values_only = writes != Py_None;
  if (!data->values_only) return true;
  if (!PyTuple_Check(writes)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(writes); ++i) {
    PyObject* write = PyTuple_GET_ITEM(writes, i);
    int variable, output;
    if (!PyTuple_Check(write) ||
        !PyArg_ParseTuple(write, "ii", &variable, &output)) {
      return false;
    }
    data->writes.emplace_back(variable, output);
  }
  return true;
}

// Fills in what follows from the rest, and checks all that `Apply` relies on.
bool CompletePlan(Plan::Data* data) {
  const Structure* structure = AsStructure(data->structure.get());
  const std::vector<Node>& nodes = *structure->nodes;
  const auto num_leaves = static_cast<size_t>(structure->num_leaves);
  const auto num_indices = static_cast<size_t>(structure->num_indices);
  if (structure->num_outer != 0 || structure->num_roots < 1 ||
      data->output_of.size() != num_leaves ||
      data->matches.size() > num_leaves || data->origin.size() != num_indices) {
    return false;
  }
  for (size_t i = 0; i < num_leaves; ++i) {
    data->num_outputs = std::max(data->num_outputs, data->output_of[i] + 1);
    if (data->output_of[i] >= 0) continue;
    if (i >= data->matches.size() || data->matches[i] < 0) return false;
  }
  for (int32_t i = 1; i < structure->num_roots; ++i) {
    data->result_position = nodes[data->result_position].end;
  }
  std::set<int32_t> variables;  // among the arguments
  std::set<int32_t> made;       // objects that the result brings
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Node& node = nodes[i];
    if (node.index < 0) continue;
    const int32_t origin = data->origin[node.index];
    if (node.kind == NodeKind::kVariable) variables.insert(origin);
    if (static_cast<int32_t>(i) < data->result_position) {
      // Nothing but values changed: all of them are the arguments' own.
      if (data->values_only && origin < 0) return false;
      continue;
    }
    data->result_has_nodes = true;
    if (origin >= 0) {
      data->result_refs.push_back(node.index);
    } else if (node.kind != NodeKind::kRef) {
      made.insert(node.index);
    } else if (data->values_only && made.count(node.index) == 0) {
      return false;
    }
  }
  for (const auto& [variable, output] : data->writes) {
    if (variable < 0 || variables.count(variable) == 0 || output < 0 ||
        output >= data->num_outputs) {
      return false;
    }
  }
  return true;
}

PyObject* PlanRestore(PyObject*, PyObject* args) {
  PyObject *structure, *output_of, *matches, *writes, *origin;
  if (!PyArg_ParseTuple(args, "OO!O!OO!:_restore", &structure, &PyTuple_Type,
                        &output_of, &PyTuple_Type, &matches, &writes,
                        &PyTuple_Type, &origin) ||
      !CheckStructure(structure)) {
    return nullptr;
  }
  Ref plan = Ref::Steal(g_plan_type->tp_alloc(g_plan_type, 0));
  if (!plan) return nullptr;
  auto* data = new Plan::Data();
  reinterpret_cast<Plan*>(plan.get())->data = data;
  data->structure = Ref::Borrow(structure);
  if (ReadNumbers(output_of, &data->output_of) &&
      ReadNumbers(matches, &data->matches) &&
      ReadNumbers(origin, &data->origin) && ReadWrites(writes, data) &&
      CompletePlan(data)) {
    return plan.release();
  }
  if (!PyErr_Occurred()) {
    PyErr_SetString(PyExc_ValueError,
                    "A plan must be restored from what `__reduce__` gave, but "
                    "its parts do not fit each other.");
  }
  return nullptr;
}

PyMethodDef plan_methods[] = {
    {"__reduce__", PlanReduce, METH_NOARGS, nullptr},
    {"_restore", PlanRestore, METH_VARARGS | METH_CLASS,
     "_restore(structure, output_of, matches, writes, origin): the inverse of "
     "`__reduce__`."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef plan_getset[] = {
    {"writes", PlanWrites, nullptr,
     "A VariableWrite each if nothing but values changed, else None.", nullptr},
    {"output_of", PlanOutputOf, nullptr,
     "By leaf of `structure`: the output that it is, or -1: unchanged.",
     nullptr},
    {"matches", PlanMatches, nullptr,
     "By leaf reached from the arguments: the input leaf in whose place it "
     "stands, or -1.",
     nullptr},
    {"structure", PlanStructure, nullptr,
     "What the arguments and the result look like afterwards.", nullptr},
    {"origin", PlanOrigin, nullptr,
     "By node of `structure`: the argument node it was copied from, or -1.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot plan_slots[] = {
    {Py_tp_doc, const_cast<char*>("Which outputs go where.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(PlanDealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(PlanTraverse)},
    {Py_tp_getset, plan_getset},
    {Py_tp_methods, plan_methods},
    {0, nullptr},
};

PyType_Spec plan_spec = {
    "nnx.engine._engine.Plan", sizeof(Plan), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    plan_slots};

void PackedDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  auto* packed = reinterpret_cast<Packed*>(self);
  Py_XDECREF(packed->plan);
  Py_XDECREF(packed->outputs);
  type->tp_free(self);
  Py_DECREF(type);
}

int PackedTraverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<Packed*>(self)->plan);
  Py_VISIT(reinterpret_cast<Packed*>(self)->outputs);
  return 0;
}

PyObject* PackedPlan(PyObject* self, void*) {
  return Ref::Borrow(reinterpret_cast<Packed*>(self)->plan).release();
}
PyObject* PackedOutputs(PyObject* self, void*) {
  return Ref::Borrow(reinterpret_cast<Packed*>(self)->outputs).release();
}

PyGetSetDef packed_getset[] = {
    {"plan", PackedPlan, nullptr, "The plan.", nullptr},
    {"outputs", PackedOutputs, nullptr, "The outputs, a tuple.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot packed_slots[] = {
    {Py_tp_doc, const_cast<char*>("A plan and its outputs.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(PackedDealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(PackedTraverse)},
    {Py_tp_getset, packed_getset},
    {0, nullptr},
};

PyType_Spec packed_spec = {
    "nnx.engine._engine.Packed", sizeof(Packed), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    packed_slots};

PyObject* PackedFlatten(PyObject*, PyObject* self) {
  if (!PyObject_TypeCheck(self, g_packed_type)) {
    PyErr_SetString(PyExc_TypeError, "`packed` must be a Packed.");
    return nullptr;
  }
  auto* packed = reinterpret_cast<Packed*>(self);
  return PyTuple_Pack(2, packed->outputs, packed->plan);
}

PyObject* PackedUnflatten(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 || !PyObject_TypeCheck(args[0], g_plan_type)) {
    PyErr_SetString(PyExc_TypeError,
                    "`packed_unflatten` takes a Plan and its outputs.");
    return nullptr;
  }
  Ref self = Ref::Steal(g_packed_type->tp_alloc(g_packed_type, 0));
  Ref outputs = Ref::Steal(PySequence_Tuple(args[1]));
  if (!self || !outputs) return nullptr;
  if (PyTuple_GET_SIZE(outputs.get()) != PlanData(args[0]).num_outputs) {
    PyErr_Format(PyExc_ValueError, "`outputs` must have %d items, but got %zd.",
                 PlanData(args[0]).num_outputs,
                 PyTuple_GET_SIZE(outputs.get()));
    return nullptr;
  }
  auto* packed = reinterpret_cast<Packed*>(self.get());
  Py_INCREF(args[0]);
  packed->plan = args[0];
  packed->outputs = outputs.release();
  return self.release();
}

PyMethodDef packed_functions[] = {
    {"packed_flatten", PackedFlatten, METH_O, "(outputs, plan) of a Packed."},
    {"packed_unflatten", reinterpret_cast<PyCFunction>(PackedUnflatten),
     METH_FASTCALL, "The Packed of a plan and outputs."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool InitPlan(PyObject* module) {
  Ref plan = Ref::Steal(PyType_FromSpec(&plan_spec));
  Ref packed = Ref::Steal(PyType_FromSpec(&packed_spec));
  if (!plan || !packed) return false;
  g_plan_type = reinterpret_cast<PyTypeObject*>(plan.get());
  g_packed_type = reinterpret_cast<PyTypeObject*>(packed.get());
  return PyModule_AddFunctions(module, packed_functions) == 0 &&
         PyModule_AddObject(module, "Plan", plan.release()) == 0 &&
         PyModule_AddObject(module, "Packed", packed.release()) == 0;
}

}  // namespace nnx::engine
