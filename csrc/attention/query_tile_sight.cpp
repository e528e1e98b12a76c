// What a tile's rows see of a run of keys: positions, windows, masks; and ALiBi, which goes by
// positions too.
#include "attention/query_tile.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace mixedkv {
namespace {

std::int64_t key_position(const KeySegment &segment, std::int64_t j) {
  return segment.pos != nullptr ? segment.pos[j] : segment.pos_start + j;
}

} // namespace

QueryTile::Sight QueryTile::look(const KeySegment &segment, std::int64_t begin, int n) const {
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

void QueryTile::hide_by_position(const KeySegment &segment, std::int64_t begin, int n, int row,
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
bool QueryTile::apply_mask(int row, std::int64_t mask_key, int n, float *x) {
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
      kernels_.of(Format::f16).to_f32(entries, bias_, n);
    } else {
      for (int j = 0; j < n; ++j) {
        f16_t entry;
        std::memcpy(&entry, entries + j * mask.key_stride, sizeof entry);
        kernels_.of(Format::f16).to_f32(&entry, bias_ + j, 1);
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

void QueryTile::apply_alibi(const KeySegment &segment, std::int64_t begin, int n, int row,
                            float *x) const {
  const float slope = params_.alibi_slopes[head(row)];
  for (int j = 0; j < n; ++j) {
    x[j] += slope * static_cast<float>(key_position(segment, begin + j) - pos_[row]);
  }
}

} // namespace mixedkv
