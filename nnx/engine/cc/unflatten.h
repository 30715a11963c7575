#ifndef NNX_ENGINE_CC_UNFLATTEN_H_
#define NNX_ENGINE_CC_UNFLATTEN_H_

#include <Python.h>

#include <cstdint>
#include <vector>

#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/structure.h"

namespace nnx::engine {

// Builds objects from a structure.
class Unflattener {
 public:
  // `leaves` by number. `reuse` (may be null): existing objects by index, which
  // `Commit` fills in place; null entries are made.
  Unflattener(const std::vector<Node>& nodes, PyObject* const* leaves,
              PyObject* const* reuse, int32_t num_indices)
      : nodes_(nodes), leaves_(leaves), reuse_(reuse), made_(num_indices) {}

  // Variables and leaves given ready-made, by node position (borrowed or null).
  void set_provided(const std::vector<PyObject*>* provided) {
    provided_ = provided;
  }
  // Objects by index whose creation line and trace carry over to the copies.
  void set_origins(PyObject* const* origins) { origins_ = origins; }
  // Variables that are made get boxes of their own.
  void set_copy_boxes() { copy_boxes_ = true; }
  // So do they, and mutable arrays, for the values that came out of a function.
  void set_new_boxes() { copy_boxes_ = new_refs_ = true; }
  void set_position(int32_t position) { position_ = position; }

  // Builds the node at the current position and moves past it.
  Ref Build();
  // Writes to the existing objects, when all is built: a refused write, or
  // Python code that raises while it builds, leaves all of them as they were.
  // Only the functions of a custom node can still raise in between.
  bool Commit();
  // Builds or reuses: objects by index after building.
  const std::vector<Ref>& objects() const { return made_; }
  // Declares an object for references without building it.
  void Declare(int32_t index, PyObject* object) {
    made_[index] = Ref::Borrow(object);
  }

 private:
  // An existing object and what it will hold. Of a Variable: the value; an
  // object or dict: a dict; a list: a tuple; a custom node: a tuple of pairs.
  // `adopted`: a Variable will be as one that was given, or take a value alone.
  struct Pending {
    const Node* node;
    Ref object;
    Ref contents;
    bool adopted;
  };

  Ref Adopt(const Node& node, PyObject* value);
  bool DeclareInside(int32_t* position, PyObject* value);
  bool CanWrite(const Pending& pending) const;
  bool Write(const Pending& pending) const;
  Ref BuildLeaf(const Node& node);
  Ref BuildVariable(const Node& node);
  Ref BuildObject(const Node& node);
  Ref BuildSequence(const Node& node);
  Ref BuildMapping(const Node& node);
  Ref BuildPytree(const Node& node);
  Ref BuildCustom(const Node& node);
  Ref Children(const Node& node);  // tuple
  bool BuildItems(const Node& node, PyObject* dict);

  const std::vector<Node>& nodes_;
  PyObject* const* leaves_;
  PyObject* const* reuse_;
  std::vector<Ref> made_;
  std::vector<Pending> pending_;
  const std::vector<PyObject*>* provided_ = nullptr;
  PyObject* const* origins_ = nullptr;
  int32_t position_ = 0;
  bool copy_boxes_ = false;
  bool new_refs_ = false;
};

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_UNFLATTEN_H_
