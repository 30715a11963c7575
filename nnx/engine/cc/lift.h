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
// `objects`: the copies by index; `leaves`: the values they were given.
Ref Pack(const Structure* structure, const std::vector<int32_t>& tops,
         PyObject* const* objects, PyObject* const* leaves, PyObject* result);

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

// While a lifted function is called, the originals of the copies that its trace
// will make: the copies take over where they were made.
class CallFrame {
 public:
  // `compiled`: the trace is kept, and serves other objects as well.
  CallFrame(const Structure* structure, PyObject* const* objects,
            bool compiled = false);
  ~CallFrame();
  CallFrame(const CallFrame&) = delete;
  CallFrame& operator=(const CallFrame&) = delete;

  static PyObject* const* OriginalsOf(const Structure* structure);
  // The innermost frame of this thread, or null.
  static const CallFrame* Current();
  // Remembers which copies the trace has made, by index, and forgets them: what
  // is traced must not outlive its trace.
  static void Remember(const Structure* structure, std::vector<Ref> copies);

  const CallFrame* previous() const { return previous_; }
  const Structure* structure() const { return structure_; }
  bool compiled() const { return compiled_; }
  // The index of a copy or of an original; -1 for any other object.
  int32_t IndexOf(PyObject* object) const;
  PyObject* original(int32_t index) const { return objects_[index]; }

 private:
  const Structure* structure_;
  PyObject* const* objects_;
  const bool compiled_;
  std::vector<Ref> copies_;
  CallFrame* previous_;
};

// Adds the functions under all transforms: flatten, unflatten, pack, apply and
// their like.
bool InitLift(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_LIFT_H_
