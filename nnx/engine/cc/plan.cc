#include "nnx/engine/cc/plan.h"

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
