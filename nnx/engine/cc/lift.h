#ifndef NNX_ENGINE_CC_LIFT_H_
#define NNX_ENGINE_CC_LIFT_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "nnx/engine/cc/plan.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/structure.h"

namespace nnx::engine {

// Compares the copies with the structure that they were made from.
// `objects`: the copies by index; `leaves`: the values they were given, or what
// makes one count as replaced. `given`: if not null, nothing but Variables can
// have changed, and these are the values in any case.
Ref Pack(const Structure* structure, const std::vector<int32_t>& tops,
         PyObject* const* objects, PyObject* const* leaves, PyObject* result,
         PyObject* const* given);

// Does to the originals what the function did to the copies, and builds its
// result. `objects` and `leaves` are those of the call.
Ref Apply(PyObject* plan, PyObject* const* objects, PyObject* const* leaves,
          PyObject* const* outputs);

// The two halves of `Apply` where nothing but values of Variables has changed.
// Outputs that nobody else has belong to their Variables alone afterwards where
// `owners`, by index, says so; null: nowhere. The first never fails.
void WriteValues(const Plan::Data& data, PyObject* const* objects,
                 PyObject* const* outputs, const std::vector<bool>* owners);
Ref BuildResult(const Plan::Data& data, PyObject* const* objects,
                PyObject* const* leaves, PyObject* const* outputs);

// Whether `objects` can be written to as those of a structure. `origin`: index
// in the structure -> index among them, or -1; null: the same.
bool CheckObjects(const Structure* structure, PyObject* const* objects,
                  size_t count, const std::vector<int32_t>* origin);
// Whether a plan can be applied to objects and leaves.
bool CheckApplies(PyObject* plan, PyObject* const* objects, size_t num_objects,
                  size_t num_leaves);

// Positions of the outermost nodes with an identity.
std::vector<int32_t> TopNodes(const Structure* structure);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_LIFT_H_
