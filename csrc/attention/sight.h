// What a tile's rows see of a run of keys: positions, windows, masks; and what goes by positions
// too, ALiBi.
#pragma once

#include "attention/query_rows.h"
#include "kernels/kernels.h"
#include "mixedkv/attention.h"

#include <cstdint>

namespace mixedkv {

class Sight {
public:
  enum class Visible : std::uint8_t { none, some, all };
  /// What the rows see of a run of keys, by position.
  struct Seen {
    Visible visible;
    bool consecutive;   ///< positions ascend by one
    std::int64_t first; ///< the smallest
  };
  /// Keys [from, to) of a run.
  struct Span {
    int from;
    int to;
  };

  /// bias: floats for a run's mask entries. All outlive this.
  Sight(const Kernels &kernels, const AttentionParams &params, const MaskView &mask,
        const QueryRows &rows, float *bias)
      : kernels_(kernels), params_(params), mask_(mask), rows_(rows), bias_(bias),
        left_(params.window_left), right_(params.causal ? 0 : params.window_right) {}

  /// Narrows keys [begin, end) of a segment to those that some row may see, where positions ascend
  /// by one: the others are cut off, not hidden.
  void narrow(const KeySegment &segment, std::int64_t *begin, std::int64_t *end) const;

  Seen look(const KeySegment &segment, std::int64_t begin, int n) const;

  /// The keys that row sees of a run of n, where these are an unbroken stretch of it; else all, to
  /// be told apart by adjust.
  Span span(const Seen &seen, int row, int n) const;

  /// Hides logits x of the n keys from key `begin` of the segment on that row does not see, with
  /// -inf, and adds mask entries and ALiBi's to the others; mask_key is the first one's number in
  /// the mask. True where the mask hides some.
  bool adjust(const Seen &seen, const KeySegment &segment, std::int64_t begin,
              std::int64_t mask_key, int n, int row, float *x);

private:
  bool positional() const { return left_ >= 0 || right_ >= 0; }
  void hide_by_position(const KeySegment &segment, std::int64_t begin, int n, int row,
                        float *x) const;
  bool apply_mask(int row, std::int64_t mask_key, int n, float *x);
  void apply_alibi(const KeySegment &segment, std::int64_t begin, int n, int row, float *x) const;

  const Kernels &kernels_;
  const AttentionParams &params_;
  const MaskView &mask_;
  const QueryRows &rows_;
  float *bias_;
  std::int64_t left_;  ///< positions before its own that a query sees; -1: all
  std::int64_t right_; ///< positions after it; -1: all
};

} // namespace mixedkv
