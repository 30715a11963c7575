#include "nnx/engine/cc/runtime.h"

#include <cstddef>
#include <vector>

#include "nnx/engine/cc/owned_items.h"
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
      {&rt.s_named_scopes, "named_scopes"},
      {&rt.s_enter, "__enter__"},
      {&rt.s_exit, "__exit__"},
      {&rt.s_init_slow, "_init_slow"},
      {&rt.s_get_raw_slow, "_get_raw_slow"},
      {&rt.s_set_raw_slow, "_set_raw_slow"},
      {&rt.s_write_raw_slow, "_write_raw_slow"},
      {&rt.s_copy_box, "_copy_box"},
      {&rt.s_assign_slow, "_assign_slow"},
      {&rt.s_refresh_metadata, "_refresh_metadata"},
      {&rt.s_get_value_slow, "_get_value_slow"},
      {&rt.s_set_value_slow, "_set_value_slow"},
      {&rt.s_getitem_slow, "_getitem_slow"},
      {&rt.s_setitem_slow, "_setitem_slow"},
      {&rt.s_delitem_slow, "_delitem_slow"},
      {&rt.s_update_hook_flags, "_update_hook_flags"},
      {&rt.s_getattr_slow, "_getattr_slow"},
      {&rt.s_new, "__new__"},
      {&rt.s_setattr_slow, "_setattr_slow"},
      {&rt.s_delattr_slow, "_delattr_slow"},
      {&rt.s_class_hook_flags, "_class_hook_flags"},
      {&rt.s_setattr_flags, "_setattr_flags"},
      {&rt.s_class_statuses, "_class_statuses"},
      {&rt.s_fields, "_fields"},
      {&rt.s_is_deleted, "is_deleted"},
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

namespace {

// What `configure` takes under a name: an object, a class or a text. The other
// two are null.
struct Setting {
  const char* name;
  PyObject** object;
  PyTypeObject** type;
  std::string* text;
};

bool Keep(const Setting& setting, PyObject* value) {
  if (setting.text) {
    const char* text = PyUnicode_AsUTF8(value);
    if (text) *setting.text = text;
    return text;
  }
  if (setting.type && !PyType_Check(value)) {
    PyErr_Format(PyExc_TypeError, "`%s` must be a class, but got %R.",
                 setting.name, value);
    return false;
  }
  Py_INCREF(value);
  Ref old;
  if (setting.type) {
    old = Ref::Steal(reinterpret_cast<PyObject*>(*setting.type));
    *setting.type = reinterpret_cast<PyTypeObject*>(value);
  } else {
    old = Ref::Steal(*setting.object);
    *setting.object = value;
  }
  return true;
}

}  // namespace

PyObject* Configure(PyObject*, PyObject* args, PyObject* kwargs) {
  Runtime& rt = GetRuntime();
  const Setting settings[] = {
      {"trace_context", &rt.trace_context, nullptr, nullptr},
      {"eval_trace", &rt.eval_trace, nullptr, nullptr},
      {"trace_error", &rt.trace_error, nullptr, nullptr},
      {"is_array_type", &rt.is_array_type, nullptr, nullptr},
      {"flatten_pytree", &rt.flatten_pytree, nullptr, nullptr},
      {"named_scope", &rt.named_scope, nullptr, nullptr},
      {"settings", &rt.settings, nullptr, nullptr},
      {"explain_error", &rt.explain_error, nullptr, nullptr},
      {"copy_array", &rt.copy_array, nullptr, nullptr},
      {"check_loan", &rt.check_loan, nullptr, nullptr},
      {"may_lend", &rt.may_lend, nullptr, nullptr},
      {"get_threshold", &rt.get_threshold, nullptr, nullptr},
      {"set_threshold", &rt.set_threshold, nullptr, nullptr},
      {"freeze_static", &rt.freeze_static, nullptr, nullptr},
      {"restored_value", &rt.restored_value, nullptr, nullptr},
      {"shape_message", &rt.shape_message, nullptr, nullptr},
      {"restored_leaf", &rt.restored_leaf, nullptr, nullptr},
      {"new_ref", &rt.new_ref, nullptr, nullptr},
      {"unboxed", &rt.unboxed, nullptr, nullptr},
      {"array_type", nullptr, &rt.array_type, nullptr},
      {"jitted_type", nullptr, &rt.jitted_type, nullptr},
      {"ref_type", nullptr, &rt.ref_type, nullptr},
      {"tracer_type", nullptr, &rt.tracer_type, nullptr},
      {"variable_metadata", nullptr, &rt.variable_metadata, nullptr},
      {"attribute_marker", nullptr, &rt.attribute_marker, nullptr},
      {"state", nullptr, &rt.state, nullptr},
      {"structure", nullptr, &rt.structure, nullptr},
      {"library_prefix", nullptr, nullptr, &rt.library_prefix},
      {"jax_prefix", nullptr, nullptr, &rt.jax_prefix},
  };
  if (PyTuple_GET_SIZE(args) > 0) {
    PyErr_SetString(PyExc_TypeError, "`configure` takes keywords alone.");
    return nullptr;
  }
  std::vector<Ref> items;
  if (kwargs) AppendPairs(kwargs, &items);
  for (size_t i = 0; i < items.size(); i += 2) {
    PyObject *name = items[i].get(), *value = items[i + 1].get();
    const Setting* found = nullptr;
    for (const Setting& setting : settings) {
      if (PyUnicode_CompareWithASCIIString(name, setting.name) == 0) {
        found = &setting;
      }
    }
    if (!found) {
      PyErr_Format(PyExc_TypeError, "`configure` has no setting %R.", name);
      return nullptr;
    }
    if (found->type == &rt.structure && PyType_Check(value) &&
        !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(value),
                          rt.structure_base)) {
      PyErr_Format(
          PyExc_TypeError,
          "`structure` must be a subclass of StructureBase, but got %R.",
          value);
      return nullptr;
    }
    if (!Keep(*found, value)) return nullptr;
  }
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
