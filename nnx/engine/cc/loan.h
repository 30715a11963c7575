#ifndef NNX_ENGINE_CC_LOAN_H_
#define NNX_ENGINE_CC_LOAN_H_

#include <Python.h>

#include <vector>

#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// The arrays that a call in place gives up, as an argument for jax: a pytree
// node of them. Where jax finds its compiled program, it opens the argument
// once and runs, and no Python code runs from there until the call is over.
// Where it finds none, Python code follows, which may be interrupted with the
// arrays used up. It opens the argument again: then it has copies.
struct Loan {
  PyObject_HEAD PyObject* items;  // tuple of arrays, filled before use
  PyObject* kept;                 // tuple of the other arguments, or null
  bool lent;                      // some of them are of Variables
  int openings;
};
extern PyTypeObject* g_loan_type;
// What the function of a Loan raises, before anything runs, where it cannot
// update in place after all.
extern PyObject* g_not_in_place;

// A Loan of `size` items, which are None, beside the other arguments, if any.
Ref NewLoan(Py_ssize_t size, PyObject* kept);

// A Variable, and the array of it that a call has.
struct Lent {
  VariableObject* variable;
  PyObject* array;

  // Not after somebody has given the Variable another array, which may be lent
  // to another call by now.
  bool holds() const {
    return variable->hold == Hold::kLent && variable->raw == array;
  }
};

// What Variables have lent to a call of this thread, from `Begin` until `End`.
// Meanwhile the collector does not run by itself: before Python 3.12 it would
// do so in between, and run Python code. It is its threshold that says so:
// other threads switch it off and on, and would find it off.
class Lending {
 public:
  Lending() = default;
  Lending(const Lending&) = delete;
  Lending& operator=(const Lending&) = delete;
  ~Lending() { End(); }

  // To be called right before what decides to lend, as it may run Python code.
  // False with an error set on failure.
  bool Prepare();
  // The caller holds the Loan, the Variables and their arrays.
  void Begin(const Loan* loan, std::vector<Lent> lent);
  // What has not been written is as it was. Runs no Python code.
  void End();
  bool active() const { return active_; }

  // Whether a call of this thread has the array of a Variable.
  static bool Has(const VariableObject* variable);
  // Ends that of a Loan, if this thread has it.
  static void EndOf(const Loan* loan);

 private:
  bool active_ = false;
  const Loan* loan_ = nullptr;
  std::vector<Lent> lent_;
  Ref threshold_;  // the collector's, as arguments for setting it
  Lending* previous_ = nullptr;
};

// Adds Loan and how jax opens it to `module`.
bool InitLoan(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_LOAN_H_
