#ifndef NNX_ENGINE_CC_PY_REF_H_
#define NNX_ENGINE_CC_PY_REF_H_

// Python.h must come first in every translation unit.
#include <Python.h>

#include <utility>

namespace nnx::engine {

// An owned reference to a Python object, or null. The hot paths of the engine
// call the C API directly, so the owner is a bare pointer that converts to one.
class Ref {
 public:
  Ref() = default;
  Ref(const Ref& other) : ptr_(other.ptr_) { Py_XINCREF(ptr_); }
  Ref(Ref&& other) noexcept : ptr_(std::exchange(other.ptr_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(ptr_, other.ptr_);
    return *this;
  }
  ~Ref() { Py_XDECREF(ptr_); }

  // Takes over a new reference, as most of the C API returns.
  static Ref Steal(PyObject* ptr) {
    Ref ref;
    ref.ptr_ = ptr;
    return ref;
  }
  // Adds a reference to a borrowed pointer.
  static Ref Borrow(PyObject* ptr) {
    Py_XINCREF(ptr);
    return Steal(ptr);
  }

  PyObject* get() const { return ptr_; }
  PyObject* release() { return std::exchange(ptr_, nullptr); }
  explicit operator bool() const { return ptr_ != nullptr; }

 private:
  PyObject* ptr_ = nullptr;
};

// Puts the error that is set aside, and sets it again at the end.
class KeptError {
 public:
#if PY_VERSION_HEX >= 0x030C0000
  KeptError() : error_(PyErr_GetRaisedException()) {}
  ~KeptError() { PyErr_SetRaisedException(error_); }
#else
  KeptError() {
    PyErr_Fetch(&type_, &error_, &traceback_);
    PyErr_NormalizeException(&type_, &error_, &traceback_);
    if (traceback_) PyException_SetTraceback(error_, traceback_);
  }
  ~KeptError() { PyErr_Restore(type_, error_, traceback_); }
#endif
  KeptError(const KeptError&) = delete;
  KeptError& operator=(const KeptError&) = delete;

  PyObject* get() const { return error_; }

 private:
#if PY_VERSION_HEX < 0x030C0000
  PyObject* type_ = nullptr;
  PyObject* traceback_ = nullptr;
#endif
  PyObject* error_ = nullptr;
};

}  // namespace nnx::engine

#endif  // NNX_ENGINE_CC_PY_REF_H_
