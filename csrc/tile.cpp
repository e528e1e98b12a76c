#include "tile.h"

#include "rows.h"

#include <algorithm>
#include <cstring>

namespace mixedkv {
namespace {

/// From this many rows on, a run of keys or values is unpacked once to f32 for all of them, keys
/// side by side; below, the kernels unpack in registers.
constexpr int kUnpackRows = 9;

std::int64_t key_position(const KeySegment &segment, std::int64_t j) {
  return segment.pos != nullptr ? segment.pos[j] : segment.pos_start + j;
}

void unpack_row(const Kernels &kernels, KvType type, const void *x, float *y, std::size_t n) {
  switch (type) {
  case KvType::f32:
    std::memcpy(y, x, n * sizeof(float));
    break;
  case KvType::f16:
    kernels.f16_to_f32(static_cast<const f16_t *>(x), y, n);
    break;
  case KvType::q4_0:
    kernels.dequantize_row_q4_0_f32(static_cast<const block_q4_0 *>(x), y, n);
    break;
  case KvType::q4_0_packed:
    break; // has no rows
  }
}

} // namespace

std::size_t Tile::scratch_floats(const AttentionParams &params) {
  const std::size_t d = params.head_dim;
  const std::size_t dv = params.head_dim_v;
  // Each part is rounded up to a cache line.
  const bool bf16 = params.compute_type == ComputeType::bf16;
  const std::size_t full = bf16 ? kChunkKeys : kChunkKeysFullTile;
  constexpr std::size_t few = (kUnpackRows - 1) * (kChunkKeys + kScoresPad);
  const std::size_t many = kTileRows * (full + kScoresPad);
  const std::size_t floats = kTileRows * (d + dv) + 2 * std::max(few, many) + kChunkKeys +
                             (kUnpackRows - 1) * packed_query_floats(d) + (full + kScoresPad) * d +
                             (kChunkKeys + kScoresPad) * dv;
  return (floats + (bf16 ? bf16_scratch_floats(d, dv) : 0) + 8 * 16) / 16 * 16;
}

Tile::Tile(const Kernels &kernels, float *scratch, const AttentionParams &params,
           const AttentionProblem &problem, int kv_head, std::int64_t row_begin, int num_rows)
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
    prepared_ = take(num_rows * packed_query_floats(head_dim_));
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
    unpack_row(kernels_, q.type, row, scaled, head_dim_);
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

void Tile::load_state(const StateView &state) {
  for (int r = 0; r < num_rows_; ++r) {
    const std::int64_t row = head(r) * problem_.q.len + query(r);
    const float m = state.ms[2 * row];
    if (m != kMinusInfinity) {
      states_[r] = {m, state.ms[2 * row + 1]};
      std::memcpy(acc(r), state.acc + row * head_dim_v_, head_dim_v_ * sizeof(float));
    }
  }
}

void Tile::store_state(const StateView &state) const {
  for (int r = 0; r < num_rows_; ++r) {
    if (states_[r].m != kMinusInfinity) {
      const std::int64_t row = head(r) * problem_.q.len + query(r);
      state.ms[2 * row] = states_[r].m;
      state.ms[2 * row + 1] = states_[r].s;
      std::memcpy(state.acc + row * head_dim_v_, acc(r), head_dim_v_ * sizeof(float));
    }
  }
}

void Tile::store_partial(float *partial) const {
  float *accs = partial + 2 * num_rows_;
  for (int r = 0; r < num_rows_; ++r) {
    partial[2 * r] = states_[r].m;
    partial[2 * r + 1] = states_[r].s;
    if (states_[r].m != kMinusInfinity) {
      std::memcpy(accs + r * head_dim_v_, acc(r), head_dim_v_ * sizeof(float));
    }
  }
}

void Tile::merge_partial(const float *partial) {
  const float *accs = partial + 2 * num_rows_;
  for (int r = 0; r < num_rows_; ++r) {
    merge_row(kernels_, states_[r], acc(r), {partial[2 * r], partial[2 * r + 1]},
              accs + r * head_dim_v_, head_dim_v_);
  }
}

void Tile::finalize(const float *sinks, const OutputView &out) const {
  for (int r = 0; r < num_rows_; ++r) {
    finalize_row(states_[r], acc(r), head_dim_v_, sinks, out, head(r), query(r));
  }
}

void Tile::attend(const KeySegment &segment, std::int64_t begin, std::int64_t end,
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

Tile::Chunk Tile::make_chunk(const KeySegment &segment, std::int64_t begin, std::int64_t end) {
  Chunk chunk{segment, begin,  static_cast<int>(std::min<std::int64_t>(chunk_keys_, end - begin)),
              0,       0,      false,
              false,   scores_};
  if (!is_packed(segment.k_type) && !is_packed(segment.v_type)) {
    return chunk;
  }
  if (segment.index == nullptr) {
    chunk.lead = static_cast<int>((segment.first_cell + begin) % kPackedTokens);
    chunk.num_tiles = (chunk.lead + chunk.n + kPackedTokens - 1) / kPackedTokens;
    chunk.x = scores_ + chunk.lead;
    return chunk;
  }
  chunk.n = list_tiles(segment.index + begin, chunk.n, &chunk.num_tiles);
  list_tiles_ahead(segment.index + begin + chunk.n, segment.index + end, chunk.num_tiles);
  chunk.listed = true;
  chunk.lead = slots_[0];
  if (slots_[chunk.n - 1] - slots_[0] == chunk.n - 1) {
    chunk.x = scores_ + chunk.lead; // tiles anywhere, but no gap within or between them
  } else {
    chunk.scattered = true;
    chunk.x = gathered_;
  }
  return chunk;
}

/// Lists the tiles of up to n cells, as many as fit in a chunk, and where in them each cell is;
/// returns the number of cells.
int Tile::list_tiles(const std::int32_t *cells, int n, int *num_tiles) {
  const int most = chunk_keys_ / kPackedTokens + 1;
  int count = 0;
  for (int j = 0; j < n; ++count) {
    if (count == most) {
      n = j;
      break;
    }
    const std::int32_t tile = cells[j] / kPackedTokens;
    tiles_[count] = tile;
    const int slot = count * kPackedTokens - tile * kPackedTokens;
    const int rest = kPackedTokens - cells[j] % kPackedTokens;
    if (j + rest <= n &&
        cells[j + rest - 1] - cells[j] == rest - 1) { // all that follow in the tile
      const int first = slot + cells[j];
      for (int i = 0; i < rest; ++i) {
        slots_[j + i] = static_cast<std::uint16_t>(first + i);
      }
      j += rest;
      continue;
    }
    for (; j < n && cells[j] / kPackedTokens == tile; ++j) {
      slots_[j] = static_cast<std::uint16_t>(slot + cells[j]);
    }
  }
  *num_tiles = count;
  return n;
}

/// Lists behind `count` tiles those that the cells after a chunk's lie in.
void Tile::list_tiles_ahead(const std::int32_t *cell, const std::int32_t *end, int count) {
  const int first = count;
  while (cell < end && count < first + kTilesAhead) {
    const std::int32_t tile = *cell / kPackedTokens;
    if (tile != tiles_[count - 1]) {
      tiles_[count++] = tile;
    }
    // Cells ascend, so equal ends mean that all that follow in the tile are there.
    const int rest = kPackedTokens - *cell % kPackedTokens;
    cell += end - cell >= rest && cell[rest - 1] - *cell == rest - 1 ? rest : 1;
  }
  num_tiles_ahead_ = count - first;
}

Rows Tile::tiles_of(const Chunk &chunk, const void *base, std::ptrdiff_t head_stride,
                    std::ptrdiff_t tile_stride) const {
  const char *data = static_cast<const char *>(base) + kv_head_ * head_stride;
  if (chunk.listed) {
    return {data, tile_stride, tiles_, num_tiles_ahead_};
  }
  const std::int64_t first = (chunk.segment.first_cell + chunk.begin) / kPackedTokens;
  return {data + first * tile_stride, tile_stride, nullptr};
}

Tile::Sight Tile::look(const KeySegment &segment, std::int64_t begin, int n) const {
  if (!positional_) {
    return {Visible::all, false, 0};
  }
  std::int64_t first = segment.pos_start + begin;
  std::int64_t last = first + n - 1;
  bool consecutive = true;
  if (segment.pos != nullptr) {
    const std::int32_t *pos = segment.pos + begin;
    std::int32_t low = pos[0];
    std::int32_t high = pos[0];
    for (int j = 1; j < n; ++j) {
      low = std::min(low, pos[j]);
      high = std::max(high, pos[j]);
      consecutive &= pos[j] == pos[0] + j;
    }
    first = low;
    last = high;
  }
  const std::int64_t window = params_.window_left;
  Visible visible = Visible::some;
  if (first > pos_max_ || (window >= 0 && last < pos_min_ - window)) {
    visible = Visible::none;
  } else if (last <= pos_min_ && (window < 0 || first >= pos_max_ - window)) {
    visible = Visible::all;
  }
  return {visible, consecutive, first};
}

void Tile::hide_by_position(const KeySegment &segment, std::int64_t begin, int n, int row,
                            float *x) const {
  const std::int64_t last = pos_[row];
  const std::int64_t first = params_.window_left >= 0 ? last - params_.window_left
                                                      : std::numeric_limits<std::int64_t>::min();
  for (int j = 0; j < n; ++j) {
    const std::int64_t pos = key_position(segment, begin + j);
    x[j] = pos > last || pos < first ? kMinusInfinity : x[j];
  }
}

/// Adds row's mask entries of n keys from mask_key on; true where it hides some.
bool Tile::apply_mask(int row, std::int64_t mask_key, int n, float *x) {
  const MaskView &mask = problem_.mask;
  const char *entries = static_cast<const char *>(mask.data) + head(row) * mask.head_stride +
                        query(row) * mask.query_stride + mask_key * mask.key_stride;
  bool hides = false;
  if (mask.type == MaskType::boolean) {
    for (int j = 0; j < n; ++j) {
      const bool hidden = entries[j * mask.key_stride] == 0;
      hides |= hidden;
      x[j] = hidden ? kMinusInfinity : x[j];
    }
    return hides;
  }
  if (mask.type == MaskType::f16) {
    if (mask.key_stride == static_cast<std::ptrdiff_t>(sizeof(f16_t))) {
      kernels_.f16_to_f32(reinterpret_cast<const f16_t *>(entries), bias_, n);
    } else {
      for (int j = 0; j < n; ++j) {
        f16_t entry;
        std::memcpy(&entry, entries + j * mask.key_stride, sizeof entry);
        kernels_.f16_to_f32(&entry, bias_ + j, 1);
      }
    }
  } else {
    for (int j = 0; j < n; ++j) {
      std::memcpy(bias_ + j, entries + j * mask.key_stride, sizeof(float));
    }
  }
  const float slope = params_.alibi_slopes != nullptr ? params_.alibi_slopes[head(row)] : 1.0f;
  for (int j = 0; j < n; ++j) {
    const bool hidden = bias_[j] == kMinusInfinity;
    hides |= hidden;
    // Chosen, not added: a NaN in a hidden key must not come through.
    x[j] = hidden ? kMinusInfinity : x[j] + slope * bias_[j];
  }
  return hides;
}

void Tile::apply_alibi(const KeySegment &segment, std::int64_t begin, int n, int row,
                       float *x) const {
  const float slope = params_.alibi_slopes[head(row)];
  for (int j = 0; j < n; ++j) {
    x[j] += slope * static_cast<float>(key_position(segment, begin + j) - pos_[row]);
  }
}

/// Takes the largest of n logits into row's state; false where none of them is to be weighed.
bool Tile::raise_maximum(int row, const float *x, int n) {
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
void Tile::softmax_row(int row, float *x, int n) {
  if (!raise_maximum(row, x, n)) {
    std::fill_n(x, n, 0.0f);
    return;
  }
  states_[row].s += kernels_.exp_sum(x, n, states_[row].m);
}

void Tile::compute_scores(const Chunk &chunk) {
  if (bf16_ != nullptr) {
    compute_scores_bf16(chunk);
    return;
  }
  const KeySegment &segment = chunk.segment;
  const int d = static_cast<int>(head_dim_);
  if (!is_packed(segment.k_type)) {
    const Rows k = rows_of_head(segment.k, segment.k_head_stride, segment.k_row_stride,
                                segment.index, kv_head_, chunk.begin, chunk.n);
    const int type = static_cast<int>(segment.k_type);
    if (num_rows_ < kUnpackRows) {
      kernels_.qk[type](q_, head_dim_, num_rows_, &k, chunk.n, d, chunk.x, ld_);
      return;
    }
    int num_tiles = 0;
    for (int j = 0; j < chunk.n; j += kPackedTokens, ++num_tiles) {
      const Rows part = rows_from(k, j);
      kernels_.transpose_keys[type](&part, std::min<int>(kPackedTokens, chunk.n - j), d,
                                    keys_ + j * head_dim_);
    }
    kernels_.qk_transposed(q_, head_dim_, num_rows_, keys_, num_tiles, d, chunk.x, ld_);
    return;
  }
  const Rows tiles = tiles_of(chunk, segment.k, segment.k_head_stride, segment.k_row_stride);
  if (num_rows_ < kUnpackRows) {
    if (!is_prepared_) {
      kernels_.prepare_packed_query(q_, head_dim_, num_rows_, d, prepared_);
      is_prepared_ = true;
    }
    kernels_.qk_packed(prepared_, num_rows_, &tiles, chunk.num_tiles, d, scores_, ld_);
  } else {
    for (int t = 0; t < chunk.num_tiles; ++t) {
      kernels_.unpack_packed_keys(row_at(tiles, t), d, keys_ + t * kPackedTokens * head_dim_);
    }
    kernels_.qk_transposed(q_, head_dim_, num_rows_, keys_, chunk.num_tiles, d, scores_, ld_);
  }
  gather_scores(chunk);
}

/// Scores over packed keys lie as tiles do; those of scattered keys are brought into their order.
void Tile::gather_scores(const Chunk &chunk) {
  if (!chunk.scattered) {
    return;
  }
  for (int r = 0; r < num_rows_; ++r) {
    const float *from = scores_ + r * ld_;
    float *to = gathered_ + r * ld_;
    for (int j = 0; j < chunk.n; ++j) {
      to[j] = from[slots_[j]];
    }
  }
}

/// acc += weights * values, f32 [n, head_dim_v]; a weight of 0 hides its value, where some_hidden
/// says that there may be such.
void Tile::weigh_unpacked(float *values, int n, const float *weights, bool some_hidden) {
  const std::size_t width = head_dim_v_;
  if (some_hidden && !kernels_.all_finite_f32(values, n * width)) {
    // A weight of 0 times infinity or NaN would leak into rows that don't see the value: such
    // values are taken out of the run and given to the rows that do see them.
    for (int j = 0; j < n; ++j) {
      float *value = values + j * width;
      if (kernels_.all_finite_f32(value, width)) {
        continue;
      }
      for (int r = 0; r < num_rows_; ++r) {
        const float weight = weights[r * ld_ + j];
        if (weight != 0.0f) {
          kernels_.axpy(weight, value, acc(r), width);
        }
      }
      std::fill_n(value, width, 0.0f);
    }
  }
  const Rows rows{values, static_cast<std::ptrdiff_t>(width * sizeof(float)), nullptr};
  kernels_.pv[static_cast<int>(KvType::f32)](weights, ld_, num_rows_, &rows, n,
                                             static_cast<int>(width), acc_, width);
}

void Tile::weigh_packed_values(const Chunk &chunk, bool some_hidden) {
  const KeySegment &segment = chunk.segment;
  const int num_tokens = chunk.num_tiles * kPackedTokens;
  for (int r = 0; r < num_rows_; ++r) {
    float *weights = scores_ + r * ld_;
    if (chunk.scattered) {
      const float *from = gathered_ + r * ld_;
      std::fill_n(weights, num_tokens, 0.0f);
      for (int j = 0; j < chunk.n; ++j) {
        weights[slots_[j]] = from[j];
      }
    } else {
      std::fill_n(weights, chunk.lead, 0.0f);
      std::fill(weights + chunk.lead + chunk.n, weights + num_tokens, 0.0f);
    }
  }
  const int dv = static_cast<int>(head_dim_v_);
  const Rows tiles = tiles_of(chunk, segment.v, segment.v_head_stride, segment.v_row_stride);
  if (num_rows_ < kUnpackRows) {
    kernels_.pv_packed(scores_, ld_, num_rows_, &tiles, chunk.num_tiles, dv, acc_, head_dim_v_);
    return;
  }
  for (int t = 0; t < chunk.num_tiles; ++t) {
    kernels_.unpack_packed_values(row_at(tiles, t), dv, values_ + t * kPackedTokens * head_dim_v_);
  }
  weigh_unpacked(values_, num_tokens, scores_, some_hidden || num_tokens > chunk.n);
}

void Tile::weigh_values(const Chunk &chunk, bool some_hidden) {
  if (bf16_ != nullptr) {
    weigh_values_bf16(chunk, some_hidden);
    return;
  }
  const KeySegment &segment = chunk.segment;
  if (is_packed(segment.v_type)) {
    weigh_packed_values(chunk, some_hidden);
    return;
  }
  const Rows v = rows_of_head(segment.v, segment.v_head_stride, segment.v_row_stride, segment.index,
                              kv_head_, chunk.begin, chunk.n);
  if (!some_hidden && (num_rows_ < kUnpackRows || segment.v_type == KvType::f32)) {
    kernels_.pv[static_cast<int>(segment.v_type)](chunk.x, ld_, num_rows_, &v, chunk.n,
                                                  static_cast<int>(head_dim_v_), acc_, head_dim_v_);
    return;
  }
  for (int j = 0; j < chunk.n; ++j) {
    unpack_row(kernels_, segment.v_type, row_at(v, j), values_ + j * head_dim_v_, head_dim_v_);
  }
  weigh_unpacked(values_, chunk.n, chunk.x, some_hidden);
}

void Tile::attend_chunk(const Chunk &chunk, std::int64_t mask_begin) {
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
