#ifndef NNX_ENGINE_CC_LAYOUT_H_
#define NNX_ENGINE_CC_LAYOUT_H_

#include <Python.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// What a value is to a walk, as far as its type decides it.
enum class TypeKind : uint8_t {
  kVariable,
  kObject,
  kArray,
  kList,
  kDict,
  kTuple,
  kNamedTuple,
  kState,
  kCustom,   // registered with `register_node_type`
  kForeign,  // an object of another library's graphs: refused
  kStatic,   // a structure: never a leaf, also as an argument
  kPlain,    // numbers, strings, functions, classes: never a pytree node
  kUnknown,  // a registered pytree node or a static value: the instance tells
};

// The attribute names of an instance dictionary (strings; ints in containers):
// as they were inserted, and in canonical order. Objects of one class nearly
// always share one layout, so finding it costs a pointer comparison an
// attribute and gives the canonical order without sorting.
struct Layout {
  std::vector<Ref> inserted;
  std::vector<int32_t> order;  // canonical position -> insertion position
  Ref keys;                    // tuple of names, canonical order
};

struct CustomNode {
  Ref flatten;       // (value) -> (sequence of (key, child), metadata)
  Ref create_empty;  // (metadata) -> value
  Ref set_key;       // (value, key, child)
  Ref pop_key;       // (value, key) -> child
  Ref clear;         // (value)
  Ref init;          // (value, pairs of key and child)
};

struct TypeInfo {
  TypeKind kind = TypeKind::kUnknown;
  bool opened = false;  // kUnknown: an instance was a registered pytree node
  bool traced = false;  // kArray: what an instance stands for, the trace knows
  bool pytree = true;   // kObject, kCustom: is a pytree of jax for sure
  Ref weakref;
  std::unique_ptr<CustomNode> custom;
  std::vector<std::unique_ptr<Layout>> layouts;
};

// Whether `value` is an object of another library's graphs, which ours cannot
// see into.
bool IsForeign(PyObject* value);
// Sets the error that refuses one; `path` may be empty.
void RaiseForeign(PyObject* value, const std::string& path);

// Never null except with a Python error set. May run Python code the first time
// that a type is seen.
TypeInfo* GetTypeInfo(PyTypeObject* type);
// The same if the type is known already, else null without an error.
TypeInfo* FindTypeInfo(PyTypeObject* type);

// The layout of `dict`, found or made; null with an error set on failure. Its
// values (borrowed), in canonical order, are appended to `arena`.
Layout* FindLayout(TypeInfo* info, PyObject* dict,
                   std::vector<PyObject*>* arena);
// Never makes one: null without an error where none fits.
Layout* MatchLayout(TypeInfo* info, PyObject* dict,
                    std::vector<PyObject*>* arena);

// The keys of a mapping in canonical order: ints, then strings, each ascending;
// where there are any others, as inserted. New tuple.
Ref CanonicalKeys(PyObject* dict);

// Classifies a type anew when it is next met, if it was taken for a plain
// static value or leaf.
void ForgetType(PyTypeObject* type);

bool RegisterCustomNode(PyTypeObject* type, CustomNode node);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_LAYOUT_H_
