#ifndef NNX_GRAPH_CC_STRUCTURE_H_
#define NNX_GRAPH_CC_STRUCTURE_H_

#include <Python.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "nnx/graph/cc/layout.h"
#include "nnx/graph/cc/objects.h"
#include "nnx/graph/cc/py_ref.h"

namespace nnx::graph {

enum class NodeKind : uint8_t {
  kStatic,    // part of the structure, compared by value
  kLeaf,      // an array, or any leaf of a function's argument
  kVariable,  // one leaf, or one child: its value when that is a pytree
  kObject,    // Pytree, Object, Module
  kList,
  kDict,
  kTuple,
  kNamedTuple,
  kState,
  kPytree,  // registered with JAX; `aux` is its treedef
  kCustom,  // registered with us; `aux` is its metadata
  kRef,     // a node met before, by `index`
};

// One entry of a structure, in preorder.
struct Node {
  NodeKind kind = NodeKind::kStatic;
  // A list or dict that is an attribute: it has an identity, may be shared, and
  // what a lifted function does to it is done to the original.
  bool reference = false;
  bool atomic = false;   // kStatic: compared without running Python code
  bool scalars = false;  // kLeaf: a scalar in its place would be a leaf too
  uint8_t hook_flags = 0;
  int32_t index = -1;  // among the nodes that have an identity
  int32_t leaf = -1;   // among the leaves
  int32_t children = 0;
  int32_t end = 0;           // one past the subtree
  TypeInfo* info = nullptr;  // of `type`, for kObject and kVariable
  Py_hash_t hash = 0;        // kStatic that is not atomic
  Ref type;
  Ref keys;  // tuple; null for sequences
  // kStatic: the value. kVariable: metadata or null. kObject: status or null.
  Ref aux;
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
  // Tuple, index -> number of the object it updates or -1; null: updates none.
  PyObject* updates;
  Py_hash_t hash;  // -1: not computed
};

extern PyTypeObject* g_structure_type;
inline Structure* AsStructure(PyObject* value) {
  return reinterpret_cast<Structure*>(value);
}

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

// How values that are neither containers nor graph nodes are read.
enum class Mode : uint8_t {
  kAttributes,  // arrays are leaves, the rest is static; containers have
                // identity
  kPytree,      // everything is a leaf; containers are values
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
  bool VisitStatic(PyObject* value);
  bool VisitLeaf(PyObject* value, bool scalars);
  bool VisitVariable(PyObject* value, TypeInfo* info);
  bool VisitObject(PyObject* value, TypeInfo* info);
  bool VisitSequence(PyObject* value, NodeKind kind, Mode mode);
  bool VisitMapping(PyObject* value, PyObject* mapping, NodeKind kind,
                    Mode mode);
  bool VisitCustom(PyObject* value, TypeInfo* info);
  bool VisitUnknown(PyObject* value, Mode mode);
  bool VisitChild(PyObject* key, PyObject* value, Mode mode);

  int32_t Push(NodeKind kind, PyTypeObject* type);
  bool PushIndexed(PyObject* value, NodeKind kind, int32_t* position);
  void Close(int32_t position, int32_t children);

  const bool hash_statics_;
  int32_t num_outer_ = 0;
  int depth_indexed_ = 0;
  std::vector<Node> nodes_;
  std::vector<Ref> leaves_;
  std::vector<Ref> objects_;
  std::vector<int32_t> roots_;
  std::vector<int32_t> tops_;
  std::vector<int32_t> leaf_nodes_;
  std::vector<PyObject*> arena_;
  std::vector<PyObject*> path_;
  std::unordered_map<PyObject*, int32_t> seen_;
};

// The keys of a value's children and the children; `keys` is null where they
// are 0, 1, 2, ... 1, or 0 for what is no node, or -1 with an error set.
int OpenNode(PyObject* value, Ref* keys, std::vector<Ref>* children);
// The items of a dict in canonical order. False with an error set on failure.
bool OpenMapping(PyObject* mapping, Ref* keys, std::vector<Ref>* children);

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

 private:
  bool Visit(PyObject* value);
  bool VisitStatic(const Node& node, PyObject* value);
  bool VisitMetadata(PyObject* recorded, PyObject* given);
  bool Index(const Node& node, PyObject* value);

  const std::vector<Node>& nodes_;
  PyObject** leaves_;
  PyObject** objects_;
  size_t position_ = 0;
  const uint64_t epoch_ = NextEpoch();
  std::vector<PyObject*> arena_;
  struct Deferred {
    PyObject* recorded;
    Py_hash_t hash;
    Ref given;
  };
  std::vector<Deferred> deferred_;
  std::unordered_map<PyObject*, int32_t> containers_;
};

// Builds objects from a structure.
class Unflattener {
 public:
  // `leaves` by number. `reuse` (may be null): existing objects by index, which
  // are filled in place; null entries are made.
  Unflattener(const std::vector<Node>& nodes, PyObject* const* leaves,
              PyObject* const* reuse, int32_t num_indices)
      : nodes_(nodes), leaves_(leaves), reuse_(reuse), made_(num_indices) {}

  // Variables and leaves given ready-made, by node position (borrowed or null).
  void set_provided(const std::vector<PyObject*>* provided) {
    provided_ = provided;
  }
  // Objects by index whose creation line and trace carry over to the copies.
  void set_origins(PyObject* const* origins) { origins_ = origins; }
  void set_position(int32_t position) { position_ = position; }

  // Builds the node at the current position and moves past it.
  Ref Build();
  // Builds or reuses: objects by index after building.
  const std::vector<Ref>& objects() const { return made_; }
  // Declares an object for references without building it.
  void Declare(int32_t index, PyObject* object) {
    made_[index] = Ref::Borrow(object);
  }

 private:
  Ref Adopt(const Node& node, PyObject* value);
  Ref BuildVariable(const Node& node);
  Ref BuildObject(const Node& node);
  Ref BuildSequence(const Node& node);
  Ref BuildMapping(const Node& node);
  Ref BuildPytree(const Node& node);
  Ref BuildCustom(const Node& node);
  Ref Children(const Node& node);  // tuple

  const std::vector<Node>& nodes_;
  PyObject* const* leaves_;
  PyObject* const* reuse_;
  std::vector<Ref> made_;
  const std::vector<PyObject*>* provided_ = nullptr;
  PyObject* const* origins_ = nullptr;
  int32_t position_ = 0;
};

// Whether the two subtrees, each starting at a position, are equal. 1, 0, -1.
int SubtreesEqual(const std::vector<Node>& a, int32_t position_a,
                  const std::vector<Node>& b, int32_t position_b);

// Whether `value` holds a Variable, Module or array anywhere: data, therefore.
// 1, 0, -1.
int HoldsData(PyObject* value);

bool InitStructure(PyObject* module);

}  // namespace nnx::graph

#endif  // NNX_GRAPH_CC_STRUCTURE_H_
