#include "nnx/engine/cc/fingerprint.h"

#include "nnx/engine/cc/children.h"
#include "nnx/engine/cc/layout.h"
#include "nnx/engine/cc/objects.h"
#include "nnx/engine/cc/runtime.h"
#include "nnx/engine/cc/statics.h"

namespace nnx::engine {
namespace {

// Deeper ones are left to the walk that reports them.
constexpr int kMaxDepth = 200;

size_t MixInto(size_t hash, size_t value) {
  return (hash ^ value) * 0x9E3779B97F4A7C15ull + (hash >> 29);
}

size_t HashOfPointer(const void* pointer) {
  return reinterpret_cast<size_t>(pointer);
}

size_t HashOfScalar(PyObject* value) {
  return MixInto(HashOfPointer(Py_TYPE(value)),
                 static_cast<size_t>(NativeHash(value)));
}

}  // namespace

Fingerprint::Fingerprint() : epoch_(NextEpoch()) {}

void Fingerprint::Mix(size_t value) { hash_ = MixInto(hash_, value); }

bool Fingerprint::Add(PyObject* value, bool is_static) {
  return is_static ? VisitStatic(value) : Visit(value, Mode::kPytree);
}

bool Fingerprint::Finish(size_t* hash) {
  for (const Ref& item : deferred_) {
    const Py_hash_t part = PyObject_Hash(item.get());
    if (part != -1) {
      Mix(static_cast<size_t>(part));
    } else if (PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Clear();
    } else {
      PyErr_Clear();
      return false;
    }
  }
  *hash = hash_;
  return true;
}

bool Fingerprint::VisitStatic(PyObject* value) {
  if (IsNativeScalar(value)) {
    Mix(HashOfScalar(value));
  } else if (IsAtomic(value)) {
    Mix(HashOfPointer(value));
  } else {
    Mix(HashOfPointer(Py_TYPE(value)));
    deferred_.push_back(Ref::Borrow(value));
  }
  return true;
}

// Names and the values that say something by themselves, in any order.
void Fingerprint::MixNamed(PyObject* mapping) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t sum = 0;
  while (PyDict_Next(mapping, &position, &key, &value)) {
    if (!IsPlainKey(key)) continue;
    sum += MixInto(HashOfScalar(key), IsNativeScalar(value)
                                          ? HashOfScalar(value)
                                          : HashOfPointer(Py_TYPE(value)));
  }
  Mix(sum);
}

bool Fingerprint::VisitVariable(PyObject* value) {
  VariableObject* variable = AsVariable(value);
  Mix(variable->hook_flags);
  MixNamed(variable->metadata);
  PyObject* raw = variable->raw;
  if (Py_TYPE(raw) == GetRuntime().array_type) return true;
  const TypeInfo* info = FindTypeInfo(Py_TYPE(raw));
  if (!info || info->kind == TypeKind::kUnknown) return false;
  if (info->kind == TypeKind::kArray) return true;
  if (info->kind == TypeKind::kPlain && raw != Py_None) return true;
  return Visit(raw, Mode::kPytree);
}

bool Fingerprint::VisitObject(PyObject* value) {
  ObjectObject* object = AsObject(value);
  PyObject* status = object->status;
  if (status) {
    if (!HasPlainKeys(status)) return false;
    MixNamed(status);
  }
  TypeInfo* info = FindTypeInfo(Py_TYPE(value));
  if (!object->dict || !info) return false;
  const size_t base = arena_.size();
  Layout* layout = MatchLayout(info, object->dict, &arena_);
  if (!layout) return false;
  PyObject* keys = layout->keys.get();
  // Of strings and ints.
  Mix(static_cast<size_t>(PyObject_Hash(keys)));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(keys); ++i) {
    PyObject* child = arena_[base + i];
    PyObject* mark =
        status ? PyDict_GetItemWithError(status, PyTuple_GET_ITEM(keys, i))
               : nullptr;
    if (mark == Py_False) {
      if (!VisitStatic(child)) return false;
      continue;
    }
    if (mark == Py_True && child != Py_None) {
      const TypeInfo* child_info = FindTypeInfo(Py_TYPE(child));
      if (child_info && child_info->kind == TypeKind::kPlain) {
        Mix(1);  // a leaf
        continue;
      }
    }
    if (!Visit(child, Mode::kAttributes)) return false;
  }
  arena_.resize(base);
  return true;
}

bool Fingerprint::VisitSequence(PyObject* value, Mode mode) {
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
  Mix(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!Visit(PySequence_Fast_GET_ITEM(value, i), mode)) return false;
  }
  return true;
}

bool Fingerprint::VisitMapping(PyObject* mapping, Mode mode) {
  PyObject *key, *value;
  Py_ssize_t position = 0;
  size_t sum = 0;
  const size_t outer = hash_;
  while (PyDict_Next(mapping, &position, &key, &value)) {
    if (!IsPlainKey(key)) return false;
    hash_ = HashOfScalar(key);
    if (!Visit(value, mode)) return false;
    sum += hash_;
  }
  hash_ = MixInto(outer, sum);
  return true;
}

bool Fingerprint::Visit(PyObject* value, Mode mode) {
  PyTypeObject* type = Py_TYPE(value);
  if (type == GetRuntime().array_type) {
    Mix(1);
    return true;
  }
  const TypeInfo* info = FindTypeInfo(type);
  if (!info || depth_ > kMaxDepth) return false;
  if (info->kind == TypeKind::kVariable || info->kind == TypeKind::kObject) {
    GraphObject* object = AsGraphObject(value);
    if (object->epoch == epoch_) {
      Mix(static_cast<size_t>(object->index));
      return true;
    }
    object->epoch = epoch_;
    object->index = num_objects_++;
  } else if (mode == Mode::kAttributes &&
             (info->kind == TypeKind::kList || info->kind == TypeKind::kDict)) {
    if (!containers_.insert(value).second) {
      Mix(2);
      return true;
    }
  }
  bool ok = false;
  ++depth_;
  switch (info->kind) {
    case TypeKind::kVariable:
      Mix(HashOfPointer(type));
      ok = VisitVariable(value);
      break;
    case TypeKind::kObject:
      Mix(HashOfPointer(type));
      ok = VisitObject(value);
      break;
    case TypeKind::kArray:
      Mix(1);
      ok = true;
      break;
    case TypeKind::kList:
    case TypeKind::kTuple:
    case TypeKind::kNamedTuple:
      Mix(HashOfPointer(type));
      ok = VisitSequence(value, mode);
      break;
    case TypeKind::kDict:
      Mix(HashOfPointer(type));
      ok = VisitMapping(value, mode);
      break;
    case TypeKind::kState: {
      Mix(HashOfPointer(type));
      const Ref mapping = StoredMapping(value);
      ok = mapping && VisitMapping(mapping.get(),
                                   mode == Mode::kPytree ? mode : Mode::kState);
      break;
    }
    case TypeKind::kStatic:
      ok = VisitStatic(value);
      break;
    case TypeKind::kPlain:
      if (mode != Mode::kPytree || value == Py_None) {
        ok = VisitStatic(value);
      } else {
        Mix(1);
        ok = true;
      }
      break;
    case TypeKind::kUnknown:
      ok = mode != Mode::kPytree && !info->opened && VisitStatic(value);
      break;
    case TypeKind::kCustom:
    case TypeKind::kForeign:
      break;
  }
  --depth_;
  return ok;
}

}  // namespace nnx::engine
