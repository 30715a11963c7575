#ifndef NNX_GRAPH_CC_LIFT_H_
#define NNX_GRAPH_CC_LIFT_H_

#include <Python.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "nnx/graph/cc/py_ref.h"
#include "nnx/graph/cc/structure.h"

namespace nnx::graph {

// What is known once a function has run on copies of its arguments: which
// outputs go where. Immutable; it travels as the static part of a `Packed`
// through JAX's transformations.
struct Plan {
  PyObject_HEAD struct Data {
    Ref structure;  // of the nodes reached from the arguments, then the result
    // By leaf of `structure`: an output, or ~(input leaf) where unchanged.
    std::vector<int32_t> sources;
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

// Compares the copies with the structure that they were made from.
// `objects`: the copies by index; `leaves`: the values they were given.
Ref Pack(const Structure* structure, const std::vector<int32_t>& tops,
         PyObject* const* objects, PyObject* const* leaves, PyObject* result);

// Does to the originals what the function did to the copies, and builds its
// result. `objects` and `leaves` are those of the call.
Ref Apply(PyObject* plan, PyObject* const* objects, PyObject* const* leaves,
          PyObject* const* outputs);

// Positions of the outermost nodes with an identity.
std::vector<int32_t> TopNodes(const Structure* structure);

// While a lifted function is called, the originals of the copies that its trace
// will make: the copies take over where they were made.
class CallFrame {
 public:
  CallFrame(const Structure* structure, PyObject* const* objects);
  ~CallFrame();
  CallFrame(const CallFrame&) = delete;
  CallFrame& operator=(const CallFrame&) = delete;

  static PyObject* const* OriginalsOf(const Structure* structure);

 private:
  const Structure* structure_;
  PyObject* const* objects_;
  CallFrame* previous_;
};

bool InitLift(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_LIFT_H_
