#include <pybind11/pybind11.h>

#include "nnx/graph/cc/identity.h"
#include "nnx/graph/cc/jit.h"
#include "nnx/graph/cc/lift.h"
#include "nnx/graph/cc/mappings.h"
#include "nnx/graph/cc/merge.h"
#include "nnx/graph/cc/node_types.h"
#include "nnx/graph/cc/objects.h"
#include "nnx/graph/cc/plan.h"
#include "nnx/graph/cc/pytree.h"
#include "nnx/graph/cc/runtime.h"
#include "nnx/graph/cc/split.h"
#include "nnx/graph/cc/structure.h"
#include "nnx/graph/cc/update.h"

namespace {

PyMethodDef configure_functions[] = {
    {"configure", reinterpret_cast<PyCFunction>(nnx::graph::Configure),
     METH_VARARGS | METH_KEYWORDS,
     "configure(...): gives the engine what it needs of the Python side."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The graph engine: walks of object graphs in C++.";
  PyObject* module = m.ptr();
  if (!nnx::graph::InitRuntime() || !nnx::graph::InitObjects(module) ||
      !nnx::graph::InitStructure(module) || !nnx::graph::InitPlan(module) ||
      !nnx::graph::InitLift(module) || !nnx::graph::InitJit(module) ||
      !nnx::graph::InitSplit(module) || !nnx::graph::InitMerge(module) ||
      !nnx::graph::InitUpdate(module) || !nnx::graph::InitMappings(module) ||
      !nnx::graph::InitPytree(module) || !nnx::graph::InitNodeTypes(module) ||
      !nnx::graph::InitIdentity(module) ||
      PyModule_AddFunctions(module, configure_functions) < 0) {
    throw pybind11::error_already_set();
  }
}
