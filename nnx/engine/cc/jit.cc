#include "nnx/engine/cc/jit.h"

#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "nnx/engine/cc/call_frame.h"
#include "nnx/engine/cc/entry_cache.h"
#include "nnx/engine/cc/fingerprint.h"
#include "nnx/engine/cc/flatten.h"
#include "nnx/engine/cc/jit_call.h"
#include "nnx/engine/cc/match.h"
#include "nnx/engine/cc/recursion_guard.h"
#include "nnx/engine/cc/scopes.h"
#include "nnx/engine/cc/structure.h"
#include "nnx/engine/cc/tuples.h"
#include "nnx/engine/cc/vocabulary.h"

namespace nnx::engine {
namespace {

struct JitFunction {
  PyObject_HEAD PyObject* dict;
  PyObject* weaklist;
  vectorcallfunc vectorcall;
  // (structure, leaves, names, objects) -> JitEntry
  PyObject* make_entry;
  PyObject* copy_array;  // (array) -> array
  PyObject* statics;     // frozenset of positions and keyword names
  EntryCache* cache;
};

JitFunction* AsJit(PyObject* self) {
  return reinterpret_cast<JitFunction*>(self);
}

// The arguments in the order of the structure's roots: positions, then keywords
// by name.
struct Arguments {
  std::vector<PyObject*> values;  // borrowed
  Ref names;
};

bool GatherArguments(PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
                     Arguments* out) {
  const Py_ssize_t nkeywords = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
  out->values.assign(args, args + nargs + nkeywords);
  if (nkeywords == 0) return true;
  std::vector<Py_ssize_t> order(nkeywords);
  for (Py_ssize_t i = 0; i < nkeywords; ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](Py_ssize_t a, Py_ssize_t b) {
    return PyUnicode_Compare(PyTuple_GET_ITEM(kwnames, a),
                             PyTuple_GET_ITEM(kwnames, b)) < 0;
  });
  out->names = Ref::Steal(PyTuple_New(nkeywords));
  if (!out->names) return false;
  for (Py_ssize_t i = 0; i < nkeywords; ++i) {
    PyObject* name = PyTuple_GET_ITEM(kwnames, order[i]);
    Py_INCREF(name);
    PyTuple_SET_ITEM(out->names.get(), i, name);
    out->values[nargs + i] = args[nargs + order[i]];
  }
  return true;
}

bool SameNames(PyObject* a, PyObject* b) {
  if (a == b) return true;
  if (!a || !b) return false;
  const int equal = PyObject_RichCompareBool(a, b, Py_EQ);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

// Whether the arguments have the structure of `entry`; if so, `call` holds
// their leaves and objects. 1, 0, -1.
int TryEntry(const Entry& entry, const Arguments& arguments, Call* call) {
  const Structure* structure = AsStructure(entry.structure.get());
  if (structure->num_roots != static_cast<int32_t>(arguments.values.size()) ||
      !SameNames(entry.names.get(), arguments.names.get())) {
    return 0;
  }
  std::vector<PyObject*> leaves(structure->num_leaves);
  std::vector<PyObject*> objects(structure->num_indices);
  Matcher matcher(structure, leaves.data(), objects.data());
  for (PyObject* value : arguments.values) {
    if (!matcher.Match(value)) return 0;
  }
  for (PyObject* leaf : leaves) Py_INCREF(leaf);
  for (PyObject* object : objects) Py_INCREF(object);
  call->leaves.swap(leaves);
  call->objects.swap(objects);
  call->owns = matcher.owns();
  call->traced = matcher.traced();
  const int equal = matcher.FinishDeferred();
  if (equal != 1) {
    Call dropped;
    dropped.leaves.swap(call->leaves);
    dropped.objects.swap(call->objects);
  }
  return equal;
}

int IsStaticRoot(JitFunction* self, Py_ssize_t position, Py_ssize_t nargs,
                 PyObject* names) {
  const Ref statics = Ref::Borrow(self->statics);
  if (PySet_GET_SIZE(statics.get()) == 0) return 0;
  if (position >= nargs) {
    return PySet_Contains(statics.get(),
                          PyTuple_GET_ITEM(names, position - nargs));
  }
  Ref key = Ref::Steal(PyLong_FromSsize_t(position));
  return key ? PySet_Contains(statics.get(), key.get()) : -1;
}

// Whether each argument is static; false with an error set on failure.
bool FindStaticRoots(JitFunction* self, const Arguments& arguments,
                     Py_ssize_t nargs, std::vector<bool>* is_static) {
  is_static->assign(arguments.values.size(), false);
  for (size_t i = 0; i < arguments.values.size(); ++i) {
    const int found = IsStaticRoot(self, static_cast<Py_ssize_t>(i), nargs,
                                   arguments.names.get());
    if (found < 0) return false;
    (*is_static)[i] = found;
  }
  return true;
}

std::optional<size_t> FingerprintOf(const Arguments& arguments,
                                    const std::vector<bool>& is_static) {
  Fingerprint fingerprint;
  for (size_t i = 0; i < arguments.values.size(); ++i) {
    if (!fingerprint.Add(arguments.values[i], is_static[i])) return {};
  }
  size_t hash = 0;
  if (!fingerprint.Finish(&hash)) return {};
  return hash;
}

// The entry with a structure; null where there is none, or with an error set.
std::shared_ptr<Entry> FindEntry(JitFunction* self, PyObject* structure,
                                 PyObject* names, size_t hash) {
  uint64_t version = 0;
  do {
    // Comparing may run Python code, and so other threads that add entries.
    version = self->cache->version();
    for (const std::shared_ptr<Entry>& entry : self->cache->Find(hash)) {
      if (!SameNames(entry->names.get(), names)) continue;
      const int equal =
          PyObject_RichCompareBool(entry->structure.get(), structure, Py_EQ);
      if (equal < 0) return nullptr;
      if (equal) return entry;
    }
  } while (version != self->cache->version());
  return nullptr;
}

// Finds the Variables of the leaves that an entry donates in place.
bool FindLenders(Entry* entry) {
  const Structure* structure = AsStructure(entry->structure.get());
  std::vector<int32_t> index_of(structure->num_leaves, -1);
  for (const Node& node : *structure->nodes) {
    if (node.kind == NodeKind::kVariable && node.leaf >= 0) {
      index_of[node.leaf] = node.index;
    }
  }
  entry->owners.assign(structure->num_indices, false);
  for (int32_t leaf : entry->donated) {
    const int32_t index = index_of[leaf];
    if (index < 0) {
      PyErr_SetString(PyExc_ValueError,
                      "What is updated in place must be a Variable.");
      return false;
    }
    entry->lenders.push_back(index);
    entry->owners[index] = true;
  }
  return true;
}

// Walks the arguments the slow way and finds or makes the entry for them.
std::shared_ptr<Entry> SlowEntry(JitFunction* self, const Arguments& arguments,
                                 const std::vector<bool>& is_static,
                                 std::optional<size_t> fingerprint,
                                 Call* call) {
  call->owns = false;
  call->traced = true;
  Flattener flattener(/*hash_statics=*/true);
  for (size_t i = 0; i < arguments.values.size(); ++i) {
    if (is_static[i] ? !flattener.AddStatic(arguments.values[i])
                     : !flattener.Add(arguments.values[i], Mode::kPytree)) {
      return nullptr;
    }
  }
  Ref structure = flattener.Finish();
  size_t hash = 0;
  if (!structure || !LookupHash(structure.get(), &hash)) return nullptr;
  for (Ref& leaf : flattener.leaves()) {
    call->leaves.push_back(Ref(leaf).release());
  }
  for (const Ref& object : flattener.objects()) {
    call->objects.push_back(Ref(object).release());
  }
  std::shared_ptr<Entry> found =
      FindEntry(self, structure.get(), arguments.names.get(), hash);
  if (PyErr_Occurred()) return nullptr;
  if (found) {
    self->cache->Use(found, fingerprint);
    return found;
  }

  Ref leaves = ToTuple(call->leaves);
  Ref objects = ToTuple(call->objects);
  if (!leaves || !objects) return nullptr;
  Ref no_names = Ref::Steal(PyTuple_New(0));
  PyObject* names = arguments.names ? arguments.names.get() : no_names.get();
  const Ref make_entry = Ref::Borrow(self->make_entry);
  Ref made;
  {
    ScopeBarrier barrier;
    CallFrame frame(AsStructure(structure.get()), call->objects.data(),
                    /*compiled=*/true);
    made = Ref::Steal(PyObject_CallFunctionObjArgs(
        make_entry.get(), structure.get(), leaves.get(), names, objects.get(),
        nullptr));
  }
  if (!made) return nullptr;
  JitEntry parts;
  if (!JitEntry::Read(made.get(), &parts)) return nullptr;
  auto entry = std::make_shared<Entry>();
  entry->structure = structure;
  entry->names = arguments.names;
  entry->compiled = Ref::Borrow(parts.function);
  if (parts.donated != Py_None) {
    Ref items = Ref::Steal(PySequence_Tuple(parts.donated));
    if (!items) return nullptr;
    std::vector<bool> is_donated(call->leaves.size());
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items.get()); ++i) {
      const long leaf = PyLong_AsLong(PyTuple_GET_ITEM(items.get(), i));
      if (leaf < 0 || leaf >= static_cast<long>(is_donated.size())) {
        if (!PyErr_Occurred()) {
          PyErr_SetString(PyExc_ValueError, "No such leaf to donate.");
        }
        return nullptr;
      }
      is_donated[leaf] = true;
    }
    for (size_t i = 0; i < is_donated.size(); ++i) {
      (is_donated[i] ? entry->donated : entry->kept)
          .push_back(static_cast<int32_t>(i));
    }
  }
  if (parts.in_place != Py_None) {
    entry->in_place = Ref::Borrow(parts.in_place);
    if (!FindLenders(entry.get())) return nullptr;
  }
  // Another thread may have made one meanwhile: both use that one, so that
  // jax compiles one function.
  found = FindEntry(self, structure.get(), arguments.names.get(), hash);
  if (PyErr_Occurred()) return nullptr;
  if (found) return found;
  self->cache->Insert(entry, hash, fingerprint);
  // Making it may have moved arrays to where the function wants them.
  Call moved;
  const int same = TryEntry(*entry, arguments, &moved);
  if (same < 0) return nullptr;
  if (same) {
    call->leaves.swap(moved.leaves);
    call->objects.swap(moved.objects);
    call->owns = moved.owns;
    call->traced = moved.traced;
  }
  return entry;
}

PyObject* Run(JitFunction* self, const Entry& entry, const Call& call) {
  const Ref copy_array = Ref::Borrow(self->copy_array);
  return RunEntry(reinterpret_cast<PyObject*>(self), copy_array.get(), entry,
                  call);
}

// Whether `__init__` has run, and the collector not yet.
bool CheckInitialised(JitFunction* self) {
  if (self->make_entry) return true;
  PyErr_SetString(PyExc_TypeError,
                  "A JitFunction must be initialised before it is called, but "
                  "its `__init__` has not run.");
  return false;
}

PyObject* JitVectorcall(PyObject* callable, PyObject* const* args,
                        size_t nargsf, PyObject* kwnames) {
  JitFunction* self = AsJit(callable);
  // What makes entries and what is compiled may be such a function as well.
  RecursionGuard guard(" while calling a JitFunction");
  if (!guard.entered() || !CheckInitialised(self)) return nullptr;
  const Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
  Arguments arguments;
  if (!GatherArguments(args, nargs, kwnames, &arguments)) return nullptr;
  Call call;
  const std::shared_ptr<Entry> front = self->cache->Front();
  if (front) {
    const int matched = TryEntry(*front, arguments, &call);
    if (matched < 0) return nullptr;
    if (matched) return Run(self, *front, call);
  }
  std::vector<bool> is_static;
  if (!FindStaticRoots(self, arguments, nargs, &is_static)) return nullptr;
  const std::optional<size_t> fingerprint = FingerprintOf(arguments, is_static);
  if (fingerprint) {
    for (const std::shared_ptr<Entry>& entry :
         self->cache->Find(*fingerprint)) {
      if (entry == front) continue;
      const int matched = TryEntry(*entry, arguments, &call);
      if (matched < 0) return nullptr;
      if (!matched) continue;
      self->cache->Use(entry, {});
      return Run(self, *entry, call);
    }
  }
  std::shared_ptr<Entry> entry =
      SlowEntry(self, arguments, is_static, fingerprint, &call);
  return entry ? Run(self, *entry, call) : nullptr;
}

PyObject* JitNew(PyTypeObject* type, PyObject*, PyObject*) {
  Ref statics = Ref::Steal(PyFrozenSet_New(nullptr));
  PyObject* self = statics ? type->tp_alloc(type, 0) : nullptr;
  if (!self) return nullptr;
  AsJit(self)->vectorcall = JitVectorcall;
  AsJit(self)->cache = new EntryCache();
  AsJit(self)->statics = statics.release();
  return self;
}

int JitInit(PyObject* self, PyObject* args, PyObject* kwargs) {
  const char* keywords[] = {"make_entry", "copy_array", "statics", nullptr};
  PyObject *make_entry, *copy_array, *statics;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO!:JitFunction",
                                   const_cast<char**>(keywords), &make_entry,
                                   &copy_array, &PyFrozenSet_Type, &statics)) {
    return -1;
  }
  auto set = [](PyObject*& slot, PyObject* value) {
    Py_INCREF(value);
    PyObject* old = slot;
    slot = value;
    Py_XDECREF(old);
  };
  set(AsJit(self)->make_entry, make_entry);
  set(AsJit(self)->copy_array, copy_array);
  set(AsJit(self)->statics, statics);
  return 0;
}

int JitTraverse(PyObject* self, visitproc visit, void* arg) {
  JitFunction* jit = AsJit(self);
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(jit->dict);
  Py_VISIT(jit->make_entry);
  Py_VISIT(jit->copy_array);
  Py_VISIT(jit->statics);
  if (!jit->cache) return 0;
  for (const std::shared_ptr<Entry>& entry : jit->cache->entries()) {
    // A running call holds the entry too: then it is reachable anyway.
    if (entry.use_count() > 1) continue;
    Py_VISIT(entry->structure.get());
    Py_VISIT(entry->names.get());
    Py_VISIT(entry->compiled.get());
    Py_VISIT(entry->in_place.get());
    Py_VISIT(entry->checked_plan.get());
  }
  return 0;
}

int JitClear(PyObject* self) {
  JitFunction* jit = AsJit(self);
  Py_CLEAR(jit->dict);
  Py_CLEAR(jit->make_entry);
  Py_CLEAR(jit->copy_array);
  if (jit->cache) jit->cache->Clear();
  return 0;
}

void JitDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  // It may be made of another, and so on.
  Py_TRASHCAN_BEGIN(self, JitDealloc);
  if (AsJit(self)->weaklist) PyObject_ClearWeakRefs(self);
  JitClear(self);
  Py_CLEAR(AsJit(self)->statics);
  delete AsJit(self)->cache;
  type->tp_free(self);
  Py_DECREF(type);
  Py_TRASHCAN_END;
}

PyObject* JitDescrGet(PyObject* self, PyObject* instance, PyObject*) {
  if (!instance || instance == Py_None) return Ref::Borrow(self).release();
  return PyMethod_New(self, instance);
}

PyObject* JitClearCache(PyObject* self, PyObject*) {
  AsJit(self)->cache->Clear();
  Py_RETURN_NONE;
}

PyObject* JitCacheSize(PyObject* self, PyObject*) {
  return PyLong_FromSize_t(AsJit(self)->cache->size());
}

// _prepare(*args, **kwargs): a Prepared, for lowering without running.
PyObject* JitPrepare(PyObject* callable, PyObject* const* args,
                     Py_ssize_t nargs, PyObject* kwnames) {
  JitFunction* self = AsJit(callable);
  if (!CheckInitialised(self)) return nullptr;
  Arguments arguments;
  if (!GatherArguments(args, nargs, kwnames, &arguments)) return nullptr;
  std::vector<bool> is_static;
  if (!FindStaticRoots(self, arguments, nargs, &is_static)) return nullptr;
  Call call;
  std::shared_ptr<Entry> entry = SlowEntry(
      self, arguments, is_static, FingerprintOf(arguments, is_static), &call);
  if (!entry) return nullptr;
  std::vector<int32_t> all(call.leaves.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
  const bool donates = !entry->donated.empty() && !entry->in_place;
  const std::vector<int32_t> given =
      donates ? entry->donated : std::vector<int32_t>();
  Ref kept = Pick(call, donates ? entry->kept : all);
  Ref donated = Pick(call, given);
  if (!kept || !donated) return nullptr;
  Ref operands = Ref::Steal(donates ? PyTuple_Pack(2, kept.get(), donated.get())
                                    : PyTuple_Pack(1, kept.get()));
  return NewRecord(g_prepared_type, {entry->compiled, operands, ToTuple(given)})
      .release();
}

PyMemberDef jit_members[] = {
    {"__dictoffset__", T_PYSSIZET, offsetof(JitFunction, dict), READONLY,
     nullptr},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(JitFunction, weaklist),
     READONLY, nullptr},
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(JitFunction, vectorcall),
     READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyGetSetDef jit_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr,
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef jit_methods[] = {
    {"clear_cache", JitClearCache, METH_NOARGS,
     "Forgets the compiled functions."},
    {"cache_clear", JitClearCache, METH_NOARGS,
     "`clear_cache` by the name that `jax.clear_caches` calls."},
    {"_cache_size", JitCacheSize, METH_NOARGS,
     "Number of structures that were compiled for."},
    {"_prepare", reinterpret_cast<PyCFunction>(JitPrepare),
     METH_FASTCALL | METH_KEYWORDS,
     "_prepare(*args, **kwargs): the call, Prepared and not made."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot jit_slots[] = {
    {Py_tp_doc, const_cast<char*>("A function compiled by graph structure.")},
    {Py_tp_new, reinterpret_cast<void*>(JitNew)},
    {Py_tp_init, reinterpret_cast<void*>(JitInit)},
    {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
    {Py_tp_dealloc, reinterpret_cast<void*>(JitDealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(JitTraverse)},
    {Py_tp_clear, reinterpret_cast<void*>(JitClear)},
    {Py_tp_descr_get, reinterpret_cast<void*>(JitDescrGet)},
    {Py_tp_members, jit_members},
    {Py_tp_getset, jit_getset},
    {Py_tp_methods, jit_methods},
    {0, nullptr},
};

PyType_Spec jit_spec = {"nnx.engine._engine.JitFunction", sizeof(JitFunction),
                        0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE |
                            Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
                        jit_slots};

}  // namespace

bool InitJit(PyObject* module) {
  Ref type = Ref::Steal(PyType_FromSpec(&jit_spec));
  return type && PyModule_AddObject(module, "JitFunction", type.release()) == 0;
}

}  // namespace nnx::engine
