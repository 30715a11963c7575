#ifndef NNX_ENGINE_CC_STRUCTURE_H_
#define NNX_ENGINE_CC_STRUCTURE_H_

#include <Python.h>

#include <cstdint>
#include <vector>

#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/vocabulary.h"

namespace nnx::engine {

// One entry of a structure, in preorder.
struct Node {
  NodeKind kind = NodeKind::kStatic;
  // A list or dict that is an attribute: it has an identity, may be shared, and
  // what a lifted function does to it is done to the original.
  bool reference = false;
  bool atomic = false;   // kStatic: compared without running Python code
  bool scalars = false;  // kLeaf: a scalar in its place would be a leaf too
  uint8_t hook_flags = 0;
  // Among the nodes that have an identity; kLeaf: that of a mutable array.
  int32_t index = -1;
  int32_t leaf = -1;  // among the leaves
  int32_t children = 0;
  int32_t end = 0;           // one past the subtree
  TypeInfo* info = nullptr;  // of `type`, for kObject and kVariable
  Py_hash_t hash = 0;        // kStatic that is not atomic
  Ref type;
  Ref keys;  // tuple; null for sequences
  // kStatic: the value. kVariable: metadata or null. kObject: status or null.
  Ref aux;
  // What there is in `aux` without a hash, as it was when the node was made.
  // kStatic: the key of the value. kVariable: dict name -> key.
  Ref key;
};

// A structure: the immutable description of an object graph. Seen from Python
// as NodeDef.
struct Structure {
  PyObject_HEAD std::vector<Node>* nodes;
  int32_t num_leaves;
  int32_t num_indices;
  int32_t num_roots;
  // The first indices are those of objects that earlier walks of one context
  // met; here there are only references to them.
  int32_t num_outer;
  bool is_tree;  // of pytrees, for sure
  // Tuple, index -> number of the object it updates or -1; null: updates none.
  PyObject* updates;
  Py_hash_t hash;  // -1: not computed
};

extern PyTypeObject* g_structure_type;
inline Structure* AsStructure(PyObject* value) {
  return reinterpret_cast<Structure*>(value);
}

// Whether `value` is a structure; sets an error if not.
bool CheckStructure(PyObject* value);

// A hash that equal structures have in common, whatever they hold: where what a
// type keeps about a node has no hash, the type stands for it. False with an
// error set on failure. Runs Python code.
bool LookupHash(PyObject* structure, size_t* hash);

// The key of a node's child.
Ref ChildKey(const Node& node, int32_t child);

// Whether the two subtrees, each starting at a position, are equal. 1, 0, -1.
int SubtreesEqual(const std::vector<Node>& a, int32_t position_a,
                  const std::vector<Node>& b, int32_t position_b);

bool InitStructure(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_STRUCTURE_H_
