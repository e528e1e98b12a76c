// New rows on their way into a cache, changed by its transform (row_transform.h).
#pragma once

#include "mixedkv/cache.h"
#include "mixedkv/row_transform.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mixedkv {

/// Keeps its memory from call to call, until it is released.
class ChangedRows {
public:
  /// Rows [num_heads][num_tokens] of `width` values as the transform makes them, in f32; valid
  /// until the next call. Without a transform the rows themselves. Throws std::bad_alloc.
  RowsView apply(const RowTransform *transform, const RowsView &rows, int num_heads,
                 std::int64_t num_tokens, int width);
  /// Gives the memory back.
  void release() noexcept { std::vector<float>().swap(values_); }
  std::size_t bytes() const { return values_.capacity() * sizeof(float); }

private:
  std::vector<float> values_;
};

} // namespace mixedkv
