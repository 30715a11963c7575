#ifndef NNX_ENGINE_CC_SELECTION_H_
#define NNX_ENGINE_CC_SELECTION_H_

#include <Python.h>

#include <vector>

#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/path.h"
#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {

// Sorts leaves by the first filter that selects them. A filter is True
// (everything), a type, or a callable (path, leaf) -> bool.
class Selector {
 public:
  explicit Selector(PyObject* filters) : filters_(filters) {}
  int size() const { return static_cast<int>(PyTuple_GET_SIZE(filters_)); }
  // For a Variable, by the filters' types alone and without running Python
  // code: the number as below, or -1 where that does not decide.
  int SelectByType(PyObject* variable) const {
    for (int i = 0; i < size(); ++i) {
      PyObject* filter = PyTuple_GET_ITEM(filters_, i);
      if (filter == Py_True) return i;
      if (!PyType_Check(filter)) return -1;
      if (PyObject_TypeCheck(variable,
                             reinterpret_cast<PyTypeObject*>(filter))) {
        return i;
      }
    }
    return size();
  }
  // Number of the filter; `size()` for none, -1 for an error.
  int Select(const std::vector<Ref>& path, PyObject* leaf) const {
    for (int i = 0; i < size(); ++i) {
      PyObject* filter = PyTuple_GET_ITEM(filters_, i);
      if (filter == Py_True) return i;
      if (PyType_Check(filter)) {
        const int is =
            PyObject_TypeCheck(leaf, reinterpret_cast<PyTypeObject*>(filter))
                ? 1
            : IsVariable(leaf) ? 0
                               : PyObject_IsInstance(leaf, filter);
        if (is < 0) return -1;
        if (is) return i;
        continue;
      }
      Ref tuple = PathTuple(path);
      if (!tuple) return -1;
      Ref selected = Ref::Steal(
          PyObject_CallFunctionObjArgs(filter, tuple.get(), leaf, nullptr));
      if (!selected) return -1;
      const int is = PyObject_IsTrue(selected.get());
      if (is < 0) return -1;
      if (is) return i;
    }
    return size();
  }

 private:
  PyObject* filters_;
};

// One nested mapping a filter, each made when its first leaf comes.
using Mappings = std::vector<Ref>;

bool Insert(Mappings* mappings, int number, PyObject* key, PyObject* value);
bool InsertChildren(Mappings* mappings, PyObject* key,
                    const Mappings& children);
// As a list; an empty dict where no leaf came.
Ref ToList(Mappings* mappings);

// Whether `filters` can be those of a Selector; sets an error if not.
bool CheckFilters(PyObject* filters);
// Sets the error for a leaf that no filter selects.
void RaiseUnselected(const std::vector<Ref>& path, PyObject* leaf);

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_SELECTION_H_
