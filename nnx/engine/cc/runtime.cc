#include "nnx/engine/cc/runtime.h"

#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

Runtime& GetRuntime() {
  static Runtime* runtime = new Runtime();
  return *runtime;
}

bool InitRuntime() {
  Runtime& rt = GetRuntime();
  struct Name {
    PyObject** slot;
    const char* text;
  };
  const Name names[] = {
      {&rt.s_trace, "trace"},
      {&rt.s_mapping, "_mapping"},
      {&rt.s_init_slow, "_init_slow"},
      {&rt.s_get_value_slow, "_get_value_slow"},
      {&rt.s_set_value_slow, "_set_value_slow"},
      {&rt.s_getitem_slow, "_getitem_slow"},
      {&rt.s_setitem_slow, "_setitem_slow"},
      {&rt.s_delitem_slow, "_delitem_slow"},
      {&rt.s_update_hook_flags, "_update_hook_flags"},
      {&rt.s_getattr_slow, "_getattr_slow"},
      {&rt.s_setattr_slow, "_setattr_slow"},
      {&rt.s_delattr_slow, "_delattr_slow"},
      {&rt.s_class_hook_flags, "_class_hook_flags"},
      {&rt.s_setattr_flags, "_setattr_flags"},
      {&rt.s_class_statuses, "_class_statuses"},
      {&rt.s_fields, "_fields"},
      {&rt.s_aval, "aval"},
      {&rt.s_shape, "shape"},
      {&rt.s_fixed_shape, "_fixed_shape"},
  };
  for (const Name& name : names) {
    if (*name.slot) continue;
    *name.slot = PyUnicode_InternFromString(name.text);
    if (!*name.slot) return false;
  }
  return true;
}

PyObject* Configure(PyObject*, PyObject* args, PyObject* kwargs) {
  Runtime& rt = GetRuntime();
  const char* keywords[] = {"trace_context",
                            "eval_trace",
                            "trace_error",
                            "is_array_type",
                            "flatten_pytree",
                            "array_type",
                            "variable_metadata",
                            "attribute_marker",
                            "state",
                            "structure",
                            "library_prefix",
                            "freeze_static",
                            "restored_value",
                            "shape_message",
                            "restored_leaf",
                            "jax_prefix",
                            nullptr};
  PyObject *trace_context = nullptr, *eval_trace = nullptr,
           *trace_error = nullptr, *is_array_type = nullptr,
           *flatten_pytree = nullptr, *array_type = nullptr,
           *variable_metadata = nullptr, *attribute_marker = nullptr,
           *state = nullptr, *structure = nullptr, *freeze_static = nullptr,
           *restored_value = nullptr, *shape_message = nullptr,
           *restored_leaf = nullptr;
  const char *library_prefix = nullptr, *jax_prefix = nullptr;
  if (!PyArg_ParseTupleAndKeywords(
          args, kwargs, "|$OOOOOO!O!O!O!O!sOOOOs:configure",
          const_cast<char**>(keywords), &trace_context, &eval_trace,
          &trace_error, &is_array_type, &flatten_pytree, &PyType_Type,
          &array_type, &PyType_Type, &variable_metadata, &PyType_Type,
          &attribute_marker, &PyType_Type, &state, &PyType_Type, &structure,
          &library_prefix, &freeze_static, &restored_value, &shape_message,
          &restored_leaf, &jax_prefix)) {
    return nullptr;
  }
  if (structure && !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(structure),
                                     rt.structure_base)) {
    PyErr_Format(PyExc_TypeError,
                 "`structure` must be a subclass of StructureBase, but got %R.",
                 structure);
    return nullptr;
  }
  auto keep = [](auto*& slot, PyObject* value) {
    if (!value) return;
    Py_INCREF(value);
    Py_XDECREF(reinterpret_cast<PyObject*>(slot));
    slot = reinterpret_cast<std::remove_reference_t<decltype(slot)>>(value);
  };
  keep(rt.trace_context, trace_context);
  keep(rt.eval_trace, eval_trace);
  keep(rt.trace_error, trace_error);
  keep(rt.is_array_type, is_array_type);
  keep(rt.flatten_pytree, flatten_pytree);
  keep(rt.freeze_static, freeze_static);
  keep(rt.restored_value, restored_value);
  keep(rt.shape_message, shape_message);
  keep(rt.restored_leaf, restored_leaf);
  keep(rt.array_type, array_type);
  keep(rt.variable_metadata, variable_metadata);
  keep(rt.attribute_marker, attribute_marker);
  keep(rt.state, state);
  keep(rt.structure, structure);
  if (library_prefix) rt.library_prefix = library_prefix;
  if (jax_prefix) rt.jax_prefix = jax_prefix;
  Py_RETURN_NONE;
}

bool CurrentTrace(PyObject** trace) {
  const Runtime& rt = GetRuntime();
  *trace = nullptr;
  if (!rt.trace_context) return true;
  PyObject* current = PyObject_GetAttr(rt.trace_context, rt.s_trace);
  if (!current) return false;
  if (current == rt.eval_trace) {
    Py_DECREF(current);
    return true;
  }
  *trace = current;
  return true;
}

}  // namespace nnx::engine
