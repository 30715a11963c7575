#include "nnx/engine/cc/selection.h"

namespace nnx::engine {

bool Insert(Mappings* mappings, int number, PyObject* key, PyObject* value) {
  Ref& mapping = (*mappings)[number];
  if (!mapping) mapping = Ref::Steal(PyDict_New());
  return mapping && PyDict_SetItem(mapping.get(), key, value) == 0;
}

bool InsertChildren(Mappings* mappings, PyObject* key,
                    const Mappings& children) {
  for (size_t i = 0; i < children.size(); ++i) {
    if (children[i] &&
        !Insert(mappings, static_cast<int>(i), key, children[i].get())) {
      return false;
    }
  }
  return true;
}

Ref ToList(Mappings* mappings) {
  Ref list = Ref::Steal(PyList_New(static_cast<Py_ssize_t>(mappings->size())));
  if (!list) return Ref();
  for (size_t i = 0; i < mappings->size(); ++i) {
    Ref& mapping = (*mappings)[i];
    if (!mapping) mapping = Ref::Steal(PyDict_New());
    if (!mapping) return Ref();
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), mapping.release());
  }
  return list;
}

bool CheckFilters(PyObject* filters) {
  if (PyTuple_Check(filters)) return true;
  PyErr_Format(PyExc_TypeError, "`filters` must be a tuple, but got %s.",
               Py_TYPE(filters)->tp_name);
  return false;
}

void RaiseUnselected(const std::vector<Ref>& path, PyObject* leaf) {
  PyErr_Format(PyExc_ValueError,
               "Filters must cover every leaf, but none of them selects `%s` "
               "of type %s: add `...` as the last filter, or use the "
               "non-exhaustive `filter`.",
               PathText(path).c_str(), Py_TYPE(leaf)->tp_name);
}

}  // namespace nnx::engine
