#include "nnx/engine/cc/call_frame.h"

#include <cstddef>
#include <utility>

namespace nnx::engine {

namespace {
thread_local CallFrame* current_frame = nullptr;
}  // namespace

CallFrame::CallFrame(const Structure* structure, PyObject* const* objects,
                     bool compiled)
    : structure_(structure),
      objects_(objects),
      compiled_(compiled),
      previous_(current_frame) {
  current_frame = this;
}

CallFrame::~CallFrame() { current_frame = previous_; }

PyObject* const* CallFrame::OriginalsOf(const Structure* structure) {
  if (!current_frame || current_frame->structure_ != structure) return nullptr;
  return current_frame->objects_;
}

const CallFrame* CallFrame::Current() { return current_frame; }

void CallFrame::Remember(const Structure* structure, std::vector<Ref> copies) {
  // A compiled function has a frame of its own inside, around its copies.
  if (!OriginalsOf(structure) || current_frame->compiled_) return;
  // The frame may be gone by the time that what is forgotten is freed.
  std::swap(current_frame->copies_, copies);
}

int32_t CallFrame::IndexOf(PyObject* object) const {
  for (size_t i = 0; i < copies_.size(); ++i) {
    if (copies_[i].get() == object) return static_cast<int32_t>(i);
  }
  for (int32_t i = 0; i < structure_->num_indices; ++i) {
    if (objects_[i] == object) return i;
  }
  return -1;
}

}  // namespace nnx::engine
