#ifndef NNX_ENGINE_CC_CALL_FRAME_H_
#define NNX_ENGINE_CC_CALL_FRAME_H_

#include <Python.h>

#include <cstdint>
#include <vector>

#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/structure.h"

namespace nnx::engine {

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

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_CALL_FRAME_H_
