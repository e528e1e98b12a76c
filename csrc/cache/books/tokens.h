// The tokens of a sequence in order of position (ties: older first), for whoever reads them out.
#pragma once

#include "cache/key_sources.h"

#include <cstdint>
#include <vector>

namespace mixedkv {

struct Token {
  std::int32_t pos;
  std::uint64_t stamp;
  Source source;
  std::int32_t cell; ///< of its tier; a row of scratch where that is the source
};

/// Those of both tiers that are committed. Throws std::bad_alloc, as the other.
std::vector<Token> committed_tokens(const Tier &hot, const Tier &cold, int seq);

/// Those that attend finds in rows of the cold type, or in rows of the hot type (in hot and in
/// scratch), pending ones too.
std::vector<Token> attended_tokens(const KeySources &sources, int seq, bool in_cold);

} // namespace mixedkv
