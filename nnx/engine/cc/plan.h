#ifndef NNX_ENGINE_CC_PLAN_H_
#define NNX_ENGINE_CC_PLAN_H_

#include <Python.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// What is known once a function has run on copies of its arguments: which
// outputs go where. Immutable; it travels as the static part of a `Packed`
// through JAX's transformations.
struct Plan {
  PyObject_HEAD struct Data {
    Ref structure;  // of the nodes reached from the arguments, then the result
    // By leaf of `structure`: the output that it is, or -1 where it is
    // unchanged: then it is the input leaf that `matches` says.
    std::vector<int32_t> output_of;
    // By leaf reached from the arguments: the input leaf in whose place it
    // stands (of the same Variable, or under the same key), or -1 if new.
    std::vector<int32_t> matches;
    // (index of a Variable among the arguments, output), when nothing but
    // values of Variables changed.
    std::vector<std::pair<int32_t, int32_t>> writes;
    bool values_only = false;
    int32_t result_position = 0;  // node of the result
    bool result_has_nodes = false;
    std::vector<int32_t> result_refs;  // argument nodes the result refers to
    // Index in `structure` -> index among the arguments, or -1: made inside.
    std::vector<int32_t> origin;
    int32_t num_outputs = 0;
  };
  Data* data;
};

extern PyTypeObject* g_plan_type;
inline Plan::Data& PlanData(PyObject* plan) {
  return *reinterpret_cast<Plan*>(plan)->data;
}

// A plan and its outputs: what a flat function returns; a pytree node.
struct Packed {
  PyObject_HEAD PyObject* plan;
  PyObject* outputs;  // tuple
};
extern PyTypeObject* g_packed_type;

// Adds both types and how jax flattens a Packed.
bool InitPlan(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_PLAN_H_
