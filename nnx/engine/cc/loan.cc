#include "nnx/engine/cc/loan.h"

#include <chrono>
#include <thread>
#include <utility>

#include "nnx/engine/cc/runtime.h"

namespace nnx::engine {

PyTypeObject* g_loan_type = nullptr;
PyObject* g_not_in_place = nullptr;

namespace {

thread_local Lending* innermost = nullptr;

// The calls that lend, of all threads, under the GIL.
int num_lending = 0;

// Since 3.12 the collector runs between the steps of Python code alone.
constexpr bool kMustStopCollector = PY_VERSION_HEX < 0x030C0000;
// What the collector goes on with after them; a tuple.
PyObject* threshold_after = nullptr;

// The threshold of the youngest generation, as a tuple of it alone.
Ref Threshold() {
  Ref all = Ref::Steal(PyObject_CallNoArgs(GetRuntime().get_threshold));
  return all ? Ref::Steal(PyTuple_GetSlice(all.get(), 0, 1)) : Ref();
}

bool IsZero(PyObject* threshold) {
  return PyLong_AsLong(PyTuple_GET_ITEM(threshold, 0)) == 0;
}

void SetThreshold(PyObject* threshold) {
  if (!Ref::Steal(PyObject_CallObject(GetRuntime().set_threshold, threshold))) {
    PyErr_Clear();
  }
}

void StopCollector(Ref threshold) {
  static PyObject* never = Py_BuildValue("(i)", 0);
  threshold_after = threshold.release();
  SetThreshold(never);
}

void ResumeCollector() {
  const Ref after = Ref::Steal(std::exchange(threshold_after, nullptr));
  PyObject *type, *error, *traceback;
  PyErr_Fetch(&type, &error, &traceback);
  const Ref now = Threshold();
  if (!now) PyErr_Clear();
  // Another thread may have set it meanwhile.
  if (now && IsZero(now.get())) SetThreshold(after.get());
  PyErr_Restore(type, error, traceback);
}

bool IsFinalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

int IsDeleted(PyObject* array) {
  Ref deleted =
      Ref::Steal(PyObject_CallMethodNoArgs(array, GetRuntime().s_is_deleted));
  return deleted ? PyObject_IsTrue(deleted.get()) : -1;
}

Loan* AsLoan(PyObject* self) { return reinterpret_cast<Loan*>(self); }

void LoanDealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(AsLoan(self)->items);
  Py_XDECREF(AsLoan(self)->kept);
  type->tp_free(self);
  Py_DECREF(type);
}

PyType_Slot loan_slots[] = {
    {Py_tp_doc, const_cast<char*>("Arrays that a call in place gives up.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(LoanDealloc)},
    {0, nullptr},
};

PyType_Spec loan_spec = {"nnx.engine._engine.Loan", sizeof(Loan), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                         loan_slots};

bool CheckLoan(PyObject* self) {
  if (PyObject_TypeCheck(self, g_loan_type)) return true;
  PyErr_SetString(PyExc_TypeError, "`loan` must be a Loan.");
  return false;
}

// loan(arrays, lent) -> Loan
PyObject* LoanFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 || !PyTuple_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError,
                    "`loan` takes a tuple and whether its arrays are lent.");
    return nullptr;
  }
  const int lent = PyObject_IsTrue(args[1]);
  Ref self = lent < 0 ? Ref() : NewLoan(0, nullptr);
  if (!self) return nullptr;
  AsLoan(self.get())->lent = lent;
  Py_INCREF(args[0]);
  Py_SETREF(AsLoan(self.get())->items, args[0]);
  return self.release();
}

// loan_flatten(loan) -> (arrays, None)
PyObject* LoanFlatten(PyObject*, PyObject* self) {
  if (!CheckLoan(self)) return nullptr;
  Loan* loan = AsLoan(self);
  const Ref items = Ref::Borrow(loan->items);
  const bool first = loan->openings++ == 0;
  if (!first) Lending::EndOf(loan);  // the arrays themselves are not needed
  if (!first && loan->kept) {
    // A program for arrays of another kind than before, or in another place.
    const Ref check_loan = Ref::Borrow(GetRuntime().check_loan);
    const Ref kept = Ref::Borrow(loan->kept);
    if (!Ref::Steal(PyObject_CallFunctionObjArgs(check_loan.get(), kept.get(),
                                                 items.get(), nullptr))) {
      return nullptr;
    }
  }
  if (first || !loan->lent) return PyTuple_Pack(2, items.get(), Py_None);
  const Ref copy_array = Ref::Borrow(GetRuntime().copy_array);
  const Py_ssize_t size = PyTuple_GET_SIZE(items.get());
  Ref copies = Ref::Steal(PyTuple_New(size));
  if (!copies) return nullptr;
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* copy =
        PyObject_CallOneArg(copy_array.get(), PyTuple_GET_ITEM(items.get(), i));
    if (!copy) return nullptr;
    PyTuple_SET_ITEM(copies.get(), i, copy);
  }
  return PyTuple_Pack(2, copies.get(), Py_None);
}

// loan_unflatten(None, children) -> tuple
PyObject* LoanUnflatten(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2) {
    PyErr_SetString(PyExc_TypeError, "`loan_unflatten` takes two arguments.");
    return nullptr;
  }
  return PySequence_Tuple(args[1]);
}

PyMethodDef loan_functions[] = {
    {"loan", reinterpret_cast<PyCFunction>(LoanFunction), METH_FASTCALL,
     "loan(arrays, lent): a Loan."},
    {"loan_flatten", LoanFlatten, METH_O,
     "(arrays, None) of a Loan: after the first time copies, if it is lent."},
    {"loan_unflatten", reinterpret_cast<PyCFunction>(LoanUnflatten),
     METH_FASTCALL, "The tuple of what is in the place of the arrays."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

Ref NewLoan(Py_ssize_t size, PyObject* kept) {
  Ref items = Ref::Steal(PyTuple_New(size));
  Ref self = Ref::Steal(g_loan_type->tp_alloc(g_loan_type, 0));
  if (!items || !self) return Ref();
  for (Py_ssize_t i = 0; i < size; ++i) {
    Py_INCREF(Py_None);
    PyTuple_SET_ITEM(items.get(), i, Py_None);
  }
  AsLoan(self.get())->items = items.release();
  AsLoan(self.get())->kept = Ref::Borrow(kept).release();
  return self;
}

bool Lending::Prepare() {
  if (!kMustStopCollector) return true;
  threshold_ = Threshold();
  return static_cast<bool>(threshold_);
}

void Lending::Begin(const Loan* loan, std::vector<Lent> lent) {
  loan_ = loan;
  lent_ = std::move(lent);
  for (const Lent& one : lent_) one.variable->hold = Hold::kLent;
  if (num_lending++ == 0 && kMustStopCollector) {
    StopCollector(std::move(threshold_));
  }
  previous_ = std::exchange(innermost, this);
  active_ = true;
}

void Lending::End() {
  if (!active_) return;
  active_ = false;
  innermost = previous_;
  for (const Lent& one : lent_) {
    if (one.holds()) one.variable->hold = Hold::kShared;
  }
  if (--num_lending == 0 && kMustStopCollector) ResumeCollector();
}

void Lending::EndOf(const Loan* loan) {
  if (innermost && innermost->loan_ == loan) innermost->End();
}

bool Lending::Has(const VariableObject* variable) {
  for (const Lending* lending = innermost; lending;
       lending = lending->previous_) {
    for (const Lent& one : lending->lent_) {
      if (one.variable == variable && one.holds()) return true;
    }
  }
  return false;
}

bool ShareSlow(VariableObject* variable) {
  const Ref copy_array = Ref::Borrow(GetRuntime().copy_array);
  while (variable->hold == Hold::kLent) {
    const Ref array = Ref::Borrow(variable->raw);
    Ref copy = Ref::Steal(PyObject_CallOneArg(copy_array.get(), array.get()));
    if (!copy && !PyErr_ExceptionMatches(PyExc_Exception)) return false;
    if (variable->hold != Hold::kLent || variable->raw != array.get()) {
      // Written meanwhile.
      PyErr_Clear();
      continue;
    }
    if (copy) {
      SetRaw(variable, copy.get());
      return true;
    }
    {
      const KeptError error;
      const int deleted = IsDeleted(array.get());
      if (deleted < 0) PyErr_Clear();
      // At the end of the process other threads do not go on.
      if (deleted <= 0 || Lending::Has(variable) || IsFinalizing()) {
        return false;
      }
    }
    // The call runs, and will soon write what it has made of the array. It runs
    // no Python code, and so waits for nobody but the GIL.
    PyErr_Clear();
    Py_BEGIN_ALLOW_THREADS;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    Py_END_ALLOW_THREADS;
    if (PyErr_CheckSignals() < 0) return false;
  }
  variable->hold = Hold::kShared;
  return true;
}

bool InitLoan(PyObject* module) {
  Ref type = Ref::Steal(PyType_FromSpec(&loan_spec));
  if (!type) return false;
  g_loan_type = reinterpret_cast<PyTypeObject*>(type.get());
  g_not_in_place =
      PyErr_NewException("nnx.engine._engine.NotInPlace", nullptr, nullptr);
  if (!g_not_in_place) return false;
  Py_INCREF(g_not_in_place);
  return PyModule_AddFunctions(module, loan_functions) == 0 &&
         PyModule_AddObject(module, "NotInPlace", g_not_in_place) == 0 &&
         PyModule_AddObject(module, "Loan", type.release()) == 0;
}

}  // namespace nnx::engine
