// A pool of worker threads, and the one way in which work is handed to it. How many threads there
// are by default is public: mixedkv/runtime.h.
#pragma once

#include "mixedkv/runtime.h"

#include <cstdint>
#include <type_traits>

namespace mixedkv {

/// Calls fn(context, unit, worker) once for every unit in [0, num_units), on up to num_threads
/// threads, the caller's among them. A thread begins with a run of units of its own, the same from
/// call to call, so that what they read may still lie in its caches; then it helps with the
/// others'. worker, in [0, num_threads), is one thread's own for the duration of the call; the
/// caller's is 0. Returns when all are done. fn must not throw. What is computed must not depend on
/// which thread runs a unit. Where the pool is busy with another caller's work, the caller does its
/// own work alone.
void parallel_for(std::int64_t num_units, int num_threads,
                  void (*fn)(void *context, std::int64_t unit, int worker), void *context);

/// The same for a callable f(unit) or f(unit, worker).
template <typename F> void parallel_for(std::int64_t num_units, int num_threads, F &&f) {
  using Fn = typename std::remove_reference<F>::type;
  parallel_for(
      num_units, num_threads,
      [](void *context, std::int64_t unit, int worker) {
        Fn &callable = *static_cast<Fn *>(context);
        if constexpr (std::is_invocable<Fn &, std::int64_t, int>::value) {
          callable(unit, worker);
        } else {
          callable(unit);
          (void)worker;
        }
      },
      const_cast<void *>(static_cast<const void *>(&f)));
}

} // namespace mixedkv
