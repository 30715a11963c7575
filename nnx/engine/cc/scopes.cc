#include "nnx/engine/cc/scopes.h"

#include <algorithm>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "nnx/engine/cc/call_frame.h"
#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/py_ref.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/structure.h"

namespace nnx::engine {
namespace {

// What CPython calls instances of classes with a `__call__` by.
ternaryfunc slot_call = nullptr;

// The Module whose call is being traced in this thread, or null.
thread_local PyObject* current_caller = nullptr;
// How many calls of Modules are under way.
thread_local int depth = 0;

PyObject* NamedCall(PyObject* self, PyObject* args, PyObject* kwargs);

bool IsNamed(PyTypeObject* type) { return type->tp_call == NamedCall; }

// `blocks/0/attn` reads `blocks_0/attn`, as names of Linen do.
void Append(PyObject* key, std::string* name) {
  if (PyUnicode_Check(key)) {
    if (!name->empty()) *name += '/';
    const char* text = PyUnicode_AsUTF8(key);
    *name += text ? text : "?";
  } else {
    if (!name->empty()) *name += '_';
    Ref text = Ref::Steal(PyObject_Str(key));
    const char* chars = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
    *name += chars ? chars : "?";
  }
  if (PyErr_Occurred()) PyErr_Clear();
}

// Looks for an object below another, the nearest place first. Runs no Python
// code but that of `Append`, when all has been found: nothing can change.
class Search {
 public:
  explicit Search(PyObject* target) : target_(target) {}

  bool Find(PyObject* start, std::string* name) {
    Visit(start, -1, Ref());
    for (size_t i = 0; i < places_.size() && found_ < 0; ++i) Open(i);
    if (found_ < 0) return false;
    std::vector<int32_t> path;
    for (int32_t i = found_; i > 0; i = places_[i].parent) path.push_back(i);
    for (size_t i = path.size(); i-- > 0;) {
      Append(places_[path[i]].key.get(), name);
    }
    return true;
  }

 private:
  struct Place {
    PyObject* value;  // borrowed
    int32_t parent;
    Ref key;
  };

  void Visit(PyObject* value, int32_t parent, Ref key) {
    const bool container = PyDict_CheckExact(value) ||
                           PyList_CheckExact(value) || PyTuple_Check(value);
    if ((!container && !IsObject(value)) || !seen_.insert(value).second) return;
    places_.push_back({value, parent, std::move(key)});
    if (value == target_ && parent >= 0) {
      found_ = static_cast<int32_t>(places_.size()) - 1;
    }
  }

  void Open(size_t position) {
    PyObject* value = places_[position].value;
    const auto parent = static_cast<int32_t>(position);
    if (PyList_CheckExact(value) || PyTuple_Check(value)) {
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) {
        PyObject* item = PySequence_Fast_GET_ITEM(value, i);
        Visit(item, parent, Ref::Steal(PyLong_FromSsize_t(i)));
      }
      return;
    }
    PyObject* dict = IsObject(value) ? AsObject(value)->dict : value;
    PyObject *key, *item;
    Py_ssize_t at = 0;
    while (dict && PyDict_Next(dict, &at, &key, &item)) {
      Visit(item, parent, Ref::Borrow(key));
    }
  }

  PyObject* target_;
  std::vector<Place> places_;
  std::unordered_set<PyObject*> seen_;
  int32_t found_ = -1;
};

// The path of an object in a structure, from the outermost Module on.
bool FindInStructure(const Structure* structure, int32_t index,
                     std::string* name) {
  const std::vector<Node>& nodes = *structure->nodes;
  int32_t position = 0, target = -1;
  for (size_t i = 0; i < nodes.size() && target < 0; ++i) {
    if (nodes[i].index == index && nodes[i].kind != NodeKind::kRef) {
      target = static_cast<int32_t>(i);
    }
  }
  if (target < 0) return false;
  while (nodes[position].end <= target) position = nodes[position].end;
  bool inside = false;
  for (;;) {
    const Node& node = nodes[position];
    if (!inside && node.kind == NodeKind::kObject &&
        IsNamed(reinterpret_cast<PyTypeObject*>(node.type.get()))) {
      *name = reinterpret_cast<PyTypeObject*>(node.type.get())->tp_name;
      inside = true;
    }
    if (position == target) return inside;
    int32_t child = 0;
    for (++position; nodes[position].end <= target; ++child) {
      position = nodes[position].end;
    }
    Ref key = ChildKey(node, child);
    if (inside && key) Append(key.get(), name);
  }
}

// The name of a Module that is called.
std::string NameOf(PyObject* self) {
  std::string name;
  if (current_caller && Search(self).Find(current_caller, &name)) return name;
  // A copy that a transform has made: where is the original?
  std::string outermost;
  PyObject* object = self;
  for (const CallFrame* frame = CallFrame::Current(); frame;
       frame = frame->previous()) {
    const int32_t index = frame->IndexOf(object);
    if (index >= 0) {
      if (!current_caller) {
        std::string path;
        if (FindInStructure(frame->structure(), index, &path)) outermost = path;
      }
      object = frame->original(index);
      if (current_caller && !frame->compiled() &&
          Search(object).Find(current_caller, &name)) {
        return name;
      }
    }
    if (frame->compiled()) break;
  }
  return outermost.empty() ? std::string(Py_TYPE(self)->tp_name) : outermost;
}

// Whether scopes are wanted. 1, 0, -1.
int IsOn() {
  const Runtime& rt = GetRuntime();
  if (!rt.named_scope) return 0;
  Ref on = Ref::Steal(PyObject_GetAttr(rt.settings, rt.s_named_scopes));
  return on ? PyObject_IsTrue(on.get()) : -1;
}

// Calls a Module in a scope of its name.
PyObject* CallInScope(PyObject* self, PyObject* args, PyObject* kwargs) {
  const Runtime& rt = GetRuntime();
  Ref scope = Ref::Steal(
      PyObject_CallFunction(rt.named_scope, "s", NameOf(self).c_str()));
  if (!scope) return nullptr;
  Ref entered = Ref::Steal(PyObject_CallMethodNoArgs(scope.get(), rt.s_enter));
  if (!entered) return nullptr;
  PyObject* before = std::exchange(current_caller, self);
  Ref result = Ref::Steal(slot_call(self, args, kwargs));
  current_caller = before;
  KeptError error;  // none, mostly
  Ref left = Ref::Steal(PyObject_CallMethodObjArgs(
      scope.get(), rt.s_exit, Py_None, Py_None, Py_None, nullptr));
  if (!left) PyErr_Clear();
  return result.release();
}

// Lets Python say in a note where an error was raised.
void Explain() {
  PyObject* explain = GetRuntime().explain_error;
  if (!explain || !PyErr_ExceptionMatches(PyExc_Exception)) return;
  KeptError error;
  Ref::Steal(PyObject_CallOneArg(explain, error.get()));
  PyErr_Clear();
}

PyObject* NamedCall(PyObject* self, PyObject* args, PyObject* kwargs) {
  PyObject* trace = nullptr;
  if (!CurrentTrace(&trace)) return nullptr;
  Ref keep = Ref::Steal(trace);
  const int on = trace ? IsOn() : 0;
  if (on < 0) return nullptr;
  ++depth;
  PyObject* result =
      on ? CallInScope(self, args, kwargs) : slot_call(self, args, kwargs);
  if (--depth == 0 && !result) Explain();
  return result;
}

// name_calls(cls)
PyObject* NameCalls(PyObject*, PyObject* cls) {
  if (!PyType_Check(cls)) {
    PyErr_SetString(PyExc_TypeError, "`cls` must be a class.");
    return nullptr;
  }
  auto* type = reinterpret_cast<PyTypeObject*>(cls);
  if (type->tp_call == slot_call) type->tp_call = NamedCall;
  Py_RETURN_NONE;
}

PyMethodDef scope_functions[] = {
    {"name_calls", NameCalls, METH_O,
     "Names the calls of a class's instances in traces."},
    {nullptr, nullptr, 0, nullptr},
};

// Finds CPython's own function, by a class that has it.
bool FindSlotCall() {
  Ref globals = Ref::Steal(PyDict_New());
  if (!globals) return false;
  Ref done =
      Ref::Steal(PyRun_String("class C:\n  def __call__(self): pass\n",
                              Py_file_input, globals.get(), globals.get()));
  PyObject* cls = done ? PyDict_GetItemString(globals.get(), "C") : nullptr;
  if (!cls) return false;
  slot_call = reinterpret_cast<PyTypeObject*>(cls)->tp_call;
  return true;
}

}  // namespace

ScopeBarrier::ScopeBarrier()
    : caller_(std::exchange(current_caller, nullptr)) {}

ScopeBarrier::~ScopeBarrier() { current_caller = caller_; }

bool InitScopes(PyObject* module) {
  return FindSlotCall() && PyModule_AddFunctions(module, scope_functions) == 0;
}

}  // namespace nnx::engine
