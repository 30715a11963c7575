#include "nnx/engine/cc/jit_call.h"

#include <cstddef>
#include <unordered_set>
#include <utility>

#include "nnx/engine/cc/call_frame.h"
#include "nnx/engine/cc/lift.h"
#include "nnx/engine/cc/loan.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/plan.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/scopes.h"
#include "nnx/engine/cc/structure.h"
#include "nnx/engine/cc/tuples.h"

namespace nnx::engine {

Ref Pick(const Call& call, const std::vector<int32_t>& numbers) {
  return ToTuple(numbers, [&call](int32_t number) {
    return Ref::Borrow(call.leaves[number]);
  });
}

namespace {

// An array that is donated twice, or donated and also kept, is copied: the
// caller asked for his Variables to be donated, and two of them may share one
// array.
Ref PickDonated(PyObject* copy_array, const Call& call, const Entry& entry) {
  Ref donated = Pick(call, entry.donated);
  if (!donated) return Ref();
  std::unordered_set<PyObject*> used;
  used.reserve(call.leaves.size());
  for (int32_t leaf : entry.kept) used.insert(call.leaves[leaf]);
  for (size_t i = 0; i < entry.donated.size(); ++i) {
    PyObject* leaf = call.leaves[entry.donated[i]];
    if (used.insert(leaf).second) continue;
    PyObject* copy = PyObject_CallOneArg(copy_array, leaf);
    if (!copy) return Ref();
    PyTuple_SetItem(donated.get(), static_cast<Py_ssize_t>(i), copy);
  }
  return donated;
}

// Lets the method `_explain`, where a class has one, add to the error that is
// set what it knows of the arguments.
void Explain(PyObject* function, const Entry& entry, const Call& call) {
  const KeptError error;
  Ref explain = Ref::Steal(PyObject_GetAttrString(function, "_explain"));
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
    if (!lending->Prepare()) return Ref();
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
    lending->Begin(parts, std::move(lent));
  }
  return Ref::Steal(PyObject_CallFunctionObjArgs(
      entry.in_place.get(), kept.get(), loan.get(), nullptr));
}

// Calls what was compiled.
Ref CallEntry(PyObject* copy_array, const Entry& entry, const Call& call,
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
  Ref donated = PickDonated(copy_array, call, entry);
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
Ref CallBest(PyObject* copy_array, const Entry& entry, const Call& call,
             bool may_lend, Lending* lending) {
  if (may_lend && entry.in_place && !entry.only_plain &&
      PrefersInPlace(entry, call)) {
    Ref packed = CallEntry(copy_array, entry, call, /*in_place=*/true, lending);
    if (packed || !PyErr_ExceptionMatches(g_not_in_place)) return packed;
    // Arrays of other shapes, for which the function does other things.
    PyErr_Clear();
    lending->End();
    entry.only_plain = true;
  }
  return CallEntry(copy_array, entry, call, /*in_place=*/false, lending);
}

}  // namespace

PyObject* RunEntry(PyObject* function, PyObject* copy_array, const Entry& entry,
                   const Call& call) {
  bool may_lend = false;
  if (entry.in_place || call.owns) {
    const int answer = MayLend();
    if (answer < 0) return nullptr;
    // Anything else that is called may do anything with what it is given.
    may_lend =
        answer && Py_TYPE(entry.compiled.get()) == GetRuntime().jitted_type;
    if (!may_lend && !ShareAll(call)) return nullptr;
  }
  Lending lending;
  Ref packed = CallBest(copy_array, entry, call, may_lend, &lending);
  if (!packed) {
    lending.End();
    if (call.owns) {  // the error may hold on to what it has seen
      const KeptError error;
      if (!ShareAll(call)) PyErr_Clear();
    }
    Explain(function, entry, call);
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

}  // namespace nnx::engine
