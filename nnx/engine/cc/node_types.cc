#include "nnx/engine/cc/node_types.h"

#include <utility>
#include <vector>

#include "nnx/engine/cc/arguments.h"
#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/py_ref.h"

namespace nnx::engine {
namespace {

// items(value) -> [(key, child), ...] in canonical order; None for a leaf
PyObject* ItemsFunction(PyObject*, PyObject* value) {
  Ref keys;
  std::vector<Ref> children;
  const int opened = OpenNode(value, &keys, &children);
  if (opened < 0) return nullptr;
  if (!opened) Py_RETURN_NONE;
  Ref items = Ref::Steal(PyList_New(static_cast<Py_ssize_t>(children.size())));
  if (!items) return nullptr;
  for (size_t i = 0; i < children.size(); ++i) {
    const auto position = static_cast<Py_ssize_t>(i);
    Ref key = keys ? Ref::Borrow(PyTuple_GET_ITEM(keys.get(), position))
                   : Ref::Steal(PyLong_FromSsize_t(position));
    PyObject* item =
        key ? PyTuple_Pack(2, key.get(), children[i].get()) : nullptr;
    if (!item) return nullptr;
    PyList_SET_ITEM(items.get(), position, item);
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
      {"items", ItemsFunction, METH_O,
       "items(value): [(key, child), ...] in canonical order, None for a "
       "leaf."},
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
