#ifndef NNX_ENGINE_CC_FLATTEN_H_
#define NNX_ENGINE_CC_FLATTEN_H_

#include <Python.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/structure.h"

namespace nnx::engine {

// How values that are neither containers nor graph nodes are read.
enum class Mode : uint8_t {
  kAttributes,  // arrays are leaves, the rest is static unless it is the root;
                // containers have identity
  kState,       // as those, of a State among them; containers are values
  kPytree,      // everything is a leaf; containers are values
};

// A structure as it was, of which the objects may have changed.
struct Former {
  const std::vector<Node>& nodes;
  PyObject* const* objects;       // by index
  PyObject* const* leaves;        // by number
  std::vector<int32_t> index_of;  // by index: that in the new walk, or -1
};

// Walks objects and records their structure. The slow, general walk: it may run
// Python code, and marks nothing on the objects.
class Flattener {
 public:
  // `hash_statics`: static attributes must be hashable (they must be in a
  // structure that is kept, not in a walk that only looks at the leaves).
  explicit Flattener(bool hash_statics) : hash_statics_(hash_statics) {}

  // Objects that earlier walks met, by index: met again, they are references.
  void Seed(const std::vector<Ref>& objects);
  // Each call adds one root. False with an error set on failure.
  bool Add(PyObject* value, Mode mode);
  // Adds a static root (a static argument).
  bool AddStatic(PyObject* value);

  // Adds a subtree as it was, but for its Variables, which are as they are now.
  bool AddFormer(Former* former, int32_t position);

  // Whether what was met is a tree of pytrees for sure.
  bool is_tree() const { return is_tree_; }
  // Ends the walk: the structure, as a new NodeDef.
  Ref Finish();

  const std::vector<Ref>& leaves() const { return leaves_; }
  std::vector<Ref>& leaves() { return leaves_; }
  // The objects by index.
  const std::vector<Ref>& objects() const { return objects_; }
  const std::vector<Node>& nodes() const { return nodes_; }
  // Positions of the roots, and of the outermost nodes with an identity.
  const std::vector<int32_t>& roots() const { return roots_; }
  const std::vector<int32_t>& tops() const { return tops_; }
  // Position of each leaf's node, and the object of each indexed node.
  const std::vector<int32_t>& leaf_nodes() const { return leaf_nodes_; }

 private:
  bool Visit(PyObject* value, Mode mode);
  // Whether nothing of the current root has been visited yet.
  bool AtRoot() const {
    return static_cast<int32_t>(nodes_.size()) == roots_.back();
  }
  bool CheckNoMark(PyObject* value) const;
  bool VisitStatic(PyObject* value);
  bool VisitLeaf(PyObject* value, bool scalars);
  bool VisitArray(PyObject* value, bool scalars);
  bool VisitVariable(PyObject* value, TypeInfo* info);
  bool VisitObject(PyObject* value, TypeInfo* info);
  bool VisitSequence(PyObject* value, NodeKind kind, Mode mode);
  bool VisitMapping(PyObject* value, PyObject* mapping, NodeKind kind,
                    Mode mode);
  bool VisitCustom(PyObject* value, TypeInfo* info);
  bool VisitUnknown(PyObject* value, Mode mode);
  bool VisitChild(PyObject* key, PyObject* value, Mode mode);
  bool VisitFormer(Former* former, int32_t position);

  int32_t Push(NodeKind kind, PyTypeObject* type);
  bool PushIndexed(PyObject* value, NodeKind kind, int32_t* position);
  void PushRef(int32_t index);
  void Close(int32_t position, int32_t children);

  const bool hash_statics_;
  int32_t num_outer_ = 0;
  int depth_indexed_ = 0;
  bool is_tree_ = true;
  std::vector<Node> nodes_;
  std::vector<Ref> leaves_;
  std::vector<Ref> objects_;
  std::vector<int32_t> roots_;
  std::vector<int32_t> tops_;
  std::vector<int32_t> leaf_nodes_;
  std::vector<PyObject*> arena_;
  std::vector<Ref> held_;  // the items of the containers that are open
  std::vector<PyObject*> path_;
  std::unordered_map<PyObject*, int32_t> seen_;
};

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_FLATTEN_H_
