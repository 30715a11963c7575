#include "nnx/engine/cc/path.h"

namespace nnx::engine {
namespace {

void AppendKey(PyObject* key, std::string* text) {
  const bool name = PyUnicode_Check(key);
  Ref part = Ref::Steal(name ? PyObject_Str(key) : PyObject_Repr(key));
  const char* utf8 = part ? PyUnicode_AsUTF8(part.get()) : nullptr;
  if (!utf8) PyErr_Clear();
  if (name && !text->empty()) *text += '.';
  if (!name) *text += '[';
  *text += utf8 ? utf8 : "?";
  if (!name) *text += ']';
}

}  // namespace

std::string PathText(const std::vector<PyObject*>& path) {
  std::string text;
  for (PyObject* key : path) AppendKey(key, &text);
  return text.empty() ? "<root>" : text;
}

std::string PathText(const std::vector<Ref>& path) {
  std::string text;
  for (const Ref& key : path) AppendKey(key.get(), &text);
  return text.empty() ? "<root>" : text;
}

Ref PathTuple(const std::vector<Ref>& path) {
  Ref tuple = Ref::Steal(PyTuple_New(static_cast<Py_ssize_t>(path.size())));
  if (!tuple) return Ref();
  for (size_t i = 0; i < path.size(); ++i) {
    PyTuple_SET_ITEM(tuple.get(), static_cast<Py_ssize_t>(i),
                     Ref(path[i]).release());
  }
  return tuple;
}

}  // namespace nnx::engine
