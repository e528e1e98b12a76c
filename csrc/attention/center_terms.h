// The term that centered keys leave out of their logits (KeySegment::k_centers).
#pragma once

#include "attention/key_run.h"
#include "attention/sizes.h"
#include "kernels/kernels.h"

#include <cstddef>
#include <cstdint>

namespace mixedkv {

/// Products of a tile's query rows with the centers of some pages, kept from run to run.
class CenterTerms {
public:
  /// q [num_rows, head_dim], scaled; outlives this and may still change until add.
  CenterTerms(const Kernels &kernels, int kv_head, const float *q, int num_rows, int head_dim)
      : kernels_(kernels), kv_head_(kv_head), q_(q), num_rows_(num_rows), head_dim_(head_dim) {}

  /// x[r * ld + j] += q_r . c for each key j of a run that is stored less c.
  void add(const KeyRun &run, float *x, std::size_t ld) noexcept;

private:
  /// Pages at a time: more than a run without gaps touches, since one product with several centers
  /// takes hardly longer than with one.
  enum : int { kPages = 8 };

  void compute(const KeySegment &segment, const std::int32_t *pages, int n) noexcept;

  const Kernels &kernels_;
  int kv_head_;
  const float *q_;
  int num_rows_;
  int head_dim_;
  const KeySegment *segment_ = nullptr; ///< whose pages follow; null: none
  std::int64_t first_ = 0;              ///< terms_ are of pages [first_, end_)
  std::int64_t end_ = 0;
  float terms_[kTileRows * kPages]; ///< [row][page]
};

} // namespace mixedkv
