// What threads of Python's may do: compute without the GIL, but one at a time on one object.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

namespace mixedkv::bindings {

/// Lets go of the GIL for its life. Unlike pybind11's, its destructor may be unwound through: an
/// interpreter that ends while a daemon thread computes ends that thread where it takes the GIL.
class GilRelease {
public:
  GilRelease() : state_(PyEval_SaveThread()) {}
  ~GilRelease() noexcept(false) { PyEval_RestoreThread(state_); }
  GilRelease(const GilRelease &) = delete;
  GilRelease &operator=(const GilRelease &) = delete;

private:
  PyThreadState *state_;
};

/// Lets one thread in at a time and refuses the others, instead of letting them wait: two threads
/// on one object is a mistake of the caller's.
class Guard {
public:
  /// what: the object, as the message names it.
  explicit Guard(std::string what) : what_(std::move(what)) {}

  /// Throws std::runtime_error where another thread is in.
  void enter() {
    if (flag_.test_and_set(std::memory_order_acquire)) {
      refuse();
    }
  }
  void leave() noexcept { flag_.clear(std::memory_order_release); }
  [[noreturn]] void refuse() const {
    throw std::runtime_error(what_ + " is in use by another thread");
  }

private:
  std::string what_;
  std::atomic_flag flag_ = ATOMIC_FLAG_INIT;
};

/// Is in for its life.
class Guarded {
public:
  explicit Guarded(Guard &guard) : guard_(guard) { guard_.enter(); }
  ~Guarded() { guard_.leave(); }
  Guarded(const Guarded &) = delete;
  Guarded &operator=(const Guarded &) = delete;

private:
  Guard &guard_;
};

} // namespace mixedkv::bindings
