#include "nnx/engine/cc/node_types.h"

#include <utility>
#include <vector>

#include "nnx/engine/cc/arguments.h"
#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/pytree.h"

namespace nnx::engine {
namespace {

// items(value, as_tree=False) -> [(key, child), ...] in canonical order; None
// for a leaf
PyObject* ItemsFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 && !CheckArity(nargs, 1, "items")) return nullptr;
  PyObject* value = args[0];
  Ref keys;
  std::vector<Ref> children;
  const int opened = OpenNode(value, &keys, &children);
  if (opened < 0) return nullptr;
  if (!opened) Py_RETURN_NONE;
  const bool data_only = nargs == 2 && args[1] == Py_True && IsObject(value);
  const Ref status = data_only ? Ref::Borrow(AsObject(value)->status) : Ref();
  Ref items = Ref::Steal(PyList_New(0));
  if (!items) return nullptr;
  for (size_t i = 0; i < children.size(); ++i) {
    const auto position = static_cast<Py_ssize_t>(i);
    Ref key = keys ? Ref::Borrow(PyTuple_GET_ITEM(keys.get(), position))
                   : Ref::Steal(PyLong_FromSsize_t(position));
    if (!key) return nullptr;
    if (data_only) {
      const int data = IsData(status.get(), key.get(), children[i].get());
      if (data < 0) return nullptr;
      if (!data) continue;
    }
    Ref item = Ref::Steal(PyTuple_Pack(2, key.get(), children[i].get()));
    if (!item || PyList_Append(items.get(), item.get()) < 0) return nullptr;
  }
  return items.release();
}

// set_item(custom node, key, child): as registered
PyObject* SetItemFunction(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (!CheckArity(nargs, 3, "set_item")) return nullptr;
  TypeInfo* info = GetTypeInfo(Py_TYPE(args[0]));
  if (!info) return nullptr;
  if (info->kind != TypeKind::kCustom) {
    PyErr_Format(PyExc_TypeError,
                 "`node` must be of a registered type, but got "
                 "%s.",
                 Py_TYPE(args[0])->tp_name);
    return nullptr;
  }
  Ref set_key = info->custom->set_key;
  return PyObject_CallFunctionObjArgs(set_key.get(), args[0], args[1], args[2],
                                      nullptr);
}

// is_custom_node(value) -> whether its type was registered
PyObject* IsCustomNodeFunction(PyObject*, PyObject* value) {
  TypeInfo* info = GetTypeInfo(Py_TYPE(value));
  return info ? PyBool_FromLong(info->kind == TypeKind::kCustom) : nullptr;
}

// forget_type(type): classifies it anew when it is next met.
PyObject* ForgetTypeFunction(PyObject*, PyObject* type) {
  if (!PyType_Check(type)) {
    PyErr_Format(PyExc_TypeError, "`type` must be a class, but got %R.", type);
    return nullptr;
  }
  ForgetType(reinterpret_cast<PyTypeObject*>(type));
  Py_RETURN_NONE;
}

PyObject* HoldsDataFunction(PyObject*, PyObject* value) {
  const int holds = HoldsData(value);
  return holds < 0 ? nullptr : PyBool_FromLong(holds);
}

// register_node_type(type, flatten, set_key, pop_key, create_empty, clear,
//                    init)
PyObject* RegisterNodeTypeFunction(PyObject*, PyObject* const* args,
                                   Py_ssize_t nargs) {
  if (!CheckArity(nargs, 7, "register_node_type")) return nullptr;
  if (!PyType_Check(args[0])) {
    PyErr_Format(PyExc_TypeError, "`type` must be a class, but got %R.",
                 args[0]);
    return nullptr;
  }
  CustomNode node;
  node.flatten = Ref::Borrow(args[1]);
  node.set_key = Ref::Borrow(args[2]);
  node.pop_key = Ref::Borrow(args[3]);
  node.create_empty = Ref::Borrow(args[4]);
  node.clear = Ref::Borrow(args[5]);
  node.init = Ref::Borrow(args[6]);
  if (!RegisterCustomNode(reinterpret_cast<PyTypeObject*>(args[0]),
                          std::move(node))) {
    return nullptr;
  }
  Py_RETURN_NONE;
}

// The methods' casts are no constants.
PyMethodDef* Functions() {
  static PyMethodDef functions[] = {
      {"holds_data", HoldsDataFunction, METH_O,
       "Whether a value holds a Variable, Module or array anywhere."},
      {"forget_type", ForgetTypeFunction, METH_O,
       "forget_type(type): its instances are classified anew."},
      {"register_node_type", Fast(RegisterNodeTypeFunction), METH_FASTCALL,
       "register_node_type(type, flatten, set_key, pop_key, create_empty, "
       "clear, init)."},
      {"items", Fast(ItemsFunction), METH_FASTCALL,
       "items(value[, as_tree]): [(key, child), ...] in canonical order, None "
       "for a leaf; with `as_tree` of an object only the data."},
      {"set_item", Fast(SetItemFunction), METH_FASTCALL,
       "set_item(node, key, child): of a node whose type was registered."},
      {"is_custom_node", IsCustomNodeFunction, METH_O,
       "is_custom_node(value): whether its type was registered."},
      {nullptr, nullptr, 0, nullptr},
  };
  return functions;
}

}  // namespace

bool InitNodeTypes(PyObject* module) {
  return PyModule_AddFunctions(module, Functions()) == 0;
}

}  // namespace nnx::engine
