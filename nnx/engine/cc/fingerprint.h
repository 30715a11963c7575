#ifndef NNX_ENGINE_CC_FINGERPRINT_H_
#define NNX_ENGINE_CC_FINGERPRINT_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <unordered_set>
#include <vector>

#include "nnx/engine/cc/flatten.h"
#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// A hash of the structure of arguments that is had without building it: equal
// structures have equal ones, but for mappings in another order. As in a
// `Matcher`, the walk runs no Python code.
class Fingerprint {
 public:
  Fingerprint();
  // Adds an argument. False, without an error, where only a walk that runs
  // Python code could tell.
  bool Add(PyObject* value, bool is_static);
  // The hash. After the walk, since hashing static values runs Python code.
  // False, without an error, where that failed.
  bool Finish(size_t* hash);

 private:
  bool Visit(PyObject* value, Mode mode);
  bool VisitStatic(PyObject* value);
  bool VisitVariable(PyObject* value);
  bool VisitObject(PyObject* value);
  bool VisitSequence(PyObject* value, Mode mode);
  bool VisitMapping(PyObject* mapping, Mode mode);
  void MixNamed(PyObject* mapping);
  void Mix(size_t value);

  size_t hash_ = 0;
  int depth_ = 0;
  int32_t num_objects_ = 0;
  const uint64_t epoch_;
  std::vector<Ref> deferred_;
  std::vector<PyObject*> arena_;
  std::unordered_set<PyObject*> containers_;
};

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_FINGERPRINT_H_
