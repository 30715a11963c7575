#ifndef NNX_ENGINE_CC_VOCABULARY_H_
#define NNX_ENGINE_CC_VOCABULARY_H_

#include <Python.h>

#include <cstdint>
#include <initializer_list>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// The words that C++ and Python share: what has several parts crosses the
// border as a record with named fields, and what is one of several kinds as a
// member of an enum. `_engine.pyi` gives their types.

// `NodeKind` in Python.
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

// `HookFlags` in Python: the hooks that a Variable has, and whether it may keep
// its value in a box, which Python opens.
inline constexpr uint8_t kGetHooks = 1;
inline constexpr uint8_t kSetHooks = 2;
inline constexpr uint8_t kBoxed = 4;
inline constexpr uint8_t kHookFlags = kGetHooks | kSetHooks | kBoxed;

// Records that the engine makes. Their fields can also be unpacked in order.
extern PyTypeObject* g_node_record_type;     // of `GraphDef._records`
extern PyTypeObject* g_flattened_type;       // of `flatten`
extern PyTypeObject* g_unflattened_type;     // of `unflatten`
extern PyTypeObject* g_prepared_type;        // of `JitFunction._prepare`
extern PyTypeObject* g_variable_write_type;  // of `Plan.writes`
extern PyTypeObject* g_source_line_type;     // of `_origin`

// A record of the given type. Null with an error set on failure, or if a field
// is null.
Ref NewRecord(PyTypeObject* type, std::initializer_list<Ref> fields);

// Records that Python makes and the engine reads. The views borrow from the
// record.
struct OpenedPytree {  // of `flatten_pytree`
  PyObject* children;  // tuple
  PyObject* treedef;
  PyObject* keys;  // tuple, of the length of `children`
  static bool Read(PyObject* record, OpenedPytree* view);
};
struct JitEntry {  // of `make_entry`
  PyObject* function;
  PyObject* donated;   // iterable of numbers of leaves, or None
  PyObject* in_place;  // None, or takes the leaves that stay and a Loan
  static bool Read(PyObject* record, JitEntry* view);
};

// The members of both enums, borrowed.
PyObject* KindMember(NodeKind kind);
PyObject* HookFlagsMember(uint8_t flags);
// The kind with a given name, or which a member of the enum stands for. Sets an
// error if there is none.
bool ParseKind(PyObject* name, NodeKind* kind);

// Adds the types of all records and both enums.
bool InitVocabulary(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_VOCABULARY_H_
