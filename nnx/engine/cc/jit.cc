#include "nnx/engine/cc/jit.h"

#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <unordered_set>
#include <vector>

#include "nnx/engine/cc/call_frame.h"
#include "nnx/engine/cc/entry_cache.h"
#include "nnx/engine/cc/fingerprint.h"
#include "nnx/engine/cc/flatten.h"
#include "nnx/engine/cc/lift.h"
#include "nnx/engine/cc/loan.h"
#include "nnx/engine/cc/match.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/plan.h"
#include "nnx/engine/cc/runtime.h"
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

// Owned references to the leaves and objects of one call.
struct Call {
  std::vector<PyObject*> leaves;
  std::vector<PyObject*> objects;
  bool owns = false;   // one of the Variables owns its array
  bool traced = true;  // one of them belongs to a trace, as far as is known
  ~Call() {
    for (PyObject* leaf : leaves) Py_XDECREF(leaf);
    for (PyObject* object : objects) Py_XDECREF(object);
  }
};

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

// The leaves with the given numbers, as a tuple.
Ref Pick(const Call& call, const std::vector<int32_t>& numbers) {
  return ToTuple(numbers, [&call](int32_t number) {
    return Ref::Borrow(call.leaves[number]);
  });
}

// An array that is donated twice, or donated and also kept, is copied: the
// caller asked for his Variables to be donated, and two of them may share one
// array.
Ref PickDonated(JitFunction* self, const Call& call, const Entry& entry) {
  Ref donated = Pick(call, entry.donated);
  if (!donated) return Ref();
  std::unordered_set<PyObject*> used;
  used.reserve(call.leaves.size());
  for (int32_t leaf : entry.kept) used.insert(call.leaves[leaf]);
  for (size_t i = 0; i < entry.donated.size(); ++i) {
    PyObject* leaf = call.leaves[entry.donated[i]];
    if (used.insert(leaf).second) continue;
    const Ref copy_array = Ref::Borrow(self->copy_array);
    PyObject* copy = PyObject_CallOneArg(copy_array.get(), leaf);
    if (!copy) return Ref();
    PyTuple_SetItem(donated.get(), static_cast<Py_ssize_t>(i), copy);
  }
  return donated;
}

// Lets the method `_explain`, where a class has one, add to the error that is
// set what it knows of the arguments.
void Explain(JitFunction* self, const Entry& entry, const Call& call) {
  const KeptError error;
  Ref explain = Ref::Steal(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(self), "_explain"));
  Ref leaves = explain ? ToTuple(call.leaves) : Ref();
  Ref names = entry.names ? entry.names : Ref::Steal(PyTuple_New(0));
  if (leaves && names) {
    Ref::Steal(PyObject_CallFunctionObjArgs(explain.get(), error.get(),
                                            entry.structure.get(), names.get(),
                                            leaves.get(), nullptr));
  }
  PyErr_Clear();
}

// Lets others have the arrays of all Variables of a call.
bool ShareAll(const Call& call) {
  for (PyObject* object : call.objects) {
    if (IsVariable(object) && !Share(AsVariable(object))) return false;
  }
  return true;
}

// Whether compiled calls run as such here and now: not under a trace, nor where
// jax runs a function as it is written, or may do so after a NaN.
int MayLend() {
  const Ref may_lend = Ref::Borrow(GetRuntime().may_lend);
  if (!may_lend) return 0;
  Ref answer = Ref::Steal(PyObject_CallNoArgs(may_lend.get()));
  return answer ? PyObject_IsTrue(answer.get()) : -1;
}

// Whether nobody but a Variable and this call has the array of a leaf. It runs
// no Python code, so what it says holds until that runs.
bool CanLend(const Entry& entry, const Call& call, size_t i) {
  PyObject* leaf = call.leaves[entry.donated[i]];
  const VariableObject* variable = AsVariable(call.objects[entry.lenders[i]]);
  return !call.traced && variable->hold == Hold::kOwn &&
         variable->raw == leaf && !(variable->hook_flags & kBoxed) &&
         Py_REFCNT(leaf) == 2;
}

// Whether to take the program that updates in place. Where others have most of
// the arrays, call after call, it is no gain to copy them first, and the plain
// program is worth its compilation.
bool PrefersInPlace(const Entry& entry, const Call& call) {
  constexpr int kMaxCopying = 2;
  size_t lendable = 0;
  for (size_t i = 0; i < entry.donated.size(); ++i) {
    lendable += CanLend(entry, call, i);
  }
  if (2 * lendable >= entry.donated.size()) {
    entry.copying = 0;
    return true;
  }
  if (entry.copying >= kMaxCopying) return false;
  ++entry.copying;
  return true;
}

// Calls the program that updates in place. What cannot be lent is copied: the
// program has arrays of its own in any case.
Ref CallInPlace(const Entry& entry, const Call& call, Lending* lending) {
  const size_t size = entry.donated.size();
  Ref kept = Pick(call, entry.kept);
  Ref loan = kept ? NewLoan(static_cast<Py_ssize_t>(size), kept.get()) : Ref();
  if (!loan) return Ref();
  const Ref copy_array = Ref::Borrow(GetRuntime().copy_array);
  std::vector<Ref> items(size);
  std::vector<Lent> lent;
  lent.reserve(size);
  // Copying runs Python code, after which somebody may have read what could be
  // lent before: until a round copies nothing.
  for (bool copied = true; copied;) {
    copied = false;
    for (size_t i = 0; i < size; ++i) {
      if (items[i] || CanLend(entry, call, i)) continue;
      items[i] = Ref::Steal(
          PyObject_CallOneArg(copy_array.get(), call.leaves[entry.donated[i]]));
      if (!items[i]) return Ref();
      copied = true;
    }
  }
  auto* parts = reinterpret_cast<Loan*>(loan.get());
  for (size_t i = 0; i < size; ++i) {
    if (!items[i]) {
      PyObject* array = call.leaves[entry.donated[i]];
      items[i] = Ref::Borrow(array);
      lent.push_back({AsVariable(call.objects[entry.lenders[i]]), array});
    }
    PyTuple_SetItem(parts->items, static_cast<Py_ssize_t>(i),
                    items[i].release());
  }
  if (!lent.empty()) {
    parts->lent = true;
    lending->Begin(std::move(lent));
  }
  return Ref::Steal(PyObject_CallFunctionObjArgs(
      entry.in_place.get(), kept.get(), loan.get(), nullptr));
}

// Calls what was compiled.
Ref CallEntry(JitFunction* self, const Entry& entry, const Call& call,
              bool in_place, Lending* lending) {
  ScopeBarrier barrier;
  CallFrame frame(AsStructure(entry.structure.get()), call.objects.data(),
                  /*compiled=*/true);
  if (in_place) return CallInPlace(entry, call, lending);
  if (entry.donated.empty() || entry.in_place) {
    Ref leaves = ToTuple(call.leaves);
    if (!leaves) return Ref();
    return Ref::Steal(PyObject_CallOneArg(entry.compiled.get(), leaves.get()));
  }
  Ref donated = PickDonated(self, call, entry);
  Ref kept = Pick(call, entry.kept);
  if (!donated || !kept) return Ref();
  return Ref::Steal(PyObject_CallFunctionObjArgs(
      entry.compiled.get(), kept.get(), donated.get(), nullptr));
}

// Whether somebody else has an output as well: then it is an input, and leaves
// the engine with the result, or is in two Variables.
bool IsForwarding(PyObject* outputs) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(outputs); ++i) {
    if (Py_REFCNT(PyTuple_GET_ITEM(outputs, i)) > 1) return true;
  }
  return false;
}

// Calls the program for the structure of the arguments, in place where it can.
Ref CallBest(JitFunction* self, const Entry& entry, const Call& call,
             bool may_lend, Lending* lending) {
  if (may_lend && entry.in_place && !entry.only_plain &&
      PrefersInPlace(entry, call)) {
    Ref packed = CallEntry(self, entry, call, /*in_place=*/true, lending);
    if (packed || !PyErr_ExceptionMatches(g_not_in_place)) return packed;
    // Arrays of other shapes, for which the function does other things.
    PyErr_Clear();
    lending->End();
    entry.only_plain = true;
  }
  return CallEntry(self, entry, call, /*in_place=*/false, lending);
}

PyObject* RunEntry(JitFunction* self, const Entry& entry, const Call& call) {
  bool may_lend = false;
  if (entry.in_place || call.owns) {
    const int answer = MayLend();
    if (answer < 0) return nullptr;
    // A function of Python may do anything with what it is given.
    may_lend = answer && !PyFunction_Check(entry.compiled.get());
    if (!may_lend && !ShareAll(call)) return nullptr;
  }
  Lending lending;
  Ref packed = CallBest(self, entry, call, may_lend, &lending);
  if (!packed) {
    lending.End();
    if (call.owns) {  // the error may hold on to what it has seen
      const KeptError error;
      if (!ShareAll(call)) PyErr_Clear();
    }
    Explain(self, entry, call);
    return nullptr;
  }
  if (!PyObject_TypeCheck(packed.get(), g_packed_type)) {
    PyErr_Format(PyExc_TypeError,
                 "The compiled function must return a Packed, but got %s.",
                 Py_TYPE(packed.get())->tp_name);
    return nullptr;
  }
  auto* result = reinterpret_cast<Packed*>(packed.get());
  if (result->plan != entry.checked_plan.get() &&
      !CheckApplies(result->plan, call.objects.data(), call.objects.size(),
                    call.leaves.size())) {
    return nullptr;
  }
  PyObject* const* outputs = PySequence_Fast_ITEMS(result->outputs);
  const Plan::Data& plan = PlanData(result->plan);
  const bool forwards = call.owns && IsForwarding(result->outputs);
  // Until what was lent is written nothing may run Python code, and so nothing
  // may ask for the trace: there is none, also of the Variables.
  const bool written =
      may_lend && entry.in_place && !call.traced && plan.values_only;
  if (written) {
    WriteValues(plan, call.objects.data(), outputs, &entry.owners);
  }
  lending.End();
  if (result->plan != entry.checked_plan.get()) {
    entry.checked_plan = Ref::Borrow(result->plan);
  }
  if (forwards && !ShareAll(call)) return nullptr;
  return (written ? BuildResult(plan, call.objects.data(), call.leaves.data(),
                                outputs)
                  : Apply(result->plan, call.objects.data(), call.leaves.data(),
                          outputs))
      .release();
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
  if (!CheckInitialised(self)) return nullptr;
  const Py_ssize_t nargs = PyVectorcall_NARGS(nargsf);
  Arguments arguments;
  if (!GatherArguments(args, nargs, kwnames, &arguments)) return nullptr;
  Call call;
  const std::shared_ptr<Entry> front = self->cache->Front();
  if (front) {
    const int matched = TryEntry(*front, arguments, &call);
    if (matched < 0) return nullptr;
    if (matched) return RunEntry(self, *front, call);
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
      return RunEntry(self, *entry, call);
    }
  }
  std::shared_ptr<Entry> entry =
      SlowEntry(self, arguments, is_static, fingerprint, &call);
  return entry ? RunEntry(self, *entry, call) : nullptr;
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
