// Scores of a tile's rows with a run of keys: first logits, then weights.
#pragma once

#include "attention/key_run.h"
#include "attention/sizes.h"

#include <cstddef>

namespace mixedkv {

/// Over packed keys or values scores lie as the tokens of their tiles do, rows ld() apart. Logits
/// are looked at in the order of keys: in place where these have no gaps in their tiles, else
/// beside it.
class Scores {
public:
  Scores(Scratch &scratch, int num_rows, int most_keys)
      : num_rows_(num_rows), ld_(static_cast<std::size_t>(most_keys) + kScoresPad),
        by_token_(scratch.floats(num_rows * ld_)), by_key_(scratch.floats(num_rows * ld_)) {}
  static constexpr std::size_t scratch_floats(int num_rows, int most_keys) {
    return 2 * Scratch::line(static_cast<std::size_t>(num_rows) * (most_keys + kScoresPad));
  }

  std::size_t ld() const { return ld_; }
  /// [num_rows, tokens of the run's tiles]
  float *by_token() { return by_token_; }
  /// [num_rows, keys of the run]
  float *by_key(const KeyRun &run) { return run.scattered() ? by_key_ : by_token_ + run.lead(); }

  /// Brings scores of a run's tokens into the order of its keys.
  void gather(const KeyRun &run);
  /// Brings scores of a run's keys to where their tokens are; those of other tokens become 0.
  void scatter(const KeyRun &run);

private:
  int num_rows_;
  std::size_t ld_;
  float *by_token_;
  float *by_key_;
};

} // namespace mixedkv
