#include <pybind11/pybind11.h>

#include "nnx/engine/cc/identity.h"
#include "nnx/engine/cc/jit.h"
#include "nnx/engine/cc/lift_functions.h"
#include "nnx/engine/cc/loan.h"
#include "nnx/engine/cc/mappings.h"
#include "nnx/engine/cc/merge.h"
#include "nnx/engine/cc/node_types.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/plan.h"
#include "nnx/engine/cc/pytree.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/scopes.h"
#include "nnx/engine/cc/split.h"
#include "nnx/engine/cc/structure.h"
#include "nnx/engine/cc/update.h"
#include "nnx/engine/cc/vocabulary.h"

namespace {

PyMethodDef configure_functions[] = {
    {"configure", reinterpret_cast<PyCFunction>(nnx::engine::Configure),
     METH_VARARGS | METH_KEYWORDS,
     "configure(...): gives the engine what it needs of the Python side."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The graph engine: walks of object graphs in C++.";
  PyObject* module = m.ptr();
  if (!nnx::engine::InitRuntime() || !nnx::engine::InitVocabulary(module) ||
      !nnx::engine::InitVariableBase(module) ||
      !nnx::engine::InitObjectBase(module) ||
      !nnx::engine::InitStructure(module) || !nnx::engine::InitPlan(module) ||
      !nnx::engine::InitLift(module) || !nnx::engine::InitLoan(module) ||
      !nnx::engine::InitJit(module) || !nnx::engine::InitSplit(module) ||
      !nnx::engine::InitMerge(module) || !nnx::engine::InitUpdate(module) ||
      !nnx::engine::InitMappings(module) || !nnx::engine::InitPytree(module) ||
      !nnx::engine::InitNodeTypes(module) ||
      !nnx::engine::InitIdentity(module) || !nnx::engine::InitScopes(module) ||
      PyModule_AddFunctions(module, configure_functions) < 0) {
    throw pybind11::error_already_set();
  }
}
