#include "attention/query_tile.h"

#include "attention/row_runs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace mixedkv {

std::size_t QueryTile::scratch_floats(const AttentionParams &params) {
  const std::size_t d = params.head_dim;
  const std::size_t dv = params.head_dim_v;
  // Each part is rounded up to a cache line.
  const bool bf16 = params.compute_type == ComputeType::bf16;
  const std::size_t full = bf16 ? kChunkKeys : kChunkKeysFullTile;
  constexpr std::size_t few = (kUnpackRows - 1) * (kChunkKeys + kScoresPad);
  const std::size_t many = kTileRows * (full + kScoresPad);
  const std::size_t floats = kTileRows * (d + dv) + 2 * std::max(few, many) + kChunkKeys +
                             (kUnpackRows - 1) * tile_query_floats(d) + (full + kScoresPad) * d +
                             (kChunkKeys + kScoresPad) * dv;
  return (floats + (bf16 ? bf16_scratch_floats(d, dv) : 0) + 8 * 16) / 16 * 16;
}

QueryTile::QueryTile(const Kernels &kernels, float *scratch, const AttentionParams &params,
                     const AttentionProblem &problem, int kv_head, std::int64_t row_begin,
                     int num_rows)
    : kernels_(kernels), params_(params), problem_(problem), kv_head_(kv_head),
      group_(params.num_qo_heads / params.num_kv_heads), row_begin_(row_begin), num_rows_(num_rows),
      positional_(params.causal || params.window_left >= 0), head_dim_(params.head_dim),
      head_dim_v_(params.head_dim_v) {
  // A decode step, of however many heads, keeps to f32: there is nothing to gain.
  if (num_rows >= kUnpackRows && params.compute_type == ComputeType::bf16 && problem.q.len > 1) {
    bf16_ = kernels.bf16;
  }
  // In bf16 a run of keys takes half the space.
  chunk_keys_ = num_rows < kUnpackRows || bf16_ != nullptr ? kChunkKeys : kChunkKeysFullTile;
  auto take = [&scratch](std::size_t n) {
    float *part = scratch;
    scratch += (n + 15) / 16 * 16;
    return part;
  };
  q_ = take(num_rows * head_dim_);
  acc_ = take(num_rows * head_dim_v_);
  ld_ = static_cast<std::size_t>(chunk_keys_ + kScoresPad);
  scores_ = take(num_rows * ld_);
  gathered_ = take(num_rows * ld_);
  bias_ = take(chunk_keys_);
  values_ = take(ld_ * head_dim_v_);
  prepared_ = keys_ = nullptr;
  if (num_rows < kUnpackRows) {
    prepared_ = take(num_rows * tile_query_floats(head_dim_));
  } else {
    keys_ = take(ld_ * head_dim_);
  }

  const QueryView &q = problem.q;
  pos_min_ = std::numeric_limits<std::int64_t>::max();
  pos_max_ = std::numeric_limits<std::int64_t>::min();
  for (int r = 0; r < num_rows; ++r) {
    const std::int64_t i = query(r);
    const char *row = static_cast<const char *>(q.data) + head(r) * q.head_stride +
                      q.row_stride * (q.index != nullptr ? q.index[i] : i);
    float *scaled = q_ + r * head_dim_;
    kernels_.of(q.type).to_f32(row, scaled, head_dim_);
    if (params.key_transform != nullptr) {
      params.key_transform->apply(scaled, head_dim_);
    }
    kernels_.scale(scaled, head_dim_, params.sm_scale);
    pos_[r] = q.pos != nullptr ? q.pos[i] : q.pos_start + i;
    pos_min_ = std::min(pos_min_, pos_[r]);
    pos_max_ = std::max(pos_max_, pos_[r]);
    states_[r] = {kMinusInfinity, 0.0f};
  }
  if (bf16_ != nullptr) {
    take_bf16(scratch);
  }
}

void QueryTile::load_state(const StateView &state) {
  for (int r = 0; r < num_rows_; ++r) {
    const std::int64_t row = head(r) * problem_.q.len + query(r);
    const float m = state.ms[2 * row];
    if (m != kMinusInfinity) {
      states_[r] = {m, state.ms[2 * row + 1]};
      std::memcpy(acc(r), state.acc + row * head_dim_v_, head_dim_v_ * sizeof(float));
    }
  }
}

void QueryTile::store_state(const StateView &state) const {
  for (int r = 0; r < num_rows_; ++r) {
    if (states_[r].m != kMinusInfinity) {
      const std::int64_t row = head(r) * problem_.q.len + query(r);
      state.ms[2 * row] = states_[r].m;
      state.ms[2 * row + 1] = states_[r].s;
      std::memcpy(state.acc + row * head_dim_v_, acc(r), head_dim_v_ * sizeof(float));
    }
  }
}

void QueryTile::store_partial(float *partial) const {
  float *accs = partial + 2 * num_rows_;
  for (int r = 0; r < num_rows_; ++r) {
    partial[2 * r] = states_[r].m;
    partial[2 * r + 1] = states_[r].s;
    if (states_[r].m != kMinusInfinity) {
      std::memcpy(accs + r * head_dim_v_, acc(r), head_dim_v_ * sizeof(float));
    }
  }
}

void QueryTile::merge_partial(const float *partial) {
  const float *accs = partial + 2 * num_rows_;
  for (int r = 0; r < num_rows_; ++r) {
    merge_row(kernels_, states_[r], acc(r), {partial[2 * r], partial[2 * r + 1]},
              accs + r * head_dim_v_, head_dim_v_);
  }
}

void QueryTile::finalize(const float *sinks, const OutputView &out) const {
  for (int r = 0; r < num_rows_; ++r) {
    finalize_row(states_[r], acc(r), head_dim_v_, sinks, out, head(r), query(r),
                 params_.value_transform);
  }
}

void QueryTile::attend(const KeySegment &segment, std::int64_t begin, std::int64_t end,
                       std::int64_t mask_begin) {
  if (positional_ && segment.pos == nullptr) {
    // Positions ascend by one: keys that no row of the tile sees are cut off, not hidden.
    end = std::min(end, pos_max_ - segment.pos_start + 1);
    if (params_.window_left >= 0) {
      begin = std::max(begin, pos_min_ - params_.window_left - segment.pos_start);
    }
  }
  while (begin < end) {
    const Chunk chunk = make_chunk(segment, begin, end);
    attend_chunk(chunk, mask_begin);
    begin += chunk.n;
  }
}

/// Takes the largest of n logits into row's state; false where none of them is to be weighed.
bool QueryTile::raise_maximum(int row, const float *x, int n) {
  RowState &state = states_[row];
  const float chunk_max = kernels_.row_max(x, n);
  const float m = state.m > chunk_max ? state.m : chunk_max;
  if (!(m > kMinusInfinity && m < std::numeric_limits<float>::infinity())) {
    // Nothing visible so far, or something that is not a number: rare, and told apart here.
    const bool nothing = state.m == kMinusInfinity &&
                         std::all_of(x, x + n, [](float v) { return v == kMinusInfinity; });
    if (!nothing) {
      constexpr float nan = std::numeric_limits<float>::quiet_NaN();
      state = {nan, nan};
      std::fill_n(acc(row), head_dim_v_, nan);
    }
    return false;
  }
  if (state.m == kMinusInfinity) {
    std::fill_n(acc(row), head_dim_v_, 0.0f); // the one place where an accumulator is reset
    state.s = 0.0f;
  } else if (state.m != m) {
    const float weight = std::exp(state.m - m);
    kernels_.scale(acc(row), head_dim_v_, weight);
    state.s *= weight;
  }
  state.m = m;
  return true;
}

/// Turns n logits into weights relative to the row's new maximum, and takes them into the state.
void QueryTile::softmax_row(int row, float *x, int n) {
  if (!raise_maximum(row, x, n)) {
    std::fill_n(x, n, 0.0f);
    return;
  }
  states_[row].s += kernels_.exp_sum(x, n, states_[row].m);
}

void QueryTile::attend_chunk(const Chunk &chunk, std::int64_t mask_begin) {
  const KeySegment &segment = chunk.segment;
  const Sight sight = look(segment, chunk.begin, chunk.n);
  if (sight.visible == Visible::none) {
    return;
  }
  compute_scores(chunk);
  const bool partly = sight.visible == Visible::some;
  bool some_hidden = partly;
  const bool masked = problem_.mask.type != MaskType::none;
  for (int r = 0; r < num_rows_; ++r) {
    float *x = chunk.x + r * ld_;
    // Keys that the row sees by position; where these ascend, they are an unbroken run.
    int from = 0;
    int to = chunk.n;
    if (partly && sight.consecutive) {
      const std::int64_t n = chunk.n;
      to = static_cast<int>(std::clamp<std::int64_t>(pos_[r] + 1 - sight.first, 0, n));
      if (params_.window_left >= 0) {
        from = static_cast<int>(
            std::clamp<std::int64_t>(pos_[r] - params_.window_left - sight.first, 0, to));
      }
    }
    const int n = to - from;
    const std::int64_t key = chunk.begin + from;
    if (n > 0) {
      if (params_.logits_soft_cap > 0.0f) {
        kernels_.soft_cap(x + from, n, params_.logits_soft_cap);
      }
      if (masked) {
        some_hidden |= apply_mask(r, mask_begin + key, n, x + from);
      } else if (params_.alibi_slopes != nullptr) {
        apply_alibi(segment, key, n, r, x + from);
      }
      if (partly && !sight.consecutive) {
        hide_by_position(segment, key, n, r, x + from);
      }
    }
    if (bf16_ != nullptr) {
      softmax_row_bf16(chunk, r, from, to);
      continue;
    }
    if (n > 0) {
      softmax_row(r, x + from, n);
    }
    std::fill(x, x + from, 0.0f);
    std::fill(x + to, x + chunk.n, 0.0f);
  }
  weigh_values(chunk, some_hidden);
}

} // namespace mixedkv
