#ifndef NNX_ENGINE_CC_SCOPES_H_
#define NNX_ENGINE_CC_SCOPES_H_

#include <Python.h>

namespace nnx::engine {

// Calls of Modules under a trace, each in a scope of jax that is named after
// where the Module is: below the Module that calls it, or below the arguments
// of the transform around.
//
// A name is looked up by identity when the call is made, so no table of names
// can be out of date; a Module that is found nowhere has the name of its class.

// Hides the Modules that are being called. A compiled function is traced once
// and may be called from many places: names inside are those of its arguments.
class ScopeBarrier {
 public:
  ScopeBarrier();
  ~ScopeBarrier();
  ScopeBarrier(const ScopeBarrier&) = delete;
  ScopeBarrier& operator=(const ScopeBarrier&) = delete;

 private:
  PyObject* caller_;
};

// Adds `name_calls`.
bool InitScopes(PyObject* module);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_SCOPES_H_
