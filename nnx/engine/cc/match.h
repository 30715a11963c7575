#ifndef NNX_ENGINE_CC_MATCH_H_
#define NNX_ENGINE_CC_MATCH_H_

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/structure.h"

namespace nnx::engine {

// Checks whether objects have a known structure, and collects their leaves and
// objects on the way. Runs no Python code, allocates no Python object and so
// never lets the garbage collector run: what it has borrowed stays alive until
// the walk is over.
class Matcher {
 public:
  Matcher(const Structure* structure, PyObject** leaves, PyObject** objects)
      : nodes_(*structure->nodes), leaves_(leaves), objects_(objects) {}
  // Matches the next root. Leaves and objects are stored as borrowed
  // references.
  bool Match(PyObject* value);
  // The comparisons put off until the walk is over. 1: equal, 0: not, -1:
  // error.
  int FinishDeferred();
  // Whether it met a Variable that owns its array, and one of another trace.
  bool owns() const { return owns_; }
  bool traced() const { return in_trace_; }

 private:
  bool Visit(PyObject* value);
  bool VisitNode(const Node& node, PyObject* value);
  bool VisitStatic(const Node& node, PyObject* value);
  bool VisitLeaf(const Node& node, PyObject* value);
  bool VisitVariable(const Node& node, VariableObject* variable);
  bool VisitObject(const Node& node, ObjectObject* object);
  bool VisitSequence(const Node& node, PyObject* value);
  bool VisitMapping(const Node& node, PyObject* value);
  bool VisitMetadata(PyObject* recorded, PyObject* frozen, PyObject* given);
  bool Index(const Node& node, PyObject* value);

  const std::vector<Node>& nodes_;
  PyObject** leaves_;
  PyObject** objects_;
  size_t position_ = 0;
  bool owns_ = false;
  bool in_trace_ = false;
  const uint64_t epoch_ = NextEpoch();
  std::vector<PyObject*> arena_;
  struct Deferred {
    Ref recorded;
    Ref key;  // of what was recorded, if it has no hash
    Ref given;
    Node* node;  // kStatic; null for metadata
  };
  std::vector<Deferred> deferred_;
  // Traced values, and whether they have to stand for mutable arrays.
  std::vector<std::pair<PyObject*, bool>> traced_;
  std::unordered_map<PyObject*, int32_t> containers_;
};

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_MATCH_H_
