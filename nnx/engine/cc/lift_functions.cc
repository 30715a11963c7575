#include "nnx/engine/cc/lift_functions.h"

#include <cstddef>
#include <cstdint>
#include <vector>

#include "nnx/engine/cc/call_frame.h"
#include "nnx/engine/cc/flatten.h"
#include "nnx/engine/cc/lift.h"
#include "nnx/engine/cc/match.h"
#include "nnx/engine/cc/plan.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/structure.h"
#include "nnx/engine/cc/tuples.h"
#include "nnx/engine/cc/unflatten.h"
#include "nnx/engine/cc/vocabulary.h"

namespace nnx::engine {
namespace {

bool CheckTuple(PyObject* value, Py_ssize_t size, const char* name) {
  if (PyTuple_Check(value) && PyTuple_GET_SIZE(value) == size) return true;
  PyErr_Format(PyExc_ValueError,
               "`%s` must be a tuple of %zd items, but got %R.", name, size,
               value);
  return false;
}

PyObject* const* Items(PyObject* tuple) { return PySequence_Fast_ITEMS(tuple); }

bool CheckObjectTuple(const Structure* structure, PyObject* objects) {
  return CheckTuple(objects, structure->num_indices, "objects") &&
         CheckObjects(structure, Items(objects), structure->num_indices,
                      /*origin=*/nullptr);
}

// Whether a structure is that of arguments, as `flatten` makes it: one that
// `split` makes in a context may refer to objects that are not there.
bool CheckClosed(PyObject* value) {
  if (!CheckStructure(value)) return false;
  if (AsStructure(value)->num_outer == 0) return true;
  PyErr_Format(PyExc_ValueError,
               "`structure` must be complete, but it refers to %d objects of "
               "earlier splits of its context.",
               AsStructure(value)->num_outer);
  return false;
}

// flatten(values, static=()) -> Flattened
PyObject* FlattenFunction(PyObject*, PyObject* args, PyObject* kwargs) {
  const char* keywords[] = {"values", "static", nullptr};
  PyObject *values = nullptr, *statics = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!|O!:flatten",
                                   const_cast<char**>(keywords), &PyTuple_Type,
                                   &values, &PyTuple_Type, &statics)) {
    return nullptr;
  }
  Flattener flattener(/*hash_statics=*/true);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(values); ++i) {
    PyObject* value = PyTuple_GET_ITEM(values, i);
    const int is_static = statics && i < PyTuple_GET_SIZE(statics)
                              ? PyObject_IsTrue(PyTuple_GET_ITEM(statics, i))
                              : 0;
    if (is_static < 0) return nullptr;
    if (is_static ? !flattener.AddStatic(value)
                  : !flattener.Add(value, Mode::kPytree)) {
      return nullptr;
    }
  }
  Ref structure = flattener.Finish();
  if (!structure) return nullptr;
  return NewRecord(g_flattened_type, {structure, ToTuple(flattener.leaves()),
                                      ToTuple(flattener.objects())})
      .release();
}

// unflatten(structure, leaves) -> Unflattened
PyObject* UnflattenFunction(PyObject*, PyObject* const* args,
                            Py_ssize_t nargs) {
  if (nargs != 2) {
    PyErr_SetString(PyExc_TypeError,
                    "`unflatten` takes a structure and a "
                    "tuple of leaves.");
    return nullptr;
  }
  if (!CheckClosed(args[0])) return nullptr;
  const Structure* structure = AsStructure(args[0]);
  if (!CheckTuple(args[1], structure->num_leaves, "leaves")) return nullptr;
  Unflattener build(*structure->nodes, Items(args[1]), nullptr,
                    structure->num_indices);
  build.set_origins(CallFrame::OriginalsOf(structure));
  Ref values = Ref::Steal(PyTuple_New(structure->num_roots));
  if (!values) return nullptr;
  for (int32_t i = 0; i < structure->num_roots; ++i) {
    Ref value = build.Build();
    if (!value) return nullptr;
    PyTuple_SET_ITEM(values.get(), i, value.release());
  }
  if (CallFrame::OriginalsOf(structure)) {
    CallFrame::Remember(structure, build.objects());
  }
  return NewRecord(g_unflattened_type, {values, ToTuple(build.objects())})
      .release();
}

// pack(structure, objects, leaves, result, given=None) -> Packed
PyObject* PackFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 4 && nargs != 5) {
    PyErr_SetString(PyExc_TypeError,
                    "`pack` takes a structure, objects, leaves, a result and "
                    "perhaps the leaves that were given.");
    return nullptr;
  }
  if (!CheckClosed(args[0])) return nullptr;
  const Structure* structure = AsStructure(args[0]);
  if (!CheckObjectTuple(structure, args[1]) ||
      !CheckTuple(args[2], structure->num_leaves, "leaves")) {
    return nullptr;
  }
  PyObject* given = nargs == 5 && args[4] != Py_None ? args[4] : nullptr;
  if (given && !CheckTuple(given, structure->num_leaves, "given")) {
    return nullptr;
  }
  return Pack(structure, TopNodes(structure), Items(args[1]), Items(args[2]),
              args[3], given ? Items(given) : nullptr)
      .release();
}

// apply(packed, objects, leaves) -> result
PyObject* ApplyFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 3 || !PyObject_TypeCheck(args[0], g_packed_type) ||
      !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) {
    PyErr_SetString(PyExc_TypeError,
                    "`apply` takes a Packed, objects and leaves.");
    return nullptr;
  }
  auto* packed = reinterpret_cast<Packed*>(args[0]);
  if (!CheckApplies(packed->plan, Items(args[1]), PyTuple_GET_SIZE(args[1]),
                    PyTuple_GET_SIZE(args[2]))) {
    return nullptr;
  }
  return Apply(packed->plan, Items(args[1]), Items(args[2]),
               Items(packed->outputs))
      .release();
}

// with_outputs(plan, leaves) -> Plan
PyObject* WithOutputsFunction(PyObject*, PyObject* const* args,
                              Py_ssize_t nargs) {
  if (nargs != 2 || !PyObject_TypeCheck(args[0], g_plan_type) ||
      !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError,
                    "`with_outputs` takes a Plan and a tuple of leaves.");
    return nullptr;
  }
  Ref copy = Ref::Steal(g_plan_type->tp_alloc(g_plan_type, 0));
  if (!copy) return nullptr;
  auto* data = new Plan::Data(PlanData(args[0]));
  reinterpret_cast<Plan*>(copy.get())->data = data;
  const std::vector<Node>& nodes = *AsStructure(data->structure.get())->nodes;
  std::vector<const Node*> node_of(data->output_of.size(), nullptr);
  for (const Node& node : nodes) {
    if (node.leaf >= 0) node_of[node.leaf] = &node;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args[1]); ++i) {
    const long leaf = PyLong_AsLong(PyTuple_GET_ITEM(args[1], i));
    if (leaf < 0 || leaf >= static_cast<long>(data->output_of.size())) {
      if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "No such leaf of the plan.");
      }
      return nullptr;
    }
    if (data->output_of[leaf] >= 0) continue;
    if (data->values_only && node_of[leaf]->kind == NodeKind::kVariable) {
      data->writes.emplace_back(data->origin[node_of[leaf]->index],
                                data->num_outputs);
    } else if (data->values_only) {
      data->values_only = false;
      data->writes.clear();
    }
    data->output_of[leaf] = data->num_outputs++;
  }
  return copy.release();
}

// forget_copies(structure)
PyObject* ForgetCopiesFunction(PyObject*, PyObject* structure) {
  if (!CheckStructure(structure)) return nullptr;
  CallFrame::Remember(AsStructure(structure), {});
  Py_RETURN_NONE;
}

// framed(structure, objects, function, *args) -> function(*args)
PyObject* FramedFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs < 3) {
    PyErr_SetString(PyExc_TypeError,
                    "`framed` takes a structure, objects and a function.");
    return nullptr;
  }
  if (!CheckClosed(args[0]) ||
      !CheckObjectTuple(AsStructure(args[0]), args[1])) {
    return nullptr;
  }
  CallFrame frame(AsStructure(args[0]), Items(args[1]));
  return PyObject_Vectorcall(args[2], args + 3, nargs - 3, nullptr);
}

// matches(structure, values) -> whether values that flatten returned the
// structure of still have it
PyObject* MatchesFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2) {
    PyErr_SetString(PyExc_TypeError,
                    "`matches` takes a structure and a tuple of values.");
    return nullptr;
  }
  if (!CheckClosed(args[0])) return nullptr;
  const Structure* structure = AsStructure(args[0]);
  if (!CheckTuple(args[1], structure->num_roots, "values")) return nullptr;
  {
    std::vector<PyObject*> leaves(structure->num_leaves);
    std::vector<PyObject*> objects(structure->num_indices);
    Matcher matcher(structure, leaves.data(), objects.data());
    bool matched = true;
    for (int32_t i = 0; matched && i < structure->num_roots; ++i) {
      matched = matcher.Match(PyTuple_GET_ITEM(args[1], i));
    }
    const int equal = matched ? matcher.FinishDeferred() : 0;
    if (equal < 0) return nullptr;
    if (equal) Py_RETURN_TRUE;
  }
  // What the fast walk does not decide, such as custom nodes, the slow one
  // does.
  Flattener flattener(/*hash_statics=*/true);
  for (int32_t i = 0; i < structure->num_roots; ++i) {
    if (!flattener.Add(PyTuple_GET_ITEM(args[1], i), Mode::kPytree)) {
      return nullptr;
    }
  }
  Ref now = flattener.Finish();
  return now ? PyObject_RichCompare(args[0], now.get(), Py_EQ) : nullptr;
}

PyMethodDef lift_functions[] = {
    {"flatten", reinterpret_cast<PyCFunction>(FlattenFunction),
     METH_VARARGS | METH_KEYWORDS,
     "flatten(values, static=()): arguments, Flattened."},
    {"unflatten", reinterpret_cast<PyCFunction>(UnflattenFunction),
     METH_FASTCALL, "unflatten(structure, leaves): the values, Unflattened."},
    {"pack", reinterpret_cast<PyCFunction>(PackFunction), METH_FASTCALL,
     "pack(structure, objects, leaves, result[, given]): what a function did, "
     "Packed; with all leaves `given`, to Variables alone."},
    {"apply", reinterpret_cast<PyCFunction>(ApplyFunction), METH_FASTCALL,
     "apply(packed, objects, leaves): does it to the originals."},
    {"with_outputs", reinterpret_cast<PyCFunction>(WithOutputsFunction),
     METH_FASTCALL,
     "with_outputs(plan, leaves): the plan with more leaves as outputs."},
    {"forget_copies", ForgetCopiesFunction, METH_O,
     "Forgets the copies that were made of a structure in its frame."},
    {"framed", reinterpret_cast<PyCFunction>(FramedFunction), METH_FASTCALL,
     "framed(structure, objects, function, *args): calls it; copies that it "
     "makes of the objects know where those were made."},
    {"matches", reinterpret_cast<PyCFunction>(MatchesFunction), METH_FASTCALL,
     "matches(structure, values): whether values still have a structure."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool InitLift(PyObject* module) {
  return PyModule_AddFunctions(module, lift_functions) == 0;
}

}  // namespace nnx::engine
