#ifndef NNX_ENGINE_CC_RECURSION_GUARD_H_
#define NNX_ENGINE_CC_RECURSION_GUARD_H_

#include <Python.h>

namespace nnx::engine {

// Guards a C++ recursion by Python's limit. An error is set where `entered` is
// false.
class RecursionGuard {
 public:
  // `where`: the end of the error's message.
  explicit RecursionGuard(const char* where = " while walking an object graph")
      : entered_(Py_EnterRecursiveCall(where) == 0) {}
  ~RecursionGuard() {
    if (entered_) Py_LeaveRecursiveCall();
  }
  RecursionGuard(const RecursionGuard&) = delete;
  RecursionGuard& operator=(const RecursionGuard&) = delete;
  bool entered() const { return entered_; }

 private:
  const bool entered_;
};

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_RECURSION_GUARD_H_
