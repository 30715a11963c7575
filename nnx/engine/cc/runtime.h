#ifndef NNX_ENGINE_CC_RUNTIME_H_
#define NNX_ENGINE_CC_RUNTIME_H_

#include <Python.h>

#include <string>

namespace nnx::engine {

// What the engine needs to know of the Python side. Nothing is imported by name
// from C++: `configure` hands the objects over once, when `nnx` is
// imported, and they live as long as the process.
struct Runtime {
  // Object whose attribute `trace` is JAX's current trace, and the trace that
  // is current outside of all transformations.
  PyObject* trace_context = nullptr;
  PyObject* eval_trace = nullptr;
  // (object) -> exception to raise when it is changed from another trace.
  PyObject* trace_error = nullptr;
  // (type) -> True: instances are array leaves; False: they are scalars or the
  // like, never a pytree node; None: a registered pytree node, or static;
  // Ellipsis: objects of another library's graphs.
  PyObject* is_array_type = nullptr;
  // (value) -> OpenedPytree of a registered pytree node, or None.
  PyObject* flatten_pytree = nullptr;
  // (static value) -> what it holds, hashable; None if it holds data.
  PyObject* freeze_static = nullptr;
  // (old, value, path, check_shapes) -> the value of a Variable, of what a
  // checkpoint holds in the place of it.
  PyObject* restored_value = nullptr;
  // Stands for an array of which no more is known, in `old`.
  PyObject* restored_leaf = nullptr;
  // (path, given, wanted) -> the text of the error for an array of a shape that
  // is not wanted.
  PyObject* shape_message = nullptr;
  // (name) -> a context in which jax names what is traced.
  PyObject* named_scope = nullptr;
  // Object whose attribute `named_scopes` says whether to use it.
  PyObject* settings = nullptr;
  // (error): notes down in which Module it was raised.
  PyObject* explain_error = nullptr;
  // (array) -> a copy of it, also under a trace.
  PyObject* copy_array = nullptr;
  // (the arguments that stay, those of a Loan): raises NotInPlace where the
  // arrays are not all in one place where that works.
  PyObject* check_loan = nullptr;
  // () -> whether a compiled call runs here and now as such, so that Variables
  // may be lent to it.
  PyObject* may_lend = nullptr;
  // () -> the thresholds of the collector, and what sets the first of them.
  PyObject* get_threshold = nullptr;
  PyObject* set_threshold = nullptr;
  // (value) -> a mutable array of it.
  PyObject* new_ref = nullptr;
  // (value) -> the array in a mutable array or box; any other value itself.
  PyObject* unboxed = nullptr;
  // The concrete array type of JAX: the one checked first.
  PyTypeObject* array_type = nullptr;
  // That of functions that JAX has compiled.
  PyTypeObject* jitted_type = nullptr;
  // Those of mutable arrays, which have an identity, and of traced values. What
  // of these stands for a mutable array, `isinstance` tells.
  PyTypeObject* ref_type = nullptr;
  PyTypeObject* tracer_type = nullptr;
  // Classes of the Python layers above.
  PyTypeObject* variable_metadata = nullptr;
  PyTypeObject* attribute_marker = nullptr;
  PyTypeObject* state = nullptr;
  PyTypeObject* structure = nullptr;  // NodeDef
  // What `structure` must derive from, as the engine makes its instances.
  PyTypeObject* structure_base = nullptr;
  // Directory prefix of the library: frames below it are never the line a user
  // wrote.
  std::string library_prefix;
  // The same for JAX's.
  std::string jax_prefix;

  // Interned attribute names.
  PyObject* s_trace = nullptr;
  PyObject* s_named_scopes = nullptr;
  PyObject* s_enter = nullptr;
  PyObject* s_exit = nullptr;
  PyObject* s_mapping = nullptr;
  PyObject* s_init_slow = nullptr;
  PyObject* s_get_raw_slow = nullptr;
  PyObject* s_set_raw_slow = nullptr;
  PyObject* s_write_raw_slow = nullptr;
  PyObject* s_copy_box = nullptr;
  PyObject* s_assign_slow = nullptr;
  PyObject* s_refresh_metadata = nullptr;
  PyObject* s_get_value_slow = nullptr;
  PyObject* s_set_value_slow = nullptr;
  PyObject* s_getitem_slow = nullptr;
  PyObject* s_setitem_slow = nullptr;
  PyObject* s_delitem_slow = nullptr;
  PyObject* s_update_hook_flags = nullptr;
  PyObject* s_getattr_slow = nullptr;
  PyObject* s_new = nullptr;
  PyObject* s_setattr_slow = nullptr;
  PyObject* s_delattr_slow = nullptr;
  PyObject* s_class_hook_flags = nullptr;
  PyObject* s_setattr_flags = nullptr;
  PyObject* s_class_statuses = nullptr;
  PyObject* s_fields = nullptr;
  PyObject* s_is_deleted = nullptr;
  PyObject* s_aval = nullptr;
  PyObject* s_shape = nullptr;
  PyObject* s_fixed_shape = nullptr;
};

Runtime& GetRuntime();

// Creates the interned names. Returns false with a Python error set on failure.
bool InitRuntime();

// Keyword-only callable `configure(...)` of the module.
PyObject* Configure(PyObject* module, PyObject* args, PyObject* kwargs);

// JAX's current trace, or null (no error) while evaluation is not traced.
// Returns false with a Python error set when it cannot be read.
bool CurrentTrace(PyObject** trace);  // new reference

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_RUNTIME_H_
