// The one seam where a change of rows hangs: what a cache's keys and values are changed by on their
// way in, so that they quantise better, and what is changed with them so that nobody notices.
//
//   store    keys and values go in changed
//   query    queries are changed as keys are, so that their products stay what they were
//   output   a result is changed back as values were
//   move     rows are changed already: they go from tier to tier as they are
//   export   rows as attention reads them stay changed; keys(), values() and what is exported
//            dequantised are changed back
//
// No transform: rows pass through untouched, at the cost of one comparison a call. The cache's own
// is a rotation (CacheConfig::rotate; rows/hadamard.h).
#pragma once

#include "mixedkv/export.h"

#include <cstddef>
#include <memory>

namespace mixedkv {

/// A linear change of rows that keeps the products of two of them (an orthogonal matrix): a
/// rotation, a change of signs, an order. May be used by several threads at once.
class MIXEDKV_API RowTransform {
public:
  virtual ~RowTransform() = default;
  /// In place, on a row of n values.
  virtual void apply(float *row, std::size_t n) const noexcept = 0;
  virtual void undo(float *row, std::size_t n) const noexcept = 0;
};

/// Of a cache's keys (head_dim values a row) and values (head_dim_v); null: none.
struct RowTransforms {
  std::shared_ptr<const RowTransform> keys;
  std::shared_ptr<const RowTransform> values;
};

} // namespace mixedkv
