// A tile: some query rows of one kv head (query_rows.h) and their states (tile_states.h), which
// walk over runs of keys (key_run.h): what is seen of a run (sight.h), and the products with its
// keys and values (products.h).
#pragma once

#include "attention/center_terms.h"
#include "attention/key_run.h"
#include "attention/products.h"
#include "attention/query_rows.h"
#include "attention/scores.h"
#include "attention/sight.h"
#include "attention/sizes.h"
#include "attention/tile_states.h"
#include "kernels/kernels.h"
#include "mixedkv/attention.h"

#include <cstdint>
#include <variant>

namespace mixedkv {

class QueryTile {
public:
  /// Rows as of QueryRows. scratch: scratch_floats(params), on a cache line. States start empty.
  QueryTile(const Kernels &kernels, float *scratch, const AttentionParams &params,
            const AttentionProblem &problem, int kv_head, std::int64_t row_begin, int num_rows);
  QueryTile(const QueryTile &) = delete;
  QueryTile &operator=(const QueryTile &) = delete;

  /// Floats of scratch that a tile of these widths takes at most.
  static std::size_t scratch_floats(const AttentionParams &params);

  /// Continues the states over keys [begin, end) of a segment whose first key has index
  /// mask_begin in the mask.
  void attend(const KeySegment &segment, std::int64_t begin, std::int64_t end,
              std::int64_t mask_begin);
  TileStates &states() { return states_; }
  /// As if made anew, but that queries stay loaded and prepared, and terms of centers known.
  void clear();
  /// Empties the states, and from now on looks at every weight of 0 before it meets a value.
  /// Without that, infinities and NaN under the weight 0 of a key that is seen make its rows NaN,
  /// which states().all_finite() tells; finding them beforehand would cost every call.
  void start_over_with_care();

private:
  /// Whether products of this many rows are in bf16.
  static bool in_bf16(const Kernels &kernels, const AttentionParams &params,
                      const AttentionProblem &problem, int num_rows);
  static int most_keys(int num_rows, bool bf16);
  void attend_run(std::int64_t mask_begin);

  const Kernels &kernels_;
  float soft_cap_;
  bool bf16_;
  bool careful_ = false;
  Scratch scratch_;
  QueryRows rows_;
  float *q_; ///< [rows, head_dim], scaled
  TileStates states_;
  KeyRun run_;
  Scores scores_;
  Sight sight_;
  CenterTerms center_terms_;
  std::variant<std::monostate, F32Products, Bf16Products> storage_;
  Products *products_; ///< what storage_ holds
};

} // namespace mixedkv
