#ifndef NNX_GRAPH_CC_RECURSION_GUARD_H_
#define NNX_GRAPH_CC_RECURSION_GUARD_H_

#include <Python.h>

namespace nnx::graph {

// Guards a C++ recursion by Python's limit. An error is set where `entered` is
// false.
class RecursionGuard {
 public:
  RecursionGuard()
      : entered_(Py_EnterRecursiveCall(" while walking an object graph") == 0) {
  }
  ~RecursionGuard() {
    if (entered_) Py_LeaveRecursiveCall();
  }
  RecursionGuard(const RecursionGuard&) = delete;
  RecursionGuard& operator=(const RecursionGuard&) = delete;
  bool entered() const { return entered_; }

 private:
  const bool entered_;
};

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_RECURSION_GUARD_H_
