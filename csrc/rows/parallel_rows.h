// Worker threads for conversions of rows, in places that must not throw.
#pragma once

#include "runtime/parallel.h"

#include <cstdint>

namespace mixedkv {

/// Calls fn(unit) for every unit in [0, num_units), on worker threads where num_values, the values
/// to convert in all, are worth waking them, and in the caller's alone where no worker can be had.
/// A unit may be done twice then: each writes the same as before.
template <typename F>
void parallel_rows(std::int64_t num_units, std::int64_t num_values, F &&fn) noexcept {
  constexpr std::int64_t kSerialValues = 1 << 15;
  if (num_values >= kSerialValues) {
    try {
      parallel_for(num_units, get_num_threads(), fn);
      return;
    } catch (...) {
      // No memory for a worker.
    }
  }
  for (std::int64_t unit = 0; unit < num_units; ++unit) {
    fn(unit);
  }
}

} // namespace mixedkv
