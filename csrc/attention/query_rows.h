// Which query rows a tile has: up to kTileRows of one kv head, that is (query, head of the group)
// pairs in that order, so that every load and unpacking of a key or value serves all of them.
#pragma once

#include "attention/sizes.h"
#include "kernels/kernels.h"
#include "mixedkv/attention.h"

#include <cstdint>

namespace mixedkv {

class QueryRows {
public:
  /// Rows [begin, begin + count) of kv head kv_head, row = query * group + head of the group.
  /// q outlives this.
  QueryRows(const QueryView &q, int group, int kv_head, std::int64_t begin, int count);

  int count() const { return count_; }
  int kv_head() const { return kv_head_; }
  std::int64_t query(int row) const { return (begin_ + row) / group_; }
  int head(int row) const { return kv_head_ * group_ + static_cast<int>((begin_ + row) % group_); }
  /// Number of a row among those of all heads, as states lie.
  std::int64_t number(int row) const { return head(row) * q_.len + query(row); }
  std::int64_t pos(int row) const { return pos_[row]; }
  std::int64_t pos_min() const { return pos_min_; }
  std::int64_t pos_max() const { return pos_max_; }

  /// The rows as f32 [count, head_dim], scaled; changed as keys were, where transform is not null.
  void load(const Kernels &kernels, std::size_t head_dim, float sm_scale,
            const RowTransform *transform, float *to) const;

private:
  const QueryView &q_;
  int group_;
  int kv_head_;
  std::int64_t begin_;
  int count_;
  std::int64_t pos_min_;
  std::int64_t pos_max_;
  std::int64_t pos_[kTileRows];
};

} // namespace mixedkv
