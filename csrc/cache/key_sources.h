// Where the rows of tokens lie: in a tier or, of a slot that is longer than hot, in scratch.
#pragma once

#include "cache/tier.h"

#include <cstdint>

namespace mixedkv {

enum class Source : std::uint8_t { cold, hot, scratch };

/// What attention reads, while a slot is pending or not.
struct KeySources {
  const Tier &cold;          ///< committed tokens; pending ones are read from scratch
  const Tier &hot;           ///< pending tokens too
  const RowStorage *scratch; ///< one layer; row j belongs to cold cell scratch_cells[j]
  const std::int32_t *scratch_cells;
  std::int64_t num_scratch;
};

} // namespace mixedkv
