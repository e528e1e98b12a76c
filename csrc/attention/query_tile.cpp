#include "attention/query_tile.h"

#include <algorithm>

namespace mixedkv {

bool QueryTile::in_bf16(const Kernels &kernels, const AttentionParams &params,
                        const AttentionProblem &problem, int num_rows) {
  // A decode step, of however many heads, keeps to f32: there is nothing to gain.
  return num_rows >= kUnpackRows && params.compute_type == ComputeType::bf16 && problem.q.len > 1 &&
         kernels.bf16 != nullptr;
}

int QueryTile::most_keys(int num_rows, bool bf16) {
  // In bf16 a run of keys takes half the space.
  return num_rows < kUnpackRows || bf16 ? kChunkKeys : kChunkKeysFullTile;
}

std::size_t QueryTile::scratch_floats(const AttentionParams &params) {
  const std::size_t d = params.head_dim;
  const std::size_t dv = params.head_dim_v;
  const auto floats = [&](int num_rows, bool bf16) {
    const int keys = most_keys(num_rows, bf16);
    return Scratch::line(num_rows * d) + TileStates::scratch_floats(num_rows, dv) +
           Scores::scratch_floats(num_rows, keys) + Scratch::line(keys) +
           (bf16 ? Bf16Products::scratch_floats(d, dv)
                 : F32Products::scratch_floats(num_rows, keys, d, dv));
  };
  std::size_t most = std::max(floats(kUnpackRows - 1, false), floats(kTileRows, false));
  if (params.compute_type == ComputeType::bf16) {
    most = std::max(most, floats(kTileRows, true));
  }
  return most;
}

QueryTile::QueryTile(const Kernels &kernels, float *scratch, const AttentionParams &params,
                     const AttentionProblem &problem, int kv_head, std::int64_t row_begin,
                     int num_rows)
    : kernels_(kernels), soft_cap_(params.logits_soft_cap),
      bf16_(in_bf16(kernels, params, problem, num_rows)), scratch_(scratch),
      rows_(problem.q, params.num_qo_heads / params.num_kv_heads, kv_head, row_begin, num_rows),
      q_(scratch_.floats(static_cast<std::size_t>(num_rows) * params.head_dim)),
      states_(kernels, rows_, params.head_dim_v, scratch_),
      run_(kv_head, most_keys(num_rows, bf16_)),
      scores_(scratch_, num_rows, most_keys(num_rows, bf16_)),
      sight_(kernels, params, problem.mask, rows_, scratch_.floats(most_keys(num_rows, bf16_))),
      center_terms_(kernels, kv_head, q_, num_rows, params.head_dim) {
  rows_.load(kernels, params.head_dim, params.sm_scale, params.key_transform, q_);
  const ProductInputs inputs{kernels,
                             num_rows,
                             static_cast<std::size_t>(params.head_dim),
                             static_cast<std::size_t>(params.head_dim_v),
                             q_,
                             states_,
                             scores_};
  if (bf16_) {
    products_ = &storage_.emplace<Bf16Products>(inputs, scratch_);
  } else {
    products_ = &storage_.emplace<F32Products>(inputs, scratch_);
  }
}

void QueryTile::attend(const KeySegment &segment, std::int64_t begin, std::int64_t end,
                       std::int64_t mask_begin) {
  sight_.narrow(segment, &begin, &end);
  while (begin < end) {
    run_.take(segment, begin, end);
    attend_run(mask_begin);
    begin += run_.size();
  }
}

void QueryTile::clear() {
  states_.clear();
  careful_ = false;
}

void QueryTile::start_over_with_care() {
  states_.clear();
  careful_ = true;
}

void QueryTile::attend_run(std::int64_t mask_begin) {
  const KeySegment &segment = run_.segment();
  const Sight::Seen seen = sight_.look(segment, run_.begin(), run_.size());
  if (seen.visible == Sight::Visible::none) {
    return;
  }
  products_->compute_scores(run_);
  if (segment.k_centers != nullptr) {
    center_terms_.add(run_, scores_.by_key(run_), scores_.ld());
  }
  bool some_hidden = careful_ || seen.visible == Sight::Visible::some;
  for (int r = 0; r < rows_.count(); ++r) {
    const Sight::Span span = sight_.span(seen, r, run_.size());
    if (span.from < span.to) {
      const int n = span.to - span.from;
      float *x = scores_.by_key(run_) + r * scores_.ld() + span.from;
      if (soft_cap_ > 0.0f) {
        kernels_.soft_cap(x, n, soft_cap_);
      }
      const std::int64_t key = run_.begin() + span.from;
      some_hidden |= sight_.adjust(seen, segment, key, mask_begin + key, n, r, x);
    }
    products_->weigh_row(run_, r, span.from, span.to);
  }
  products_->add_values(run_, some_hidden);
}

} // namespace mixedkv
