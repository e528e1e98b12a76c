// What is timed.
#pragma once

#include "kernels/kernels.h"

#include <chrono>
#include <cstddef>

namespace mixedkv::bench {

/// How a subject is to run. The table is the active one, and the threads are the default, too.
struct Context {
  const Kernels *kernels;
  int threads;
};

/// Owns its data, which are random and touched.
class Subject {
public:
  Subject() = default;
  Subject(const Subject &) = delete;
  Subject &operator=(const Subject &) = delete;
  virtual ~Subject() = default;

  /// Before each repetition.
  virtual void prepare(const Context &) {}
  /// Where Work::resets: before each call, not timed.
  virtual void reset() {}
  /// One call, which is timed.
  virtual void run(const Context &context) = 0;
  /// Some number that hangs on what run wrote, finite where that is.
  virtual float result() const = 0;
};

/// Seconds since some moment.
inline double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

/// The sum of n numbers, for result().
inline float sum_of(const float *x, std::size_t n) {
  float sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    sum += x[i];
  }
  return sum;
}

} // namespace mixedkv::bench
