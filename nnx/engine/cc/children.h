#ifndef NNX_ENGINE_CC_CHILDREN_H_
#define NNX_ENGINE_CC_CHILDREN_H_

#include <Python.h>

#include <vector>

#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// Whether looking a key up in a dict of such keys runs no Python code. A key of
// another class could run some when it is compared.
bool IsPlainKey(PyObject* key);
bool HasPlainKeys(PyObject* dict);

// Values opened by one level, as the slow walks do it: all of this may run
// Python code, but for `StoredMapping`.

// The keys of a value's children and the children; `keys` is null where they
// are 0, 1, 2, ... 1, or 0 for what is no node, or -1 with an error set.
int OpenNode(PyObject* value, Ref* keys, std::vector<Ref>* children);
// The items of a dict in canonical order. False with an error set on failure.
bool OpenMapping(PyObject* mapping, Ref* keys, std::vector<Ref>* children);

// The dict inside a State; null with an error set on failure.
Ref StateMapping(PyObject* state);
// The same without running Python code, so not for a class that computes it;
// null without an error.
Ref StoredMapping(PyObject* state);
// The dict inside a mapping: a dict itself, or the inside of a State. Null for
// other values, without an error unless Python code raised one.
Ref AsMapping(PyObject* value);

// A registered pytree node opened one level; false, with no error, for a leaf.
// `keys` may be null.
bool OpenPytree(PyObject* value, Ref* children, Ref* treedef, Ref* keys);
// The children of a custom node, in canonical order.
bool OpenCustom(PyObject* value, TypeInfo* info, Ref* keys,
                std::vector<Ref>* children, Ref* metadata);
// The field names of a named tuple; null, without an error, where they do not
// fit its items.
bool FieldNames(PyObject* value, Ref* names);

// Whether an array is a mutable one, or a traced value that stands for one.
// Such a leaf has an identity. 1, 0, -1.
int IsMutableArray(PyObject* value);

// Whether `value` holds a Variable, Module or array anywhere: data, therefore.
// 1, 0, -1.
int HoldsData(PyObject* value);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_CHILDREN_H_
