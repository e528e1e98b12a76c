#include "attention/center_terms.h"

#include <algorithm>

namespace mixedkv {

void CenterTerms::compute(const KeySegment &segment, const std::int32_t *pages, int n) noexcept {
  const f16_t *centers = segment.k_centers + kv_head_ * segment.k_center_head_stride;
  const std::size_t width = static_cast<std::size_t>(head_dim_);
  const Rows rows{centers, static_cast<std::ptrdiff_t>(width * sizeof(f16_t)), pages};
  kernels_.of(Format::f16).qk(q_, width, num_rows_, &rows, n, head_dim_, terms_, kPages);
}

void CenterTerms::add(const KeyRun &run, float *x, std::size_t ld) noexcept {
  const KeySegment &segment = run.segment();
  std::int32_t pages[kPages];
  if (segment.index == nullptr) {
    const std::int64_t begin = segment.first_cell + run.begin();
    const std::int64_t last = (segment.first_cell + segment.len - 1) / kCenterCells;
    for (std::int64_t cell = begin; cell < begin + run.size();) {
      const std::int64_t page = cell / kCenterCells;
      if (segment_ != &segment || page < first_ || page >= end_) {
        segment_ = &segment;
        first_ = page;
        end_ = std::min<std::int64_t>(page + kPages, last + 1);
        for (int i = 0; i < end_ - first_; ++i) {
          pages[i] = static_cast<std::int32_t>(page + i);
        }
        compute(segment, pages, static_cast<int>(end_ - first_));
      }
      const std::int64_t end = std::min((page + 1) * kCenterCells, begin + run.size());
      kernels_.add_constants(terms_ + (page - first_), kPages, num_rows_, x + (cell - begin), ld,
                             static_cast<int>(end - cell));
      cell = end;
    }
    return;
  }
  segment_ = nullptr;
  const std::int32_t *index = segment.index + run.begin();
  for (int j = 0; j < run.size();) {
    int from = j;
    int ends[kPages]; // of the keys of each page
    int n = 0;
    for (; n < kPages && j < run.size(); ++n) {
      pages[n] = index[j] / kCenterCells;
      const std::int64_t next = (std::int64_t{pages[n]} + 1) * kCenterCells;
      j = ends[n] = static_cast<int>(std::lower_bound(index + j, index + run.size(), next) - index);
    }
    compute(segment, pages, n);
    for (int i = 0; i < n; from = ends[i++]) {
      kernels_.add_constants(terms_ + i, kPages, num_rows_, x + from, ld, ends[i] - from);
    }
  }
}

} // namespace mixedkv
