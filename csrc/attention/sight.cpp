#include "attention/sight.h"

#include "attention/state.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace mixedkv {
namespace {

std::int64_t key_position(const KeySegment &segment, std::int64_t j) {
  return segment.pos != nullptr ? segment.pos[j] : segment.pos_start + j;
}

} // namespace

void Sight::narrow(const KeySegment &segment, std::int64_t *begin, std::int64_t *end) const {
  if (!positional() || segment.pos != nullptr) {
    return;
  }
  if (right_ >= 0) {
    *end = std::min(*end, rows_.pos_max() + right_ - segment.pos_start + 1);
  }
  if (left_ >= 0) {
    *begin = std::max(*begin, rows_.pos_min() - left_ - segment.pos_start);
  }
}

Sight::Seen Sight::look(const KeySegment &segment, std::int64_t begin, int n) const {
  if (!positional()) {
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
  Visible visible = Visible::some;
  if ((right_ >= 0 && first > rows_.pos_max() + right_) ||
      (left_ >= 0 && last < rows_.pos_min() - left_)) {
    visible = Visible::none;
  } else if ((right_ < 0 || last <= rows_.pos_min() + right_) &&
             (left_ < 0 || first >= rows_.pos_max() - left_)) {
    visible = Visible::all;
  }
  return {visible, consecutive, first};
}

Sight::Span Sight::span(const Seen &seen, int row, int n) const {
  Span span{0, n};
  if (seen.visible == Visible::some && seen.consecutive) {
    const std::int64_t pos = rows_.pos(row);
    if (right_ >= 0) {
      span.to = static_cast<int>(std::clamp<std::int64_t>(pos + right_ + 1 - seen.first, 0, n));
    }
    if (left_ >= 0) {
      span.from = static_cast<int>(std::clamp<std::int64_t>(pos - left_ - seen.first, 0, span.to));
    }
  }
  return span;
}

bool Sight::adjust(const Seen &seen, const KeySegment &segment, std::int64_t begin,
                   std::int64_t mask_key, int n, int row, float *x) {
  bool hides = false;
  const bool additive = mask_.type == MaskType::f32 || mask_.type == MaskType::f16;
  if (params_.alibi_slopes != nullptr && !additive) {
    apply_alibi(segment, begin, n, row, x);
  }
  if (mask_.type != MaskType::none) {
    hides = apply_mask(row, mask_key, n, x);
  }
  if (seen.visible == Visible::some && !seen.consecutive) {
    hide_by_position(segment, begin, n, row, x);
  }
  return hides;
}

void Sight::hide_by_position(const KeySegment &segment, std::int64_t begin, int n, int row,
                             float *x) const {
  using Limits = std::numeric_limits<std::int64_t>;
  const std::int64_t last = right_ >= 0 ? rows_.pos(row) + right_ : Limits::max();
  const std::int64_t first = left_ >= 0 ? rows_.pos(row) - left_ : Limits::min();
  for (int j = 0; j < n; ++j) {
    const std::int64_t pos = key_position(segment, begin + j);
    x[j] = pos > last || pos < first ? kMinusInfinity : x[j];
  }
}

/// Adds row's mask entries of n keys from mask_key on; true where it hides some.
bool Sight::apply_mask(int row, std::int64_t mask_key, int n, float *x) {
  const char *entries = static_cast<const char *>(mask_.data) +
                        rows_.head(row) * mask_.head_stride +
                        rows_.query(row) * mask_.query_stride + mask_key * mask_.key_stride;
  bool hides = false;
  if (mask_.type == MaskType::boolean) {
    for (int j = 0; j < n; ++j) {
      const bool hidden = entries[j * mask_.key_stride] == 0;
      hides |= hidden;
      x[j] = hidden ? kMinusInfinity : x[j];
    }
    return hides;
  }
  if (mask_.type == MaskType::f16) {
    if (mask_.key_stride == static_cast<std::ptrdiff_t>(sizeof(f16_t))) {
      kernels_.of(Format::f16).to_f32(entries, bias_, n);
    } else {
      for (int j = 0; j < n; ++j) {
        f16_t entry;
        std::memcpy(&entry, entries + j * mask_.key_stride, sizeof entry);
        kernels_.of(Format::f16).to_f32(&entry, bias_ + j, 1);
      }
    }
  } else {
    for (int j = 0; j < n; ++j) {
      std::memcpy(bias_ + j, entries + j * mask_.key_stride, sizeof(float));
    }
  }
  const float slope =
      params_.alibi_slopes != nullptr ? params_.alibi_slopes[rows_.head(row)] : 1.0f;
  for (int j = 0; j < n; ++j) {
    const bool hidden = bias_[j] == kMinusInfinity;
    hides |= hidden;
    // Chosen, not added: a NaN in a hidden key must not come through.
    x[j] = hidden ? kMinusInfinity : x[j] + slope * bias_[j];
  }
  return hides;
}

void Sight::apply_alibi(const KeySegment &segment, std::int64_t begin, int n, int row,
                        float *x) const {
  const float slope = params_.alibi_slopes[rows_.head(row)];
  const std::int64_t query_position = rows_.pos(row);
  for (int j = 0; j < n; ++j) {
    x[j] += slope * static_cast<float>(key_position(segment, begin + j) - query_position);
  }
}

} // namespace mixedkv
