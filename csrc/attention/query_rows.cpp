#include "attention/query_rows.h"

#include <algorithm>
#include <limits>

namespace mixedkv {

QueryRows::QueryRows(const QueryView &q, int group, int kv_head, std::int64_t begin, int count)
    : q_(q), group_(group), kv_head_(kv_head), begin_(begin), count_(count),
      pos_min_(std::numeric_limits<std::int64_t>::max()),
      pos_max_(std::numeric_limits<std::int64_t>::min()) {
  for (int r = 0; r < count; ++r) {
    const std::int64_t i = query(r);
    pos_[r] = q.pos != nullptr ? q.pos[i] : q.pos_start + i;
    pos_min_ = std::min(pos_min_, pos_[r]);
    pos_max_ = std::max(pos_max_, pos_[r]);
  }
}

void QueryRows::load(const Kernels &kernels, std::size_t head_dim, float sm_scale,
                     const RowTransform *transform, float *to) const {
  for (int r = 0; r < count_; ++r, to += head_dim) {
    const std::int64_t i = query(r);
    const char *row = static_cast<const char *>(q_.data) + head(r) * q_.head_stride +
                      q_.row_stride * (q_.index != nullptr ? q_.index[i] : i);
    kernels.of(q_.type).to_f32(row, to, head_dim);
    if (transform != nullptr) {
      transform->apply(to, head_dim);
    }
    kernels.scale(to, head_dim, sm_scale);
  }
}

} // namespace mixedkv
