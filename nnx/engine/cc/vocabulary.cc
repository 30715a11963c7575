#include "nnx/engine/cc/vocabulary.h"

#include <structseq.h>

#include <cstddef>

namespace nnx::engine {

PyTypeObject* g_node_record_type = nullptr;
PyTypeObject* g_flattened_type = nullptr;
PyTypeObject* g_unflattened_type = nullptr;
PyTypeObject* g_prepared_type = nullptr;
PyTypeObject* g_variable_write_type = nullptr;
PyTypeObject* g_source_line_type = nullptr;

namespace {

PyTypeObject* g_opened_pytree_type = nullptr;
PyTypeObject* g_jit_entry_type = nullptr;

PyStructSequence_Field node_record_fields[] = {
    {"kind", "What it is: a NodeKind."},
    {"index", "Its number among the nodes that have an identity, or -1."},
    {"leaf", "Its number among the leaves, or -1."},
    {"children", "How many children follow."},
    {"type", "Its class, or None."},
    {"keys", "The keys of the children; None for 0, 1, 2, ..."},
    {"aux",
     "static: the value; variable: its metadata; object: its marks; pytree: "
     "its treedef; custom: its metadata; or None."},
    {"reference", "Whether it is a list or dict with an identity."},
    {"atomic", "static: whether comparing it runs no Python code."},
    {"hook_flags", "variable: its hooks, as HookFlags."},
    {nullptr, nullptr},
};

PyStructSequence_Field flattened_fields[] = {
    {"structure", "The structure."},
    {"leaves", "The leaves, by number."},
    {"objects", "The nodes that have an identity, by index."},
    {nullptr, nullptr},
};

PyStructSequence_Field unflattened_fields[] = {
    {"values", "The value of each root."},
    {"objects", "The nodes that have an identity, by index."},
    {nullptr, nullptr},
};

PyStructSequence_Field prepared_fields[] = {
    {"function", "What was compiled for the structure of the arguments."},
    {"arguments", "What it would be called with."},
    {"donated", "The numbers of the leaves that it donates."},
    {nullptr, nullptr},
};

PyStructSequence_Field variable_write_fields[] = {
    {"index", "The index of the Variable."},
    {"output", "The number of the output that is its new value."},
    {nullptr, nullptr},
};

PyStructSequence_Field source_line_fields[] = {
    {"filename", "The file."},
    {"line", "The number of the line."},
    {nullptr, nullptr},
};

PyStructSequence_Field opened_pytree_fields[] = {
    {"children", "The children, a tuple."},
    {"treedef", "What makes the node again of its children."},
    {"keys", "The key of each child, a tuple."},
    {nullptr, nullptr},
};

PyStructSequence_Field jit_entry_fields[] = {
    {"function", "Takes the leaves, and returns a Packed."},
    {"donated", "The numbers of the leaves that it donates, or None."},
    {"in_place",
     "None, or what is called in its place with the leaves that stay and a "
     "Loan "
     "of the others, `donated`, which are Variables of their own."},
    {nullptr, nullptr},
};

struct RecordType {
  PyTypeObject** type;
  const char* name;
  const char* doc;
  PyStructSequence_Field* fields;
};

const RecordType record_types[] = {
    {&g_node_record_type, "nnx.engine._engine.NodeRecord",
     "A node of a structure.", node_record_fields},
    {&g_flattened_type, "nnx.engine._engine.Flattened",
     "Values as a structure and leaves.", flattened_fields},
    {&g_unflattened_type, "nnx.engine._engine.Unflattened",
     "What was built from a structure and leaves.", unflattened_fields},
    {&g_prepared_type, "nnx.engine._engine.Prepared",
     "A call that was prepared and not made.", prepared_fields},
    {&g_variable_write_type, "nnx.engine._engine.VariableWrite",
     "A new value for a Variable.", variable_write_fields},
    {&g_source_line_type, "nnx.engine._engine.SourceLine",
     "A line of a user's code.", source_line_fields},
    {&g_opened_pytree_type, "nnx.engine._engine.OpenedPytree",
     "A pytree node of jax, opened by one level.", opened_pytree_fields},
    {&g_jit_entry_type, "nnx.engine._engine.JitEntry",
     "A function compiled for one structure.", jit_entry_fields},
};

bool AddRecordType(PyObject* module, const RecordType& record) {
  int size = 0;
  while (record.fields[size].name) ++size;
  PyStructSequence_Desc desc = {record.name, record.doc, record.fields, size};
  *record.type = PyStructSequence_NewType(&desc);
  if (!*record.type) return false;
  return PyModule_AddType(module, *record.type) == 0;
}

bool IsRecord(PyObject* value, PyTypeObject* type) {
  if (Py_TYPE(value) == type) return true;
  PyErr_Format(PyExc_TypeError, "The engine must be given a %s, but got %s.",
               type->tp_name, Py_TYPE(value)->tp_name);
  return false;
}

// --- enums

struct Member {
  const char* name;
  const char* value;
};

constexpr Member kinds[] = {
    {"STATIC", "static"},     {"LEAF", "leaf"},
    {"VARIABLE", "variable"}, {"OBJECT", "object"},
    {"LIST", "list"},         {"DICT", "dict"},
    {"TUPLE", "tuple"},       {"NAMEDTUPLE", "namedtuple"},
    {"STATE", "state"},       {"PYTREE", "pytree"},
    {"CUSTOM", "custom"},     {"REF", "ref"},
};
constexpr size_t kNumKinds = sizeof(kinds) / sizeof(kinds[0]);
static_assert(kNumKinds == static_cast<size_t>(NodeKind::kRef) + 1);

PyObject* kind_members[kNumKinds] = {};
PyObject* hook_flags_members[kHookFlags + 1] = {};

// Makes an enum class, as `class name(enum.base)` with these members does.
Ref NewEnum(const char* base, const char* name, PyObject* members,
            PyObject* module) {
  Ref library = Ref::Steal(PyImport_ImportModule("enum"));
  Ref type =
      library ? Ref::Steal(PyObject_GetAttrString(library.get(), base)) : Ref();
  Ref args = Ref::Steal(Py_BuildValue("(sO)", name, members));
  Ref kwargs =
      Ref::Steal(Py_BuildValue("{s:s}", "module", PyModule_GetName(module)));
  if (!type || !args || !kwargs) return Ref();
  return Ref::Steal(PyObject_Call(type.get(), args.get(), kwargs.get()));
}

bool AddKinds(PyObject* module) {
  Ref members = Ref::Steal(PyDict_New());
  if (!members) return false;
  for (const Member& kind : kinds) {
    Ref value = Ref::Steal(PyUnicode_InternFromString(kind.value));
    if (!value ||
        PyDict_SetItemString(members.get(), kind.name, value.get()) < 0) {
      return false;
    }
  }
  Ref type = NewEnum("StrEnum", "NodeKind", members.get(), module);
  if (!type) return false;
  for (size_t i = 0; i < kNumKinds; ++i) {
    kind_members[i] = PyObject_GetAttrString(type.get(), kinds[i].name);
    if (!kind_members[i]) return false;
  }
  return PyModule_AddObjectRef(module, "NodeKind", type.get()) == 0;
}

bool AddHookFlags(PyObject* module) {
  Ref members = Ref::Steal(Py_BuildValue("{s:i,s:i,s:i}", "GET", kGetHooks,
                                         "SET", kSetHooks, "BOXED", kBoxed));
  if (!members) return false;
  Ref type = NewEnum("IntFlag", "HookFlags", members.get(), module);
  if (!type) return false;
  for (int i = 0; i <= kHookFlags; ++i) {
    hook_flags_members[i] = PyObject_CallFunction(type.get(), "i", i);
    if (!hook_flags_members[i]) return false;
  }
  return PyModule_AddObjectRef(module, "HookFlags", type.get()) == 0;
}

}  // namespace

Ref NewRecord(PyTypeObject* type, std::initializer_list<Ref> fields) {
  for (const Ref& field : fields) {
    if (!field) return Ref();
  }
  Ref record = Ref::Steal(PyStructSequence_New(type));
  if (!record) return Ref();
  Py_ssize_t i = 0;
  for (const Ref& field : fields) {
    PyStructSequence_SetItem(record.get(), i++, Ref(field).release());
  }
  // Which not every Python does itself.
  if (!PyObject_GC_IsTracked(record.get())) PyObject_GC_Track(record.get());
  return record;
}

bool OpenedPytree::Read(PyObject* record, OpenedPytree* view) {
  if (!IsRecord(record, g_opened_pytree_type)) return false;
  view->children = PyStructSequence_GetItem(record, 0);
  view->treedef = PyStructSequence_GetItem(record, 1);
  view->keys = PyStructSequence_GetItem(record, 2);
  if (PyTuple_CheckExact(view->children) && PyTuple_CheckExact(view->keys) &&
      PyTuple_GET_SIZE(view->children) == PyTuple_GET_SIZE(view->keys)) {
    return true;
  }
  PyErr_SetString(PyExc_ValueError,
                  "`flatten_pytree` must return a tuple of children and one "
                  "with a key for each child.");
  return false;
}

bool JitEntry::Read(PyObject* record, JitEntry* view) {
  if (!IsRecord(record, g_jit_entry_type)) return false;
  view->function = PyStructSequence_GetItem(record, 0);
  view->donated = PyStructSequence_GetItem(record, 1);
  view->in_place = PyStructSequence_GetItem(record, 2);
  return true;
}

PyObject* KindMember(NodeKind kind) {
  return kind_members[static_cast<size_t>(kind)];
}

PyObject* HookFlagsMember(uint8_t flags) {
  return hook_flags_members[flags & kHookFlags];
}

bool ParseKind(PyObject* name, NodeKind* kind) {
  if (!PyUnicode_Check(name)) {
    PyErr_Format(PyExc_TypeError, "`kind` must be a NodeKind, but got %s.",
                 Py_TYPE(name)->tp_name);
    return false;
  }
  for (size_t i = 0; i < kNumKinds; ++i) {
    if (PyUnicode_CompareWithASCIIString(name, kinds[i].value) == 0) {
      *kind = static_cast<NodeKind>(i);
      return true;
    }
  }
  PyErr_Format(PyExc_ValueError, "`kind` must be a NodeKind, but got %R.",
               name);
  return false;
}

bool InitVocabulary(PyObject* module) {
  for (const RecordType& record : record_types) {
    if (!AddRecordType(module, record)) return false;
  }
  return AddKinds(module) && AddHookFlags(module);
}

}  // namespace nnx::engine
