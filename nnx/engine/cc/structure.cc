#include "nnx/engine/cc/structure.h"

#include <limits>
#include <utility>

#include "nnx/engine/cc/owned_items.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/statics.h"
#include "nnx/engine/cc/tuples.h"

namespace nnx::engine {

PyTypeObject* g_structure_type = nullptr;

namespace {

int ObjectsEqual(PyObject* a, PyObject* b) {
  if (a == b) return 1;
  if (!a || !b) return 0;
  return PyObject_RichCompareBool(a, b, Py_EQ);
}

// Of dicts that nobody changes: copies which the nodes own.
int MetadataEqual(const Node& a, const Node& b) {
  PyObject *dict_a = a.aux.get(), *dict_b = b.aux.get();
  if (dict_a == dict_b) return 1;
  if (!dict_a || !dict_b ||
      PyDict_GET_SIZE(dict_a) != PyDict_GET_SIZE(dict_b)) {
    return 0;
  }
  auto find = [](const Ref& keys, PyObject* name) {
    return keys ? PyDict_GetItemWithError(keys.get(), name) : nullptr;
  };
  PyObject *name, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict_a, &position, &name, &value)) {
    PyObject* other = PyDict_GetItemWithError(dict_b, name);
    if (!other) return PyErr_Occurred() ? -1 : 0;
    const int equal =
        StaticEqual(value, find(a.key, name), other, find(b.key, name));
    if (equal != 1) return equal;
  }
  return 1;
}

int NodesEqual(const Node& a, const Node& b) {
  if (a.kind != b.kind || a.reference != b.reference || a.index != b.index ||
      a.children != b.children || a.hook_flags != b.hook_flags ||
      (a.leaf < 0) != (b.leaf < 0) || a.type.get() != b.type.get()) {
    return 0;
  }
  if (a.kind == NodeKind::kStatic) {
    if (a.atomic != b.atomic || a.hash != b.hash) return 0;
    // Owned: a `Matcher` may put another value there while Python compares.
    const Ref value_a = a.aux, value_b = b.aux;
    return StaticEqual(value_a.get(), a.key.get(), value_b.get(), b.key.get());
  }
  const int keys = ObjectsEqual(a.keys.get(), b.keys.get());
  if (keys != 1) return keys;
  if (a.kind == NodeKind::kVariable) return MetadataEqual(a, b);
  return ObjectsEqual(a.aux.get(), b.aux.get());
}

}  // namespace

Ref ChildKey(const Node& node, int32_t child) {
  if (node.keys) return Ref::Borrow(PyTuple_GET_ITEM(node.keys.get(), child));
  return Ref::Steal(PyLong_FromLong(child));
}

bool CheckStructure(PyObject* value) {
  if (PyObject_TypeCheck(value, g_structure_type)) return true;
  if (IsForeign(value)) {
    RaiseForeign(value, "graphdef");
    return false;
  }
  PyErr_Format(PyExc_TypeError,
               "`graphdef` must be a graph structure (from nnx.split or "
               "nnx.graphdef), but got %s.",
               Py_TYPE(value)->tp_name);
  return false;
}

int SubtreesEqual(const std::vector<Node>& a, int32_t position_a,
                  const std::vector<Node>& b, int32_t position_b) {
  const int32_t size = a[position_a].end - position_a;
  if (b[position_b].end - position_b != size) return 0;
  for (int32_t i = 0; i < size; ++i) {
    const int equal = NodesEqual(a[position_a + i], b[position_b + i]);
    if (equal != 1) return equal;
  }
  return 1;
}

// --- the Python type

namespace {

int StructureTraverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(AsStructure(self)->updates);
  if (!AsStructure(self)->nodes) return 0;
  for (const Node& node : *AsStructure(self)->nodes) {
    Py_VISIT(node.type.get());
    Py_VISIT(node.keys.get());
    Py_VISIT(node.aux.get());
    Py_VISIT(node.key.get());
  }
  return 0;
}

int StructureClear(PyObject* self) {
  std::vector<Node>* nodes = AsStructure(self)->nodes;
  AsStructure(self)->nodes = nullptr;
  delete nodes;
  Py_CLEAR(AsStructure(self)->updates);
  return 0;
}

void StructureDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  StructureClear(self);
  type->tp_free(self);
  Py_DECREF(type);
}

size_t Mix(size_t hash, size_t value) {
  return (hash ^ value) * 0x9E3779B97F4A7C15ull + (hash >> 29);
}

// Metadata is hashed by its names alone: values may be unhashable, and equality
// looks at them anyway.
bool MixMapping(PyObject* mapping, size_t* hash) {
  std::vector<Ref> items;
  AppendPairs(mapping, &items);
  size_t sum = 0;
  for (size_t i = 0; i < items.size(); i += 2) {
    const Py_hash_t part = PyObject_Hash(items[i].get());
    if (part == -1) return false;
    sum += Mix(17, static_cast<size_t>(part));
  }
  *hash = Mix(*hash, sum);
  return true;
}

// `lenient`: without an error for what has no hash. -1 with an error set.
Py_hash_t ComputeHash(const Structure* structure, bool lenient) {
  size_t hash = structure->nodes->size();
  for (const Node& node : *structure->nodes) {
    hash = Mix(hash, static_cast<size_t>(node.kind) * 4 + node.reference);
    hash = Mix(hash, static_cast<size_t>(node.index + 1));
    hash = Mix(hash, static_cast<size_t>(node.children));
    hash = Mix(hash, reinterpret_cast<size_t>(node.type.get()));
    if (node.keys) {
      const Py_hash_t part = PyObject_Hash(node.keys.get());
      if (part == -1) return -1;
      hash = Mix(hash, static_cast<size_t>(part));
    }
    if (!node.aux) continue;
    if (PyDict_CheckExact(node.aux.get()) && node.kind != NodeKind::kStatic) {
      if (!MixMapping(node.aux.get(), &hash)) return -1;
    } else {
      const bool hashed = node.kind == NodeKind::kStatic && !node.atomic;
      const Py_hash_t part = hashed ? node.hash : NativeHash(node.aux.get());
      if (part == -1) {
        if (!lenient || !PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
        PyErr_Clear();
      }
      hash = Mix(hash, static_cast<size_t>(part));
    }
  }
  const auto result = static_cast<Py_hash_t>(hash);
  return result == -1 ? -2 : result;
}

Py_hash_t StructureHash(PyObject* self) {
  Structure* structure = AsStructure(self);
  if (structure->hash == -1) {
    structure->hash = ComputeHash(structure, /*lenient=*/false);
  }
  return structure->hash;
}

PyObject* StructureCompare(PyObject* self, PyObject* other, int op) {
  if ((op != Py_EQ && op != Py_NE) ||
      !PyObject_TypeCheck(other, g_structure_type)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  int equal = self == other;
  if (!equal) {
    const Structure *a = AsStructure(self), *b = AsStructure(other);
    equal = a->nodes->size() == b->nodes->size() &&
            a->num_roots == b->num_roots && a->num_outer == b->num_outer;
    if (equal == 1) equal = ObjectsEqual(a->updates, b->updates);
    for (size_t i = 0; equal == 1 && i < a->nodes->size(); ++i) {
      equal = NodesEqual((*a->nodes)[i], (*b->nodes)[i]);
    }
    if (equal < 0) return nullptr;
  }
  return PyBool_FromLong(op == Py_EQ ? equal : !equal);
}

Ref OrNone(const Ref& ref) { return ref ? ref : Ref::Borrow(Py_None); }
Ref Flag(bool flag) { return Ref::Borrow(flag ? Py_True : Py_False); }

// The record of a node: what Python needs to print, pickle and test a
// structure. `RestoreNode` is the inverse.
Ref RecordOf(const Node& node) {
  // A copy of what is in a structure, which never changes.
  const bool own = node.aux && node.kind != NodeKind::kStatic &&
                   PyDict_CheckExact(node.aux.get());
  return NewRecord(
      g_node_record_type,
      {Ref::Borrow(KindMember(node.kind)), Number(node.index),
       Number(node.leaf), Number(node.children), OrNone(node.type),
       OrNone(node.keys),
       own ? Ref::Steal(PyDict_Copy(node.aux.get())) : OrNone(node.aux),
       Flag(node.reference), Flag(node.atomic),
       Ref::Borrow(HookFlagsMember(node.hook_flags))});
}

PyObject* StructureRecords(PyObject* self, void*) {
  return ToTuple(*AsStructure(self)->nodes, RecordOf).release();
}

// Sets the ends of a subtree; -1 if it does not fit into the vector.
int32_t CloseRestored(std::vector<Node>* nodes, int32_t position) {
  RecursionGuard guard;
  if (!guard.entered()) return -1;
  const auto size = static_cast<int32_t>(nodes->size());
  if (position >= size) return -1;
  int32_t next = position + 1;
  for (int32_t i = 0; i < (*nodes)[position].children; ++i) {
    next = CloseRestored(nodes, next);
    if (next < 0) return -1;
  }
  (*nodes)[position].end = next;
  return next;
}

bool IsTypeBelow(const Ref& type, PyTypeObject* base) {
  return type && PyType_Check(type.get()) &&
         PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type.get()), base);
}

// Attribute names, which are compared without running Python code.
bool ArePlainKeys(PyObject* keys) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keys); ++i) {
    PyObject* key = PyTuple_GET_ITEM(keys, i);
    if (!PyUnicode_CheckExact(key) && !PyLong_CheckExact(key)) return false;
  }
  return true;
}

bool IsType(const Ref& type, PyTypeObject* wanted) {
  return type.get() == reinterpret_cast<PyObject*>(wanted);
}

// Whether a record has what a walk reads of its kind of node, and nothing that
// one would take for something else.
bool IsComplete(const Node& node) {
  const bool named = static_cast<bool>(node.keys);
  const bool container = node.index < 0 && node.leaf < 0;
  const bool dict_or_null = !node.aux || PyDict_CheckExact(node.aux.get());
  if (named && PyTuple_GET_SIZE(node.keys.get()) != node.children) return false;
  const bool may_refer =
      node.kind == NodeKind::kList || node.kind == NodeKind::kDict;
  if (may_refer ? node.reference != (node.index >= 0) : node.reference) {
    return false;
  }
  switch (node.kind) {
    case NodeKind::kStatic:
      return container && node.aux && node.children == 0;
    case NodeKind::kLeaf:
      return node.leaf >= 0 && node.children == 0;
    case NodeKind::kRef:
      return node.index >= 0 && node.leaf < 0 && node.children == 0;
    case NodeKind::kVariable:
      return IsTypeBelow(node.type, g_variable_base) && node.index >= 0 &&
             dict_or_null && !named &&
             node.children == (node.leaf >= 0 ? 0 : 1);
    case NodeKind::kObject:
      return IsTypeBelow(node.type, g_object_base) && node.index >= 0 &&
             node.leaf < 0 && dict_or_null && named &&
             ArePlainKeys(node.keys.get());
    case NodeKind::kList:
      return IsType(node.type, &PyList_Type) && node.leaf < 0 && !named;
    case NodeKind::kDict:
      return IsType(node.type, &PyDict_Type) && node.leaf < 0 && named;
    case NodeKind::kTuple:
      return IsType(node.type, &PyTuple_Type) && container && !named;
    case NodeKind::kNamedTuple:
      return IsTypeBelow(node.type, &PyTuple_Type) && container;
    case NodeKind::kState:
      return GetRuntime().state && IsTypeBelow(node.type, GetRuntime().state) &&
             container && named;
    case NodeKind::kPytree:
      return node.aux && container;
    case NodeKind::kCustom:
      return node.info && node.info->kind == TypeKind::kCustom && node.aux &&
             node.index >= 0 && node.leaf < 0 && named;
  }
  return false;
}

// Whether `updates` has a number for each object.
bool AreUpdates(PyObject* updates, int32_t num_indices) {
  if (!updates) return true;
  if (PyTuple_GET_SIZE(updates) != num_indices) return false;
  for (Py_ssize_t i = 0; i < num_indices; ++i) {
    PyObject* number = PyTuple_GET_ITEM(updates, i);
    int overflow = 0;
    if (!PyLong_CheckExact(number) ||
        PyLong_AsLongAndOverflow(number, &overflow) < -1 || overflow != 0) {
      return false;
    }
  }
  return true;
}

// Whether records make a structure that can be built: damaged ones must not
// lead a walk out of a vector. Counts leaves and indices, looks for a tree.
bool IsValid(Structure* structure) {
  std::vector<Node>& nodes = *structure->nodes;
  const auto size = static_cast<int64_t>(nodes.size());
  if (structure->num_roots < 0 || structure->num_outer < 0 ||
      size + structure->num_outer > std::numeric_limits<int32_t>::max()) {
    return false;
  }
  int32_t position = 0;
  for (int32_t i = 0; i < structure->num_roots && position >= 0; ++i) {
    position = CloseRestored(&nodes, position);
  }
  if (position != size) return false;
  structure->num_leaves = 0;
  structure->num_indices = structure->num_outer;
  structure->is_tree = true;
  for (const Node& node : nodes) {
    if (node.kind == NodeKind::kRef || (node.info && !node.info->pytree)) {
      structure->is_tree = false;
    }
    if (!IsComplete(node)) return false;
    if (node.leaf >= 0 && node.leaf != structure->num_leaves++) return false;
    if (node.kind == NodeKind::kRef) {
      if (node.index >= structure->num_indices) return false;
    } else if (node.index >= 0 && node.index != structure->num_indices++) {
      return false;
    }
  }
  return AreUpdates(structure->updates, structure->num_indices);
}

// A record, or a tuple of its fields, as pickles have them.
bool RestoreNode(PyObject* record, Node* node) {
  PyObject *kind, *node_type, *keys, *aux;
  int index, leaf, children, reference, atomic, hook_flags;
  if (!PyTuple_Check(record) ||
      !PyArg_ParseTuple(record, "OiiiOOOppi", &kind, &index, &leaf, &children,
                        &node_type, &keys, &aux, &reference, &atomic,
                        &hook_flags) ||
      !ParseKind(kind, &node->kind)) {
    return false;
  }
  node->index = index < 0 ? -1 : index;
  node->leaf = leaf < 0 ? -1 : leaf;
  node->children = children < 0 ? 0 : children;
  node->reference = reference;
  node->hook_flags = static_cast<uint8_t>(hook_flags & kHookFlags);
  if (node_type != Py_None) node->type = Ref::Borrow(node_type);
  if (PyTuple_CheckExact(keys)) node->keys = Ref::Borrow(keys);
  // Walks take metadata and marks for null where there are none.
  const bool empty = PyDict_CheckExact(aux) && PyDict_GET_SIZE(aux) == 0;
  const bool holds_names =
      node->kind == NodeKind::kVariable || node->kind == NodeKind::kObject;
  if (empty && holds_names) aux = Py_None;
  if (aux != Py_None || node->kind == NodeKind::kStatic ||
      node->kind == NodeKind::kCustom) {
    node->aux = Ref::Borrow(aux);
  }
  if (PyType_Check(node_type)) {
    node->info = GetTypeInfo(reinterpret_cast<PyTypeObject*>(node_type));
    if (!node->info) return false;
  }
  if (node->kind == NodeKind::kVariable && node->aux &&
      PyDict_CheckExact(node->aux.get())) {
    return FreezeMapping(node->aux.get(), &node->key);
  }
  if (node->kind != NodeKind::kStatic) return true;
  node->atomic = IsAtomic(aux);
  // Hashes of strings differ between processes.
  if (!node->atomic) node->hash = HashStatic(aux, "", &node->key);
  return node->hash != -1;
}

PyObject* StructureRestore(PyObject* cls, PyObject* args) {
  PyObject *records = nullptr, *updates = Py_None;
  int num_roots = 1, num_outer = 0;
  if (!PyArg_ParseTuple(args, "O!i|iO:_restore", &PyTuple_Type, &records,
                        &num_roots, &num_outer, &updates)) {
    return nullptr;
  }
  // All of the structure before there is an object: hashing a static value may
  // run Python code, which must find none that is half made.
  std::vector<Node> nodes(PyTuple_GET_SIZE(records));
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (RestoreNode(PyTuple_GET_ITEM(records, i), &nodes[i])) continue;
    if (!PyErr_Occurred()) {
      PyErr_SetString(PyExc_ValueError, "`records` must hold tuples.");
    }
    return nullptr;
  }
  Structure checked = {};
  checked.nodes = &nodes;
  checked.num_roots = num_roots;
  checked.num_outer = num_outer;
  checked.updates = PyTuple_CheckExact(updates) ? updates : nullptr;
  if (!IsValid(&checked)) {
    if (!PyErr_Occurred()) {
      PyErr_SetString(
          PyExc_ValueError,
          "`records` must be those of a graph structure whose node "
          "types are registered in this process, but they are not.");
    }
    return nullptr;
  }
  auto* type = reinterpret_cast<PyTypeObject*>(cls);
  Ref self = Ref::Steal(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  Structure* structure = AsStructure(self.get());
  structure->nodes = new std::vector<Node>(std::move(nodes));
  structure->num_leaves = checked.num_leaves;
  structure->num_indices = checked.num_indices;
  structure->num_roots = num_roots;
  structure->num_outer = num_outer;
  structure->is_tree = checked.is_tree;
  structure->updates = Ref::Borrow(checked.updates).release();
  structure->hash = -1;
  return self.release();
}

PyObject* StructureNumLeaves(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_leaves);
}
PyObject* StructureNumIndices(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_indices);
}
PyObject* StructureNumRoots(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_roots);
}
PyObject* StructureNumOuter(PyObject* self, void*) {
  return PyLong_FromLong(AsStructure(self)->num_outer);
}
PyObject* StructureUpdates(PyObject* self, void*) {
  PyObject* updates = AsStructure(self)->updates;
  return Ref::Borrow(updates ? updates : Py_None).release();
}
PyObject* StructureShares(PyObject* self, void*) {
  for (const Node& node : *AsStructure(self)->nodes) {
    if (node.kind == NodeKind::kRef) Py_RETURN_TRUE;
  }
  Py_RETURN_FALSE;
}
PyObject* StructureIsTree(PyObject* self, void*) {
  return PyBool_FromLong(AsStructure(self)->is_tree);
}
PyObject* StructureObjectTypes(PyObject* self, void*) {
  Ref types = Ref::Steal(PySet_New(nullptr));
  if (!types) return nullptr;
  PyObject* last = nullptr;  // objects of one class often follow each other
  for (const Node& node : *AsStructure(self)->nodes) {
    if (node.kind != NodeKind::kObject && node.kind != NodeKind::kCustom) {
      continue;
    }
    if (node.type.get() == last) continue;
    last = node.type.get();
    if (PySet_Add(types.get(), last) < 0) return nullptr;
  }
  return types.release();
}

PyGetSetDef structure_getset[] = {
    {"_records", StructureRecords, nullptr,
     "A NodeRecord of each node, in preorder.", nullptr},
    {"num_leaves", StructureNumLeaves, nullptr, "Number of leaves.", nullptr},
    {"num_nodes", StructureNumIndices, nullptr,
     "Number of nodes with an identity.", nullptr},
    {"_num_roots", StructureNumRoots, nullptr, "Number of roots.", nullptr},
    {"_num_outer", StructureNumOuter, nullptr,
     "Number of objects of earlier walks that it may refer to.", nullptr},
    {"_shares", StructureShares, nullptr,
     "Whether a node is met again, so that this is no tree.", nullptr},
    {"_is_tree", StructureIsTree, nullptr,
     "Whether this is a tree of pytrees of jax for sure.", nullptr},
    {"_object_types", StructureObjectTypes, nullptr,
     "The set of the types of objects and of custom nodes.", nullptr},
    {"_updates", StructureUpdates, nullptr,
     "By object, the number of the one it updates, or -1; None: updates none.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef structure_methods[] = {
    {"_restore", StructureRestore, METH_VARARGS | METH_CLASS,
     "_restore(records, num_roots, num_outer, updates): the inverse of "
     "`_records`."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot structure_slots[] = {
    {Py_tp_doc, const_cast<char*>("The structure of an object graph.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(StructureDealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(StructureTraverse)},
    {Py_tp_hash, reinterpret_cast<void*>(StructureHash)},
    {Py_tp_richcompare, reinterpret_cast<void*>(StructureCompare)},
    {Py_tp_getset, structure_getset},
    {Py_tp_methods, structure_methods},
    {0, nullptr},
};

PyType_Spec structure_spec = {
    "nnx.engine._engine.StructureBase", sizeof(Structure), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC |
        Py_TPFLAGS_DISALLOW_INSTANTIATION,
    structure_slots};

}  // namespace

bool LookupHash(PyObject* structure, size_t* hash) {
  const Py_hash_t found = ComputeHash(AsStructure(structure), /*lenient=*/true);
  *hash = static_cast<size_t>(found);
  return found != -1;
}

bool InitStructure(PyObject* module) {
  Ref type = Ref::Steal(PyType_FromSpec(&structure_spec));
  if (!type) return false;
  g_structure_type = reinterpret_cast<PyTypeObject*>(type.get());
  GetRuntime().structure_base = g_structure_type;
  return PyModule_AddObject(module, "StructureBase", type.release()) == 0;
}

}  // namespace nnx::engine
