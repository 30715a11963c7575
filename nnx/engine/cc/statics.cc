#include "nnx/engine/cc/statics.h"

#include "nnx/engine/cc/runtime.h"

namespace nnx::engine {
namespace {

// Compared by identity alone: the type inherits both hash and equality from
// `object`, or is a class.
bool IsIdentityCompared(PyObject* value) {
  PyTypeObject* type = Py_TYPE(value);
  return PyType_Check(value) || type == &PyFunction_Type ||
         (type->tp_hash == PyBaseObject_Type.tp_hash &&
          type->tp_richcompare == PyBaseObject_Type.tp_richcompare);
}

// What `nnx.graphlib.statics.freeze` returns: the key, or None for data.
Ref Freeze(PyObject* value) {
  const Runtime& rt = GetRuntime();
  if (rt.freeze_static) {
    return Ref::Steal(PyObject_CallOneArg(rt.freeze_static, value));
  }
  PyErr_Format(PyExc_TypeError, "unhashable type: '%s'",
               Py_TYPE(value)->tp_name);
  return Ref();
}

// The hash; -1 without an error for a value that has none, with one on failure.
Py_hash_t OwnHash(PyObject* value) {
  const Py_hash_t hash = PyObject_Hash(value);
  if (hash == -1 && PyErr_ExceptionMatches(PyExc_TypeError)) PyErr_Clear();
  return hash;
}

}  // namespace

bool IsAtomic(PyObject* value) {
  return IsNativeScalar(value) || IsIdentityCompared(value);
}

Py_hash_t HashStatic(PyObject* value, const std::string& path, Ref* key) {
  const Py_hash_t hash = OwnHash(value);
  if (hash != -1 || PyErr_Occurred()) return hash;
  *key = Freeze(value);
  const std::string name = path.empty() ? "one" : "`" + path + "`";
  if (!*key) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError,
                 "Static attributes must have a hash or hold only what can be "
                 "compared, but %s is %R of type %s. Make it hashable (a "
                 "tuple, a frozen dataclass).",
                 name.c_str(), value, Py_TYPE(value)->tp_name);
    return -1;
  }
  if (key->get() == Py_None) {
    PyErr_Format(PyExc_ValueError,
                 "A static attribute must hold no data, but %s is %R of type "
                 "%s. Mark the attribute as data: `nnx.data(...)`.",
                 name.c_str(), value, Py_TYPE(value)->tp_name);
    return -1;
  }
  return PyObject_Hash(key->get());
}

bool FreezeMapping(PyObject* mapping, Ref* keys) {
  PyObject *name, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(mapping, &position, &name, &value)) {
    if (IsAtomic(value)) continue;
    if (OwnHash(value) != -1) continue;
    if (PyErr_Occurred()) return false;
    Ref key = Freeze(value);
    if (!key) {
      // Compared by its own equality, as a value with a hash is.
      if (!PyErr_ExceptionMatches(PyExc_TypeError)) return false;
      PyErr_Clear();
    }
    if (!key || key.get() == Py_None) continue;
    if (!*keys) *keys = Ref::Steal(PyDict_New());
    if (!*keys || PyDict_SetItem(keys->get(), name, key.get()) < 0) {
      return false;
    }
  }
  return true;
}

int StaticEqual(PyObject* a, PyObject* key_a, PyObject* b, PyObject* key_b) {
  // What has no hash may have changed in place.
  if (a == b && !key_a && !key_b) return 1;
  if (Py_TYPE(a) != Py_TYPE(b)) return 0;
  if (IsNativeScalar(a)) return NativeEqual(a, b);
  if (IsIdentityCompared(a)) return a == b;
  const Ref frozen_a = key_a ? Ref::Borrow(key_a) : Freeze(a);
  const Ref frozen_b =
      !frozen_a ? Ref() : (key_b ? Ref::Borrow(key_b) : Freeze(b));
  if (!frozen_a || !frozen_b) {
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
    PyErr_Clear();
  } else if (frozen_a.get() != Py_None && frozen_b.get() != Py_None) {
    return PyObject_RichCompareBool(frozen_a.get(), frozen_b.get(), Py_EQ);
  }
  return PyObject_RichCompareBool(a, b, Py_EQ);
}

}  // namespace nnx::engine
